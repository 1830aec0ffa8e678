"""What a projection did, layer by layer."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from conditioning.blocks.block import table
from conditioning.errors import InvalidArgumentError
from conditioning.procrustes import routes
from conditioning.procrustes.layers import Layer
from conditioning.singular import SingularValues, singular_values
from conditioning.spectrum.results import Result

if TYPE_CHECKING:
    import pandas as pd

Ends = tuple[float, float]

# From here on a layer is said not to be flat.
_SPREAD = 1.05


@dataclass(frozen=True)
class LayerReport(Result):
    """One layer.

    Attributes
    ----------
    name, layer : str
        Its name, and what it is.
    route : {"window", "taps", "frequencies"}
        How it is projected; the first two are exact in one step, the last comes nearer.
    operator : {"kernel", "circular"}
        Of which operator the singular values are. Those of the kernel are those of the layer as
        it runs where windows do not overlap; padding may cut windows at the border.
    circle : tuple of int or None
        Of which circle, as its number of output positions on each axis; ``None`` for kernels. About
        a thousand positions, fewer where there are many channels, or those of the input shape if
        that was given. Of a layer that is not flat the range may be wider on other circles: the
        least singular value of square ones may be next to zero in between.
    aim : {"backward", "forward", "given"}
    target : float
        The singular value aimed at.
    before, after : tuple of float or None
        Least and largest non-zero singular value before and after the last projection; ``None``
        if there was none.
    now : tuple of float
        The same for the weight as it is.
    moved : float or None
        Relative distance that the last projection moved the weight.
    drift : float or None
        Relative distance of the weight now from where the last projection put it.
    steps_since : int
        Optimizer steps since then, or since the beginning.
    true : SingularValues or None
        Of the operator as it runs, if its input shape was given.
    """

    name: str
    layer: str
    route: str
    operator: str
    circle: tuple[int, ...] | None
    aim: str
    target: float
    before: Ends | None
    after: Ends | None
    now: Ends
    moved: float | None
    drift: float | None
    steps_since: int
    true: SingularValues | None = None

    @property
    def spread(self) -> float:
        """Largest over least non-zero singular value now; 1 where all are equal."""
        return self.now[1] / self.now[0] if self.now[0] > 0 else float("inf")

    def __str__(self) -> str:
        text = f"{self.name}: {self.layer}; sigma {_ends(self.now)}, target {self.target:.4g}"
        if self.true is not None:
            text += f"; as it runs {_as_it_runs(self.true)}"
        return text


class ProcrustesReport(Sequence[LayerReport]):
    """All layers, printable as a table.

    Attributes
    ----------
    num_projections : int
    seconds : float
        Mean time of one projection of all layers, on the clock of the host.
    """

    def __init__(self, rows: Sequence[LayerReport], num_projections: int, seconds: float) -> None:
        self._rows = tuple(rows)
        self.num_projections, self.seconds = num_projections, seconds

    @overload
    def __getitem__(self, key: int | str) -> LayerReport: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[LayerReport, ...]: ...
    def __getitem__(self, key: int | str | slice) -> LayerReport | tuple[LayerReport, ...]:
        """A layer by position or name, or several by a slice."""
        if isinstance(key, str):
            found = [row for row in self._rows if row.name == key]
            if not found:
                raise KeyError(key)
            return found[0]
        return self._rows[key]

    def __len__(self) -> int:
        return len(self._rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, ready for JSON."""
        return {
            "num_projections": self.num_projections,
            "seconds": self.seconds,
            "layers": [row.to_dict() for row in self._rows],
        }

    def to_frame(self) -> pd.DataFrame:
        """One row for each layer; ends of ranges in columns of their own."""
        import pandas as pd

        rows = []
        for row in self._rows:
            plain: dict[str, Any] = {
                "layer": row.name, "what": row.layer, "route": row.route,
                "operator": row.operator, "circle": row.circle, "aim": row.aim,
                "target": row.target,
            }  # fmt: skip
            for name in ("before", "after", "now"):
                low, high = getattr(row, name) or (float("nan"), float("nan"))
                plain |= {f"{name}_min": low, f"{name}_max": high}
            plain |= {"spread": row.spread, "moved": row.moved, "drift": row.drift}
            plain["steps_since"] = row.steps_since
            rows.append(plain)
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        head = (
            "layer", "what", "route", "operator", "target", "before", "after", "now", "moved",
            "drift", "steps since", "as it runs",
        )  # fmt: skip
        rows = [
            (
                row.name, row.layer, row.route, _where(row), f"{row.target:.4g}",
                _ends(row.before), _ends(row.after), _ends(row.now), _share(row.moved),
                _share(row.drift), row.steps_since, _as_it_runs(row.true),
            )
            for row in self._rows
        ]  # fmt: skip
        cost = f", {1e3 * self.seconds:.3g} ms each" if self.num_projections else ""
        lines = [*_hints(self._rows), _counted(self.num_projections, "projection") + cost]
        return "\n".join([table(head, rows), *lines])

    def __repr__(self) -> str:
        layers = _counted(len(self), "layer")
        return f"ProcrustesReport({layers}, {_counted(self.num_projections, 'projection')})"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _where(row: LayerReport) -> str:
    if row.circle is None:
        return row.operator
    return f"{row.operator}, {'x'.join(map(str, row.circle))}"


def _hints(rows: Sequence[LayerReport]) -> list[str]:
    """What to do about layers that are not flat."""
    advice = {
        True: "project(sweeps=50) at the beginning brings overlapping kernels nearer, square ones "
        "not always to the end; a kernel as long as its stride (IsometricDownsample) is exact.",
        False: "project() makes them flat in one step.",
    }
    lines = []
    for swept, text in advice.items():
        spread = [r for r in rows if (r.route == "frequencies") is swept and r.spread > _SPREAD]
        if spread:
            names = ", ".join(f"{r.name} ({r.route}, spread {r.spread:.3g})" for r in spread)
            lines.append(f"Not flat: {names}. {text}")
    return lines


def checked_shapes(shapes: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by name.

    Raises
    ------
    InvalidArgumentError
        If it is no mapping to sequences of positive integers.
    """
    if shapes is None:
        return {}
    if not isinstance(shapes, Mapping):
        msg = (
            f"input_shapes must map names of layers to shapes, as {{'stem': (3, 32, 32)}}, got "
            f"{shapes!r}."
        )
        raise InvalidArgumentError(msg)
    found = {}
    for name, shape in shapes.items():
        try:
            sizes = tuple(operator.index(size) for size in shape)
        except TypeError:
            sizes = ()
        if not sizes or min(sizes) < 1:
            msg = (
                f"The input shape of {name!r} must be that of one input without the batch axis, "
                f"as (3, 32, 32), got {shape!r}."
            )
            raise InvalidArgumentError(msg)
        found[name] = sizes
    return found


def reported(
    layer: Layer, before: Tensor | None, after: Tensor | None, steps_since: int, input_shape: Any
) -> LayerReport:
    """Measure a layer.

    Parameters
    ----------
    layer : Layer
    before, after : Tensor of shape (groups, rows, columns, *kernel) or None
        Its filters around the last projection.
    steps_since : int
    input_shape : tuple of int or None
    """
    shape = layer.shape
    weight = layer.weight.detach()
    # There is no double precision on that device.
    weight = weight.cpu() if weight.device.type == "mps" else weight
    now = layer.geometry.filters(weight).to(torch.float64)
    true = None if input_shape is None else singular_values(layer.module, input_shape)
    circle = routes.circle(shape, layer.geometry.groups, _outputs(layer, input_shape))
    ends_after = _measured(after, layer, circle)
    # Right after a projection they are the same, and singular values take a while.
    kept = after is not None and torch.equal(after.to(now), now)
    ends_now = ends_after if kept and ends_after is not None else _range(now, layer, circle)
    return LayerReport(
        name=layer.name,
        layer=layer.geometry.describe(),
        route=shape.route,
        operator="kernel" if shape.route == "window" else "circular",
        circle=circle,
        aim=layer.aim,
        target=layer.target,
        before=_measured(before, layer, circle),
        after=ends_after,
        now=ends_now,
        moved=_distance(after, before),
        drift=_distance(now, after),
        steps_since=steps_since,
        true=true,
    )


def _outputs(layer: Layer, input_shape: Sequence[int] | None) -> tuple[int, ...] | None:
    """Output positions of a circle of the size of the input, as nearly as the stride allows."""
    if input_shape is None:
        return None
    g = layer.geometry
    strides = [1] * g.num_axes if g.transposed else g.stride
    return tuple(max(n // s, 1) for n, s in zip(input_shape[1:], strides, strict=True))


def _range(filters: Tensor, layer: Layer, circle: tuple[int, ...] | None) -> Ends:
    values = routes.singular_values(filters, layer.shape, circle)
    return float(values.min()), float(values.max())


def _measured(filters: Tensor | None, layer: Layer, circle: tuple[int, ...] | None) -> Ends | None:
    return None if filters is None else _range(filters, layer, circle)


def _distance(one: Tensor | None, other: Tensor | None) -> float | None:
    if one is None or other is None:
        return None
    gap = torch.linalg.vector_norm(one.double() - other.to(one.device).double())
    return float(gap / torch.linalg.vector_norm(other.double()))


def _ends(ends: Ends | None) -> str:
    if ends is None:
        return ""
    low, high = ends
    if high - low < 1e-4 * high:
        return f"{low:.4g}"
    digits = next((n for n in range(3, 7) if f"{low:.{n}g}" != f"{high:.{n}g}"), 7)
    return f"{low:.{digits}g} ... {high:.{digits}g}"


def _as_it_runs(found: SingularValues | None) -> str:
    """The range of the singular values that are not zero, and whether others are."""
    if found is None:
        return ""
    least = found.smallest_nonzero
    if least is None:
        return f"{found.smallest} ... {found.largest}"
    text = _ends((least.value, found.largest.value))
    if found.rank is not None and found.rank < min(found.shape):
        text += f", rank {found.rank} of {min(found.shape)}"
    return text if found.status in ("exact", "exhausted") else f"{least} ... {found.largest}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"

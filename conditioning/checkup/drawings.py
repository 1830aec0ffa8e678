"""The figures of a checkup's page: which there are, what they show, and in words what is seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conditioning import plots
from conditioning.checkup.readings import BlockReading, LayerReading, SpectrumReading
from conditioning.checkup.results import Checkup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A prediction whose name starts so is a band for the ratios of single blocks.
BAND = "ratio of every"


@dataclass(frozen=True)
class Drawing:
    """One figure: the SVG, and the sentence under it."""

    name: str
    svg: str
    caption: str


def drawings(report: Checkup, marks: Mapping[str, str]) -> dict[str, Drawing]:
    """The figures for which the checkup has numbers, by name.

    Parameters
    ----------
    report : Checkup
    marks : mapping of str to str
        Severity by the row of a table, such as ``blocks-3``: what is a problem gets a ring.
    """
    found: list[Drawing] = []
    if report.blocks:
        found += [_norms(report), _ratios(report, marks)]
    if any(layer.largest is not None and layer.smallest is not None for layer in report.layers):
        found.append(_ranges(report.layers))
    if len(report.layers) > 1:
        found.append(_gains(report.layers))
    spectra = [s for s in (report.hessian, report.gauss_newton) if s is not None]
    if spectra:
        found.append(_condition(spectra))
        if any(s.density.nodes for s in spectra):
            found.append(_density(spectra))
    return {drawing.name: drawing for drawing in found}


def _drawn(
    name: str,
    title: str,
    description: str,
    caption: str,
    *parts: Callable[[Axes], Any],
    height: float = 3.7,
    columns: int = 2,
    names: Sequence[str] = (),
) -> Drawing:
    """Axes under each other with one legend, in the width that fits a phone and half a screen."""
    height += plots.room_for(names)
    with plots.page_style():
        figure, rows = plots.new_grid(len(parts), 1, width=5.8, height=height / len(parts))
        for (ax,), part in zip(rows, parts, strict=True):
            part(ax)
        for (ax,) in rows[:-1]:
            ax.tick_params(labelbottom=False)
            ax.set_xlabel("")
        rows[0][0].set_title(title, pad=12)
        plots.legend_below(rows[0][0], columns)
        return Drawing(name, plots.to_svg(figure, name, title, description), caption)


def _norms(report: Checkup) -> Drawing:
    blocks = report.blocks
    names = [block.name for block in blocks]
    label = "mean over the batches" if report.setting.num_batches > 1 else "norm, of one batch"

    def gradient(ax: Axes) -> None:
        plots.plot_norms(
            [b.grad_in for b in blocks], [b.grad_out for b in blocks], ax, names=names, label=label
        )
        ax.set_ylabel("gradient norm")

    def activations(ax: Axes) -> None:
        plots.plot_norms(
            [b.act_in for b in blocks], [b.act_out for b in blocks], ax, names=names,
            color=plots.SECOND, label=label,
        )  # fmt: skip
        ax.set_ylabel("activation norm")

    first, last = blocks[0], blocks[-1]
    return _drawn(
        "norms", "Norms from block to block",
        f"Two curves over {len(blocks)} blocks. The gradient norm is {first.grad_in.value:.3g} at "
        f"the input of the first block and {last.grad_out.value:.3g} at the output of the last. "
        f"The activation norm is {first.act_in.value:.3g} and {last.act_out.value:.3g} there.",
        "Each block takes one unit of the axis, from its input on the left to its output. A step "
        "between two blocks is what runs between them. Flat is ideal.",
        gradient, activations, height=4.1, names=names,
    )  # fmt: skip


def _ratios(report: Checkup, marks: Mapping[str, str]) -> Drawing:
    blocks = report.blocks
    reach = [_reach(block) for block in blocks]
    band = next(
        (
            (p.low, p.high)
            for p in report.predictions
            if p.name.startswith(BAND) and math.isfinite(p.low) and math.isfinite(p.high)
        ),
        None,
    )

    def part(ax: Axes) -> None:
        plots.plot_block_ratios(
            [b.ratio for b in blocks], ax, names=[b.name for b in blocks], reach=reach, band=band,
            transitions=[i for i, b in enumerate(blocks) if b.kind == "transition"],
            ringed=[i for i in range(len(blocks)) if marks.get(f"blocks-{i}") == "problem"],
        )  # fmt: skip

    known = sum(pair is not None for pair in reach)
    return _drawn(
        "ratios", "Ratio of gradient norms, block by block",
        f"A point for each of {len(blocks)} blocks, {_span(b.ratio.value for b in blocks)}; "
        f"bars for the Jacobians of {known} of them.",
        "A ratio of 1 keeps the norm."
        + (
            " A bar encloses what the block's Jacobian on samples of the first batch allows: no "
            "gradient of these samples can leave it. A bar that meets the edge goes on beyond it."
            if known else ""
        )
        + (
            " The band is what theory says of identity blocks."
            if band is not None and band[0] < band[1] else ""
        ),
        part, names=[b.name for b in blocks],
    )  # fmt: skip


def _reach(block: BlockReading) -> tuple[float, float] | None:
    """What the Jacobian allows a ratio to be, by the outer ends of its enclosures."""
    if block.jacobian is None or any(map(math.isnan, block.jacobian.ratio_bounds)):
        return None
    return block.jacobian.ratio_bounds


def _ranges(layers: Sequence[LayerReading]) -> Drawing:
    known = [
        (layer, layer.smallest, layer.largest)
        for layer in layers
        if layer.smallest is not None and layer.largest is not None
    ]
    names = [layer.name for layer, _, _ in known]

    def part(ax: Axes) -> None:
        plots.plot_ranges(
            [smallest for _, smallest, _ in known], [largest for _, _, largest in known], ax,
            targets=[layer.target for layer, _, _ in known], names=names,
        )  # fmt: skip

    return _drawn(
        "ranges", "Singular values of the transitions",
        f"A bar for each of {len(known)} layers from its smallest to its largest singular value; "
        f"the largest are {_span(largest.value for _, _, largest in known)}.",
        "Random gradients keep their norm where all singular values are at the target.",
        part, columns=1, names=names,
    )  # fmt: skip


def _gains(layers: Sequence[LayerReading]) -> Drawing:
    def part(ax: Axes) -> None:
        plots.plot_gains(
            [layer.weight_gain for layer in layers], ax,
            normalised=[layer.normalised for layer in layers],
            names=[layer.name for layer in layers],
        )  # fmt: skip

    return _drawn(
        "gains", "Scale of the weights, layer by layer",
        f"A point for each of {len(layers)} layers, {_span(x.weight_gain for x in layers)}; "
        "lines at 1 and at the square root of 2.",
        "1 keeps the variance through a linear layer, √2 through one in front of a ReLU. Behind "
        "a hollow point a normalisation follows, which undoes the scale.",
        part, names=[layer.name for layer in layers],
    )  # fmt: skip


def _density(spectra: Sequence[SpectrumReading]) -> Drawing:
    curves = {s.matrix: (s.density.nodes, s.density.weights) for s in spectra if s.density.nodes}

    def part(ax: Axes) -> None:
        plots.plot_spectra(
            curves, ax, ends={s.matrix: (s.smallest, s.largest) for s in spectra if s.density.nodes}
        )

    ends = "; ".join(
        f"{s.matrix} from {s.smallest.value:.3g} to {s.largest.value:.3g}" for s in spectra
    )
    return _drawn(
        "density", "Density of the eigenvalues",
        f"Densities of eigenvalues on logarithmic axes. {ends}.",
        "Logarithmic in both directions, evenly spaced around zero. Left of zero the loss curves "
        "downwards. A hump apart from the bulk is an outlier; it sets the largest stable step.",
        part,
    )  # fmt: skip


def _condition(spectra: Sequence[SpectrumReading]) -> Drawing:
    numbers = {
        f"{spectrum.matrix}, {name}": number
        for spectrum in spectra
        for name, number in (("κ", spectrum.condition), ("κ₁₀", spectrum.condition10))
    }

    def part(ax: Axes) -> None:
        plots.plot_condition_numbers(numbers, ax)

    said = "; ".join(f"{name}: {_words(n.value, n.high)}" for name, n in numbers.items())
    return _drawn(
        "condition", "Condition numbers with their enclosures", f"{said}.",
        "A bar is an enclosure. An arrow starts at a certain lower bound where no upper bound is "
        "known.",
        part, height=0.9 + 0.45 * len(numbers),
    )  # fmt: skip


def _words(value: float, high: float) -> str:
    return "not defined" if math.isnan(value) else f"{'at least ' * math.isinf(high)}{value:.4g}"


def _span(values: Iterable[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"from {min(finite):.3g} to {max(finite):.3g}" if finite else "none of them finite"

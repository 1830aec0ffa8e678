"""Find out whether the parameters sit on a kink of the loss.

At such a point autograd still returns a second derivative, that of a convention
(``relu'(0) = 0``), and not the limit of the Hessians around it. Residual branches with
zero weights are the usual case.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# The places of the kinks of a function, from its arguments.
_Places = Callable[[tuple[Any, ...], dict[str, Any]], list[Any]]


def _zero(_args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[Any]:
    return [0.0]


def _fixed(*places: float) -> _Places:
    return lambda _args, _kwargs: list(places)


def _arguments(*named: tuple[str, int, Any]) -> _Places:
    """Kinks at the values of arguments, each given by name, position and default."""

    def places(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        values = [
            args[position] if len(args) > position else kwargs.get(name, default)
            for name, position, default in named
        ]
        return [value for value in values if value is not None]

    return places


def _leaky(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
    return [] if slope == 1 else [0.0]


def _elu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    alpha = args[1] if len(args) > 1 else kwargs.get("alpha", 1.0)
    return [] if alpha == 1 else [0.0]


_BOUNDS = _arguments(("min", 1, None), ("max", 2, None))
_HARDTANH = _arguments(("min_val", 1, -1.0), ("max_val", 2, 1.0))
_LOWER = _arguments(("min", 1, None))
_UPPER = _arguments(("max", 1, None))
_OTHER = _arguments(("other", 1, None))
_TARGET = _arguments(("target", 1, None))

_KINKS: dict[Any, _Places] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _zero),
    **dict.fromkeys((F.prelu, torch.prelu, Tensor.prelu, F.rrelu, F.selu, torch.selu), _zero),
    **dict.fromkeys((torch.abs, torch.absolute, torch.abs_, Tensor.abs, Tensor.abs_), _zero),
    **dict.fromkeys((Tensor.absolute, Tensor.absolute_, Tensor.__abs__), _zero),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _leaky),
    **dict.fromkeys((F.elu, F.elu_), _elu),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _HARDTANH),
    **dict.fromkeys((F.hardswish, F.hardsigmoid), _fixed(-3.0, 3.0)),
    **dict.fromkeys((torch.clamp, torch.clamp_, torch.clip, Tensor.clamp), _BOUNDS),
    **dict.fromkeys((Tensor.clamp_, Tensor.clip, Tensor.clip_), _BOUNDS),
    **dict.fromkeys((torch.clamp_min, Tensor.clamp_min, Tensor.clamp_min_), _LOWER),
    **dict.fromkeys((torch.clamp_max, Tensor.clamp_max, Tensor.clamp_max_), _UPPER),
    **dict.fromkeys((torch.maximum, torch.minimum, Tensor.maximum, Tensor.minimum), _OTHER),
    F.relu6: _fixed(0.0, 6.0),
    F.threshold: _arguments(("threshold", 1, 0.0)),
    F.l1_loss: _TARGET,
}


class KinkRecorder(TorchFunctionMode):
    """Notes, for every piecewise function called, which entries of its input sit on a kink.

    Only inputs that depend on something to differentiate by count.

    Attributes
    ----------
    calls : list of (str, Tensor or None)
        The function's name, and a mask of those entries if there are any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Tensor | None]] = []

    def __enter__(self) -> KinkRecorder:
        self.calls.clear()  # of a pass that did not come to its end
        super().__enter__()
        return self

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Look at the input before the call, which may overwrite it."""
        kwargs = kwargs or {}
        places = _KINKS.get(func)
        if places is not None:
            subject = args[0] if args else kwargs.get("input")
            if isinstance(subject, Tensor) and subject.requires_grad:
                name = getattr(func, "__name__", str(func))
                self.calls.append((name, _on_kink(subject, places(args, kwargs))))
        return func(*args, **kwargs)

    @property
    def found(self) -> bool:
        """Whether any entry sat on a kink."""
        return any(mask is not None for _, mask in self.calls)


def _on_kink(subject: Tensor, places: list[Any]) -> Tensor | None:
    with torch.no_grad():
        mask: Tensor | None = None
        for place in places:
            here = subject == place
            mask = here if mask is None else mask | here
        return mask if mask is not None and bool(mask.any()) else None


def moved_off(
    before: KinkRecorder, after: KinkRecorder, eps: float
) -> list[tuple[str, int, int, int]]:
    """Which kinks were left when the parameters moved a little.

    Entries that stay are no kink in the parameters: padding, units that were cut off
    before, inputs that are zero. Single entries that happen to be zero by rounding are
    not counted either.

    Returns
    -------
    list of (name, index of the call, entries that moved, entries)
    """
    if [name for name, _ in before.calls] != [name for name, _ in after.calls]:
        return []
    left = []
    pairs = zip(before.calls, after.calls, strict=True)
    for index, ((name, old), (_, new)) in enumerate(pairs):
        if old is None or (new is not None and new.shape != old.shape):
            continue
        on_kink = int(old.sum())
        moved = on_kink if new is None else int((old & ~new).sum())
        chance = max(1e-5, 2 * eps) * old.numel()
        if moved > 0 and moved >= max(1e-3 * on_kink, chance):
            left.append((name, index, moved, old.numel()))
    return left


def small_step(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return a random step of a few units of rounding."""
    originals = [parameter.detach() for parameter in parameters]
    norm = torch.stack([o.float().square().sum() for o in originals]).sum().sqrt()
    floor = float(norm) / sum(o.numel() for o in originals) ** 0.5 or 1.0
    steps = []
    for index, original in enumerate(originals):
        generator = torch.Generator(device=original.device).manual_seed(index)
        noise = torch.empty_like(original).normal_(generator=generator)
        steps.append(8 * torch.finfo(original.dtype).eps * (original.abs() + floor) * noise)
    return steps


@contextlib.contextmanager
def moved(parameters: Sequence[Tensor], steps: Sequence[Tensor]) -> Iterator[None]:
    """Move the parameters by a step, and put the same storage back."""
    originals = [parameter.data for parameter in parameters]
    try:
        for parameter, original, step in zip(parameters, originals, steps, strict=True):
            parameter.data = original + step
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original

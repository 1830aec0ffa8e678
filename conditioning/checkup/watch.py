"""What happens in one forward pass: activations, layers and what follows them, time steps."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from conditioning.blocks.wrappers import walk
from conditioning.procrustes.layers import is_layer

_FLAT = 0.01  # of the largest slope


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


def _silu_slope(x: Tensor) -> Tensor:
    share = torch.sigmoid(x)
    return share * (1 + x * (1 - share))


def _mish_slope(x: Tensor) -> Tensor:
    inner = torch.tanh(F.softplus(x))
    return inner + x * torch.sigmoid(x) * (1 - inner**2)


def _between(low: float, high: float) -> Callable[[Tensor], Tensor]:
    return lambda x: ((x > low) & (x < high)).to(x.dtype)


# Slopes over their largest (or asymptotic) value. Leaky functions are never flat.
_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: (x > 0).to(x.dtype),
    "relu6": _between(0.0, 6.0),
    "hardsigmoid": _between(-3.0, 3.0),
    "hardswish": lambda x: torch.where(x.abs() < 3, x / 3 + 0.5, (x > 0).to(x.dtype)),
    "mish": _mish_slope,
    "celu": lambda x: torch.exp(x.clamp(max=0)),
    "tanh": lambda x: 1 - torch.tanh(x) ** 2,
    "sigmoid": lambda x: 4 * torch.sigmoid(x) * (1 - torch.sigmoid(x)),
    "elu": lambda x: torch.exp(x.clamp(max=0)),
    "selu": lambda x: torch.exp(x.clamp(max=0)),
    "gelu": _gelu_slope,
    "silu": _silu_slope,
}
_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), "relu"),
    F.relu6: "relu6",
    **dict.fromkeys((F.hardtanh, F.hardtanh_), "hardtanh"),
    **dict.fromkeys((torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_, F.tanh), "tanh"),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_), "sigmoid"),
    **dict.fromkeys((F.sigmoid,), "sigmoid"),
    **dict.fromkeys((F.elu, F.elu_), "elu"),
    **dict.fromkeys((F.selu, torch.selu, torch.selu_), "selu"),
    F.softplus: "softplus",
    F.gelu: "gelu",
    F.silu: "silu",
    F.mish: "mish",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    **dict.fromkeys((F.celu, torch.celu, torch.celu_), "celu"),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_, F.prelu, torch.prelu, F.rrelu), "leaky_relu"),
    **dict.fromkeys((torch.clamp, Tensor.clamp, Tensor.clamp_, torch.clip, Tensor.clip), "clamp"),
    **dict.fromkeys((torch.clamp_min, Tensor.clamp_min, Tensor.clamp_min_), "clamp"),
}
_NORMALISATIONS = {
    F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.local_response_norm,
    getattr(F, "rms_norm", F.layer_norm),
}  # fmt: skip


def _identified(
    function: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Callable[[Tensor], Tensor] | None] | None:
    """The function that a call amounts to, and its slope; None for clamps that are no ReLU."""
    first = args[1] if len(args) > 1 else None
    second = args[2] if len(args) > 2 else None
    if function == "clamp":
        low, high = kwargs.get("min", first), kwargs.get("max", second)
        is_relu = isinstance(low, (int, float)) and low == 0 and high is None
        return ("relu", _SLOPES["relu"]) if is_relu else None
    if function == "hardtanh":
        # nn.ReLU6 calls it with its own bounds.
        low = float(kwargs.get("min_val", -1.0 if first is None else first))
        high = float(kwargs.get("max_val", 1.0 if second is None else second))
        name = "relu6" if low == 0 and high == 6 else "hardtanh"
        return name, _between(low, high)
    if function == "softplus":
        beta = float(kwargs.get("beta", 1.0 if first is None else first))
        return function, lambda x: torch.sigmoid(beta * x)
    return function, _SLOPES.get(function)


@dataclass
class Use:
    """What was added up over the batches for one use of an activation function."""

    name: str
    function: str
    order: int
    squares: Tensor
    flat: Tensor
    count: int = 0
    always_flat: Tensor | None = None  # by unit

    def add(self, x: Tensor, axis: int, slope: Callable[[Tensor], Tensor] | None) -> None:
        """Add the inputs of one call."""
        x = x.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        self.squares = self.squares + x.double().square().sum()
        self.count += x.numel()
        flat = torch.zeros_like(x, dtype=torch.bool) if slope is None else slope(x) <= _FLAT
        self.flat = self.flat + flat.sum()
        if x.ndim < 2:
            return  # samples, and no units
        units = flat.movedim(axis, 0).flatten(1).all(dim=1)
        before = self.always_flat
        if before is not None and before.shape == units.shape:
            units = units & before
        self.always_flat = units


@dataclass
class Layer:
    """A linear or convolutional layer that ran."""

    name: str
    module: nn.Module
    order: int
    input_shape: tuple[int, ...]
    followed_by: str = ""


@dataclass
class Times:
    """Gradient norms at the steps of a recurrent layer, per batch."""

    name: str
    module: nn.Module
    batches: list[Tensor] = field(default_factory=list)  # each (time,), on the device


class Watch(TorchFunctionMode):
    """Notes what happens in forward passes that run under it, and in their backward passes.

    Attributes
    ----------
    uses : dict of str to Use
    layers : dict of str to Layer
    times : dict of str to Times
    unwatched : list of (str, str)
        Recurrent layers whose gradients could not be followed, with the reason.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self.uses: dict[str, Use] = {}
        self.layers: dict[str, Layer] = {}
        self.times: dict[str, Times] = {}
        self.unwatched: list[tuple[str, str]] = []
        self._stack: list[str] = []
        self._order = 0
        self._in_pass: Counter[str] = Counter()
        self._last_layer: nn.Module | None = None
        self._outputs: dict[int, tuple[weakref.ref[Tensor], Layer]] = {}
        self._cells: dict[str, list[Tensor]] = {}

    # -- functions --------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Look at the input before the call, which may overwrite it."""
        kwargs = kwargs or {}
        name = _ACTIVATIONS.get(func)
        if name is not None or func in _NORMALISATIONS:
            subject = args[0] if args else kwargs.get("input")
            if isinstance(subject, Tensor):
                found = None if name is None else _identified(name, args, kwargs)
                if found is not None or name is None:
                    self._follows(subject, found[0] if found else "normalisation")
                real = subject.dtype.is_floating_point
                if found is not None and real and subject.ndim and subject.numel():
                    with torch.no_grad():
                        self._note(*found, subject)
        return func(*args, **kwargs)

    def _follows(self, subject: Tensor, what: str) -> None:
        reference, layer = self._outputs.get(id(subject), (None, None))
        if reference is not None and layer is not None and reference() is subject:
            layer.followed_by = layer.followed_by or what

    def _note(
        self, function: str, slope: Callable[[Tensor], Tensor] | None, subject: Tensor
    ) -> None:
        place = self._stack[-1] if self._stack else ""
        self._in_pass[place] += 1
        count = self._in_pass[place]
        name = (place or "(model)") + (f"#{count}" if count > 1 else "")
        use = self.uses.get(name)
        if use is None:
            zero = torch.zeros((), device=subject.device)
            use = self.uses[name] = Use(name, function, self._order, zero, zero)
        self._order += 1
        convolutional = isinstance(self._last_layer, nn.modules.conv._ConvNd)
        # As the last layer has them; without one, as images have them.
        by_channel = convolutional or (self._last_layer is None and subject.ndim > 3)
        use.add(subject, 1 if by_channel and subject.ndim > 2 else -1, slope)

    # -- modules ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def one_pass(self) -> Iterator[None]:
        """Hooks for one forward pass and its backward pass."""
        self._stack.clear()
        self._in_pass.clear()
        self._cells = {}
        with contextlib.ExitStack() as stack:
            for name, called, inner in walk(self._model):
                stack.callback(
                    called.register_forward_pre_hook(
                        lambda *_, name=name: self._stack.append(name), prepend=True
                    ).remove
                )
                stack.callback(
                    called.register_forward_hook(
                        lambda _, args, kwargs, out, name=name, inner=inner: self._left(
                            name, inner, (*args, *kwargs.values()), out
                        ),
                        with_kwargs=True,
                    ).remove
                )
            yield
        self._outputs.clear()
        for name, norms in self._cells.items():
            if len(norms) > 1:
                self._times(name).batches.append(torch.stack(norms[::-1]))

    def _left(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while self._stack and self._stack.pop() != name:
            pass
        if isinstance(module, nn.RNNBase):
            self._follow_sequence(name, module, args)
        elif isinstance(module, nn.RNNCellBase):
            self._follow_cell(name, args)
        elif is_layer(module) and isinstance(output, Tensor) and args:
            self._last_layer = module
            layer = self.layers.setdefault(
                name, Layer(name, module, self._order, tuple(args[0].shape[1:]))
            )
            self._order += 1
            self._outputs[id(output)] = (weakref.ref(output), layer)

    def _times(self, name: str) -> Times:
        module = self._model.get_submodule(name) if name else self._model
        return self.times.setdefault(name, Times(name, module))

    def _follow_sequence(self, name: str, module: nn.RNNBase, args: tuple[Any, ...]) -> None:
        sequence = args[0] if args else None
        if not isinstance(sequence, Tensor) or sequence.ndim != 3:
            self._unwatched(name, "its input is no tensor of (batch, time, features)")
            return
        if module.bidirectional:
            self._unwatched(name, "it runs in both directions of time")
            return
        if not sequence.requires_grad:
            self._unwatched(name, "no gradient reaches its input")
            return
        others = (0, 2) if module.batch_first else (1, 2)
        times = self._times(name)

        def note(gradient: Tensor | None) -> None:
            if gradient is None:
                return
            times.batches.append(gradient.detach().double().square().sum(dim=others).sqrt())

        sequence.register_hook(note)

    def _follow_cell(self, name: str, args: tuple[Any, ...]) -> None:
        state = args[1] if len(args) > 1 else None
        hidden = state[0] if isinstance(state, (tuple, list)) else state
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            norms = self._cells.setdefault(name, [])
            self._times(name)

            # Called from the last step to the first.
            def note(gradient: Tensor | None) -> None:
                if gradient is not None:
                    norms.append(gradient.detach().double().norm())

            hidden.register_hook(note)

    def _unwatched(self, name: str, reason: str) -> None:
        if (name, reason) not in self.unwatched:
            self.unwatched.append((name, reason))

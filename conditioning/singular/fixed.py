"""A layer with its weights at one moment, that runs without leaving a trace."""

from __future__ import annotations

import contextlib
import operator
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_state

from conditioning.errors import (
    InvalidArgumentError,
    NonFiniteError,
    ShapeError,
    UnsupportedLayerError,
    UnsupportedParameterError,
)
from conditioning.operators.guards import differentiable, isolated_randomness
from conditioning.singular.geometry import Geometry, base_of, geometry_of
from conditioning.singular.scales import norm_of, scale_of

T = TypeVar("T")
DTYPES = (torch.float64, torch.float32)

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_REGISTRIES = ("_parameters", "_buffers", "_modules")


class FixedLayer:
    r"""A layer with its weights at one moment, in the precision of the products.

    Where the weight alone says what the layer computes, the products are those of a bare layer
    with that weight, without bias and hooks, divided by ``scale``: a power of two near its
    largest entry where that is far from 1, so that no square overflows or vanishes. Others run as
    they are.

    Attributes
    ----------
    layer : nn.Module
    geometry : Geometry or None
        Where the weight alone says what the layer computes.
    why_not : UnsupportedLayerError or None
        Why there is no geometry.
    scale : float
        What the singular values of the products are to be multiplied with.
    rounded : bool
        Whether weights lost digits on the way to ``dtype``.
    device, dtype, name
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        if dtype not in DTYPES:
            msg = f"dtype must be torch.float64 or torch.float32, got {dtype}."
            raise InvalidArgumentError(msg)
        if not isinstance(layer, nn.Module):
            msg = (
                f"Expected a layer (nn.Module), got {type(layer).__name__}. For a matrix use "
                f"singular_range."
            )
            raise UnsupportedLayerError(msg)
        layer = getattr(layer, "_orig_mod", layer)  # what torch.compile wraps
        self.layer, self.dtype, self.name = layer, dtype, type(layer).__name__
        self._modules = list(layer.modules())
        self._host = _Host(layer)
        given, buffers = _slots(layer, "_parameters"), _slots(layer, "_buffers")
        for name, parameter in given.items():
            _refuse_unusable(parameter, name, self.name)
        floating = [t for t in (*given.values(), *buffers.values()) if t.is_floating_point()]
        self.device = floating[0].device if floating else torch.device("cpu")
        double = any(t.dtype == torch.float64 for t in floating)
        # Weights in float64 may be out of the range of float32 until they are scaled.
        self._reading = torch.float64 if double else dtype
        self.scale = 1.0
        self.rounded = dtype != self._reading
        self.geometry: Geometry | None = None
        self.why_not: UnsupportedLayerError | None = None
        self._bare: nn.Module | None = None
        try:
            geometry = geometry_of(layer)
        except UnsupportedLayerError as error:
            self.why_not = error
        else:
            self._lift(given, buffers, self._reading)
            self._read(geometry)
        if self.geometry is None:
            self._lift(given, buffers, dtype)

    def _lift(self, given: dict[str, Tensor], buffers: dict[str, Tensor], to: torch.dtype) -> None:
        """Copies of parameters and buffers; what is shared stays shared."""
        copies: dict[int, Tensor] = {}
        with torch.inference_mode(mode=False), torch.no_grad():
            for tensor in (*given.values(), *buffers.values()):
                if id(tensor) not in copies:
                    detached = tensor.detach()
                    copy = detached.to(to) if tensor.is_floating_point() else detached
                    copies[id(tensor)] = copy.clone() if copy.is_inference() else copy
            for name, parameter in given.items():
                if to != self._reading and not bool(torch.isfinite(copies[id(parameter)]).all()):
                    _refuse_nonfinite(parameter.detach(), name, self.name)
                    msg = (
                        f"Parameter {name!r} of the {self.name} leaves the range of {to}: use "
                        f"dtype=torch.float64."
                    )
                    raise NonFiniteError(msg)
                _refuse_nonfinite(copies[id(parameter)], name, self.name)
        self._weights = {f"layer.{n}": copies[id(p)] for n, p in given.items()}
        self._buffers = {f"layer.{n}": copies[id(b)] for n, b in buffers.items()}

    @property
    def placement(self) -> dict[str, Any]:
        """Arguments that make a tensor for the layer."""
        return {"dtype": self.dtype, "device": self.device}

    @property
    def weight(self) -> Tensor:
        """The weight that the layer applies, over ``scale``, for layers of known geometry."""
        if self.geometry is None:
            assert self.why_not is not None
            raise self.why_not
        assert self._bare is not None
        found: Tensor = vars(self._bare)["weight"]
        return found

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """In which the layer may run without leaving a trace."""
        with (
            isolated_randomness(),
            differentiable(self._modules, self.device),
            _without_autocast(self.device),
            _kept(self._modules),
        ):
            for module in self._modules:
                # To compile for float64 and a few products does not pay.
                vars(module)["_compiled_call_impl"] = None
            yield

    def _run(self, action: Callable[[nn.Module], T]) -> T:
        """Let something be done with the layer while it has the fixed weights."""
        # What the forward pass does to its buffers, it does to copies.
        copies = {id(b): b.clone() for b in self._buffers.values()}
        tensors = self._weights | {name: copies[id(b)] for name, b in self._buffers.items()}
        # What is tied has one copy already.
        result: T = torch.func.functional_call(self._host, tensors, (action,), tie_weights=False)
        return result

    def _outputs(self, inputs: Tensor) -> Any:
        # A copy, because a layer may work in place, which a leaf does not allow, and because
        # inputs that were made in a caller's inference mode forbid to save them.
        inputs = inputs.clone(memory_format=torch.contiguous_format)
        if self._bare is not None:
            # Not by a call, which would run hooks of all modules.
            return self._bare.forward(inputs)
        return self._run(lambda layer: layer(inputs))

    def trace(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """A batch of inputs as a leaf, and the outputs with their graph."""
        leaf = inputs.detach().to(**self.placement).clone().requires_grad_()
        return leaf, self._outputs(leaf)

    def respond(self, inputs: Tensor) -> Tensor:
        """Outputs for a batch of inputs, without a graph."""
        with self.evaluation(), torch.no_grad():
            inputs = inputs.to(**self.placement)
            try:
                outputs = self._outputs(inputs)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                shape = tuple(inputs.shape[1:])
                msg = (
                    f"The {self.name} does not take a {self.dtype} input of shape {shape}, which "
                    f"is without the batch: {first}"
                )
                raise ShapeError(msg) from error
        if not isinstance(outputs, Tensor):
            msg = f"The {self.name} returns a {type(outputs).__name__}, not one tensor: wrap it."
            raise UnsupportedLayerError(msg)
        if outputs.ndim == 0 or len(outputs) != len(inputs):
            msg = (
                f"The {self.name} turns a batch of {len(inputs)} into an output of shape "
                f"{tuple(outputs.shape)}: it does not keep the samples apart."
            )
            raise UnsupportedLayerError(msg)
        return outputs

    # -- what the weight tells --------------------------------------------------------------

    def _read(self, geometry: Geometry) -> None:
        """Take the weight as the forward pass finds it: parametrised, or set by a hook."""
        sizes = [
            d * (k - 1) + 1 + s + max(ends)
            for k, d, s, ends in zip(
                geometry.kernel, geometry.dilation, geometry.stride, geometry.padding, strict=True
            )
        ]

        def read(module: nn.Module) -> Tensor:
            if _hooked(module):
                self._compare(module, (geometry.in_channels, *sizes))
            return module.weight.detach().clone()  # type: ignore[operator]

        try:
            with self.evaluation():
                weight = self._run(read)
        except UnsupportedLayerError as error:
            self.why_not = error
            return
        _refuse_nonfinite(weight, "weight", self.name)
        if not weight.numel():
            msg = (
                f"The weight of the {self.name} has shape {tuple(weight.shape)}: without entries "
                f"it has no singular values."
            )
            raise ShapeError(msg)
        self.geometry, self.scale = geometry, scale_of(weight)
        if self.scale != 1:
            weight = weight / self.scale
        self._bare = _bare(self.layer, weight.to(self.dtype))

    def verify(self, input_shape: tuple[int, ...]) -> None:
        """Find out whether hooks change what the layer computes on inputs of a given shape.

        They may do so at some sizes only. Where they do, there is no geometry any more.
        """
        if self.geometry is None or not _hooked(self.layer):
            return
        try:
            self.respond(torch.zeros(1, *input_shape, **self.placement))
        except ShapeError:
            return  # for who needs that shape to say
        try:
            with self.evaluation():
                self._run(lambda module: self._compare(module, input_shape))
        except UnsupportedLayerError as error:
            self.geometry, self._bare, self.why_not, self.scale = None, None, error, 1.0
            self._lift(
                _slots(self.layer, "_parameters"), _slots(self.layer, "_buffers"), self.dtype
            )

    def _compare(self, module: nn.Module, input_shape: tuple[int, ...]) -> None:
        """Refuse hooks that do more than to set the weight, or to look on.

        What they do to the input, the output or to gradients, the weight does not tell.
        """
        generator = torch.Generator(device="cpu").manual_seed(0)

        def random(*shape: int) -> Tensor:
            drawn = torch.randn(shape, generator=generator, device="cpu", dtype=self._reading)
            return drawn.to(self.device)

        probe = random(1, *input_shape).requires_grad_()
        found = module(probe.clone())
        own = type(module).forward(module, probe.clone())
        same = isinstance(found, Tensor) and found.shape == own.shape and found.requires_grad
        if same:
            seed = random(*own.shape)
            back, own_back = (
                torch.autograd.grad(out, probe, seed.clone())[0] for out in (found, own)
            )
            pairs = ((found, own), (back, own_back))
            bound = 1e3 * torch.finfo(self._reading).eps
            same = all(norm_of(a - b) <= bound * norm_of(b) for a, b in pairs)
        if not same:
            msg = (
                f"Hooks of the {self.name}, or a forward of its own, change what it "
                f"computes, so the weight alone does not say what that is."
            )
            raise UnsupportedLayerError(msg)


class _Host(nn.Module):
    """Gives something to do with a layer the place of a forward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __call__(self, action: Callable[[nn.Module], T]) -> T:
        # Not that of nn.Module, by which hooks of all modules would act here too.
        return action(self.layer)


def _bare(layer: nn.Module, weight: Tensor) -> nn.Module:
    """A layer of the same settings with a given weight, without bias, hooks and parameters."""
    base = base_of(layer)
    bare = base.__new__(base)
    nn.Module.__init__(bare)
    machinery = {*vars(bare), "forward"}
    vars(bare).update({n: v for n, v in vars(layer).items() if n not in machinery})
    vars(bare).update(weight=weight, bias=None)
    return bare


def _slots(layer: nn.Module, registry: str) -> dict[str, Tensor]:
    """Parameters or buffers by name, each place where a module holds one once."""
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, module in layer.named_modules()
        for name, tensor in vars(module)[registry].items()
        if tensor is not None
    }


def _hooked(module: nn.Module) -> bool:
    """Whether a call of the module may do something else than its class does."""
    everywhere = (vars(module_state).get(f"_global{name}") for name in _HOOKS)
    return (
        any(vars(module).get(name) for name in _HOOKS)
        or any(everywhere)
        or "forward" in vars(module)
    )


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    known = device.type in ("cpu", "cuda")
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


@contextlib.contextmanager
def _kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back what the modules hold as attributes: buffers, caches, weights that hooks set."""
    kept = [
        (vars(module), dict(vars(module)), [dict(vars(module)[name]) for name in _REGISTRIES])
        for module in modules
    ]
    try:
        yield
    finally:
        for attributes, before, registries in kept:
            for name in [name for name in attributes if name not in before]:
                del attributes[name]
            attributes.update(before)
            for name, registry in zip(_REGISTRIES, registries, strict=True):
                attributes[name].clear()
                attributes[name].update(registry)


def checked_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one input as a tuple of positive integers."""
    try:
        shape = tuple(map(operator.index, input_shape))
    except TypeError:
        shape = ()
    if not shape or min(shape) < 1:
        got = reprlib.repr(input_shape)
        if hasattr(input_shape, "shape"):
            # Its numbers would not help, and there may be many.
            kind = type(input_shape).__name__
            got = f"a {kind} of shape {tuple(input_shape.shape)}"
        msg = f"input_shape must be a tuple of positive integers, got {got}."
        raise ShapeError(msg)
    return shape


def _refuse_unusable(parameter: Tensor, name: str, owner: str) -> None:
    fault = None
    if isinstance(parameter, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        fault = "is not initialised yet (lazy module): run the layer once on a batch"
    elif hasattr(parameter, "full_tensor"):
        fault = (
            "is sharded over devices (DTensor): measure a layer that holds "
            "parameter.full_tensor(), which every rank has to call"
        )
    elif parameter.layout != torch.strided:
        fault = f"is sparse ({parameter.layout}): pass a layer with a dense weight"
    elif parameter.device.type == "meta":
        fault = "is on the meta device and has no data: load the weights first"
    elif parameter.dtype.is_complex:
        fault = f"is complex ({parameter.dtype}); supported are real weights"
    elif not parameter.is_floating_point():
        fault = f"is not floating-point ({parameter.dtype}): dequantise the layer first"
    if fault:
        msg = f"Parameter {name!r} of the {owner} {fault}."
        raise UnsupportedParameterError(msg)


def _refuse_nonfinite(tensor: Tensor, name: str, owner: str) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        msg = (
            f"Parameter {name!r} of the {owner} holds NaN or an infinity in {bad} of "
            f"{tensor.numel()} entries, so it has no singular values."
        )
        raise NonFiniteError(msg)

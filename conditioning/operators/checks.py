"""What an operator finds out about a model before it is trusted."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conditioning.errors import (
    AsymmetricOperatorError,
    BatchFormatError,
    BatchNormTrainingError,
    DoubleBackwardError,
    LargeGraphWarning,
    LossWithoutGraphError,
    MixedDevicesError,
    MixedDtypesError,
    NonFiniteError,
    NonsmoothPointWarning,
    RandomForwardError,
    UnusedParameterWarning,
)
from conditioning.memory import format_bytes
from conditioning.operators.batches import tensors_in
from conditioning.operators.graphs import differentiate
from conditioning.operators.guards import (
    BufferGuard,
    RandomState,
    isolated_randomness,
)
from conditioning.operators.kinks import KinkRecorder, moved, moved_off, small_step
from conditioning.operators.modules import join_names, random_modules, tracking_norms

if TYPE_CHECKING:
    from torch import nn

    from conditioning.operators.graphs import LossGraph
    from conditioning.operators.losses import LossOperator

_DTYPE_FAULT = re.compile(r"dtype|scalar type|Input type|same type|datatype")
_DEVICE_FAULT = re.compile(r"same device|Expected all tensors to be on|different device")
# Below this precision exact zeros are common and small steps are large: kinks mean nothing.
_FINE_EPS = 1e-4
# Entries of a vector that are taken to double precision together.
_PIECE = 2**16
_OFF_THE_KINK = (
    "Autograd's second derivative is a convention there, not the limit of the Hessians around. "
    "Evaluate at a small random perturbation of the parameters, or use a smooth activation."
)


@contextlib.contextmanager
def translated_forward_errors(batch: Any, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Say what does not fit where data and parameters differ in dtype or device."""
    try:
        yield
    except TypeError as error:
        pairs = isinstance(batch, tuple) and all(isinstance(part, (tuple, list)) for part in batch)
        if pairs and "positional argument" in str(error):
            msg = (
                f"A tuple is one batch (inputs, targets), and inputs in a tuple are passed as "
                f"several arguments ({error}). For several batches pass a list of them."
            )
            raise BatchFormatError(msg) from error
        raise
    except RuntimeError as error:
        text = str(error).splitlines()[0] if str(error) else ""
        data = [t for t in tensors_in(batch) if t.dtype.is_floating_point]
        own = {p.dtype for p in parameters}
        other = {t.dtype for t in data} - own
        if other and _DTYPE_FAULT.search(text):
            msg = (
                f"The batch holds {_listed(other)}, the parameters are {_listed(own)}, and the "
                f"model cannot mix them ({text}). Convert the data (inputs.to(dtype)) or the "
                f"model (model.to(dtype))."
            )
            raise MixedDtypesError(msg) from error
        if _DEVICE_FAULT.search(text):
            msg = (
                f"Something in the model or the loss is on another device than the parameters "
                f"({text}). Batches are moved by themselves; move the rest, such as class weights "
                f"or buffers, with .to(device)."
            )
            raise MixedDevicesError(msg) from error
        raise


def _listed(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype) for dtype in dtypes))


@dataclass
class Evaluation:
    """Loss and gradient of one pass over the data, and how large their parts are."""

    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    gradient: Tensor = field(default_factory=lambda: torch.zeros(()))
    loss_scale: float = 0.0
    gradient_scale: float = 0.0
    batches: int = 0
    drew: bool = False
    custom: list[str] = field(default_factory=list)


@dataclass
class FirstBatch:
    """The first batch, which stands for all where products are compared."""

    batch: Any = None
    loss: float = 0.0
    gradient: float = 0.0
    gradient_vector: Tensor | None = None
    probe: Tensor | None = None
    product: Tensor | None = None


def check_loss_operator(operator: LossOperator, stacklevel: int) -> None:
    """Evaluate a loss twice, multiply two vectors, and compare what has to agree.

    The graphs of the second evaluation are those that the operator keeps. The two products
    are with graphs of the two evaluations, so that one comparison, ``<u, A v> = <v, A u>``,
    shows a product that depends on chance as well as one that is no second derivative.

    Raises
    ------
    ConditioningError
        What was found, as one of its subclasses.
    """
    layout = operator._layout
    recorder = KinkRecorder()
    used = [False] * len(layout.names)
    head = FirstBatch()
    generators = operator._batches.generators()
    with torch.inference_mode(mode=False), isolated_randomness(generators) as state:

        def first_graphs() -> Iterator[tuple[LossGraph, float, bool]]:
            for index, batch in enumerate(operator._batches):
                size = operator._batches.size(batch) if operator._needs_sizes else 1.0
                buffers = BufferGuard(operator._modules, compare=True)
                before = RandomState.capture()
                if index == 0:
                    head.batch = batch
                    graph = operator._measure(batch, watch=recorder, buffers=buffers)
                else:
                    graph = operator._build(batch, buffers=buffers)
                drew = not before.unchanged()
                refuse_norms_in_training(operator._owners, buffers.changed)
                yield graph, size, drew
                del graph  # as everywhere here, before the next is built: two may not fit

        def second_graphs() -> Iterator[tuple[LossGraph, float, bool]]:
            for graph, size in operator._stream():
                yield graph, size, False
                del graph

        first = _evaluate(operator, first_graphs(), used, head)
        if not any(used):
            msg = (
                f"None of the selected parameters influences the loss: "
                f"{join_names(list(layout.names))}. Look for .detach() on the way, or select "
                f"other parameters."
            )
            raise LossWithoutGraphError(msg)
        if operator._checkpointed and not _segments_are_right(operator, head):
            operator._checkpointed = False
            operator._whole_because = "its gradient comes out different then"
            check_loss_operator(operator, stacklevel + 1)
            return
        state.reseed()
        second = _evaluate(operator, second_graphs(), used, None)
        _check_repetition(operator, first, second, head)
        fine = operator._eps < _FINE_EPS
        kinks = _find_kinks(operator, head.batch, recorder) if fine else ""
        _check_products(operator, head, drew=first.drew, kinks=kinks)
        if first.custom and fine and not recorder.calls:
            _check_differences(operator, head, first.custom)
        if kinks:
            warnings.warn(f"{kinks} {_OFF_THE_KINK}", NonsmoothPointWarning, stacklevel=stacklevel)
    if operator._whole_because:
        msg = (
            f"The gradient's graph of a batch holds more than it should "
            f"({format_bytes(operator._budget())} are for graphs), and the model cannot be run "
            f"again block by block instead: {operator._whole_because}. It is built as it is. With "
            f"smaller batches (a list of them) one graph is built at a time."
        )
        warnings.warn(msg, LargeGraphWarning, stacklevel=stacklevel)
    operator._value = (operator._marks(), first.loss, first.gradient.to(layout.dtype))
    warn_of_unused(layout.names, used, stacklevel + 1)


def warn_of_unused(names: Sequence[str], used: Sequence[bool], stacklevel: int) -> None:
    """Name the parameters that no loss depends on."""
    unused = [name for name, is_used in zip(names, used, strict=True) if not is_used]
    if unused:
        msg = (
            f"No influence on the loss, so zero rows in the matrix: {join_names(unused)}. Leave "
            f"them out with params= if they should not count as zero eigenvalues."
        )
        warnings.warn(msg, UnusedParameterWarning, stacklevel=stacklevel)


def _probe(operator: LossOperator) -> Tensor:
    layout = operator._layout
    generator = torch.Generator(device=layout.device).manual_seed(0)
    return torch.randn(layout.numel, dtype=layout.dtype, device=layout.device, generator=generator)


def _product(operator: LossOperator, graph: LossGraph, vector: Tensor) -> Tensor:
    product = operator._layout.join(graph.apply(operator._layout.split(vector), batched=False))
    _refuse_nonfinite("product with a vector", product, operator)
    return product


def _evaluate(
    operator: LossOperator,
    graphs: Iterator[tuple[LossGraph, float, bool]],
    used: list[bool],
    head: FirstBatch | None,
) -> Evaluation:
    """Go once over the data; numbers that are not finite end it."""
    result = Evaluation()
    layout = operator._layout
    total = size = 0.0

    def noted() -> Iterator[tuple[LossGraph, float]]:
        nonlocal total, size
        for graph, batch_size, drew in graphs:
            result.drew |= drew
            size = batch_size
            total += size
            yield graph, size
            del graph

    def quantity(graph: LossGraph) -> list[Tensor]:
        if not bool(torch.isfinite(graph.loss)):
            msg = (
                f"The loss is {float(graph.loss)}. Look at the data, and at logarithms, divisions "
                f"and overflow in half precision."
            )
            raise NonFiniteError(msg)
        used[:] = [u or g is not None for u, g in zip(used, graph.gradient, strict=True)]
        gradient = layout.join(graph.gradient)
        _refuse_nonfinite("gradient", gradient, operator)
        result.custom = result.custom or graph.custom
        result.batches += 1
        # Sizes of the batches' own terms: their sum may cancel, their rounding does not.
        loss, length = abs(float(graph.loss)), norm(gradient)
        result.loss_scale += size * loss
        result.gradient_scale += size * length
        if head is not None and head.product is None:
            head.loss, head.gradient = loss, length
            head.gradient_vector = gradient if operator._checkpointed else None
            head.probe = _probe(operator)
            head.product = _product(operator, graph, head.probe)
        return [graph.loss, gradient]

    result.loss, result.gradient = operator._average(noted(), quantity)
    share = 1 / total if operator._needs_sizes else 1.0
    result.loss_scale *= share
    result.gradient_scale *= share
    return result


def exact(vector: Tensor) -> Tensor:
    """Return a tensor in double precision, on a device that has it."""
    vector = vector.detach()
    return (vector.cpu() if vector.device.type == "mps" else vector).double()


def norm(vector: Tensor) -> float:
    """Euclidean norm, without loss to overflow or underflow."""
    vector = vector.detach()
    if vector.dtype in (torch.float32, torch.float64):
        # Fifteen times faster, and good to rounding where no square that counts vanishes.
        length = float(torch.linalg.vector_norm(vector))
        if 1e-15 < length < 1e15:
            return length
    return float(torch.linalg.vector_norm(exact(vector)))


def _dot(left: Tensor, right: Tensor) -> float:
    """Inner product in double precision, piece by piece: no copy of a whole vector."""
    pieces = zip(left.split(_PIECE), right.split(_PIECE), strict=True)
    return math.fsum(float(torch.dot(exact(a), exact(b))) for a, b in pieces)


def _refuse_nonfinite(what: str, flat: Tensor, operator: LossOperator) -> None:
    # The sum first: one pass, and no vector of flags.
    if bool(torch.isfinite(flat.sum())) or bool(torch.isfinite(flat).all()):
        return
    parts = operator._layout.unflatten(flat)
    bad = [name for name, part in parts.items() if not bool(torch.isfinite(part).all())]
    msg = (
        f"The {what} is not finite, first for {join_names(bad, limit=3)}. Usual causes: the "
        f"square root or norm of zero, a division by a spread of zero, overflow in half precision."
    )
    raise NonFiniteError(msg)


def _scales(
    operator: LossOperator, loss: float, gradient: float, product: float
) -> tuple[float, float]:
    """Size of the parameters, and what terms of the loss may have cancelled in a result.

    The second is in units of the loss. It tells rounding from disagreement where the
    numbers themselves nearly vanish, as at a minimum.
    """
    size = max(1.0, math.hypot(*(norm(p) for p in operator._parameters)))
    curvature = product * size**2 / operator._layout.numel**0.5
    return size, max(loss, gradient * size, curvature)


def _relative(operator: LossOperator, *, drew: bool) -> float:
    loose = 10 * operator._eps**0.5
    # Where numbers were drawn, a difference is no rounding by another order of the sums.
    return float(min(loose, 1e3 * operator._eps) if drew else loose)


def _check_repetition(
    operator: LossOperator, first: Evaluation, second: Evaluation, head: FirstBatch
) -> None:
    assert head.product is not None
    weight = 1 if operator._needs_sizes else first.batches
    size, energy = _scales(
        operator, first.loss_scale, first.gradient_scale, weight * norm(head.product)
    )
    floor = 1e3 * operator._eps * energy
    relative = _relative(operator, drew=first.drew)
    names = random_modules(operator._owners)
    gaps = {
        "loss": (norm(first.loss - second.loss), relative * first.loss_scale + floor),
        "gradient": (
            norm(first.gradient - second.gradient),
            relative * first.gradient_scale + floor / size,
        ),
    }
    wrong = [what for what, (gap, bound) in gaps.items() if not gap <= bound]
    if wrong or (first.drew and names):
        raise RandomForwardError(random_message(names, wrong, drew=first.drew))


def _segments_are_right(operator: LossOperator, head: FirstBatch) -> bool:
    """Whether a model that runs block by block has the same gradient: tensors may slip in."""
    loss = operator._plain_loss(head.batch)
    plain = operator._layout.join(differentiate([loss], operator._parameters))
    assert head.gradient_vector is not None
    assert head.product is not None
    gap = norm(plain - head.gradient_vector)
    size, energy = _scales(operator, head.loss, head.gradient, norm(head.product))
    floor = 1e3 * operator._eps * energy / size
    return gap <= _relative(operator, drew=False) * norm(plain) + floor


def _check_products(operator: LossOperator, head: FirstBatch, *, drew: bool, kinks: str) -> None:
    assert head.probe is not None
    assert head.product is not None
    # A loader may shuffle, so the first of several batches is built once more.
    kept = operator._kept
    single = kept is not None and len(kept) == 1
    graph = kept[0][0] if kept is not None and single else operator._build(head.batch)
    # The same numbers at other places: drawing as many again may take as long as a gradient.
    probe = head.probe.roll(len(head.probe) // 3 or 1)
    other = _product(operator, graph, probe)
    left, right = _dot(head.product, probe), _dot(other, head.probe)
    scale = norm(head.product) + norm(other)
    size, energy = _scales(operator, head.loss, head.gradient, norm(head.product))
    floor = 1e3 * operator._eps * energy * norm(probe) / size**2
    # A product's rounding points anywhere, so against a random vector it counts by its norm.
    bound = 10 * operator._eps**0.5 * scale + floor
    asymmetric = abs(left - right) > bound
    if asymmetric or drew:
        gap = norm(_product(operator, graph, head.probe) - head.product)
        if gap > _relative(operator, drew=drew) * norm(head.product) + floor:
            names = random_modules(operator._owners)
            raise RandomForwardError(random_message(names, ["product with a vector"], drew=drew))
    if asymmetric:
        why = (
            f"{kinks} {_OFF_THE_KINK}"
            if kinks
            else "Look for a custom autograd.Function whose backward detaches or works on .data, "
            "torch's weight_norm (autograd takes its norms for constants: remove the "
            "parametrization), and gradients changed by hooks."
        )
        msg = (
            f"<u, A v> = {left:.9g} and <v, A u> = {right:.9g} differ by more than rounding "
            f"({bound:.1e}), so the products are not those of a second derivative. {why}"
        )
        raise AsymmetricOperatorError(msg)


def _check_differences(operator: LossOperator, head: FirstBatch, custom: list[str]) -> None:
    """Compare a product with differences of the gradient, where the user wrote derivatives.

    A custom function whose backward detaches loses a term that is symmetric by itself,
    so the test of symmetry is blind to it. Piecewise functions would disturb this test.
    """
    assert head.probe is not None
    assert head.product is not None
    parameters, layout = operator._parameters, operator._layout
    direction = head.probe / norm(head.probe)
    product = exact(head.product) / norm(head.probe)
    size, energy = _scales(operator, head.loss, head.gradient, norm(head.product))
    gaps = []
    for relative in (operator._eps ** (1 / 3), operator._eps**0.4):
        length = relative * size
        sides = []
        for sign in (length, -length):
            with moved(parameters, layout.split(sign * direction)):
                sides.append(exact(layout.join(operator._build(head.batch).gradient)))
        difference = (sides[0] - sides[1]) / (2 * length)
        noise = 1e2 * operator._eps * energy / (size * length)
        gaps.append(norm(difference - product) - 0.1 * norm(difference) - noise)
    if min(gaps) > 0:
        msg = (
            f"The product with a vector is not the change of the gradient along it, and the model "
            f"or loss has custom functions: {join_names(custom)}. One of their backwards "
            f"detaches or works on .data, so it has no second derivative. Write it with "
            f"differentiable operations on ctx.saved_tensors."
        )
        raise DoubleBackwardError(msg)


def random_message(names: list[str], wrong: list[str], *, drew: bool) -> str:
    """Say where randomness comes from: what is known, and else where to look."""
    if names:
        return (
            f"The forward pass is random, because these modules are in training mode: "
            f"{join_names(names)}. Call model.eval() before, and model.train() afterwards if "
            f"training goes on."
        )
    found = f"Two evaluations of the same loss disagree ({join_names(wrong)})."
    if drew:
        return (
            f"{found} The forward pass draws random numbers. Look for F.dropout without "
            f"training=self.training, noise, or sampling in the model or the loss; call "
            f"model.eval(), or draw the numbers once and make them part of the data."
        )
    return (
        f"{found} Look for a data loader that augments at random or shuffles with drop_last=True "
        f"(so that each pass sees other samples), batch statistics over shuffled batches, noise "
        f"with a generator of its own, or a model that changes its state. Use a fixed list of "
        f"batches and model.eval()."
    )


def refuse_norms_in_training(owners: dict[str, nn.Module], changed: set[int]) -> None:
    """Complain of normalisation layers whose running statistics the forward pass rewrote."""
    norms = [name for name, module in tracking_norms(owners) if id(module) in changed]
    if norms:
        others = random_modules(owners)
        also = f" Random in this mode as well: {join_names(others)}." if others else ""
        msg = (
            f"In training mode, so the forward pass rewrites running statistics and couples the "
            f"samples of a batch: {join_names(norms)}. Call model.eval() before.{also}"
        )
        raise BatchNormTrainingError(msg)


def _find_kinks(operator: LossOperator, batch: Any, before: KinkRecorder) -> str:
    """Say which kinks a small step of the parameters leaves, if any."""
    if not before.found:
        return ""
    after = KinkRecorder()
    with (
        moved(operator._parameters, small_step(operator._parameters)),
        warnings.catch_warnings(),
        after,
    ):
        warnings.simplefilter("ignore")  # of the moved storage of recurrent weights
        operator._plain_loss(batch)
    left = moved_off(before, after, operator._eps)
    if not left:
        return ""
    places = [f"{name} (call {index + 1}: {n} of {of})" for name, index, n, of in left]
    return (
        f"The parameters sit on a kink: {join_names(places, limit=4)} entries lie exactly where "
        f"the function is not smooth, and a small step of the parameters moves them off it."
    )

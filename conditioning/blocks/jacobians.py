"""Singular values of the input-output Jacobian of every block: how much a block bends norms."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from conditioning.blocks.block import table
from conditioning.blocks.record import BlockCall, copied, quiet, record_calls, stream_tensors
from conditioning.blocks.selection import select_blocks
from conditioning.blocks.wrappers import uncompiled, unwrapped
from conditioning.errors import (
    BatchFormatError,
    BlockSelectionError,
    CompiledModelError,
    ConditioningError,
    LossWithoutGraphError,
    RandomForwardError,
)
from conditioning.operators.base import LinearOperator
from conditioning.operators.batches import map_tensors, tensors_in
from conditioning.operators.jacobian import JacobianOperator
from conditioning.spectrum.common import check_at_least, check_between, check_counts
from conditioning.spectrum.full import NAN
from conditioning.spectrum.results import Estimate, Result
from conditioning.spectrum.singular import singular_range
from conditioning.spectrum.singular_bounds import SingularRange

if TYPE_CHECKING:
    import pandas as pd

_FEW = 3  # up to so many blocks are not worth a progress bar


@dataclass(frozen=True)
class BlockJacobian(Result):
    """Extreme singular values of the Jacobian of one call of a block.

    Attributes
    ----------
    name : str
    call : int
        Which call of the block in the forward pass, from 0.
    kind : str
        Of the block: ``identity``, ``transition``, ``plain`` or ``unknown``.
    shape : tuple of int
        Elements of the output and of the input, with the batch.
    largest, smallest : Estimate
        Of the ``min(shape)`` singular values.
    delta : Estimate
        ``max(sigma_max - 1, 1 - sigma_min)``: how far a block can change the norm of a gradient,
        relative to it.
    branch : Estimate or None
        ``||J - I||_2``, the bound that the theory has for ``delta``; ``None`` where input and
        output differ in shape, or where it was not asked for.
    num_matvecs : int
        Products with the Jacobian and its transpose.
    status : str
        As of :class:`SingularRange`, or ``undefined`` where the block has no Jacobian.
    message : str
    """

    name: str
    call: int
    kind: str
    shape: tuple[int, int]
    largest: Estimate
    smallest: Estimate
    delta: Estimate
    branch: Estimate | None
    num_matvecs: int
    status: str
    message: str

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """What ``||J^T g|| / ||g||`` can be for any gradient ``g`` at the output.

        With more outputs than inputs some gradients vanish on the way: the lower end is 0.
        """
        rows, columns = self.shape
        return (self.smallest.low if rows <= columns else 0.0), self.largest.high

    @property
    def label(self) -> str:
        """The name as it is printed, with the call where it is not the first."""
        return (self.name or "(model)") + (f" (call {self.call + 1})" if self.call else "")

    def __str__(self) -> str:
        branch = "" if self.branch is None else f", |J - I| = {self.branch}"
        return (
            f"{self.label}: sigma_max = {self.largest}, sigma_min = {self.smallest}, delta = "
            f"{self.delta}{branch} ({self.status}, {self.num_matvecs} products): {self.message}"
        )


@dataclass(frozen=True)
class BlockJacobians(Result, Sequence[BlockJacobian]):
    """The Jacobians of all blocks, in the order in which they ran; printable as a table.

    Attributes
    ----------
    blocks : tuple of BlockJacobian
    """

    blocks: tuple[BlockJacobian, ...]

    @overload
    def __getitem__(self, key: int | str) -> BlockJacobian: ...
    @overload
    def __getitem__(self, key: slice) -> BlockJacobians: ...
    def __getitem__(self, key: int | str | slice) -> BlockJacobian | BlockJacobians:
        """One block by position or name (its first call), or several by a slice."""
        if isinstance(key, slice):
            return BlockJacobians(self.blocks[key])
        if isinstance(key, str):
            for block in self.blocks:
                if block.name == key:
                    return block
            raise KeyError(key)
        return self.blocks[key]

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[BlockJacobian]:
        return iter(self.blocks)

    @property
    def num_matvecs(self) -> int:
        """Products of all blocks together."""
        return sum(block.num_matvecs for block in self.blocks)

    def to_frame(self) -> pd.DataFrame:
        """One row for each call of a block.

        Columns: block, call, depth, kind, outputs, inputs; ``sigma_max``, ``sigma_min``,
        ``delta`` and ``branch``, each also with ``_low`` and ``_high``; num_matvecs, status,
        message. What there is not is NaN.
        """
        import pandas as pd

        rows = []
        for depth, block in enumerate(self.blocks):
            row: dict[str, Any] = {
                "block": block.name,
                "call": block.call,
                "depth": depth,
                "kind": block.kind,
                "outputs": block.shape[0],
                "inputs": block.shape[1],
            }
            numbers = (block.largest, block.smallest, block.delta, block.branch or NAN)
            for name, number in zip(
                ("sigma_max", "sigma_min", "delta", "branch"), numbers, strict=True
            ):
                row |= {
                    name: number.value,
                    f"{name}_low": number.low,
                    f"{name}_high": number.high,
                }
            row |= {
                "num_matvecs": block.num_matvecs,
                "status": block.status,
                "message": block.message,
            }
            rows.append(row)
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        head = ("block", "kind", "shape", "sigma_max", "sigma_min", "delta", "|J - I|", "status")
        return table(
            head,
            [
                (
                    b.label, b.kind, f"{b.shape[0]}x{b.shape[1]}", b.largest, b.smallest, b.delta,
                    "" if b.branch is None else b.branch,
                    b.status if b.status != "undefined" else f"undefined: {b.message}",
                )
                for b in self.blocks
            ],
        )  # fmt: skip


def block_jacobians(
    model: nn.Module,
    inputs: Any,
    blocks: Any = None,
    *,
    rtol: float = 1e-2,
    max_matvecs: int = 600,
    branch: bool = True,
    failure_probability: float = 1e-6,
    seed: int | torch.Generator = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> BlockJacobians:
    r"""Extreme singular values of every block's Jacobian, on the inputs that it gets in the model.

    A gradient at the output of a block reaches its input with a norm between
    ``sigma_min`` and ``sigma_max`` times its own, so ``delta = max(sigma_max - 1, 1 -
    sigma_min)`` is the smallest number for which the block is sure to keep the norms of
    gradients to within ``1 +- delta``.

    Parameters
    ----------
    model : nn.Module
        Runs in the mode that it is in, and is left as it was. Dropout has to be off
        (``model.eval()``); normalisation layers may be in training mode.
    inputs : Tensor, tuple or dict
        As :class:`JacobianOperator` takes them.
    blocks : Blocks, str, nn.Module or iterable of these, optional
        As :func:`select_blocks` takes them. Default: what :func:`find_blocks` finds.
    rtol : float
        Wanted width of the enclosures, relative to the number or to 1, whichever is more.
    max_matvecs : int
        Products with the Jacobian and its transpose at most, for each block.
    branch : bool
        Also ``||J - I||_2`` where input and output have one shape.
    failure_probability : float
        Allowed to the enclosures of each block.
    seed : int or torch.Generator
    memory_budget : int, optional
        As of :func:`singular_range`, for each block.
    progress : bool
        Show a bar, where there are many blocks and the output is a terminal.

    Returns
    -------
    BlockJacobians
        One entry for each call: a block that is used twice has two.

    Raises
    ------
    BlockSelectionError
        If ``blocks`` matches nothing, or none of them ran.
    RandomForwardError
        If a block does not return the same twice: dropout is on, or it keeps state.
    CompiledModelError
        If a part of a block went through ``torch.compile``.
    InvalidArgumentError
        If an option is out of range.

    Notes
    -----
    The Jacobian is that of the residual stream, from where it comes in to where it leaves, as
    :attr:`Block.input_index` and :attr:`Block.output_index` say. Where the kinds were not measured,
    or no skip tells: the first floating-point tensor that the block returns, by the first one among
    its arguments that this depends on and that has its shape, else the first that it depends on.
    All else that the block is given (masks, embeddings, a second stream) is constant. A tensor
    that is passed several times, as in ``attention(x, x, x)``, is differentiated in all places.

    It is the Jacobian of the whole batch. Where samples do not see each other it is
    block diagonal: ``sigma_max`` is the largest and ``sigma_min`` the smallest over all samples.
    Normalisation in training mode couples the samples.

    Input and output are the tensors at the block's boundary, so for a block that ends in an
    activation, such as a ReLU after the addition, ``J`` is that of the activation as well.

    A block without a Jacobian (integer inputs, no dependence, an infinity) has status
    ``undefined``, NaN for its numbers, and the reason in its message.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    >>> for layer, factor in zip(model, (1.0, 0.5)):
    ...     _ = layer.weight.data.copy_(factor * torch.eye(3))
    >>> found = block_jacobians(model, torch.zeros(2, 3))
    >>> [round(float(block.delta), 6) for block in found]
    [0.0, 0.5]
    """
    check_between(0, 1, rtol=rtol)
    check_between(0, 0.5, failure_probability=failure_probability)
    check_counts(max_matvecs=max_matvecs)
    check_at_least(10, max_matvecs=max_matvecs)
    chosen = select_blocks(model, blocks, inputs)
    calls = record_calls(model, inputs, chosen)
    if not calls:
        names = ", ".join(repr(block.label) for block in chosen)
        msg = f"None of the blocks ran on these inputs: {names}."
        raise BlockSelectionError(msg)
    order = {block: index for index, block in enumerate(chosen)}
    calls.sort(key=lambda call: (call.call, order[call.block]))
    options = {
        "rtol": rtol,
        "atol": rtol,
        "failure_probability": failure_probability / 2 if branch else failure_probability,
        "seed": seed,
        "memory_budget": memory_budget,
    }
    with uncompiled(model), _bar(calls, shown=progress) as shown_calls:
        results = [_measured(call, options, max_matvecs, branch=branch) for call in shown_calls]
    return BlockJacobians(tuple(results))


@contextlib.contextmanager
def _bar(calls: list[BlockCall], *, shown: bool) -> Iterator[Iterator[BlockCall]]:
    if not (shown and len(calls) > _FEW and sys.stderr.isatty()):
        yield iter(calls)
        return
    from tqdm import tqdm

    with tqdm(calls, "Jacobians", unit="block", leave=False, dynamic_ncols=True) as bar:

        def named() -> Iterator[BlockCall]:
            for call in bar:
                bar.set_postfix_str(call.block.label[-40:])
                yield call

        yield named()


class _Chain:
    """What a block computes, as a function of the distinct tensors among its arguments."""

    def __init__(self, call: BlockCall) -> None:
        block = call.block
        self._arguments = call.args, call.kwargs
        self._places = {id(t): i for i, t in enumerate(_distinct(call))}
        self._parts = [unwrapped(part) for part in block.parts]
        # Under names that the operator finds, for its messages, and to guard their buffers.
        for index, part in enumerate(self._parts):
            name = block.label if len(self._parts) == 1 else f"{block.label}[{index}]"
            vars(self)[name] = part

    def __call__(self, *tensors: Tensor) -> Any:
        # The same object wherever it was passed: attention looks whether query and key are one.
        args, kwargs = map_tensors(lambda t: tensors[self._places[id(t)]], self._arguments)
        output = self._parts[0](*args, **kwargs)
        for part in self._parts[1:]:
            output = part(output)
        return output

    @property
    def modules(self) -> nn.ModuleList:
        return nn.ModuleList(self._parts)


class _MinusIdentity(LinearOperator):
    """``J - I``."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.shape, operator.dtype, operator.device)
        self._operator = operator

    def _matmat(self, vectors: Tensor) -> Tensor:
        return self._operator.matvec(vectors) - vectors

    def _rmatmat(self, vectors: Tensor) -> Tensor:
        return self._operator.rmatvec(vectors) - vectors


def _measured(
    call: BlockCall, options: dict[str, Any], max_matvecs: int, *, branch: bool
) -> BlockJacobian:
    try:
        return _singular_values(call, options, max_matvecs, branch=branch)
    except (RandomForwardError, CompiledModelError) as error:
        msg = f"In block {call.block.label!r}: {error}"
        raise type(error)(msg) from error
    except ConditioningError as error:
        return _undefined(call, error)


def _singular_values(
    call: BlockCall, options: dict[str, Any], max_matvecs: int, *, branch: bool
) -> BlockJacobian:
    jacobian, stream, output = _stream_jacobian(call)
    _check_replay(call)
    shifted = branch and stream.shape == output.shape
    first = singular_range(
        jacobian, max_matvecs=max_matvecs * 2 // 3 if shifted else max_matvecs, **options
    )
    bound, message = None, first.message
    if shifted:
        left = max_matvecs - jacobian.num_matvecs
        second = singular_range(
            _MinusIdentity(jacobian), max_matvecs=left, which="largest", **options
        )
        bound = second.largest
        if second.status == "one-sided":
            message += f"; |J - I|: {second.message}"
    return BlockJacobian(
        call.block.name, call.call, call.block.kind, first.shape, first.largest, first.smallest,
        _delta(first), bound, jacobian.num_matvecs, first.status, message,
    )  # fmt: skip


def _delta(found: SingularRange) -> Estimate:
    """``max(sigma_max - 1, 1 - sigma_min)``; never negative, whatever the enclosures are."""
    largest, smallest = found.largest, found.smallest
    return Estimate(
        max(largest.value - 1, 1 - smallest.value, 0.0),
        max(largest.low - 1, 1 - smallest.high, 0.0),
        max(largest.high - 1, 1 - smallest.low, 0.0),
    )


def _stream_jacobian(call: BlockCall) -> tuple[JacobianOperator, Tensor, Tensor]:
    """The Jacobian of the stream, and the tensors that it comes in and leaves by."""
    chain, tensors = _Chain(call), tuple(_distinct(call))
    output, outputs = _output(call)
    floating = _floating(tensors)
    if not floating:
        msg = "Its arguments hold no floating-point tensor to differentiate by."
        raise BatchFormatError(msg)
    candidates = sorted(floating, key=lambda t: t.shape != output.shape)
    measured = _measured_at(call.block.input_index, (call.args, call.kwargs))
    if measured is not None:
        candidates = [measured]
    for stream in candidates:
        place = next(i for i, tensor in enumerate(floating) if tensor is stream)
        with contextlib.suppress(LossWithoutGraphError):
            operator = JacobianOperator(
                chain, tensors, wrt=place, outputs=outputs, batch_statistics=True
            )
            return operator, stream, output
    inputs = "any of its floating-point inputs" if measured is None else "its input"
    msg = f"its output does not depend on {inputs} through autograd"
    raise LossWithoutGraphError(msg)


def _output(call: BlockCall) -> tuple[Tensor, int]:
    """The tensor by which the stream leaves, and its place among the floating-point ones."""
    floating = _floating(call.output)
    if not floating:
        msg = "Its output holds no floating-point tensor."
        raise BatchFormatError(msg)
    measured = _measured_at(call.block.output_index, call.output)
    place = next((i for i, tensor in enumerate(floating) if tensor is measured), 0)
    return floating[place], place


def _measured_at(index: int | None, tree: Any) -> Tensor | None:
    """The tensor at a measured place, if this call has a floating-point one there, too."""
    tensors = stream_tensors(tree)
    if index is None or index >= len(tensors) or not tensors[index].dtype.is_floating_point:
        return None
    return tensors[index]


def _distinct(call: BlockCall) -> list[Tensor]:
    return list({id(t): t for t in tensors_in((call.args, call.kwargs))}.values())


def _check_replay(call: BlockCall) -> None:
    """The block alone has to return what it returned in the model."""
    chain = _Chain(call)
    before, place = _output(call)
    with quiet(chain.modules):
        again = _floating(chain(*copied(_distinct(call))))[place]
    if again.shape == before.shape:
        gap = float(torch.linalg.vector_norm((again - before).double()))
        size = float(torch.linalg.vector_norm(before.double()))
        if gap <= 10 * torch.finfo(before.dtype).eps ** 0.5 * size:
            return
    msg = (
        "Called alone, on the inputs that it got in the model, it returns something else. It keeps "
        "state between calls (a cache: use_cache=False), or reads more than its arguments. Choose "
        "a block around or inside of it."
    )
    raise RandomForwardError(msg)


def _undefined(call: BlockCall, error: ConditioningError) -> BlockJacobian:
    tensors = [_floating(call.output), _floating((call.args, call.kwargs))]
    rows, columns = (found[0].numel() if found else 0 for found in tensors)
    return BlockJacobian(
        call.block.name, call.call, call.block.kind, (rows, columns), NAN, NAN, NAN, None, 0,
        "undefined", str(error),
    )  # fmt: skip


def _floating(tree: Any) -> list[Tensor]:
    return [t for t in tensors_in(tree) if t.dtype.is_floating_point]

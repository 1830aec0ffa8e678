"""Products for models whose parameters are sharded over ranks: FSDP2, or ``distribute_tensor``.

Every rank holds a stretch of each parameter's entries, and the same stretches of every vector. A
weight is gathered where the model reads it and freed after the operation; the backward pass of
gathering is to add up and scatter, whose backward pass is to gather, so a second derivative needs
nothing else. What autograd would keep of a gathered weight is kept as a recipe: it is gathered
again where a backward pass reads it. Small parameters are gathered together, once, and kept.

All ranks gather in the same order, as they run the same model: forward passes by its program,
backward passes because autograd's order depends on the graph only. Nothing here may depend on when
an object is collected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from conditioning.distributed import LOCAL, Group, digest
from conditioning.errors import (
    InvalidArgumentError,
    ParameterSelectionError,
    RankMismatchError,
    UnsupportedParameterError,
)
from conditioning.operators.gathering import Bundle, Stretch, local_tensor
from conditioning.operators.modules import join_names

# Parameters of at most so many entries, and together of at most so many, are gathered together and
# kept while the model's graph is.
_SMALL, _TOGETHER = 2**16, 2**20


def can_shard(process_group: Any) -> bool:
    """Whether sharded parameters can be gathered: there are ranks, and they work together."""
    return dist.is_available() and dist.is_initialized() and process_group is not LOCAL


class _Recipe(NamedTuple):
    """A view of a gathered weight, to be made again."""

    stretch: Stretch
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Gathering(dict[str, Any]):
    """A module's parameters, of which those that are sharded are gathered when they are read."""

    def __init__(self, own: Mapping[str, Any], read: Callable[[Any], Any]) -> None:
        super().__init__(own)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        return self._read(super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 -- that would be this

    def items(self) -> Any:
        return ((name, self[name]) for name in self)

    def values(self) -> Any:
        return (self[name] for name in self)


class Shards:
    """The sharded parameters of a model, and how they are gathered while it runs.

    Parameters
    ----------
    modules : sequence of Module
        Those that the loss uses.
    selected : mapping of str to Tensor
        What to differentiate by, as the model has it.
    group : Group

    Attributes
    ----------
    leaves : list of Tensor
        This rank's entries of each selected parameter.
    """

    def __init__(
        self, modules: Sequence[nn.Module], selected: Mapping[str, Tensor], group: Group
    ) -> None:
        self.group = group
        self._modules = modules
        owned = [p for m in modules for p in m._parameters.values() if p is not None]
        chosen = {id(p) for p in selected.values()}
        # By identity, and the parameters themselves, so that no other takes their place.
        self._stretches: dict[int, tuple[Tensor, Stretch]] = {
            id(p): (p, Stretch(group, p))
            for p in (*selected.values(), *owned)
            if id(p) in chosen or hasattr(p, "placements")
        }
        for key, (_, stretch) in self._stretches.items():
            if key not in chosen:
                stretch.leaf = stretch.leaf.detach()
        self._selected = [self._stretches[id(p)][1] for p in selected.values()]
        self.leaves = [stretch.leaf for stretch in self._selected]
        self._sizes = [stretch.numel for stretch in self._selected]
        self.numel = sum(self._sizes)
        counts = [sum(p is q for q in owned) for p in owned]
        self._tied = {id(p) for p, count in zip(owned, counts, strict=True) if count > 1}
        self._bundles = self._bundled([id(p) for p in selected.values()])
        self._held: dict[int, Tensor] = {}
        self._known: dict[int, tuple[StorageWeakRef, Stretch]] = {}

    def _bundled(self, selected: Sequence[int]) -> dict[int, tuple[Sequence[int], Bundle]]:
        """Which parameters are gathered together, by each one's identity.

        Of those that are differentiated by the smallest ones; every other one by itself.
        """
        sizes = {key: stretch.numel for key, (_, stretch) in self._stretches.items()}
        groups: list[list[int]] = []
        for dtype in dict.fromkeys(leaf.dtype for leaf in self.leaves):
            small, room = [], _TOGETHER
            for key in sorted(selected, key=sizes.__getitem__):
                if self._stretches[key][1].leaf.dtype == dtype:
                    room -= sizes[key]
                    if room >= 0 and sizes[key] <= _SMALL:
                        small.append(key)
            groups.append(small)
        together = {key for small in groups for key in small}
        groups += [[key] for key in self._stretches if key not in together]
        return {
            key: (keys, bundle)
            for keys in groups
            for bundle in [Bundle(self.group, [self._stretches[k][1] for k in keys])]
            for key in keys
        }

    # -- vectors ----------------------------------------------------------------------------

    def local_part(self, vector: Tensor) -> Tensor:
        """``(n,)`` or ``(n, k)`` to this rank's entries."""
        parts = vector.split(self._sizes)
        return torch.cat([p[s.begin : s.end] for p, s in zip(parts, self._selected, strict=True)])

    def whole(self, part: Tensor) -> Tensor:
        """Inverse of :meth:`local_part`, on every rank."""
        pieces = part.split([s.end - s.begin for s in self._selected])
        return torch.cat(Bundle(self.group, self._selected).gather_rows(pieces))

    def sum(self, partial: Tensor) -> Tensor:
        """Add up what the ranks found on their entries."""
        return self.group.start_sum(partial.clone())()

    def largest(self, value: float) -> int:
        """The largest of the ranks' values."""
        return int(max(self.group.gather(value)))

    def confirm(self, *label: Any) -> None:
        """See that all ranks are about to do the same.

        Raises
        ------
        RankMismatchError
            On every rank, if they are not.
        """
        if not self.group.start_comparison(digest(label))():
            msg = (
                "The ranks do not do the same: each has to multiply equally many vectors with one "
                "operator, in one order, whatever its own part of the data."
            )
            raise RankMismatchError(msg)

    # -- weights ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """Gather weights where the model reads them, and keep none for the backward passes."""
        reshard(self._modules)
        self._refuse_moved()
        with contextlib.ExitStack() as stack:
            stack.callback(self._held.clear)
            stack.enter_context(_fsdp_aside(self._modules))
            for module in self._modules:
                own = module._parameters
                if any(id(p) in self._stretches for p in own.values()):
                    vars(module)["_parameters"] = _Gathering(own, self._read)
                    stack.callback(vars(module).__setitem__, "_parameters", own)
                    if isinstance(module, nn.RNNBase):  # keeps a list of its own
                        flat = module._flat_weights
                        stack.callback(vars(module).__setitem__, "_flat_weights", flat)
                        names = module._flat_weights_names
                        vars(module)["_flat_weights"] = [getattr(module, n) for n in names]
            outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
            pack, unpack = outer or (torch.Tensor.detach, lambda kept: kept)
            stack.enter_context(
                torch.autograd.graph.saved_tensors_hooks(
                    lambda tensor: self._recipe(tensor) or pack(tensor),
                    lambda kept: self._cook(kept) if isinstance(kept, _Recipe) else unpack(kept),
                )
            )
            yield

    def _read(self, parameter: Any) -> Any:
        if id(parameter) not in self._stretches:
            return parameter
        if id(parameter) in self._held:
            return self._held[id(parameter)]
        _, stretch = self._stretches[id(parameter)]
        together, bundle = self._bundles[id(parameter)]
        found = bundle.gather()
        if len(together) > 1:
            self._held |= dict(zip(together, found, strict=True))
            return self._held[id(parameter)]
        (whole,) = found
        self._note(whole, stretch)
        if id(parameter) in self._tied:  # one tensor under both names, as in the model
            self._held[id(parameter)] = whole
        return whole

    def _note(self, whole: Tensor, stretch: Stretch) -> None:
        storage = whole.untyped_storage()
        self._known[storage.data_ptr()] = (StorageWeakRef(storage), stretch)

    def _recipe(self, tensor: Tensor) -> _Recipe | None:
        if tensor.layout != torch.strided:
            return None
        address = tensor.untyped_storage().data_ptr()
        weak, stretch = self._known.get(address, (None, None))
        if weak is None or stretch is None:
            return None
        if weak.expired():  # another tensor has the memory now
            del self._known[address]
            return None
        return _Recipe(stretch, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def _cook(self, recipe: _Recipe) -> Tensor:
        with torch.no_grad():
            bundle = Bundle(self.group, [recipe.stretch])
            (whole,) = bundle.gather_rows([recipe.stretch.leaf.detach().reshape(-1)])
            self._note(whole, recipe.stretch)
            return whole.as_strided(recipe.size, recipe.stride, recipe.offset)

    def _refuse_moved(self) -> None:
        owned = {id(p) for m in self._modules for p in m._parameters.values()}
        for key, (parameter, stretch) in self._stretches.items():
            local, leaf = local_tensor(parameter), stretch.leaf
            same = local.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()
            if key not in owned or not same or local.dtype != leaf.dtype:
                msg = (
                    f"A parameter of shape {stretch.shape} was replaced or moved since this "
                    f"operator was made. Make a new operator."
                )
                raise ParameterSelectionError(msg)


# -- FSDP2 ----------------------------------------------------------------------------------------


def _fsdp_states(modules: Iterable[nn.Module]) -> Iterator[Any]:
    if not dist.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in modules:
        if isinstance(module, FSDPModule):
            yield module._get_fsdp_state()


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let FSDP2 modules free what a forward pass without a backward pass left gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def _fsdp_aside(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Take the hooks of FSDP2 off the modules: its gathering cannot be differentiated twice."""
    states = {id(state) for state in _fsdp_states(modules)}
    saved = []
    for module in modules:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            ours = [k for k, hook in hooks.items() if id(getattr(hook, "__self__", None)) in states]
            if ours:
                saved.append((hooks, list(hooks.items())))
                for key in ours:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, items in saved:
            hooks.clear()
            hooks.update(items)


def shards_of(
    modules: Sequence[nn.Module], selected: Mapping[str, Tensor], process_group: Any
) -> Shards | None:
    """Find out how a model is sharded; ``None`` if it is not.

    Raises
    ------
    UnsupportedParameterError
        If a parameter is sharded in another way than along its first axis over one group of
        ranks, or FSDP2 computes in another precision than that of the parameters, or offloads.
    InvalidArgumentError
        If ``process_group`` is another group than that of the shards.
    """
    named = dict(selected)
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and not any(parameter is p for p in named.values()):
                named[f"{type(module).__name__}.{name}"] = parameter
    sharded = {name: p for name, p in named.items() if hasattr(p, "placements")}
    if not sharded:
        return None
    refused = [f"{name} {tuple(p.placements)}" for name, p in sharded.items() if not _fits(p)]
    if refused:
        msg = (
            f"Sharded in a way that is not supported: {join_names(refused, limit=3)}. Supported "
            f"are Shard(0) and Replicate() on a mesh of one axis, as fully_shard(model) makes "
            f"them; neither hybrid sharding nor tensor parallelism."
        )
        raise UnsupportedParameterError(msg)
    meshes: list[Any] = [p.device_mesh for p in cast("dict[str, Any]", sharded).values()]
    groups = [mesh.get_group() for mesh in meshes]
    ranks = {tuple(dist.get_process_group_ranks(group)) for group in groups}
    if len(ranks) > 1:
        msg = (
            f"The parameters are sharded over several groups of ranks: {sorted(ranks)}. Use one "
            f"device mesh for the whole model."
        )
        raise UnsupportedParameterError(msg)
    for state in _fsdp_states(modules):
        _refuse_policies(state)
    group = groups[0]
    given = not isinstance(process_group, str)
    if given and tuple(dist.get_process_group_ranks(process_group)) not in ranks:
        msg = "process_group has other ranks than the mesh of the shards. Leave it at 'auto'."
        raise InvalidArgumentError(msg)
    return Shards(modules, selected, Group(group))


def _fits(parameter: Any) -> bool:
    from torch.distributed.tensor import Replicate, Shard

    if parameter.device_mesh.ndim != 1:
        return False
    (placement,) = parameter.placements
    # Exactly these classes: strided shards derive from Shard and lie otherwise.
    return type(placement) is Replicate or (type(placement) is Shard and placement.dim == 0)


def _refuse_policies(state: Any) -> None:
    policy = state._mp_policy
    if any((policy.param_dtype, policy.reduce_dtype, policy.output_dtype)):
        msg = (
            f"FSDP's mixed precision ({policy}) is not applied here: products are those of the "
            f"parameters' own dtype. Shard the model without mp_policy for the analysis."
        )
        raise UnsupportedParameterError(msg)
    group = state._fsdp_param_group
    if group is not None and getattr(group.offload_policy, "pin_memory", None) is not None:
        msg = (
            "FSDP's CPU offloading is not supported here. Shard the model without offload_policy "
            "for the analysis."
        )
        raise UnsupportedParameterError(msg)

"""Which modules a callable uses, and what about them matters: compiled, random, normalising."""

from __future__ import annotations

import contextlib
import dis
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from conditioning.errors import CompiledModelError, ParameterSelectionError

_MAX_DEPTH = 4


@dataclass
class _Search:
    """What a walk through a callable has met so far."""

    bound: dict[str, nn.Module] = field(default_factory=dict)
    by_global: dict[str, nn.Module] = field(default_factory=dict)
    compiled: list[str] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def visit(self, thing: Any, name: str, depth: int, *, from_global: bool) -> None:
        if id(thing) in self.seen or depth > _MAX_DEPTH:
            return
        self.seen.add(id(thing))
        if hasattr(thing, "_torchdynamo_orig_callable") and not isinstance(thing, nn.Module):
            self.compiled.append(f"the function {getattr(thing, '__name__', name)!r}")
            return

        def go(inner: Any, inner_name: str, *, by_global: bool = False) -> None:
            self.visit(inner, inner_name, depth + 1, from_global=from_global or by_global)

        if isinstance(thing, nn.Module):
            found = self.by_global if from_global else self.bound
            key = name
            while key in found:
                key += "_"
            found[key] = thing
        elif isinstance(thing, functools.partial):
            for value in (thing.func, *thing.args):
                go(value, name)
            for key, value in thing.keywords.items():
                go(value, key)
        elif isinstance(thing, types.MethodType):
            go(thing.__self__, name)
            if not isinstance(thing.__self__, nn.Module):
                go(thing.__func__, name)
        elif isinstance(thing, types.FunctionType):
            for inner_name, value in _captured(thing):
                go(value, inner_name)
            for inner_name in _global_names(thing.__code__):
                value = thing.__globals__.get(inner_name)
                # Only things that may hold a network; a walk through libraries would never end.
                if isinstance(value, (nn.Module, functools.partial)) or (
                    isinstance(value, types.FunctionType) and value.__globals__ is thing.__globals__
                ):
                    go(value, inner_name, by_global=True)
        elif isinstance(thing, dict):
            for key, value in thing.items():
                go(value, f"{name}.{key}")
        elif isinstance(thing, (list, tuple)):
            for index, value in enumerate(thing):
                go(value, f"{name}.{index}")
        elif hasattr(thing, "__dict__") and not isinstance(thing, (type, types.ModuleType)):
            for key, value in vars(thing).items():
                if isinstance(value, nn.Module):
                    go(value, key)


def _captured(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Names and values that a function carries: its closure and its default arguments."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        # A cell is empty while its name is assigned later only.
        with contextlib.suppress(ValueError):
            yield name, cell.cell_contents
    code, defaults = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount]
    yield from zip(names[len(names) - len(defaults) :], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()


def _global_names(code: types.CodeType) -> Iterator[str]:
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            yield step.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _outermost(found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Drop modules that are part of another found one."""
    inner = {id(part) for module in found.values() for part in list(module.modules())[1:]}
    return {name: module for name, module in found.items() if id(module) not in inner}


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def find_modules(
    function: Callable[..., Any], *, exact: bool, also: Mapping[str, Any] | None = None
) -> dict[str, nn.Module]:
    """Return the outermost modules that a callable uses, by name.

    Parameters
    ----------
    function : callable
        An ``nn.Module``, a bound method, a ``functools.partial``, a function with
        modules in its closure, default arguments or referenced globals, or an
        object with modules as attributes.
    exact : bool
        Whether the answer must be beyond doubt, because parameters are taken from it.
    also : mapping, optional
        More callables, searched without that demand; their names end in a colon.

    Returns
    -------
    dict of str to Module
        The name is empty where there is one module only.

    Raises
    ------
    CompiledModelError
        If something on the way went through ``torch.compile``.
    ParameterSelectionError
        If ``exact`` and there is no module, or more than one reading.
    """
    search = _Search()
    search.visit(function, "", 0, from_global=False)
    owners = _outermost(search.bound)
    extra = {
        name: module
        for name, module in _outermost(search.bound | search.by_global).items()
        if name not in owners and _has_parameters(module)
    }
    if exact and not isinstance(function, nn.Module):
        trained = [name for name, module in owners.items() if _has_parameters(module)]
        if (trained and extra) or (not trained and len(extra) != 1):
            found = ", ".join(repr(name) for name in (*trained, *extra)) or "none"
            msg = (
                f"Cannot tell which parameters the callable {_describe(function)} trains: modules "
                f"with parameters that it refers to: {found}. Pass params= (a module, parameters, "
                f"or a dict of names and parameters)."
            )
            raise ParameterSelectionError(msg)
    owners |= extra
    with_parameters = [name for name, module in owners.items() if _has_parameters(module)]
    if len(with_parameters) == 1:
        only = with_parameters[0]
        owners = {("" if name == only else name): module for name, module in owners.items()}
    inner = _Search(seen=search.seen)
    for name, other in (also or {}).items():
        inner.visit(other, name, 0, from_global=False)
    for name, module in (inner.bound | inner.by_global).items():
        owners[f"{name}:"] = module
    _refuse_compiled(search.compiled + inner.compiled, owners)
    return owners


def _describe(function: Callable[..., Any]) -> str:
    return repr(getattr(function, "__qualname__", type(function).__name__))


def _refuse_compiled(functions: list[str], owners: dict[str, nn.Module]) -> None:
    found = list(functions)
    for name, module in named_modules(owners):
        label = f"the module {name!r}" if name else "the model"
        if "_orig_mod" in module._modules:
            found.append(f"{label} (torch.compile)")
        elif getattr(module, "_compiled_call_impl", None) is not None:
            found.append(f"{label} (module.compile())")
        elif hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            found.append(f"{label} (compiled forward)")
    if found:
        msg = (
            f"Compiled: {join_names(found)}. torch.compile supports one backward pass only, and a "
            f"Hessian product needs two. Pass the original: `model._orig_mod` of what "
            f"torch.compile returned, the function before compiling, or a copy of the model on "
            f"which .compile() was not called."
        )
        raise CompiledModelError(msg)


def named_modules(owners: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every module under the owners once, with its full name."""
    seen: set[nn.Module] = set()
    for prefix, owner in owners.items():
        yield from owner.named_modules(memo=seen, prefix=prefix.rstrip(":"))


def join_names(names: list[str], limit: int = 6) -> str:
    """Write names as ``a, b, c and 7 more``."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def random_modules(owners: dict[str, nn.Module]) -> list[str]:
    """Names of the modules that draw random numbers in the mode they are in."""
    names = []
    for name, module in named_modules(owners):
        if not module.training:
            continue
        if isinstance(module, _DropoutNd):
            active = module.p > 0
        elif isinstance(module, nn.RNNBase):
            active = module.dropout > 0 and module.num_layers > 1
        elif isinstance(module, nn.MultiheadAttention):
            active = module.dropout > 0
        elif isinstance(module, nn.RReLU):
            active = module.lower != module.upper
        else:
            # Stochastic depth and its relatives live in other libraries: go by their names.
            rate = next((getattr(module, a) for a in ("drop_prob", "p") if hasattr(module, a)), 0)
            named_so = "drop" in type(module).__name__.lower()
            active = named_so and isinstance(rate, (int, float)) and rate > 0
        if active:
            names.append(f"{name or 'model'} ({type(module).__name__})")
    return names


def tracking_norms(owners: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Normalisation layers that rewrite their running statistics in the mode they are in."""
    return [
        (f"{name or 'model'} ({type(module).__name__})", module)
        for name, module in named_modules(owners)
        if isinstance(module, _NormBase)
        and module.training
        and module.track_running_stats
        and module.running_mean is not None
    ]

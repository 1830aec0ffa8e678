"""Look through what wraps a model or a part of it: data parallelism, compilation, checkpointing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

# Attribute under which torch.compile, the checkpoint wrapper and FSDP1 keep what they wrap.
_INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# These call it "module", a name that a user's own class may have for something else.
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def inner_of(module: nn.Module) -> tuple[str, nn.Module] | None:
    """Attribute name and module that a wrapper wraps, ``None`` where there is no wrapper."""
    for attribute in _INNER:
        # A scripted module's dictionary has no get().
        if attribute in module._modules:
            return attribute, module._modules[attribute]  # type: ignore[return-value]
    if isinstance(module, _PARALLEL):
        return "module", module.module
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what is inside all wrappers around a module."""
    found = inner_of(module)
    while found is not None:
        module = found[1]
        found = inner_of(module)
    return module


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Every module once, as (name, what is called, what is inside its wrappers).

    Names are those of the model without wrappers, so that they stay the same when a
    model is compiled or distributed.
    """
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        inner = unwrapped(module)
        if inner in seen:
            return
        seen.add(inner)
        yield name, module, inner
        for key, child in inner._modules.items():
            if child is not None:
                yield from visit(f"{name}.{key}" if name else key, child)

    return visit("", model)


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Let compiled modules run as they were written: what happens inside is to be seen."""
    with contextlib.ExitStack() as stack:
        for module in list(model.modules()):
            if "_orig_mod" in module._modules and "forward" in vars(module):
                original = module._modules["_orig_mod"]
                assert original is not None
                stack.callback(vars(module).__setitem__, "forward", vars(module)["forward"])
                vars(module)["forward"] = original.__call__
            compiled = getattr(module, "_compiled_call_impl", None)
            if compiled is not None:
                stack.callback(setattr, module, "_compiled_call_impl", compiled)
                module._compiled_call_impl = None
        yield

"""Why nothing was recorded, in words that say what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from conditioning.norms.recorder import Slot
from conditioning.operators.modules import join_names


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, went through ``torch.compile`` as a module."""
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def why_nothing_fired(model: nn.Module, names: Sequence[str]) -> str:
    """Explain hooks that did not run."""
    start = f"The hooks of {join_names(list(names))} did not run in this step."
    if is_compiled(model):
        return (
            f"{start} The model is compiled, and hooks that are added after its first forward "
            f"pass are ignored. Start tracking before the first forward pass, or call "
            f"torch._dynamo.reset() once tracking has started."
        )
    return (
        f"{start} Look for: a model that torch.compile has run before tracking started (start "
        f"earlier, or call torch._dynamo.reset()); another object being trained (a copy made "
        f"by deepcopy, DataParallel or prepare()); blocks that the forward pass does not use; "
        f"a forward pass that was over before tracking started, or was under torch.no_grad()."
    )


def why_unseen(names: Mapping[int, str], slots: Sequence[Slot]) -> str:
    """Explain blocks that took no part in a step; ``names`` by position."""
    reasons: dict[str, list[str]] = {}
    for index, name in names.items():
        mine = [slot for slot in slots if slot.block == index]
        if not mine:
            reason = "did not run"
        elif mine[-1].returned:
            reason = f"returned no tensor that can be read ({mine[-1].returned})"
        else:
            reason = (
                "ran without gradients (frozen, detached, or under torch.no_grad), or the loss "
                "does not depend on the output"
            )
        reasons.setdefault(reason, []).append(name)
    return " ".join(
        f"No gradient passed through {join_names(found)}: {reason}."
        for reason, found in reasons.items()
    )


def why_no_gradient(slots: Sequence[Slot]) -> str:
    """Explain calls of blocks to which no gradient came back."""
    finished = [slot for slot in slots if slot.finished]
    if not finished:
        return "The tracked blocks began to run but did not end: the forward pass failed."
    if all(slot.mode == "unrecorded" for slot in finished):
        return (
            "The tracked blocks ran under torch.no_grad() only, so there is no gradient to "
            "measure. Run the forward pass with gradients on."
        )
    if all(slot.returned for slot in finished):
        kinds = join_names(sorted({slot.returned for slot in finished}))
        return (
            f"The tracked blocks return no tensor that can be read ({kinds}): track blocks that "
            f"return tensors, tuples, dicts or dataclasses of tensors."
        )
    if not any(slot.differentiable for slot in finished):
        return (
            "The outputs of the tracked blocks need no gradient: their parameters and inputs "
            "are frozen. Track blocks that come after a parameter with requires_grad=True, or "
            "call inputs.requires_grad_() first."
        )
    return (
        "No gradient came back to the tracked blocks. Either no backward pass ran in this step "
        "(call loss.backward() before the optimizer steps), or the loss does not depend on "
        "these blocks: look for .detach() behind them."
    )


def folded_message(count: int) -> str:
    """Warn that several passes were counted as one step."""
    return (
        f"{count} forward passes were counted as one step, because no optimizer that moves the "
        f"tracked blocks stepped. Call norms.step() after each step of your own."
    )

"""The model as a checkup runs it: as in training, with the chance taken out, or as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from conditioning.blocks.wrappers import uncompiled
from conditioning.operators.modules import join_names, random_modules, tracking_norms


@dataclass(frozen=True)
class Mode:
    """In which mode a model runs, in words."""

    name: str
    notes: tuple[str, ...]
    couples_samples: bool


@contextlib.contextmanager
def steady(model: nn.Module, *, gently: bool = False) -> Iterator[Mode]:
    """Run a model as in its own mode, but so that it returns the same twice; restored after.

    In training mode batch normalisation takes the statistics of the batch, as in training, but
    leaves the running ones alone; dropout and all else that ``eval()`` switches is off. In
    evaluation mode nothing changes.

    Parameters
    ----------
    model : nn.Module
    gently : bool
        Switch only the modules that are known to be random.

    Yields
    ------
    Mode
    """
    modules = list(model.modules())
    random = random_modules({"": model})
    names = [text.rsplit(" (", 1)[0] for text in random]
    inside = dict(model.named_modules())
    chancy = {id(inside.get(name, model)) for name in names}
    norms: list[Any] = [module for _, module in tracking_norms({"": model})]
    by_batch = any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
        for m in modules
    )
    notes = []
    if random:
        notes.append(f"off for the measurement: {join_names(random)}")
    if norms:
        notes.append("normalisation by the statistics of each batch, running ones left alone")
    if any(isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) for m in modules):
        notes.append("attention by its math path, which can be differentiated twice")
    training = any(module.training for module in modules)
    with contextlib.ExitStack() as stack:
        stack.enter_context(uncompiled(model))
        for module in modules:
            stack.callback(setattr, module, "training", module.training)
            if not gently or id(module) in chancy:
                module.training = False
        for module in norms:
            stack.callback(setattr, module, "track_running_stats", module.track_running_stats)
            module.training, module.track_running_stats = True, False
        # The fused encoder layer of evaluation mode calls none of the modules inside it.
        fast = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        # cuDNN's recurrent layers have no backward pass in evaluation mode.
        if any(isinstance(m, nn.RNNBase) for m in modules):
            stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
            torch.backends.cudnn.enabled = False
        name = "as in training, without chance" if training else "evaluation"
        yield Mode(name, tuple(notes), by_batch)

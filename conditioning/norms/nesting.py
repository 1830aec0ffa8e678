"""How tracked blocks lie inside each other, and inside the model."""

from __future__ import annotations

from torch import nn

from conditioning.blocks import Blocks


def containers(blocks: Blocks) -> list[tuple[int, ...]]:
    """For each block the positions of the blocks that contain it."""
    own = [{id(part) for part in block.parts} for block in blocks]
    inside = [
        {id(m) for part in block.parts for m in part.modules()} - mine
        for block, mine in zip(blocks, own, strict=True)
    ]
    return [
        tuple(i for i, other in enumerate(inside) if id(block.module) in other) for block in blocks
    ]


def ancestors(model: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """Modules that contain every block without being one: their calls begin forward passes."""
    wanted = {id(part) for block in blocks for part in block.parts}
    return [
        module
        for module in model.modules()
        if id(module) not in wanted and wanted <= {id(part) for part in module.modules()}
    ]

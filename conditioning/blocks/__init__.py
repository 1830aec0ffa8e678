"""Blocks of a model: residual units and others, found by structure or by running it."""

from conditioning.blocks.block import Block, Blocks, Kind
from conditioning.blocks.jacobians import BlockJacobian, BlockJacobians, block_jacobians
from conditioning.blocks.record import BlockCall, record_calls
from conditioning.blocks.selection import find_blocks, select_blocks
from conditioning.blocks.split import BlockSplit, BlockSplits, split_blocks

__all__ = [
    "Block",
    "BlockCall",
    "BlockJacobian",
    "BlockJacobians",
    "BlockSplit",
    "BlockSplits",
    "Blocks",
    "Kind",
    "block_jacobians",
    "find_blocks",
    "record_calls",
    "select_blocks",
    "split_blocks",
]

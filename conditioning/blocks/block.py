"""What a block is, and a table of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn

from conditioning.blocks.wrappers import unwrapped
from conditioning.errors import BlockSelectionError

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["identity", "transition", "plain", "unknown"]
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Block:
    """One unit of depth: where a signal enters, where it leaves, and what its skip is.

    Attributes
    ----------
    name : str
        As in ``model.named_modules()``, without the parts that wrappers add. A run of
        children of an ``nn.Sequential`` is called ``parent.first-last``.
    module : nn.Module
        Where the input enters.
    last : nn.Module
        Where the output leaves: ``module`` itself, or the last child of a run.
    kind : {"identity", "transition", "plain", "unknown"}
        ``identity``: the input is added to what a branch makes of it, also where an activation or
        a normalisation follows. ``transition``: the shape changes, or the skip goes through a
        layer, or a bare layer stands between residual blocks and changes the shape. ``plain``:
        no skip was seen; one that is added otherwise than by an operation that adds two tensors,
        such as ``torch.stack([x, f(x)]).sum(0)``, is not. ``unknown``: nothing was run.
    note : str
        What was seen, in a few words.
    parts : tuple of nn.Module
        What runs, in order: ``(module,)``, or all children of a run.
    input_shape, output_shape : tuple of int or None
        Of the first call, with its batch axis; ``None`` where nothing was run.
    input_index, output_index : int or None
        Which tensor the residual stream is where it comes in and where it leaves: its position,
        from 0, among the floating-point and complex tensors of ``(args, kwargs)``, and among those
        of what is returned, in the order in which they are passed; containers are gone through
        from the left, and a tensor that is passed twice counts twice. For ``forward(mask, h)``
        that adds to ``h`` the first is 1. ``None`` where it was not seen: nothing was run, or there
        is no skip and more than one such tensor.
    """

    name: str
    module: nn.Module
    last: nn.Module
    kind: Kind = "unknown"
    note: str = ""
    parts: tuple[nn.Module, ...] = field(default=(), repr=False)
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    input_index: int | None = None
    output_index: int | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            if self.module is not self.last:
                msg = f"The block {self.name!r} is a run: pass its modules as parts."
                raise BlockSelectionError(msg)
            object.__setattr__(self, "parts", (self.module,))

    @property
    def label(self) -> str:
        """The name as it is printed: the model itself has an empty one."""
        return self.name or "(model)"

    @property
    def classes(self) -> str:
        """Class names of the parts, joined by ``+``."""
        return "+".join(type(unwrapped(part)).__name__ for part in self.parts)

    @property
    def shapes(self) -> str:
        """Shapes of input and output as text, empty where nothing was run."""
        if self.input_shape is None or self.output_shape is None:
            return ""
        return f"{_shape_text(self.input_shape)} -> {_shape_text(self.output_shape)}"


class Blocks(Sequence[Block]):
    """Blocks in order, printable as a table.

    Parameters
    ----------
    blocks : iterable of Block

    Raises
    ------
    BlockSelectionError
        If two blocks have one name.
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = tuple(blocks)
        names = [block.name for block in self._blocks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            msg = f"Blocks with one and the same name: {', '.join(map(repr, twice))}."
            raise BlockSelectionError(msg)

    @overload
    def __getitem__(self, key: int | str) -> Block: ...
    @overload
    def __getitem__(self, key: slice) -> Blocks: ...
    def __getitem__(self, key: int | str | slice) -> Block | Blocks:
        """One block by position or name, or several by a slice."""
        if isinstance(key, slice):
            return Blocks(self._blocks[key])
        if isinstance(key, str):
            if key not in self.names:
                raise KeyError(key)
            return self._blocks[self.names.index(key)]
        return self._blocks[key]

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(block.name for block in self._blocks)

    @property
    def transitions(self) -> tuple[str, ...]:
        """Names of the transition blocks."""
        return tuple(block.name for block in self._blocks if block.kind == "transition")

    def to_frame(self) -> pd.DataFrame:
        """One row for each block: block, class, kind, input_shape, output_shape, note."""
        import pandas as pd

        rows = [(b.name, b.classes, b.kind, b.input_shape, b.output_shape, b.note) for b in self]
        columns = ["block", "class", "kind", "input_shape", "output_shape", "note"]
        return pd.DataFrame(rows, columns=columns)

    def __str__(self) -> str:
        head = ("block", "class", "kind", "input -> output", "note")
        return table(head, [(b.label, b.classes, b.kind, b.shapes, b.note) for b in self])

    def __repr__(self) -> str:
        return f"Blocks({', '.join(block.label for block in self)})"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as text in aligned columns; columns that are empty throughout are left out."""
    cells = [[str(cell) for cell in row] for row in rows]
    kept = [i for i in range(len(head)) if not rows or any(row[i] for row in cells)]
    lines = [[line[i] for i in kept] for line in ([str(cell) for cell in head], *cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _shape_text(shape: Shape) -> str:
    return "x".join(str(size) for size in shape) or "scalar"

"""The nets that *Demystifying ResNet* compares, by the names that tables and figures use.

0.01 × Xavier is what the paper calls zero initialisation. The plain nets are made of units of two
matrices, so that activations in the middle stand where those of the 2-shortcut net stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from conditioning.errors import InvalidArgumentError
from experiments.models.shortcut_net import Activation, Init, ShortcutNet

TWO = "2-shortcut, 0.01 Xavier"
TWO_XAVIER = "2-shortcut, Xavier"
ORTHOGONAL = "plain, orthogonal"
XAVIER = "plain, Xavier"
ONE = "1-shortcut, 0.01 Xavier"
THREE = "3-shortcut, 0.01 Xavier"


@dataclass(frozen=True)
class ShortcutKind:
    """How one kind of net is built and initialised.

    Parameters
    ----------
    unit_depth : int
        Matrices in a unit; ``n`` where there are shortcuts.
    init : {"xavier", "orthogonal"}
        Initial weights.
    scale : float
        Factor on them.
    shortcut : bool
        Whether units have one.
    """

    unit_depth: int
    init: Init
    scale: float = 1.0
    shortcut: bool = True

    def build(
        self,
        dim: int,
        num_layers: int,
        seed: int,
        *,
        mid: str | Activation | None = None,
        device: torch.device | str | None = None,
    ) -> ShortcutNet:
        """Build a net of ``num_layers`` matrices, its weights drawn from ``seed``.

        Raises
        ------
        InvalidArgumentError
            If units of this depth do not add up to that many layers.
        """
        num_units, rest = divmod(num_layers, self.unit_depth)
        if rest:
            msg = f"{num_layers} layers are no whole number of units of {self.unit_depth}."
            raise InvalidArgumentError(msg)
        return ShortcutNet(
            dim, num_units, self.unit_depth, mid=mid, shortcut=self.shortcut, init=self.init,
            scale=self.scale, generator=torch.Generator().manual_seed(seed), device=device,
        )  # fmt: skip


SHORTCUT_KINDS: Mapping[str, ShortcutKind] = MappingProxyType(
    {
        TWO: ShortcutKind(2, "xavier", 0.01),
        TWO_XAVIER: ShortcutKind(2, "xavier"),
        ORTHOGONAL: ShortcutKind(2, "orthogonal", shortcut=False),
        XAVIER: ShortcutKind(2, "xavier", shortcut=False),
        ONE: ShortcutKind(1, "xavier", 0.01),
        THREE: ShortcutKind(3, "xavier", 0.01),
    }
)

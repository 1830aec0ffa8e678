"""Sizes of networks, checked before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conditioning.errors import InvalidArgumentError


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Reject the first of some named sizes that is not a positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            msg = f"{name} must be a positive integer, got {size!r}."
            raise InvalidArgumentError(msg)

"""How much memory a device has free, and how to say it."""

from __future__ import annotations

import os

import torch

_UNKNOWN = 4 * 2**30


def available_bytes(device: torch.device) -> int:
    """Bytes that are free now on ``device`` (4 GiB where the system does not tell)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return _UNKNOWN


def format_bytes(count: float) -> str:
    """``1536`` becomes ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"

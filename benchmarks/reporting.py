"""Results of benchmarks: what they depend on, tables, files."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Timing

RESULTS = Path(__file__).parent / "results"


def environment(threads: int, device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    packages = {}
    for name in ("torch", "wandb", "torchlens"):
        if importlib.util.find_spec(name) is not None:
            packages[name] = importlib.metadata.version(name)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "torch threads": threads,
        "python": platform.python_version(),
        "packages": packages,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(
    title: str, timings: Sequence[Timing], memory: Mapping[str, float | None] | None = None
) -> str:
    """A table to read, one variant in a line."""
    width = max(len(timing.label) for timing in timings)
    lines = [
        title,
        f"  {'':{width}}  {'ratio [95 %]':21}  {'processor time':21}  {'ms a step':>9}  "
        f"{'peak, MiB':>9}",
    ]
    for timing in timings:
        peak = (memory or {}).get(timing.label)
        shown = "-" if peak is None else f"{peak:.0f}"
        lines.append(
            f"  {timing.label:{width}}  {timing.ratio!s:21}  {timing.processor_ratio!s:21}  "
            f"{timing.milliseconds:9.1f}  {shown:>9}"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    """Report progress."""
    print(f"\r{text}", end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def write(folder: Path, name: str, report: dict[str, Any], texts: list[str]) -> None:
    """Write ``name.json`` and ``name.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    head = ", ".join(f"{key}: {value}" for key, value in report["environment"].items())
    (folder / f"{name}.txt").write_text("\n\n".join([head, *texts]) + "\n", "utf-8")

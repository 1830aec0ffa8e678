"""What communication costs in a Hessian product: ``python -m benchmarks.ranks``.

Two and four processes over gloo on this machine multiply one vector at a time, all at once: each by
itself with its own batch, data-parallel with and without overlap, and with sharded parameters. The
share of communication is what a product takes beyond that of a rank by itself, at the same batch:
by the clock, which says something where each rank has a core, and of the processor's time.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from benchmarks.problems import ResNet20
from benchmarks.reporting import RESULTS, environment, say, write
from conditioning import HessianOperator
from conditioning.operators.hessian import HessianGraph

VARIANTS = ("alone", "overlapped", "not overlapped", "sharded")
_ROUNDS, _QUICK_ROUNDS = 9, 4


class ResidualNet(nn.Module):
    """Eight fully connected residual layers of one width."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(8))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.3 * torch.tanh(layer(x))
        logits: Tensor = self.head(x)
        return logits


PROBLEMS: dict[str, tuple[str, Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "resnet20": ("ResNet-20, 16 images of 3x32x32 a rank", ResNet20, 16, (3, 32, 32)),
    "dense": ("8 residual layers of width 256, batch 256 a rank", ResidualNet, 256, (256,)),
}


def _products(name: str, rank: int) -> dict[str, Callable[[], Any]]:
    """A product with one vector, by variant."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _, build, batch, shape = PROBLEMS[name]

    def operator(process_group: Any, *, shard: bool = False) -> HessianOperator:
        torch.manual_seed(0)
        model = build().eval()
        if shard:
            fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        torch.manual_seed(1 + rank)
        data = torch.randn(batch, *shape), torch.randint(10, (batch,))
        loss = nn.functional.cross_entropy
        return HessianOperator(model, loss, data, check=False, process_group=process_group)

    alone, parallel = operator(None), operator(dist.group.WORLD)
    sharded = operator("auto", shard=True)
    vector = torch.randn(alone.shape[0], generator=torch.Generator().manual_seed(2))
    part = sharded.local_part(vector)

    def apart() -> Tensor:
        HessianGraph.by_parameter = False
        try:
            return parallel @ vector
        finally:
            HessianGraph.by_parameter = True

    return dict(
        zip(
            VARIANTS,
            (lambda: alone @ vector, lambda: parallel @ vector, apart, lambda: sharded @ part),
            strict=True,
        )
    )


def _measure(rank: int, size: int, folder: str, names: list[str], rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size,
        timeout=datetime.timedelta(minutes=5),
    )  # fmt: skip
    found: dict[str, Any] = {}
    for name in names:
        products = _products(name, rank)
        for product in products.values():
            product()
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        processor: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for _ in range(rounds):
            for variant, product in products.items():
                dist.barrier()
                begin, used = time.perf_counter(), time.process_time()
                product()
                processor[variant].append(time.process_time() - used)
                dist.barrier()  # the slowest rank counts, with and without communication
                seconds[variant].append(time.perf_counter() - begin)
        # Of one number, as often as a product has handshakes and ends: what gloo takes at least.
        latency = []
        for _ in range(50):
            begin = time.perf_counter()
            dist.all_reduce(torch.zeros(1))
            latency.append(time.perf_counter() - begin)
        found[name] = {
            "seconds": seconds,
            "processor": processor,
            "latency": statistics.median(latency),
        }
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group


def _summary(measured: dict[str, Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {"latency_ms": 1e3 * measured["latency"]}
    for variant in VARIANTS:
        summary[variant] = {}
        for clock in ("seconds", "processor"):
            alone, taken = (measured[clock][name] for name in ("alone", variant))
            # Round by round, so that what else the machine does touches both alike.
            shares = [1 - a / t for a, t in zip(alone, taken, strict=True)]
            quarters = statistics.quantiles(shares, n=4)
            summary[variant][clock] = {
                "milliseconds": 1e3 * statistics.median(taken),
                "share": statistics.median(shares),
                "share_quartiles": [quarters[0], quarters[2]],
            }
    return summary


def _text(title: str, size: int, rounds: int, summary: dict[str, Any]) -> str:
    lines = [
        f"{title}; {size} ranks, {rounds} rounds; all-reduce of one number: "
        f"{summary['latency_ms']:.2f} ms",
        f"  {'':15}  {'ms':>8}  {'share [quartiles]':24}  {'processor, ms':>13}  "
        f"share of its time [quartiles]",
    ]
    for variant in VARIANTS:
        cells = []
        for clock, width in (("seconds", 8), ("processor", 13)):
            row = summary[variant][clock]
            low, high = row["share_quartiles"]
            share = "-" if variant == "alone" else f"{row['share']:.1%} [{low:.1%}, {high:.1%}]"
            cells.append(f"{row['milliseconds']:{width}.1f}  {share:24}")
        lines.append(f"  {variant:15}  {'  '.join(cells).rstrip()}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write ``ranks.json`` and ``ranks.txt``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rounds = _QUICK_ROUNDS if options.quick else _ROUNDS
    report: dict[str, Any] = {"environment": environment(1, "cpu"), "found": []}
    texts = []
    for size in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_measure, (size, folder, options.problems, rounds), nprocs=size)
            found = torch.load(Path(folder) / "found.pt")
        for name, measured in found.items():
            summary = _summary(measured)
            report["found"].append({"problem": name, "ranks": size, "rounds": rounds, **summary})
            texts.append(_text(PROBLEMS[name][0], size, rounds, summary))
            say(texts[-1])
    write(options.results, "ranks", report, texts)


if __name__ == "__main__":
    main()

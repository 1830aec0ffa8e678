"""How costs grow with width, batch size and depth: a figure with fitted exponents for each.

::

    python -m benchmarks.cost
    python -m benchmarks.cost --quick

The net is a residual ReLU net. Times are the processor's, on one thread; within a round all sizes
take a turn, in random order, and differences and ratios are of one round.
"""

from __future__ import annotations

import argparse
import csv
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.hessian_problems import ResidualNet
from benchmarks.problems import Problem
from benchmarks.reporting import RESULTS, environment, say, write
from benchmarks.timing import Median
from benchmarks.worker import take_turn
from conditioning import FunctionOperator, GradientNorms, HessianOperator, Procrustes
from conditioning.krylov import LanczosRun, random_start

BASE = {"width": 64, "batch": 256, "depth": 16}
#: What is varied, and what the figure's title says.
SWEEPS: dict[str, tuple[tuple[int, ...], str]] = {
    "width": ((16, 32, 64, 128), "A product costs as many gradients at any width"),
    "batch": ((32, 128, 512, 2048), "A product costs as many gradients at any batch size"),
    "depth": ((4, 8, 16, 32, 64), "A product costs as many gradients at any depth"),
}
LABELS = {
    "width": "parameters n, by the width (depth 16, batch 256)",
    "batch": "batch size (width 64, depth 16)",
    "depth": "depth L (width 64, batch 256)",
}
LANCZOS_STEPS = 100
#: name: (over what, minus or divided by what)
SECONDS = {
    "gradient": ("gradient", None),
    "product": ("product", None),
    f"{LANCZOS_STEPS} Lanczos steps, products not counted": ("lanczos", None),
    "GradientNorms, added to a step": ("tracked", "step"),
    "Procrustes on all layers, added to a step": ("projected", "step"),
}
RATIOS = {
    "product / gradient": ("product", "gradient"),
    "step with GradientNorms / step": ("tracked", "step"),
    "step with Procrustes on all layers / step": ("projected", "step"),
}
_TURN = 0.05  # seconds
Variant = Callable[[], AbstractContextManager[Callable[[], Any]]]


@dataclass(frozen=True)
class Series:
    """A quantity along a sweep.

    Parameters
    ----------
    points : list of Median
        Over rounds, one for each size.
    exponent : Median or None
        Of the slopes in log-log coordinates of each round. ``None`` where the quantity is not
        positive in most rounds: a difference that drowns in the noise has no exponent.
    """

    points: list[Median]
    exponent: Median | None

    @classmethod
    def of(cls, x: Sequence[float], rounds: np.ndarray[Any, Any]) -> Series:
        """From values of shape ``(rounds, sizes)``."""
        points = [Median.of(column.tolist()) for column in rounds.T]
        positive = rounds[(rounds > 0).all(axis=1)]
        exponent = None
        if 2 * len(positive) > len(rounds):
            slopes = np.polyfit(np.log(x), np.log(positive).T, 1)[0]
            exponent = Median.of(slopes.tolist())
        return cls(points, exponent)


def variants(width: int, batch: int, depth: int, *, lanczos: bool) -> dict[str, Variant]:
    """What is timed of one size."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model, loss = ResidualNet(depth, width), nn.CrossEntropyLoss()
    inputs = torch.randn(batch, width, generator=generator)
    targets = torch.randint(10, (batch,), generator=generator)
    # So small that the parameters, and with them the active units, stay.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    problem = Problem("", model, inputs, targets, optimizer)
    # Of its own parameters: training steps elsewhere would make it build its graph anew.
    fixed = ResidualNet(depth, width)
    fixed.load_state_dict(model.state_dict())
    operator = HessianOperator(fixed, loss, (inputs, targets))
    vector = torch.randn(operator.shape[0], generator=generator)
    parameters = list(fixed.parameters())

    def gradient() -> None:
        torch.autograd.grad(loss(fixed(inputs), targets), parameters)

    @contextmanager
    def tracked() -> Any:
        with GradientNorms(model, list(model.units)):
            yield problem.step

    @contextmanager
    def projected() -> Any:
        layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        regulariser = Procrustes(layers, model=model).attach(optimizer)
        yield problem.step
        regulariser.detach()

    found: dict[str, Variant] = {
        "gradient": lambda: nullcontext(gradient),
        "product": lambda: nullcontext(lambda: operator @ vector),
        "step": lambda: nullcontext(problem.step),
        "tracked": tracked,
        "projected": projected,
    }
    if lanczos:
        size = operator.shape[0]
        found["lanczos"] = lambda: nullcontext(functools.partial(_lanczos, size))
    return found


def _lanczos(size: int) -> None:
    """Steps on a diagonal matrix, whose product is one in some hundred passes over a vector."""
    diagonal = torch.linspace(0, 1, size, dtype=torch.float64)
    operator = FunctionOperator(lambda v: diagonal * v, (size, size))
    LanczosRun(operator, random_start(size, 0, "cpu")).extend(LANCZOS_STEPS)


def measure(
    sweep: str, sizes: Sequence[int], rounds: int, seed: int = 0
) -> tuple[list[float], dict[str, Series], dict[str, Series]]:
    """Abscissae, seconds and ratios along a sweep."""
    order = random.Random(seed)
    made = {
        size: variants(**BASE | {sweep: size}, lanczos=sweep != "batch") for size in sizes
    }  # fmt: skip
    steps = {}
    for size, timed in made.items():
        for name, variant in timed.items():
            take_turn(variant, 1, "cpu")  # first calls fill caches
            once = take_turn(variant, 1, "cpu")[1]
            steps[size, name] = int(np.clip(_TURN / max(once, 1e-6), 1, 50))
    names = list(next(iter(made.values())))
    times = {name: np.empty((rounds, len(sizes))) for name in names}
    for number in range(rounds):
        for size in order.sample(list(sizes), len(sizes)):
            for name in order.sample(names, len(names)):
                count = steps[size, name]
                spent = take_turn(made[size][name], count, "cpu")[1] / count
                times[name][number, list(sizes).index(size)] = spent
        say(f"  {sweep}: round {number + 1} of {rounds}")
    x = [float(BASE["depth"] * size**2 if sweep == "width" else size) for size in sizes]
    seconds = {
        label: Series.of(x, times[one] - (times[other] if other else 0.0))
        for label, (one, other) in SECONDS.items()
        if one in times
    }
    ratios = {
        label: Series.of(x, times[one] / times[other]) for label, (one, other) in RATIOS.items()
    }
    return x, seconds, ratios


def _label(name: str, series: Series) -> str:
    if series.exponent is None:
        return f"{name}: no more than the noise"
    found = series.exponent
    return f"{name}: exponent {found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def draw(
    path: Path,
    sweep: str,
    x: Sequence[float],
    seconds: Mapping[str, Series],
    ratios: Mapping[str, Series],
) -> None:
    """Two panels with fitted lines; a difference that may be zero is drawn as an upper limit."""
    from conditioning.plots.axes import PALETTE, new_axes, save, style

    with style():
        figure, axes = new_axes(2, width=6.2, height=5.4)
        figure.suptitle(SWEEPS[sweep][1], x=0.01, ha="left")
        colors = dict(zip(SECONDS, PALETTE, strict=False)) | dict(
            zip(RATIOS, (PALETTE[1], PALETTE[3], PALETTE[4]), strict=True)
        )
        for ax, drawn, unit in zip(
            axes,
            (seconds, ratios),
            ("processor time, seconds", "ratio of times in one round"),
            strict=True,
        ):
            for name, series in drawn.items():
                _curve(ax, x, series, colors[name], _label(name, series))
            ax.set(xscale="log", yscale="log", xlabel=LABELS[sweep], ylabel=unit)
            ax.set_xticks(x, [f"{at:,.0f}" for at in x])
            ax.xaxis.minorticks_off()
            if ax is axes[1]:
                ax.axhline(1, color="0.5", linewidth=0.8, zorder=0)
                _plain_decades(ax)
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize="small")
        axes[0].set_title("seconds")
        axes[1].set_title("compared with a gradient, or a training step")
        save(figure, path)


def _plain_decades(ax: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(LogLocator(base=10, subs=()))


def _curve(ax: Any, x: Sequence[float], series: Series, color: Any, label: str) -> None:
    values = np.array([p.value for p in series.points])
    low, high = (np.array([getattr(p, end) for p in series.points]) for end in ("low", "high"))
    sure = low > 0
    at = np.array(x)
    ax.errorbar(
        at[sure], values[sure], yerr=[(values - low)[sure], (high - values)[sure]],
        fmt="o", color=color, capsize=3, markersize=4, label=label,
    )  # fmt: skip
    limits = ~sure & (high > 0)
    ax.plot(at[limits], high[limits], "v", color=color, fillstyle="none")
    if series.exponent is not None and (values > 0).all():
        slope = series.exponent.value
        height = np.mean(np.log(values) - slope * np.log(at))
        ax.plot(at, np.exp(height) * at**slope, "--", color=color, linewidth=1)


def rows(sweep: str, x: Sequence[float], kind: str, found: Mapping[str, Series]) -> list[list[Any]]:
    """Lines of the CSV."""
    return [
        [sweep, kind, name, at, point.value, point.low, point.high]
        for name, series in found.items()
        for at, point in zip(x, series.points, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost", description="Costs against width, batch and depth."
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="few rounds, without the largest size")
    parser.add_argument("--rounds", type=int, help="turns of each size (default: 9; quick: 3)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rounds = options.rounds or (3 if options.quick else 9)
    name = "cost_quick" if options.quick else "cost"
    report: dict[str, Any] = {"environment": environment(1, "cpu"), "rounds": rounds, "sweeps": {}}
    table: list[list[Any]] = []
    texts = []
    for sweep, (sizes, claim) in SWEEPS.items():
        chosen = sizes[:-1] if options.quick else sizes
        x, seconds, ratios = measure(sweep, chosen, rounds)
        report["sweeps"][sweep] = {
            "claim": claim, "x": x,
            "seconds": {key: asdict(series) for key, series in seconds.items()},
            "ratios": {key: asdict(series) for key, series in ratios.items()},
        }  # fmt: skip
        table += rows(sweep, x, "seconds", seconds) + rows(sweep, x, "ratio", ratios)
        lines = [f"{claim} ({LABELS[sweep]})"]
        for label, series in [*seconds.items(), *ratios.items()]:
            values = ", ".join(f"{point.value:.3g}" for point in series.points)
            lines.append(f"  {_label(label, series)}; {values}")
        texts.append("\n".join(lines))
        print(texts[-1], flush=True)
        write(options.out, name, report, texts)
        draw(options.out / f"{name}_{sweep}.png", sweep, x, seconds, ratios)
        with (options.out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            head = ["sweep", "kind", "quantity", "x", "median", "low", "high"]
            csv.writer(file, lineterminator="\n").writerows([head, *table])


if __name__ == "__main__":
    main()

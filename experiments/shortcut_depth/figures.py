"""Tables and figures of the shortcut-depth experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from conditioning import Estimate, plots, theory
from experiments.readings import number
from experiments.report import write_csv
from experiments.sweep import Pair, parts

_COLORS = {
    "n = 2": plots.PALETTE[0],
    "n = 1": plots.PALETTE[3],
    "2-shortcut, 0.01 Xavier": plots.PALETTE[0],
    "plain, orthogonal": plots.PALETTE[2],
    "plain, Xavier": plots.PALETTE[1],
    "2-shortcut, Xavier": plots.PALETTE[4],
}


# -- tables ---------------------------------------------------------------------------------


def _rows(measured: Sequence[Pair]) -> list[dict[str, Any]]:
    rows = []
    for cell, result in measured:
        quantities = [
            ("kappa", "lanczos", result.get("kappa")),
            ("kappa", "dense", result.get("dense")),
        ]
        ten = result.get("kappa10")
        quantities.append(("kappa10", "dense" if ten and ten["status"] == "exact" else "", ten))
        for quantity, route, found in quantities:
            if found:
                predicted = result.get("predicted")
                rows.append(
                    {
                        **cell,
                        "n": result["n"],
                        "shortcut_depth": cell.get("n"),
                        "quantity": quantity,
                        "route": route or "lanczos",
                        "value": found["value"],
                        "low": found["low"],
                        "high": found["high"],
                        "status": found["status"],
                        "products": found["num_matvecs"],
                        "nullity": found["nullity"]["value"],
                        "predicted": predicted if isinstance(predicted, float) else None,
                    }
                )
    return rows


def write_tables(out: Path, measured: Sequence[Pair], context: Mapping[str, Any]) -> None:
    """Write ``condition_numbers.csv``, ``largest_eigenvalues.csv`` and ``data.csv``."""
    order = [
        "part", "net", "L", "R", "s", "pre", "mid", "post", "seed", "n", "quantity", "route",
        "value", "low", "high", "status", "products", "nullity", "predicted",
    ]  # fmt: skip
    frame = pd.DataFrame(_rows(measured)).reindex(columns=order)
    whole = {name: "Int64" for name in ("L", "R", "seed", "n", "products")}
    write_csv(out / "condition_numbers.csv", frame.astype(whole))
    largest = [
        {"shortcut_depth": depth, "L": cell["L"], "n": result["n"], **result["largest"]}
        for depth, part in ((1, "one"), (2, "two"))
        for cell, result in parts(measured, part)
        if "largest" in result
    ]
    write_csv(out / "largest_eigenvalues.csv", pd.DataFrame(largest))
    singular = np.asarray(context["singular_values"])
    data = pd.DataFrame({"singular_value_of_D": singular, "kappa_of_D": singular[0] / singular[-1]})
    write_csv(out / "data.csv", data)


def draw(out: Path, measured: Sequence[Pair], context: Mapping[str, Any]) -> None:
    """Draw the three figures."""
    with plots.style():
        _condition_numbers(out / "condition_number.png", measured, context)
        _spectra(out / "spectrum_at_zero.png", measured, context)
        _products(out / "products.png", measured, context)


def _estimates(cells: Sequence[Pair], key: str) -> tuple[list[int], list[Estimate]]:
    found = [(c["L"], r[key]) for c, r in cells if key in r]
    ends = [[number(r[e]) for e in ("value", "low", "high")] for _, r in found]
    return [depth for depth, _ in found], [Estimate(*e) for e in ends]


def _depth_axis(ax: Any, depths: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("depth L (number of weight matrices)")
    ticks = sorted({d for d in depths if d & (d - 1) == 0})
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()


def _condition_numbers(path: Path, measured: Sequence[Pair], context: Mapping[str, Any]) -> None:
    figure, (left, right) = plots.new_axes(2, width=6.2, height=4.6)
    singular = np.asarray(context["singular_values"])
    two, one = parts(measured, "two"), parts(measured, "one")

    depths, values = _estimates(two, "kappa")
    left.axhline(
        singular[0] / singular[-1], color=_COLORS["n = 2"], linewidth=1.2,
        label="n = 2, theory: κ(D)",
    )  # fmt: skip
    plots.plot_enclosures(
        depths, values, left, color=_COLORS["n = 2"], label="n = 2, measured (Lanczos)"
    )
    small, exact = _estimates(one, "dense")
    predicted = {c["L"]: np.abs(np.asarray(r["predicted"])) for c, r in one}
    lines = sorted(predicted)
    left.plot(
        lines, [predicted[d].max() / predicted[d].min() for d in lines], color=_COLORS["n = 1"],
        linewidth=1, label="n = 1, theory: the block matrix",
    )  # fmt: skip
    plots.plot_enclosures(
        small, exact, left, color=_COLORS["n = 1"], marker="s", label="n = 1, measured (dense)"
    )
    left.plot([], [], " ", label="n = 3, 4: H = 0, no condition number")
    _depth_axis(left, [1, *depths])
    left.set_ylabel("condition number κ of the Hessian at zero")
    left.set_title(
        f"At zero ({context['data']}): κ(H) = κ(D) at every depth for 2-shortcuts,\n"
        f"erratic for 1-shortcuts"
    )
    left.legend(loc="center right", bbox_to_anchor=(1.0, 0.42))
    _initialisations(right, measured, context)
    plots.save(figure, path)


def _initialisations(ax: Any, measured: Sequence[Pair], context: Mapping[str, Any]) -> None:
    one = parts(measured, "one")
    depths, values = _estimates([(c, r) for c, r in one if c["L"] >= 2], "kappa10")
    predicted = {c["L"]: np.abs(np.asarray(r["predicted"])) for c, r in one}
    lines = [d for d in sorted(predicted) if d >= 2]
    ax.plot(
        lines, [predicted[d].max() / np.percentile(predicted[d], 10) for d in lines],
        color=_COLORS["n = 1"], linewidth=1,
    )  # fmt: skip
    plots.plot_enclosures(
        depths, values, ax, color=_COLORS["n = 1"], marker="s", label="1-shortcut at zero"
    )
    moment = torch.diag(torch.as_tensor(np.asarray(context["singular_values"])))
    shown: list[int] = []
    for net in (
        "plain, Xavier",
        "2-shortcut, Xavier",
        "plain, orthogonal",
        "2-shortcut, 0.01 Xavier",
    ):
        cells = parts(measured, "initialisation", net=net)
        shown = sorted({c["L"] for c, _ in cells})
        _spread(ax, net, cells, shown)
    flat = [
        theory.two_shortcut_spectrum(moment, d // 2).condition_number(percentile=10) for d in shown
    ]
    ax.plot(shown, flat, color=_COLORS["n = 2"], linewidth=1.2)
    ax.plot([], [], color="0.35", linewidth=1.2, label="lines: theory at zero")
    ax.plot([], [], "^", color="0.35", markerfacecolor="none", label="certain lower bound only")
    _depth_axis(ax, [*shown, *depths])
    ax.set_ylabel("κ₁₀ = max |λ| / 10th percentile of |λ|")
    ax.set_title(
        "At initialisation: flat for 2-shortcuts, linear for 1-shortcuts\n"
        "and orthogonal, exploding for Xavier (bars: range over seeds)"
    )
    ax.legend(loc="upper left")


def _spread(ax: Any, net: str, cells: Sequence[Pair], depths: Sequence[int]) -> None:
    """Geometric mean and range over the seeds; where a seed is known from below only, an arrow."""
    found = []
    for depth in depths:
        results = [r["kappa10"] for c, r in cells if c["L"] == depth]
        lows = [number(r["low"]) for r in results]
        if all(np.isfinite(number(r["high"])) for r in results):
            values = [number(r["value"]) for r in results]
            mean = float(np.exp(np.mean(np.log(values))))
            found.append(Estimate(mean, min(lows), max(number(r["high"]) for r in results)))
        else:
            found.append(Estimate(min(lows), min(lows), float("inf")))
    plots.plot_enclosures(depths, found, ax, color=_COLORS[net], label=net)


def _spectra(path: Path, measured: Sequence[Pair], context: Mapping[str, Any]) -> None:
    figure, axes = plots.new_axes(3, width=4.6, height=4.2)
    singular = np.asarray(context["singular_values"])
    dim = int(context["dim"])
    two = {c["L"]: r for c, r in parts(measured, "two") if "values" in r}
    depth = 16 if 16 in two else max(two)
    values = np.asarray(two[depth]["values"])
    expected = np.repeat(np.concatenate([singular, -singular]), dim * depth // 2)
    plots.plot_spectrum(values, expected, axes[0])
    axes[0].set_title(
        f"n = 2, L = {depth}: the spectrum is ±σ_i(D),\neach {dim * depth // 2} times"
    )
    isotropic = {c["L"]: r for c, r in parts(measured, "isotropic") if c["s"] == 0.6}
    depth = 8 if 8 in isotropic else max(isotropic)
    found = isotropic[depth]
    plots.plot_spectrum(np.asarray(found["values"]), np.asarray(found["predicted_values"]), axes[1])
    axes[1].set_title(f"n = 1, L = {depth}, white, D = 0.6 I: four values,\nas often as predicted")
    one = {c["L"]: r for c, r in parts(measured, "one")}
    depth = 16 if 16 in one else max(one)
    plots.plot_spectrum(
        np.asarray(one[depth]["values"]), np.asarray(one[depth]["predicted"]), axes[2]
    )
    axes[2].set_title(
        f"n = 1, L = {depth}, {context['data']}: block matrix,\nbulk of order 1, edge of order L"
    )
    for ax in axes:
        ax.legend(loc="upper left")
        ax.axhline(0, color="0.6", linewidth=0.8)
    plots.save(figure, path)


def _products(path: Path, measured: Sequence[Pair], context: Mapping[str, Any]) -> None:
    figure, (ax,) = plots.new_axes(width=6.4, height=4.4)
    dim = int(context["dim"])
    two = parts(measured, "two")
    depths = [c["L"] for c, _ in two]
    sizes = [r["n"] for _, r in two]
    ax.plot(
        depths,
        sizes,
        color="0.5",
        linewidth=1,
        linestyle=":",
        label="n = number of parameters (dense)",
    )
    ax.axhline(2 * dim + 1, color=_COLORS["n = 2"], linewidth=1.2, label="theory for n = 2: 2d + 1")
    ax.plot(
        depths, [r["kappa"]["num_matvecs"] for _, r in two], "o", color=_COLORS["n = 2"],
        label="2-shortcut at zero: exhausted",
    )  # fmt: skip
    isotropic = parts(measured, "isotropic", s=0.6)
    ax.plot(
        [c["L"] for c, _ in isotropic], [r["kappa"]["num_matvecs"] for _, r in isotropic], "D",
        color=plots.PALETTE[2], label="1-shortcut, white, D = 0.6 I: exhausted",
    )  # fmt: skip
    one = [(c, r["kappa"]) for c, r in parts(measured, "one") if c["L"] >= 2]
    for status, marker in (
        ("exhausted", "s"),
        ("certified", "P"),
        ("lower bound only", "^"),
        ("depends on threshold", "v"),
        ("not resolvable", "x"),
    ):
        some = [(c["L"], k["num_matvecs"]) for c, k in one if k["status"] == status]
        if some:
            ax.plot(
                [d for d, _ in some], [p for _, p in some], marker, color=_COLORS["n = 1"],
                markerfacecolor="none" if marker == "^" else _COLORS["n = 1"],
                label=f"1-shortcut, {context['data']}: {status}",
            )  # fmt: skip
    _depth_axis(ax, depths)
    ax.set_ylabel("Hessian-vector products")
    ax.set_title("κ of the depth-2 net takes 2d + 1 products at every depth")
    ax.legend(loc="center right", bbox_to_anchor=(1.0, 0.47), fontsize="small")
    plots.save(figure, path)

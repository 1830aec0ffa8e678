"""Tables of :mod:`benchmarks.hessian`: as text, and as the table of the README.

::

    python -m benchmarks.hessian_tables       # writes the table into README.rst again
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import reporting
from benchmarks.timing import ROOT, Median
from benchmarks.tools import KINDS

README = ROOT / "README.rst"
BEGIN = ".. The table of the benchmark begins: python -m benchmarks.hessian_tables\n"
END = ".. The table of the benchmark ends.\n"
_BUSY = 1.5  # load average of a machine that does something else, too
#: Columns of the README's table: a tool, and the solver whose top-5 is quoted.
COLUMNS = {
    "auto": "",
    "pyhessian": "",
    "curvlinops": "",
    "eigenthings": "lanczos, max_iter=60",
}


def number(value: float) -> str:
    """Three digits, or two of a tiny one: ``0.132``, ``1.45``, ``148``, ``2e-06``."""
    if not math.isfinite(value):
        return str(value)
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _median(entry: Mapping[str, Any] | None) -> str:
    return "-" if entry is None else str(Median(**entry))


def text(problem: Mapping[str, Any]) -> str:
    """Everything of one problem, to read."""
    block = next(
        (k for tool in problem["tools"].values() for k in tool.get("gradients", {}) if k != "1"),
        "16",
    )
    lines = [
        f"{problem['title']}, n = {problem['size']}",
        f"  {'gradients for a product [95 %]':30}  {'one vector':21}  "
        f"{f'in blocks of {block}':21}  "
        f"{'ms':>9}  {'ms, block':>9}  {'build, s':>8}  {'first, s':>8}  {'peak, MiB':>9}  "
        f"{'block':>6}",
    ]
    for tool, found in problem["tools"].items():
        label = KINDS[tool].label
        failed = found["fails"].get("1")
        if failed:
            lines.append(f"  {label:30}  fails: {failed}")
            continue
        costs = found.get("gradients", {})
        lines.append(
            f"  {label:30}  {_median(costs.get('1')):21}  {_median(costs.get(block)):21}  "
            + "  ".join(
                f"{value:>{width}}"
                for value, width in (
                    (_scaled(found, "product_s", "1", 1e3), 9),
                    (_scaled(found, "product_s", block, 1e3), 9),
                    (number(found["build_s"]), 8),
                    (_scaled(found, "first_s", "1", 1), 8),
                    (_scaled(found, "peak_mib", "1", 1), 9),
                    (_scaled(found, "peak_mib", block, 1), 6),
                )
            )
        )
        if block in found["fails"]:
            lines.append(f"  {'':30}  in blocks it fails: {found['fails'][block]}")
        for vectors, engine in found.get("engine", {}).items():
            if engine:
                lines.append(f"  {'':30}  engine ({vectors}): {engine}")
    lines += _solvers(problem)
    return "\n".join(lines)


def _scaled(found: Mapping[str, Any], name: str, key: str, factor: float) -> str:
    value = found.get(name, {}).get(key)
    return "-" if value is None else number(factor * value)


def _solvers(problem: Mapping[str, Any]) -> list[str]:
    reference = problem["reference"]
    if "fails" in reference:
        lines = [f"  no reference: {reference['fails']}"]
    else:
        lines = [
            f"  reference: {reference['status']}, {reference['check']} differs by "
            f"{number(reference['difference'])}"
        ]
    lines.append(
        f"  {'five largest eigenvalues':42}  {'tol':>5}  {'products':>8}  {'seconds':>8}  "
        f"{'gradients':>9}  {'true error':>10}  says converged"
    )
    for tool, found in problem["tools"].items():
        for solver, cells in found["top"].items():
            label = f"{KINDS[tool].label}{', ' if solver else ''}{solver}"
            for tolerance, cell in cells.items():
                start = f"  {label:42}  {tolerance:>5}  "
                if not cell["starts"]:
                    lines.append(f"{start}fails: {cell['fails']}")
                    continue
                gradient = found.get("gradient_s", {}).get("1")
                spent = "-" if not gradient else number(cell["seconds"] / gradient)
                error = "-" if cell["error"] is None else number(cell["error"])
                said = cell["converged"]
                flag = "(no such flag)" if said is None else f"{said} of {cell['starts']}"
                lines.append(
                    f"{start}{cell['products']:>8.0f}  {number(cell['seconds']):>8}  {spent:>9}  "
                    f"{error:>10}  {flag} ({cell['said']})"
                )
    return lines


def write(folder: Path, name: str, report: dict[str, Any]) -> None:
    """Write ``name.json`` and ``name.txt``."""
    reporting.write(folder, name, report, [text(p) for p in report["problems"].values()])


def _product_cell(found: Mapping[str, Any] | None, block: str) -> str:
    if found is None:
        return "-"
    if "1" in found["fails"]:
        return "fails"
    one = number(found["gradients"]["1"]["value"])
    inside = found["gradients"].get(block)
    return one if inside is None else f"{one} ({number(inside['value'])})"


def _best_engine(tools: Mapping[str, Any], block: str) -> str:
    """The cheapest of the engines that are not there from the start."""
    built = {
        name: tools[name]
        for name in ("linearized", "compiled")
        if "1" in tools.get(name, {}).get("gradients", {})
    }
    if not built:
        return ""
    name = min(built, key=lambda name: built[name]["gradients"]["1"]["value"])
    return f"{name}: {_product_cell(built[name], block)}"


def _top_cell(found: Mapping[str, Any] | None, solver: str, tolerance: str) -> str:
    if found is None:
        return "-"
    if "1" in found["fails"]:
        return "fails"
    cell = found["top"].get(solver, {}).get(tolerance)
    if cell is None:
        return "-"
    if not cell["starts"]:
        return str(cell["fails"])
    error = "?" if cell["error"] is None else number(cell["error"])
    said = cell["converged"]
    flag = "" if said is None or said == cell["starts"] else r"\*"
    return f"{cell['products']:.0f}, {number(cell['seconds'])} s, {error}{flag}"


def rst(report: Mapping[str, Any]) -> str:
    """The table of the README, with machine and date."""
    where, block = report["environment"], str(report["preset"]["block"])
    labels = [KINDS[tool].label for tool in COLUMNS]
    versions = []
    for tool in COLUMNS:
        found = [p["tools"].get(tool, {}).get("version") for p in report["problems"].values()]
        known = next((version for version in found if version), None)
        if KINDS[tool].peer and known:
            versions.append(f"{KINDS[tool].label} {known}")
    lines = [
        ".. list-table::", "   :header-rows: 1", "   :widths: 16 22 15 15 16 16", "",
        "   * - model", "     - measured",
        *(f"     - {label}" for label in labels),
    ]  # fmt: skip
    for problem in report["problems"].values():
        first = f"   * - {problem['name']}"
        lines += [first, "     - gradients for a product"]
        lines += [f"     - {_product_cell(problem['tools'].get(t), block)}" for t in COLUMNS]
        if best := _best_engine(problem["tools"], block):
            lines += ["   * -", "     - once an engine is built", f"     - {best}"]
            lines += ["     -"] * (len(COLUMNS) - 1)
        for tolerance in report["preset"]["tolerances"]:
            shown = f"{tolerance:g}"
            lines += ["   * -", f"     - five largest, tolerance {shown}"]
            lines += [
                f"     - {_top_cell(problem['tools'].get(tool), solver, shown)}"
                for tool, solver in COLUMNS.items()
            ]
    threads = where["torch threads"]
    said = [
        f"{where['device']}, {where['cores']} cores, {threads} thread{'s' if threads > 1 else ''},",
        f"torch {where['packages']['torch']}, {where['date']}; {', '.join(versions)}.",
        f"In parentheses: a vector in blocks of {block}. Of the five largest eigenvalues:",
        "products, seconds, largest true error (relative);",
        r"\*: the tool itself does not say that all have converged.",
    ]
    if report["preset"]["quick"]:
        said.append("Small problems (``make bench-quick``), a single start.")
    load = max(problem["load average before"] for problem in report["problems"].values())
    if load > _BUSY:
        said.append(f"Provisional: measured on a busy machine (load average up to {load:.1f}).")
    text = textwrap.fill(" ".join(said), 100, break_on_hyphens=False, break_long_words=False)
    return "\n".join([*lines, "", text]) + "\n"


def inserted(page: str, table: str) -> str:
    """The page with the table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        msg = f"The page lacks the marks {BEGIN!r} and {END!r}."
        raise ValueError(msg)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def committed() -> dict[str, Any]:
    """The results that the README shows: of the full run, or else of the quick one."""
    paths = [reporting.RESULTS / f"{name}.json" for name in ("hessian", "hessian_quick")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        msg = f"There are no results in {reporting.RESULTS}: run python -m benchmarks.hessian."
        raise FileNotFoundError(msg)
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return report


def main() -> None:
    """Write the table of the committed results into the README."""
    report = committed()
    README.write_text(inserted(README.read_text("utf-8"), rst(report)), "utf-8")


if __name__ == "__main__":
    main()

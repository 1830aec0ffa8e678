"""A checkup as text for a terminal, as flat numbers for loggers, and as a table of its blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from conditioning.blocks.block import table
from conditioning.checkup.readings import BlockReading, Finding, SpectrumReading
from conditioning.checkup.tables import (
    JOINED,
    activation_table,
    block_table,
    count,
    label,
    layer_table,
    recurrent_table,
    shown,
    wrapped,
)
from conditioning.operators.modules import join_names
from conditioning.spectrum import ConditionNumber
from conditioning.spectrum.full import NAN

if TYPE_CHECKING:
    import pandas as pd

    from conditioning.checkup.results import Checkup

_TOTAL = "total"  # among the seconds by stage, what is between them included
_NORMS = ("act_in", "act_out", "grad_in", "grad_out", "ratio", "product")
_JACOBIAN = {
    "sigma_max": "largest", "sigma_min": "smallest", "delta": "delta", "branch": "branch",
}  # fmt: skip


def text(report: Checkup) -> str:
    """Write a checkup for a terminal of 96 columns.

    The verdict comes first, then the findings in order of weight, then all that was measured.
    Of more than 24 blocks, layers or activations those that a finding names, the worst and both
    ends are shown; what is left out is counted, with its range.
    """
    parts = [
        _head(report), _findings(report.findings), _numbers(report), block_table(report),
        layer_table(report), activation_table(report), recurrent_table(report),
        _predictions(report), _missing(report), _spent(report),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def verdict(report: Checkup) -> str:
    """One line: how many problems and remarks, and whether everything was looked at."""
    problems = len(report.problems)
    remarks = len(report.findings) - problems
    found = ["NaN or an infinity came up"] if report.nonfinite else []
    if problems:
        found.append(count(problems, "problem"))
    elif not report.nonfinite:
        found.append("no problem in what was measured")
    found += [count(remarks, "remark")] if remarks else []
    found += [f"{len(report.missing)} not measured or not certified"] if report.missing else []
    ended = "" if report.status == "complete" else f" ({report.status})"
    return f"{report.setting.model}: {', '.join(found)}{ended}"


def _head(report: Checkup) -> str:
    seen = report.setting
    trained = seen.num_trainable
    few = f"{trained} of them trained, " if trained != seen.num_parameters else ""
    lines = [
        verdict(report),
        wrapped(
            f"{seen.loss} on {count(seen.num_samples, 'sample')} in "
            f"{count(seen.num_batches, 'batch')}; "
            f"{seen.num_parameters} parameters, {few}{seen.dtype} on {seen.device}; "
            f"mode: {seen.mode}; seed {seen.seed}"
        ),
    ]
    lines += [wrapped(note, "        ", "  note: ") for note in seen.notes]
    if report.status == "interrupted":
        lines.append("The checkup was interrupted; what follows was measured before that.")
    if report.status == "out of budget":
        lines.append("The budget ended first; what follows was measured before that.")
    if report.nonfinite:
        lines.append(wrapped(f"NaN or infinity: {report.nonfinite}"))
    return "\n".join(lines)


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    lines = ["Findings, the weightiest first"]
    for place, finding in enumerate(findings, 1):
        start = f"{place:3d}. "
        indent = " " * len(start)
        where = f" at {join_names([label(name) for name in finding.where])}"
        lines.append(wrapped(
            f"{finding.severity.upper()} {finding.kind}{where if finding.where else ''}",
            indent, start,
        ))  # fmt: skip
        lines.append(wrapped(finding.sentence, indent))
        lines.append(wrapped(finding.remedy, f"{indent}   ", f"{indent}-> "))
        lines.append(wrapped(
            f"{shown(finding.number)}, limit {finding.limit:.4g} ({finding.evidence})", indent
        ))  # fmt: skip
    return "\n".join(lines)


def _kappa(number: ConditionNumber) -> str:
    if math.isnan(number.value):
        return "not defined"
    return f">= {number.low:.4g}" if math.isinf(number.high) else shown(number.estimate)


def _numbers(report: Checkup) -> str:
    batches = report.setting.num_batches
    mean = f"mean of {batches} batches [least, largest]" if batches > 1 else "one batch"
    rows = [("loss", shown(report.loss), mean)]
    rows += [("gradient norm", shown(report.gradient_norm), mean)]
    if report.blocks:
        rows += [
            ("product of ratios", shown(report.product), "gradient norm, front over back"),
            ("mean |1 - ratio|", shown(report.mean_deviation), "over the blocks"),
        ]
    notes: dict[str, list[str]] = {}
    for spectrum in (report.hessian, report.gauss_newton):
        if spectrum is None:
            continue
        rows += _spectrum_rows(spectrum)
        for name, message in (
            ("kappa", spectrum.condition.message),
            ("kappa_10", spectrum.condition10.message),
            ("density", spectrum.density.message),
            ("spectrum", spectrum.message),
        ):
            # What is not certified is listed at the end, with the same words.
            if message and not any(message in one.reason for one in report.missing):
                notes.setdefault(message, []).append(f"{spectrum.matrix} {name}")
    step = report.step_size
    if step is not None:
        what = "2 / lambda_max" if not step.momentum else f"momentum {step.momentum:g}"
        rows.append(("largest stable step", shown(step.largest_stable), what))
        if step.given is not None:
            rows.append(("given learning rate", f"{step.given:g}", ""))
        if step.quotient is not None:
            quotient = shown(step.quotient)
            rows.append(("  over the largest stable", quotient, "above 1 is too large"))
    lines = [table(("Numbers", "value [enclosure]", "what it is"), rows)]
    lines += [
        wrapped(f"{', '.join(names)}: {message}", "    ", "  ") for message, names in notes.items()
    ]
    return "\n".join(lines)


def _spectrum_rows(spectrum: SpectrumReading) -> list[tuple[str, str, str]]:
    def of(condition: ConditionNumber) -> str:
        nullity, rest = condition.nullity, str(condition.status)
        if condition.percentile is None and nullity.value >= 1 and nullity.low == nullity.high:
            rest += f", {nullity.value:.0f} eigenvalues are zero"
        return rest

    density = spectrum.density.status
    rows = [
        (spectrum.matrix, f"{spectrum.size} x {spectrum.size}", f"{spectrum.num_matvecs} products"),
        ("  lambda_max", shown(spectrum.largest), ""),
        ("  lambda_min", shown(spectrum.smallest), ""),
        ("  kappa", _kappa(spectrum.condition), of(spectrum.condition)),
        ("  kappa_10", _kappa(spectrum.condition10), of(spectrum.condition10)),
        ("  share negative", shown(spectrum.index), density),
        ("  trace", shown(spectrum.trace), density),
    ]
    rows += [
        (f"  quantile {level}", shown(value), density)
        for level, value in spectrum.density.quantiles.items()
    ]
    return [row for row in rows if row[1] not in ("nan", "not defined")]


def _predictions(report: Checkup) -> str:
    if not report.predictions:
        return ""
    lines = ["Theory for a network of this depth"]
    for one in report.predictions:
        given = f"{one.low:.4g}" if one.low == one.high else f"{one.low:.4g} to {one.high:.4g}"
        lines.append(wrapped(
            f"{one.name}: {given} predicted, {shown(one.measured)} measured, {one.agrees}",
            "    ", "  ",
        ))  # fmt: skip
        lines.append(wrapped("; ".join(filter(None, (one.source, one.note))), "    "))
    return "\n".join(lines)


def _missing(report: Checkup) -> str:
    if not report.missing:
        return ""
    lines = ["Not measured, or not certified"]
    lines += [wrapped(f"{one.what}: {one.reason}", "    ", "  - ") for one in report.missing]
    return "\n".join(lines)


def _spent(report: Checkup) -> str:
    stages = ", ".join(f"{name} {_time(spent)}" for name, spent in spent_by_stage(report).items())
    budget = report.setting.seconds
    given = "" if budget is None else f" of {budget:g}{JOINED}s"
    most = report.setting.num_matvecs
    products = f"{report.num_matvecs} products" + ("" if most is None else f" of {most}")
    took = _time(elapsed(report))
    rest = f" ({stages})" if stages else ""
    return wrapped(
        f"Took {took}{given} and {products}{rest}. conditioning {report.setting.conditioning}, "
        f"torch {report.setting.torch}.", "  ", "",
    )  # fmt: skip


def elapsed(report: Checkup) -> float:
    """All seconds that a checkup took; its stages may leave some of them to none."""
    return report.seconds.get(_TOTAL, sum(report.seconds.values()))


def spent_by_stage(report: Checkup) -> dict[str, float]:
    """The seconds of each stage, without their total."""
    return {name: spent for name, spent in report.seconds.items() if name != _TOTAL}


def _time(seconds: float) -> str:
    return f"{seconds:.1f}{JOINED}s" if seconds < 10 else f"{seconds:.0f}{JOINED}s"


def scalars(report: Checkup, prefix: str = "checkup/") -> dict[str, float]:
    """The main numbers by flat, stable names, for any logger; what was not measured is left out.

    Of the Hessian there are ``lambda_max``, ``lambda_min``, ``kappa`` (a lower bound where nothing
    better is known), ``kappa_low``, ``kappa_high``, ``kappa10`` (likewise), ``index`` and
    ``trace``; of the Gauss-Newton matrix the same below ``gauss_newton/``. A number that was
    measured may be NaN or infinite.
    """
    found: dict[str, float] = {
        "loss": report.loss.value,
        "gradient_norm": report.gradient_norm.value,
        "num_problems": len(report.problems),
        "num_findings": len(report.findings),
        "num_missing": len(report.missing),
        "num_matvecs": report.num_matvecs,
        "seconds": elapsed(report),
    }
    if report.blocks:
        ratios = [b.ratio.value for b in report.blocks if not math.isnan(b.ratio.value)]
        found |= {
            "product": report.product.value,
            "mean_deviation": report.mean_deviation.value,
            "ratio_min": min(ratios, default=math.nan),
            "ratio_max": max(ratios, default=math.nan),
        }
    jacobians = [b.jacobian for b in report.blocks if b.jacobian is not None]
    sigmas = [j for j in jacobians if not math.isnan(j.smallest.value + j.largest.value)]
    if sigmas:
        found["sigma_min"] = min(j.smallest.value for j in sigmas)
        found["sigma_max"] = max(j.largest.value for j in sigmas)
    if report.activations:
        found["dead_share_max"] = max(use.dead_share for use in report.activations)
        found["flat_share_max"] = max(use.flat_share for use in report.activations)
    for layer in report.recurrent:
        found[f"growth_per_step/{label(layer.name)}"] = layer.growth_per_step.value
    for start, spectrum in (("", report.hessian), ("gauss_newton/", report.gauss_newton)):
        if spectrum is not None:
            found |= {f"{start}{name}": v for name, v in _spectrum_scalars(spectrum).items()}
    if report.step_size is not None:
        found["largest_stable_step"] = report.step_size.largest_stable.value
        if report.step_size.quotient is not None:
            found["step_quotient"] = report.step_size.quotient.value
    return {f"{prefix}{name}": float(value) for name, value in found.items()}


def _spectrum_scalars(spectrum: SpectrumReading) -> dict[str, float]:
    known = {
        "lambda_max": spectrum.largest.value, "lambda_min": spectrum.smallest.value,
        "kappa": spectrum.condition.value, "kappa_low": spectrum.condition.low,
        "kappa_high": spectrum.condition.high, "kappa10": spectrum.condition10.value,
        "kappa10_low": spectrum.condition10.low, "kappa10_high": spectrum.condition10.high,
        "index": spectrum.index.value, "trace": spectrum.trace.value,
    }  # fmt: skip
    return {name: value for name, value in known.items() if not math.isnan(value)}


def frame(report: Checkup) -> pd.DataFrame:
    """One row for each block, in the order of execution.

    Columns: block, class, kind, shapes, depth; ``act_in``, ``act_out``, ``grad_in``,
    ``grad_out``, ``ratio``, ``product``, ``sigma_max``, ``sigma_min``, ``delta`` and ``branch``,
    each also with ``_low`` and ``_high``; growth, branch_share, status (of the Jacobian). What
    there is not is NaN.
    """
    import pandas as pd

    ends = [f"{name}{end}" for name in (*_NORMS, *_JACOBIAN) for end in ("", "_low", "_high")]
    columns = [
        "block", "class", "kind", "shapes", "depth", *ends, "growth", "branch_share", "status",
    ]  # fmt: skip
    return pd.DataFrame([_row(block) for block in report.blocks], columns=columns)


def _row(block: BlockReading) -> dict[str, Any]:
    jacobian = block.jacobian
    numbers = {name: getattr(block, name) for name in _NORMS}
    for name, attribute in _JACOBIAN.items():
        numbers[name] = (getattr(jacobian, attribute) if jacobian else None) or NAN
    row: dict[str, Any] = {
        "block": block.name, "class": block.classes, "kind": block.kind, "shapes": block.shapes,
        "depth": block.depth, "growth": block.growth,
        "branch_share": math.nan if block.branch_share is None else block.branch_share,
        "status": jacobian.status if jacobian else "not measured",
    }  # fmt: skip
    for name, number in numbers.items():
        row |= {name: number.value, f"{name}_low": number.low, f"{name}_high": number.high}
    return row

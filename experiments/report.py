"""Verdicts on paper: the table in the terminal, ``verdicts.json``, and two of them side by side."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import tempfile
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import FAILS, HOLDS, NOT_DECIDED, Claim, Verdict
from experiments.errors import ClaimError, VerdictFileError

if TYPE_CHECKING:
    import pandas as pd

# Two machines do not round alike: what differs by less than this has not moved.
ROUNDING = 1e-9

# Below this width columns would hold single words, so each verdict becomes a paragraph.
_NARROWEST_TABLE = 80


def number(value: float | None, digits: int = 4) -> str:
    """Write a number for a reader: few digits, and ``-`` where there is none."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return f"{value:.{digits}g}"


def with_enclosure(value: float, low: float, high: float) -> str:
    """Write a value and its enclosure with as many digits as tell its ends apart."""
    if math.isnan(value) or (low == high == value):
        return number(value)
    for digits in range(4, 10):
        ends = [number(end, digits) for end in (low, high)]
        if ends[0] != ends[1]:
            return f"{number(value, digits)} [{ends[0]}, {ends[1]}]"
    half = max(abs(high - value), abs(value - low))
    return f"{number(value)} ± {half:.1g}"


def _predicted(verdict: Verdict) -> str:
    relation = verdict.claim.predicted
    if isinstance(relation, str):
        known = "" if verdict.expected is None else f" = {number(verdict.expected)}"
        return f"{relation}{known}"
    return number(relation if verdict.expected is None else verdict.expected)


def _cells(verdict: Verdict) -> list[str]:
    claim = verdict.claim
    # Sources are in the list of claims and in verdicts.json: here they would bury the numbers.
    where = f"\n{verdict.run}" if verdict.run else ""
    note = f"\n({verdict.note})" if verdict.note else ""
    return [
        verdict.value,
        f"{claim.id}: {claim.statement}{note}",
        _predicted(verdict),
        f"{with_enclosure(verdict.measured, verdict.low, verdict.high)}{where}",
        str(claim.tolerance),
    ]


def _wrap(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for line in text.split("\n"):
        lines += textwrap.wrap(line, width, break_on_hyphens=False) or [""]
    return lines


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int, limits: Sequence[int | None]
) -> str:
    """Lay out rows in columns that fit ``width``; the one without a limit takes the remainder."""
    gap = "  "
    natural = [
        max(1, *(len(line) for row in [header, *rows] for line in row[column].split("\n")))
        for column in range(len(header))
    ]
    widths = [
        n if limit is None else min(n, limit) for n, limit in zip(natural, limits, strict=True)
    ]
    flexible = list(limits).index(None)
    others = sum(widths) - widths[flexible] + len(gap) * (len(header) - 1)
    widths[flexible] = max(min(natural[flexible], width - others), 10)
    rule = gap.join("-" * w for w in widths)
    lines = [gap.join(cell.ljust(w) for cell, w in zip(header, widths, strict=True)).rstrip(), rule]
    for row in rows:
        wrapped = [_wrap(cell, w) for cell, w in zip(row, widths, strict=True)]
        for index in range(max(map(len, wrapped))):
            parts = [
                (cell[index] if index < len(cell) else "").ljust(w)
                for cell, w in zip(wrapped, widths, strict=True)
            ]
            lines.append(gap.join(parts).rstrip())
        lines.append(rule)
    return "\n".join(lines)


def summary(verdicts: Sequence[Verdict]) -> str:
    """Count the verdicts in one line."""
    counts = {
        value: sum(verdict.value == value for verdict in verdicts)
        for value in (HOLDS, FAILS, NOT_DECIDED)
    }
    return (
        f"{len(verdicts)} claims: {counts[HOLDS]} hold, {counts[FAILS]} fail, "
        f"{counts[NOT_DECIDED]} not decided"
    )


def verdict_table(verdicts: Sequence[Verdict], width: int | None = None) -> str:
    """Write verdicts as a table for a terminal.

    Parameters
    ----------
    verdicts : sequence of Verdict
        In the order in which they are shown.
    width : int, optional
        The number of columns; the terminal's width by default.

    Returns
    -------
    str
        Lines without trailing blanks, the last one counts the verdicts. In a narrow terminal
        each verdict is a paragraph.
    """
    if width is None:
        width = shutil.get_terminal_size((100, 24)).columns
    header = ["verdict", "claim", "predicted", "measured", "tolerance"]
    rows = [_cells(verdict) for verdict in verdicts]
    if rows and width >= _NARROWEST_TABLE:
        limits = (11, None, 18, 24, 16) if width >= 100 else (11, None, 12, 16, 12)
        return f"{_table(header, rows, width, limits)}\n{summary(verdicts)}"
    paragraphs = []
    for row in rows:
        title, *rest = _wrap(f"{row[0].upper()}  {row[1]}", max(width - 2, 10))
        fields = [
            line
            for name, cell in zip(header[2:], row[2:], strict=True)
            for line in _wrap(f"{name}: {cell}", max(width - 2, 10))
        ]
        paragraphs.append("\n".join([title, *(f"  {line}" for line in [*rest, *fields])]))
    return "\n\n".join([*paragraphs, summary(verdicts)])


def claim_list(claims: Iterable[Claim], width: int | None = None) -> str:
    """Write claims, their predictions and their sources as an indented list."""
    if width is None:
        width = shutil.get_terminal_size((100, 24)).columns
    lines: list[str] = []
    for claim in claims:
        predicted = claim.predicted if isinstance(claim.predicted, str) else number(claim.predicted)
        lines += textwrap.wrap(
            f"{claim.id}: {claim.statement}",
            max(width, 30),
            initial_indent="    ",
            subsequent_indent="        ",
            break_on_hyphens=False,
        )
        lines += textwrap.wrap(
            f"predicted {predicted} ({claim.tolerance}); {claim.source}",
            max(width, 30),
            initial_indent="        ",
            subsequent_indent="        ",
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def atomic_write(path: Path, text: str) -> None:
    """Write a file so that a reader, or a killed run, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; a result is for everyone.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a table with twelve digits, whole or not at all."""
    atomic_write(path, frame.to_csv(index=False, float_format="%.12g", lineterminator="\n"))


class Titles:
    """Titles that say what is claimed and what the verdict is, never more."""

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        self._values = {verdict.claim.id: verdict.value for verdict in verdicts}

    def __call__(self, *claims: tuple[str, str]) -> str:
        """Lines such as ``mean ~ log(2L)/L: holds`` from ids of claims and what they say."""
        return "\n".join(f"{text}: {self._values[claim]}" for claim, text in claims)


def json_number(value: float | None) -> float | str | None:
    """Make a number valid JSON: NaN and None become null, infinities become words."""
    if value is None or math.isnan(value):
        return None
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return float(value)


def _record(verdict: Verdict) -> dict[str, Any]:
    claim, accepted = verdict.claim, verdict.accepted
    relation = claim.predicted if isinstance(claim.predicted, str) else None
    return {
        "id": claim.id,
        "source": claim.source,
        "statement": claim.statement,
        "predicted": relation if verdict.expected is None else json_number(verdict.expected),
        "measured": json_number(verdict.measured),
        "low": json_number(verdict.low),
        "high": json_number(verdict.high),
        "tolerance": str(claim.tolerance),
        "verdict": verdict.value,
        "num_runs": verdict.num_runs,
        "relation": relation,
        "accepted": None if accepted is None else [json_number(end) for end in accepted],
        "run": verdict.run,
        "note": verdict.note,
        "reason": claim.reason,
        "how": claim.how,
    }


def write_verdicts(
    path: str | Path,
    experiment: str,
    preset: str,
    environment: Mapping[str, Any],
    verdicts: Sequence[Verdict],
) -> None:
    """Write the verdicts of a run as JSON.

    Parameters
    ----------
    path : path
        The file; folders are made, and an existing file is replaced in one step.
    experiment, preset : str
        What was run.
    environment : mapping
        What it was run on, see :func:`environment`.
    verdicts : sequence of Verdict
        In the order in which they are written.

    Notes
    -----
    Equal verdicts give equal bytes: the order is fixed and there are no times in it. ``predicted``
    is the number where one is known, else the relation; NaN is ``null``, infinities are the
    strings ``"inf"`` and ``"-inf"``.
    """
    ids = [verdict.claim.id for verdict in verdicts]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        msg = f"each claim gets one verdict, but there are several for {', '.join(twice)}"
        raise ClaimError(msg)
    document = {
        "experiment": experiment,
        "preset": preset,
        "environment": dict(sorted(environment.items())),
        "claims": [_record(verdict) for verdict in verdicts],
    }
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write(Path(path), f"{text}\n")


def environment(
    *, device: str = "cpu", seeds: int | None = None, data: str = "", fingerprint: str = ""
) -> dict[str, Any]:
    """Describe what a run depends on, and nothing that identifies a person or a machine.

    Parameters
    ----------
    device : str
        The torch device; a GPU is described by its model.
    seeds : int, optional
        How many seeds were run.
    data, fingerprint : str
        The data set's name and the hash of its content.
    """
    import numpy as np
    import scipy
    import torch

    import conditioning

    kind = torch.device(device)
    described = kind.type
    if kind.type == "cuda" and torch.cuda.is_available():
        described = f"{kind.type}: {torch.cuda.get_device_name(kind)}"
    return {
        "conditioning": conditioning.__version__,
        "data": data,
        "data_sha256": fingerprint,
        "device": described,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "scipy": scipy.__version__,
        "seeds": seeds,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def read_verdicts(path: str | Path) -> dict[str, Any]:
    """Read a ``verdicts.json``, or the one in a folder."""
    path = Path(path)
    if path.is_dir():
        path = path / "verdicts.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        claims = {claim["id"]: claim["verdict"] for claim in document["claims"]}
    except FileNotFoundError:
        msg = f"{path}: no such file; a run writes it as verdicts.json into its --out folder"
        raise VerdictFileError(msg) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{path}: not a file of verdicts ({type(error).__name__}: {error})"
        raise VerdictFileError(msg) from error
    if len(claims) != len(document["claims"]):
        msg = f"{path}: a claim occurs twice"
        raise VerdictFileError(msg)
    return dict(document)


def _parsed(value: object) -> float:
    return math.nan if value is None else float(value)  # type: ignore[arg-type]


def _moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Say whether two enclosures are disjoint, by more than rounding."""
    ends = [_parsed(claim.get(name)) for claim in (old, new) for name in ("low", "high")]
    old_low, old_high, new_low, new_high = ends
    if any(math.isnan(end) for end in ends):
        # A number on one side only has moved; none on either side has not.
        return all(map(math.isnan, ends[:2])) != all(map(math.isnan, ends[2:]))
    slack = ROUNDING * max((abs(end) for end in ends if math.isfinite(end)), default=0.0)
    return new_low > old_high + slack or new_high < old_low - slack


def compare(
    old: Mapping[str, Any], new: Mapping[str, Any], width: int | None = None
) -> tuple[str, bool]:
    """Put two runs side by side.

    Parameters
    ----------
    old, new : mapping
        The content of two files, see :func:`read_verdicts`.
    width : int, optional
        The number of columns; the terminal's width by default.

    Returns
    -------
    text : str
        A table with every claim, marked where a verdict changed or a measured value moved beyond
        its error, and below it what differs in the environments.
    changed : bool
        Whether a verdict changed; a claim that only one run has counts as changed.
    """
    if width is None:
        width = shutil.get_terminal_size((100, 24)).columns
    sides = [{claim["id"]: claim for claim in run["claims"]} for run in (old, new)]
    rows, changed, moved = [], 0, 0
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        pair = [side.get(name) for side in sides]
        verdicts = ["absent" if claim is None else claim["verdict"] for claim in pair]
        numbers = [
            "-"
            if claim is None
            else with_enclosure(*(_parsed(claim.get(key)) for key in ("measured", "low", "high")))
            for claim in pair
        ]
        mark = ""
        if verdicts[0] != verdicts[1]:
            changed += 1
            mark = "CHANGED"
        elif pair[0] is not None and pair[1] is not None and _moved(pair[0], pair[1]):
            moved += 1
            mark = "moved"
        rows.append([mark, name, *(f"{v}\n{n}" for v, n in zip(verdicts, numbers, strict=True))])
    header = ["", "claim", "before", "after"]
    parts = [_table(header, rows, width, (7, None, 28, 28))] if rows else []
    environments = [
        {"experiment": run.get("experiment"), "preset": run.get("preset")}
        | dict(run.get("environment", {}))
        for run in (old, new)
    ]
    parts += [
        f"{key}: {environments[0].get(key)} -> {environments[1].get(key)}"
        for key in dict.fromkeys([*environments[0], *environments[1]])
        if environments[0].get(key) != environments[1].get(key)
    ]
    parts.append(
        f"{len(rows)} claims: {changed} verdicts changed, {moved} values moved beyond their error"
    )
    return "\n".join(parts), changed > 0

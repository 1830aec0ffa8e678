"""The command line: examine all networks of the gallery and count hits, misses, false alarms."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from conditioning.checkup import checkup
from experiments.gallery.ailments import ailments
from experiments.gallery.cases import Case, Patient
from experiments.gallery.handwritten import handwritten_ailments, handwritten_healthy
from experiments.gallery.healthy import healthy
from experiments.gallery.judging import Judgement, counted, judge
from experiments.gallery.later import later_ailments, later_healthy
from experiments.report import environment

#: Products for each network, in place of seconds: results do not depend on how fast it goes.
NUM_MATVECS = 50


def cases_of(names: Sequence[str] = ()) -> list[Case]:
    """The cases whose name begins with one of these; all without any."""
    every = [
        *ailments(), *later_ailments(), *handwritten_ailments(),
        *healthy(), *later_healthy(), *handwritten_healthy(),
    ]  # fmt: skip
    return [case for case in every if not names or case.name.startswith(tuple(names))]


def networks(case: Case) -> Iterator[tuple[str, Patient]]:
    """The networks of a case: with the ailment and without it, or the healthy one alone."""
    if case.twin is None:
        yield "healthy", case.sick()
    else:
        yield "sick", case.sick()
        yield "twin", case.twin()


def examine(
    case: Case, num_matvecs: int = NUM_MATVECS, pages: Path | None = None
) -> list[Judgement]:
    """Make a checkup of each network of a case, and judge it.

    Parameters
    ----------
    case : Case
    num_matvecs : int
        Products for each checkup.
    pages : Path, optional
        A folder for the page of each checkup.
    """
    found = []
    for state, patient in networks(case):
        report = checkup(
            patient.model, patient.loss_fn, patient.data, seconds=None, num_matvecs=num_matvecs,
            progress=False, **patient.options,
        )  # fmt: skip
        found.append(judge(case, state, report))
        if pages is not None:
            report.save(pages / f"{case.name.replace('/', '-')}-{state}.html")
    return found


def show(judgements: Sequence[Judgement], stream: TextIO) -> None:
    """Print what is not right, and the counts."""
    for judgement in judgements:
        if not judgement.right:
            print(line(judgement), file=stream)
    for group, outcomes in counted(judgements).items():
        said = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
        print(f"{group}: {said or 'none'}", file=stream)


def line(judgement: Judgement) -> str:
    """One network in one line."""
    wanted = f"{judgement.expected} {judgement.expected_where}".strip() or "nothing"
    got = f"{judgement.found} {judgement.where}".strip() or "nothing"
    return (
        f"{judgement.outcome}: {judgement.case} ({judgement.state}; {judgement.summary}): "
        f"expected {wanted}, found {got}"
    )


def write(judgements: Sequence[Judgement], out: Path) -> None:
    """Write ``gallery.csv``, one row for each network, and the counts as ``gallery.json``."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(judgement) for judgement in judgements]
    with (out / "gallery.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Judgement)])
        writer.writeheader()
        writer.writerows(rows)
    described = environment(device="cpu", seeds=1, data="digits", fingerprint="")
    summary = {
        "environment": described,
        "num_matvecs": NUM_MATVECS,
        "counts": counted(judgements),
        "not right": [
            {"case": j.case, "state": j.state, "outcome": j.outcome, "found": j.found}
            for j in judgements
            if not j.right
        ],
    }
    text = json.dumps(summary, indent=1, allow_nan=False)
    (out / "gallery.json").write_text(text + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns
    -------
    int
        0 when all networks were examined, whatever was found; 2 if no case has such a name.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gallery",
        description="Examine networks with one known ailment each, and healthy ones.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases, by how they begin")
    parser.add_argument("--out", default="figures/gallery", metavar="DIR", help="where tables go")
    parser.add_argument("--pages", metavar="DIR", help="write the page of each checkup there")
    parser.add_argument(
        "--max-matvecs", type=int, default=NUM_MATVECS, metavar="N", help="products for each"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parsed = parser.parse_args(arguments)
    cases = cases_of(parsed.names)
    if not cases:
        known = ", ".join(dict.fromkeys(case.ailment for case in cases_of()))
        print(f"error: no case begins with {' or '.join(parsed.names)}: {known}", file=sys.stderr)
        return 2
    judgements: list[Judgement] = []
    for case in tqdm(cases, unit="case", disable=parsed.quiet or not sys.stderr.isatty()):
        found = examine(case, parsed.max_matvecs, Path(parsed.pages) if parsed.pages else None)
        judgements += found
        if not parsed.quiet:
            for judgement in found:
                tqdm.write(line(judgement), file=sys.stdout)
                sys.stdout.flush()
    show(judgements, sys.stdout)
    if parsed.names or parsed.max_matvecs != NUM_MATVECS:
        return 0  # the tables are of the whole gallery, in its own budget
    write(judgements, Path(parsed.out))
    print(f"Results are in {parsed.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

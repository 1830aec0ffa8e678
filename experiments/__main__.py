"""The command line: list experiments and their claims, run one, compare two runs."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TextIO

from experiments import registry
from experiments.errors import ExperimentError
from experiments.ranks import RankFailedError, launched, ranks

EXIT_OK = 0
EXIT_CHANGED = 1
EXIT_UNUSABLE = 2
EXIT_INTERRUPTED = 130

_EPILOG = """\
without arguments:     list the experiments and what each of them tests
compare BEFORE AFTER:  show two verdicts.json side by side, exit with 1 if a verdict changed

A run that was interrupted or killed continues where it stopped when it is started again.
Training on N GPUs:    torchrun --nproc-per-node N -m experiments NAME --device cuda
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Measure what a paper claims, and say whether it holds.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the experiment to run")
    parser.add_argument("--preset", help="quick (default), paper, ...: listed without NAME")
    parser.add_argument("--data", metavar="DATA", help="digits, mnist, cifar10 or FILE.npz")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto (default)")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many seeds")
    parser.add_argument("--out", metavar="DIR", help="where results go (default figures/NAME)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--resume", action="store_true", help="insist on continuing, or repeat from finished cells"
    )
    mode.add_argument("--fresh", action="store_true", help="discard finished cells")
    return parser


def _list(stream: TextIO) -> None:
    from experiments.report import claim_list

    for name in registry.names():
        try:
            experiment = registry.find(name)
        except ExperimentError as error:
            print(f"{name}: {error}\n", file=stream)
            continue
        print(f"{name}: {experiment.TITLE}\n  {experiment.PAPER}", file=stream)
        for preset, settings in experiment.PRESETS.items():
            print(f"  --preset {preset}: {settings.summary}", file=stream)
        print(f"  claims:\n{claim_list(experiment.claims())}\n", file=stream)
    print("Run one with: python -m experiments NAME [--preset PRESET] ...", file=stream)


def _compare(arguments: Sequence[str]) -> int:
    from experiments.report import compare, read_verdicts

    parser = argparse.ArgumentParser(
        prog="python -m experiments compare",
        description="Show two runs side by side. Exit with 1 if a verdict changed.",
    )
    parser.add_argument("before", help="a verdicts.json, or the folder of one")
    parser.add_argument("after", help="a verdicts.json, or the folder of one")
    parsed = parser.parse_args(arguments)
    text, changed = compare(read_verdicts(parsed.before), read_verdicts(parsed.after))
    print(text)
    return EXIT_CHANGED if changed else EXIT_OK


def _run(parsed: argparse.Namespace) -> int:
    from experiments.report import verdict_table

    experiment = registry.find(parsed.name)
    options = registry.options_for(
        experiment,
        preset=parsed.preset,
        data_name=parsed.data,
        device=parsed.device,
        seeds=parsed.seeds,
        out=parsed.out,
        mode="resume" if parsed.resume else "fresh" if parsed.fresh else "continue",
        progress=not parsed.quiet,
    )
    with ranks(options.device) as here:
        if here.first:
            print(f"{experiment.TITLE}\n{experiment.PAPER}")
            several = f", {here.size} ranks" if here.size > 1 else ""
            print(
                f"preset {options.preset}, {_data(experiment, options)}device {options.device}, "
                f"{options.seeds} seeds{several}\n",
                flush=True,
            )
            if parsed.data is not None and not registry.takes_data(experiment):
                # No error: make gives the same options to all experiments.
                print(f"note: {experiment.NAME} takes no data set", file=sys.stderr)
        verdicts = registry.run(experiment, options)
        if here.first:
            print(verdict_table(verdicts))
            print(f"Results are in {options.out}")
    return EXIT_OK


def _data(experiment: registry.Experiment, options: registry.Options) -> str:
    """What it is run on, for a reader; nothing for an experiment that takes no data set."""
    return f"data {options.data}, " if registry.takes_data(experiment) else ""


def _complain(error: Exception) -> None:
    """Say an error once, though every rank may have it: the others only what is theirs alone."""
    here = launched()
    if here.first:
        print(f"error: {error}", file=sys.stderr)
    elif not isinstance(error, RankFailedError):
        print(f"error on rank {here.rank}: {error}", file=sys.stderr)


def _resume_command(arguments: Sequence[str]) -> str:
    kept = [argument for argument in arguments if argument not in ("--resume", "--fresh")]
    start = ["python"]
    if launched().size > 1:
        here = os.environ.get("LOCAL_WORLD_SIZE", str(launched().size))
        start = ["torchrun", "--nproc-per-node", here]
    return shlex.join([*start, "-m", "experiments", *kept, "--resume"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words after ``python -m experiments``; those of the process by default.

    Returns
    -------
    int
        0 when the run was completed, whatever its verdicts; 1 when ``compare`` finds a changed
        verdict; 2 when nothing could be run as asked; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # A terminal that knows no Greek gets question marks rather than a traceback.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        if arguments[:1] == ["compare"]:
            return _compare(arguments[1:])
        parsed = _parser().parse_args(arguments)
        if parsed.name is None:
            _list(sys.stdout)
            return EXIT_OK
        return _run(parsed)
    except ExperimentError as error:
        _complain(error)
        return EXIT_UNUSABLE
    except KeyboardInterrupt as interruption:
        if not launched().first:
            return EXIT_INTERRUPTED
        # What run_cells raises says how many cells are on the disk.
        print(f"\n{interruption or 'interrupted'}", file=sys.stderr)
        print(f"continue with: {_resume_command(arguments)}", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

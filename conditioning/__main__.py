"""The command line: examine a model, compare two checkups, show one."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

from conditioning import __version__
from conditioning.cli.parser import parse
from conditioning.errors import ConditioningError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words after ``python -m conditioning``; those of the process by default.

    Returns
    -------
    int
        0 if no problem was found, 1 if problems were, 2 for bad input, 130 if interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # where a sign is not in the terminal's encoding
            stream.reconfigure(errors="replace")
    try:
        options = parse(given, f"conditioning {__version__}")
        from conditioning.cli import commands

        run = {
            "checkup": commands.run_checkup, "compare": commands.run_compare,
            "show": commands.run_show,
        }[options.command]  # fmt: skip
        return run(options)
    except ConditioningError as error:
        return _failed(f"error: {error}", given)
    except KeyboardInterrupt:
        without = " before there was a report" if given[:1] == ["checkup"] else ""
        _say(f"interrupted{without}")
        return 130
    except BrokenPipeError:
        # The reader has seen enough, as in "| head".
        _silence()
        return 0
    except Exception as error:  # a defect, of which no program may think that it is a finding
        where = "" if "--debug" in given else " (--debug shows where)"
        return _failed(f"internal error {type(error).__name__}: {error}{where}", given)


def _failed(message: str, given: Sequence[str]) -> int:
    if "--debug" in given:
        with contextlib.suppress(OSError):
            traceback.print_exc()
    _say(" ".join(message.split()))
    try:
        sys.stdout.flush()
    except OSError:
        _silence()
    return 2


def _say(message: str) -> None:
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def _silence() -> None:
    """What could not be written is dropped: Python would try again at its end, and complain."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())

"""The command line: examine a model, compare two checkups, show one."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from conditioning import __version__
from conditioning.cli.parser import make_parser
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
    try:
        options = make_parser(f"conditioning {__version__}").parse_args(given)
        from conditioning.cli import commands

        run = {
            "checkup": commands.run_checkup, "compare": commands.run_compare,
            "show": commands.run_show,
        }[options.command]  # fmt: skip
        return run(options)
    except ConditioningError as error:
        if "--debug" in given:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was measured yet, or not all was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has seen enough, as in "| head". Python would complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())

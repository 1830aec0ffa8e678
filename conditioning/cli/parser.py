"""The options of the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NoReturn

from conditioning.errors import InvalidArgumentError

_DESCRIPTION = "Where a network loses the norm, and how badly its loss is conditioned."
_EPILOG = """\
exit codes:  0 no problem found, 1 problems found (compare: new ones), 2 bad input, 130 interrupted

  python -m conditioning checkup train.py:make --html page.html --json before.json
  python -m conditioning checkup package.nets:Net --input-shape 3,32,32 --classes 10
  python -m conditioning checkup package.nets:Net --checkpoint last.pt --data digits.npz
  python -m conditioning compare before.json after.json
"""
_FACTORY = (
    "PACKAGE.MODULE:NAME or FILE.py:NAME; an nn.Module, its class, or a function without arguments "
    "that returns one, or returns (model, loss_fn, data)"
)


LEAST_MATVECS = 50  # as checkup() refuses less


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors of this package: one line, no usage."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of ending the process."""
        if message.endswith("required: FACTORY"):
            message += "; it comes before --blocks and --params, which take all that follows"
        msg = f"{message} ({self.prog} --help shows the options)"
        raise InvalidArgumentError(msg)


def parse(arguments: Sequence[str], version: str) -> argparse.Namespace:
    """The options that are given.

    Raises
    ------
    InvalidArgumentError
        If they are not understood.
    """
    parser = make_parser(version)
    options, rest = parser.parse_known_args(arguments)
    if rest:
        msg = (
            f"unrecognized arguments: {' '.join(rest)} ({parser.prog} {options.command} --help "
            f"shows the options)"
        )
        raise InvalidArgumentError(msg)
    return options


def make_parser(version: str) -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="python -m conditioning", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, usage, text, add in (
        ("checkup", "FACTORY", "examine a model", _checkup),
        ("compare", "A.json B.json", "set two checkups beside each other", _compare),
        ("show", "A.json", "print a checkup that was saved, or write it in another form", _show),
    ):
        command = commands.add_parser(
            name, help=text, description=f"{text}.", allow_abbrev=False,
            # The usual form has options first, where --blocks would take the rest as names.
            usage=f"%(prog)s {usage} [options]",
        )  # fmt: skip
        add(command)
        command.add_argument("--debug", action="store_true", help="show where an error arose")
    return parser


def _checkup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("factory", metavar="FACTORY", help=_FACTORY)
    given = parser.add_argument_group("model, loss and data")
    given.add_argument("--checkpoint", metavar="FILE", help="weights: a state dict, or safetensors")
    given.add_argument(
        "--loss", metavar="LOSS",
        help="cross_entropy, mse, none (the model returns its loss), or PACKAGE.MODULE:NAME; "
        "default: by the kind of the targets",
    )  # fmt: skip
    source = given.add_mutually_exclusive_group()
    source.add_argument(
        "--data", metavar="DATA",
        help="FILE.npz with x and y, FILE.pt with two tensors, or PACKAGE.MODULE:NAME of a "
        "DataLoader, data set or batch, or of a function for one",
    )  # fmt: skip
    source.add_argument(
        "--input-shape", type=sizes, metavar="C,H,W", help="random normal inputs of this shape"
    )
    source.add_argument(
        "--tokens", type=two_sizes, metavar="VOCABULARY,LENGTH", help="random sequences of tokens"
    )
    given.add_argument("--classes", type=size, metavar="N", help="labels for random inputs")
    given.add_argument("--batch-size", type=size, metavar="N", help="default 64")
    given.add_argument("--batches", type=size, metavar="N", help="how many batches, default 4")
    given.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:N or mps; default: the model's"
    )
    given.add_argument("--dtype", choices=("float32", "float64"), help="default: the model's")
    mode = given.add_mutually_exclusive_group()
    mode.add_argument("--eval", action="store_true", help="in evaluation mode")
    mode.add_argument("--train", action="store_true", help="in training mode")
    what = parser.add_argument_group("what is examined")
    what.add_argument(
        "--blocks", nargs="+", metavar="GLOB", help="names of blocks, such as layer1.*"
    )
    what.add_argument("--params", nargs="+", metavar="GLOB", help="parameters of the Hessian")
    what.add_argument(
        "--learning-rate", type=positive, metavar="X", help="yours, for plain SGD: is it too large?"
    )
    what.add_argument("--momentum", type=momentum, default=0.0, metavar="X", help="default 0")
    what.add_argument(
        "--budget", type=seconds, default=60.0, metavar="SECONDS", help="default 60; none: no limit"
    )
    what.add_argument(
        "--max-matvecs", type=products, metavar="N", help="products at most, 50 or more"
    )
    what.add_argument(
        "--seed", type=seed, default=0, metavar="N",
        help="of random vectors and inputs, and of weights that FACTORY draws; default 0",
    )  # fmt: skip
    output = _outputs(parser)
    output.add_argument("--quiet", action="store_true", help="no progress, and only one line")
    output.add_argument(
        "--exit-zero", action="store_true", help="exit with 0 if problems are found"
    )


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="A.json", help="a checkup that was saved")
    parser.add_argument("after", metavar="B.json", help="another one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--exit-zero", action="store_true", help="exit with 0 if problems are new")


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", metavar="A.json", help="a checkup that was saved")
    _outputs(parser)


def _outputs(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    output = parser.add_argument_group("output")
    output.add_argument("--html", metavar="FILE", help="write one page, figures included")
    output.add_argument(
        "--json",
        metavar="FILE",
        help="write JSON; - for the standard output, and nothing else there",
    )
    output.add_argument("--text", metavar="FILE", help="write what is printed")
    return output


def size(text: str) -> int:
    """A positive integer."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        msg = f"expected a positive integer, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return number


def seed(text: str) -> int:
    """An integer that random generators take."""
    try:
        number = int(text)
    except ValueError:
        number = 2**64
    if not -(2**63) <= number < 2**64:
        msg = f"expected an integer from -2^63 to 2^64 - 1, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return number


def sizes(text: str) -> tuple[int, ...]:
    """Positive integers with commas between them."""
    try:
        return tuple(size(part) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        msg = f"expected sizes such as 3,32,32 (without the batch), got {text!r}"
        raise argparse.ArgumentTypeError(msg) from error


def two_sizes(text: str) -> tuple[int, ...]:
    """Vocabulary and length."""
    found = sizes(text) if text.count(",") == 1 else ()
    if not found:
        msg = f"expected the size of the vocabulary and a length, such as 50257,128, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return found


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        msg = f"expected a number above 0, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return number


def momentum(text: str) -> float:
    """A number from 0 to below 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1:
        msg = f"expected a number from 0 to below 1, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return number


def products(text: str) -> int:
    """As many products as a checkup needs at least."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < LEAST_MATVECS:
        msg = f"expected an integer of at least {LEAST_MATVECS}, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return number


def seconds(text: str) -> float | None:
    """Seconds, or none for no limit."""
    return None if text == "none" else positive(text)

"""Where results go: checked before a run that may take minutes, written after it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from conditioning.errors import OutputPathError

if TYPE_CHECKING:
    from conditioning.checkup import Checkup

_SUFFIXES = {"json": (".json",), "text": (".txt",), "html": (".html", ".htm")}


@dataclass(frozen=True)
class Outputs:
    """The files that a checkup is to be written to; ``-`` for JSON is the standard output."""

    json: str | None
    text: str | None
    html: str | None

    @property
    def on_stdout(self) -> bool:
        """Whether JSON goes to the standard output, so that nothing else may."""
        return self.json == "-"

    def _files(self) -> dict[str, Path]:
        given = {"json": self.json, "text": self.text, "html": self.html}
        return {form: Path(path) for form, path in given.items() if path and path != "-"}

    def check(self) -> None:
        """Say at once what could not be written later.

        Raises
        ------
        OutputPathError
            If a suffix is not that of its form, a folder cannot be made or written to, or two
            forms go to one file.
        """
        if "-" in (self.text, self.html):
            msg = "Only --json can go to the standard output (-): the text does so by itself."
            raise OutputPathError(msg)
        for form, name in (("json", self.json), ("text", self.text), ("html", self.html)):
            if name == "":
                msg = f"--{form} needs the name of a file, got an empty one."
                raise OutputPathError(msg)
        files = self._files()
        for form, path in files.items():
            if path.suffix.lower() not in _SUFFIXES[form]:
                wanted = " or ".join(_SUFFIXES[form])
                msg = f"--{form} needs a file that ends in {wanted}, got {str(path)!r}."
                raise OutputPathError(msg)
            _check_writable(path)

    def save(self, report: Checkup) -> list[Path]:
        """Write all files, and return their paths.

        Raises
        ------
        OutputPathError
            If a file cannot be written; the others are written before that.
        """
        paths = list(self._files().values())
        failures = [error for path in paths if (error := _failure(report, path)) is not None]
        if self.on_stdout:
            say(report.to_json(), sys.stdout)
        if failures:
            raise OutputPathError(" ".join(map(str, failures))) from failures[0].__cause__
        return paths


def _failure(report: Checkup, path: Path) -> OutputPathError | None:
    """Write one file, and return what prevents it."""
    try:
        report.save(path)
    except OSError as error:
        failure = OutputPathError(f"{str(path)!r} cannot be written: {error.strerror or error}.")
        failure.__cause__ = error
        return failure
    except Exception as error:  # a page that cannot be drawn must not cost the numbers
        failure = OutputPathError(
            f"{str(path)!r} cannot be made: {type(error).__name__}: {error} (--debug shows where)."
        )
        failure.__cause__ = error
        return failure
    return None


def say(what: Any, stream: TextIO) -> None:
    """Print at once.

    Raises
    ------
    OutputPathError
        If the stream takes nothing, as on a full disk.
    BrokenPipeError
        If nobody reads it any more.
    """
    try:
        print(what, file=stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        msg = f"The report cannot be printed: {error.strerror or error}."
        raise OutputPathError(msg) from error


def _check_writable(path: Path) -> None:
    reason = ""
    if path.is_dir():
        reason = "it is a folder"
    elif path.exists():
        reason = "" if os.access(path, os.W_OK) else "it is write-protected"
    else:
        # What is missing of the folders is made later, below the nearest one that is there.
        nearest = next(folder for folder in path.absolute().parents if folder.exists())
        if not nearest.is_dir():
            reason = f"{str(nearest)!r} is no folder"
        elif not os.access(nearest, os.W_OK | os.X_OK):
            reason = f"the folder {str(nearest)!r} is write-protected"
    if reason:
        msg = f"{str(path)!r} cannot be written: {reason}."
        raise OutputPathError(msg)

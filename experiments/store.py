"""The finished cells of a sweep, on disk: a killed run continues where it stopped.

A store is a file of JSON lines. The first describes the configuration, each other one is a
finished cell, appended and forced to disk before the next cell starts. A run that is killed while
it writes leaves a torn last line, which is dropped: its cell is run again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from experiments.errors import ConfigurationChangedError, StoreError, StoreLockedError

Mode = Literal["continue", "resume", "fresh"]
STORE_NAME = "cells.jsonl"
_FORMAT = 1
# A changed program does not make hours of finished cells worthless, so a run that insists on
# continuing may go on with them; every other part of a configuration decides what is measured.
_SOFT_KEYS = frozenset({"code"})


def to_json(value: Any) -> Any:
    """Turn a result into what JSON can hold without losing a bit of any number.

    Numpy and torch scalars and arrays become numbers and lists, tuples become lists, and what JSON
    has no literal for (NaN, infinities) becomes ``{"$float": "nan"}``.

    Raises
    ------
    StoreError
        If the value holds something else, such as a model, or a dict with keys that are not words.
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        value = float(value)
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == "$float":
                msg = f"a cell's result needs words as keys, got {key!r}: use str(...)"
                raise StoreError(msg)
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return to_json(value.tolist())
    msg = (
        f"a cell's result must be made of numbers, words, lists and dicts, got "
        f"{type(value).__name__}: store its to_dict() or the numbers that matter"
    )
    raise StoreError(msg)


def from_json(value: Any) -> Any:
    """Undo :func:`to_json`, as far as it can be: lists stay lists."""
    if isinstance(value, dict):
        if set(value) == {"$float"}:
            return float(value["$float"])
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return value


def canonical(value: Any) -> str:
    """Write a value as JSON in the one form that equal values share."""
    return json.dumps(to_json(value), sort_keys=True, ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """Hash a value by its content."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def seed_from(value: Any) -> int:
    """A seed made from numbers, words, lists and mappings of them: different for different ones.

    It has 32 bits, because torch's generator on the CPU takes no notice of more.
    """
    return int(fingerprint(value)[:8], 16)


def code_fingerprint() -> str:
    """Hash the source of both packages, to notice that the program changed between two runs."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for package in ("conditioning", "experiments"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            # Far beyond the content: on Windows a locked region can be neither read nor written.
            file.seek(1 << 62)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        msg = f"another run is writing to {path}: wait for it, or give this one its own --out"
        raise StoreLockedError(msg) from error
    except OSError:
        # Some network file systems have no locks. Losing the protection is better than not running.
        pass


class CellStore:
    """The finished cells of one configuration.

    Parameters
    ----------
    path : path
        The file; its folder is made.
    configuration : mapping
        Everything that decides what a cell measures: experiment, preset, data fingerprint, seeds,
        device, versions. Key ``"code"`` may differ when ``mode="resume"``.
    mode : {"continue", "resume", "fresh"}
        ``"continue"`` takes over the cells of an unfinished run of the same configuration and
        otherwise starts anew; ``"resume"`` insists on continuing, and also takes over a finished
        run; ``"fresh"`` discards whatever is there.

    Attributes
    ----------
    notice : str
        What was done with the file that was there, in words; empty if there was none.

    Raises
    ------
    ConfigurationChangedError
        ``"resume"``, but the cells belong to another configuration or there are none.
    StoreLockedError
        Another run holds the store.
    StoreError
        The file is not a store, or is damaged elsewhere than at its end.

    Notes
    -----
    Use it as a context manager, or call :meth:`close`. Cells that are discarded although their
    run was not finished are kept in ``cells.previous.jsonl`` beside the store.
    """

    def __init__(
        self, path: str | Path, configuration: Mapping[str, Any], mode: Mode = "continue"
    ) -> None:
        if mode not in ("continue", "resume", "fresh"):
            msg = f"mode must be 'continue', 'resume' or 'fresh', got {mode!r}"
            raise StoreError(msg)
        self.path = Path(path)
        self.notice = ""
        self.finished = False
        self._configuration: dict[str, Any] = json.loads(canonical(configuration))
        self._cells: dict[str, Any] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = self.path.open("a+b")
        except OSError as error:
            msg = f"cannot write to {self.path.parent} ({error.strerror}): choose another --out"
            raise StoreError(msg) from error
        try:
            _lock(self._file, self.path)
            self._open(mode)
        except BaseException:
            self._file.close()
            raise

    def _open(self, mode: Mode) -> None:
        try:
            header, cells, finished, num_bytes = _read(self._file, self.path)
        except StoreError:
            if mode != "fresh":
                raise
            header, cells, finished, num_bytes = None, {}, False, 0
        if mode == "resume" and header is None:
            msg = f"nothing to resume: {self.path} holds no finished cell; run without --resume"
            raise ConfigurationChangedError(msg)
        differing = _differing(header, self._configuration) if header is not None else []
        hard = [text for key, text in differing if key not in _SOFT_KEYS]
        if mode == "resume" and hard:
            msg = (
                f"{self.path} cannot be resumed, its cells were made with another configuration "
                f"({'; '.join(hard)}): run with the former options, with another --out, or --fresh"
            )
            raise ConfigurationChangedError(msg)
        same = header is not None and not differing
        if mode == "resume" or (mode == "continue" and same and not finished):
            self._file.truncate(num_bytes)
            self._cells, self.finished = cells, finished
            if cells:
                self.notice = f"continuing with {len(cells)} finished cells of {self.path}"
                self.notice += ", although the program changed since" if differing else ""
            return
        reasons = [text for _, text in differing]
        if header is not None and cells and not finished:
            kept = self.path.with_name(f"{self.path.stem}.previous{self.path.suffix}")
            shutil.copyfile(self.path, kept)
            why = "as --fresh asks" if mode == "fresh" else f"because {'; '.join(reasons)}"
            self.notice = f"starting anew {why}; {len(cells)} finished cells are kept in {kept}"
        elif reasons:
            self.notice = f"starting anew because {'; '.join(reasons)}"
        self._file.truncate(0)
        self._append({"format": _FORMAT, "configuration": self._configuration})

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        # One write call: another process sees the whole line or none of it.
        self._file.write(line.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> CellStore:
        """Return the store itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the file; its cells stay."""
        self.close()

    def __len__(self) -> int:
        return len(self._cells)

    def __contains__(self, cell: Mapping[str, Any]) -> bool:
        return canonical(cell) in self._cells

    def __getitem__(self, cell: Mapping[str, Any]) -> Any:
        return from_json(self._cells[canonical(cell)])

    def add(self, cell: Mapping[str, Any], result: Any) -> None:
        """Append a finished cell, and return when it is on the disk."""
        key, encoded = canonical(cell), to_json(result)
        if key in self._cells:
            msg = f"cell {key} is already in {self.path}"
            raise StoreError(msg)
        self._append({"cell": to_json(cell), "result": encoded})
        # What a resumed run will read, not what was given: both runs go on with the same.
        self._cells[key] = json.loads(json.dumps(encoded))

    def mark_finished(self) -> None:
        """Note that the run is complete, so that the next plain one measures anew."""
        if not self.finished:
            self._append({"finished": True, "num_cells": len(self._cells)})
            self.finished = True

    def close(self) -> None:
        """Release the file and its lock."""
        self._file.close()


class CellsInMemory(CellStore):
    """Finished cells that another process keeps on disk: what ranks but the first one have."""

    def __init__(self) -> None:
        self.path = Path(os.devnull)
        self.notice = ""
        self.finished = False
        self._cells = {}

    def _append(self, record: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        """Do nothing: there is no file."""


def mark_finished(path: str | Path) -> None:
    """Mark the store of a run as finished, if there is one."""
    path = Path(path)
    if not path.exists():
        return
    with path.open("r+b") as file:
        _lock(file, path)
        header, cells, finished, num_bytes = _read(file, path)
        if header is None or finished:
            return
        file.truncate(num_bytes)
        file.seek(num_bytes)
        file.write(json.dumps({"finished": True, "num_cells": len(cells)}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _read(file: IO[bytes], path: Path) -> tuple[dict[str, Any] | None, dict[str, Any], bool, int]:
    """Read header, cells, whether the run is finished, and how many bytes of the file are whole."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].split(b"\n")[:-1]
    header: dict[str, Any] | None = None
    cells: dict[str, Any] = {}
    finished = False
    for index, line in enumerate(lines):
        try:
            record = json.loads(line)
            if index == 0:
                if record["format"] != _FORMAT:
                    msg = f"{path} was written by another version: remove it, or run with --fresh"
                    raise StoreError(msg)
                header = dict(record["configuration"])
            elif "finished" in record:
                finished = True
            else:
                cells[canonical(from_json(record["cell"]))] = record["result"]
                finished = False
        except (ValueError, KeyError, TypeError) as error:  # noqa: PERF203
            # A power cut may leave a last block that was allocated but never written.
            if index > 0 and index == len(lines) - 1:
                whole -= len(line) + 1
                break
            msg = f"{path}, line {index + 1}, is damaged: remove the file, or run with --fresh"
            raise StoreError(msg) from error
    return header, cells, finished, whole


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say in words what differs between two configurations."""

    def short(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 40 else f"{text[:12]}...{text[-4:]}"

    differing = []
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            text = f"{key} was {short(old.get(key))} and is {short(new.get(key))}"
            differing.append((key, "the program changed" if key in _SOFT_KEYS else text))
    return differing

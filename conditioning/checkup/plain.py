"""Results as plain Python for JSON, and back into their classes by the types of their fields."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from conditioning.errors import InvalidArgumentError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Dataclasses as dicts, sequences as lists, numbers that are not finite as strings.

    JSON has no NaN and no infinity; readers other than Python's refuse them.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (Tensor, np.ndarray)):
        return to_plain(value.tolist())
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


@functools.cache
def _types(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def from_plain(kind: type[T], plain: Any) -> T:
    """Inverse of :func:`to_plain` for a class whose fields say their types.

    Raises
    ------
    InvalidArgumentError
        If a field is missing, unknown, or of another type.
    """
    return typing.cast("T", _read(kind, plain, kind.__name__))


def _read(kind: Any, plain: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        inner = [option for option in typing.get_args(kind) if option is not types.NoneType]
        return None if plain is None else _read(inner[0], plain, where)
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, plain, where)
    if origin is typing.Literal:
        return _checked(plain, plain in typing.get_args(kind), where)
    if origin is tuple:
        item, items = typing.get_args(kind), _checked(plain, isinstance(plain, list), where)
        kinds = [item[0]] * len(items) if item[-1] is Ellipsis else list(item)
        _checked(plain, len(kinds) == len(items), where)
        return tuple(
            _read(one, value, f"{where}[{i}]")
            for i, (one, value) in enumerate(zip(kinds, items, strict=True))
        )
    if origin is dict:
        values = _checked(plain, isinstance(plain, dict), where)
        return {k: _read(typing.get_args(kind)[1], v, f"{where}.{k}") for k, v in values.items()}
    if kind is float:
        if plain in ("nan", "inf", "-inf"):
            return float(plain)
        return float(_checked(plain, _is_number(plain), where))
    if kind is int:
        return _checked(plain, _is_number(plain) and int(plain) == plain, where)
    return _checked(plain, isinstance(plain, kind), where)


def _read_fields(kind: Any, plain: Any, where: str) -> Any:
    fields = {f.name for f in dataclasses.fields(kind)}
    given = set(_checked(plain, isinstance(plain, dict), where))
    if given != fields:
        wrong = sorted(given ^ fields)
        msg = f"{where} has other fields than a checkup of this version: {', '.join(wrong)}."
        raise InvalidArgumentError(msg)
    known = _types(kind)
    return kind(**{k: _read(known[k], v, f"{where}.{k}") for k, v in plain.items()})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _checked(value: Any, fits: bool, where: str) -> Any:
    if not fits:
        msg = f"{where} of the file does not fit a checkup: {str(value)[:60]!r}."
        raise InvalidArgumentError(msg)
    return value

"""Objects by the name of their module or file, and the models and data that factories make."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from conditioning.errors import FactoryError, ObjectNotFoundError
from conditioning.operators.modules import join_names


@dataclass(frozen=True)
class Built:
    """What a factory made: a model, and maybe its loss function and its data."""

    model: nn.Module
    loss_fn: Any = None
    data: Any = None
    complete: bool = False  # whether loss and data came with it


def find_object(name: str) -> Any:
    """The object that ``PACKAGE.MODULE:NAME`` or ``FILE.py:NAME`` stands for.

    The current directory can be imported from, as can the folder of a file.

    Raises
    ------
    ObjectNotFoundError
        If the form is another one, the import fails, or there is no such name.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        msg = f"{name!r} should have the form PACKAGE.MODULE:NAME or FILE.py:NAME."
        raise ObjectNotFoundError(msg)
    module = _from_file(Path(place)) if place.endswith(".py") else _from_name(place)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            msg = f"{place} has no {attribute!r}: {_near(part, found)}"
            raise ObjectNotFoundError(msg)
        found = getattr(found, part)
    return found


def _near(name: str, owner: Any) -> str:
    known = [known for known in vars(owner) if not known.startswith("_")]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    own = [k for k in known if getattr(getattr(owner, k), "__module__", None) == owner.__name__]
    return f"it defines {join_names(own) or 'nothing'}."


def _reachable(folder: Path, *, last: bool = False) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(len(sys.path) if last else 0, str(folder))


def _from_name(name: str) -> ModuleType:
    _reachable(Path.cwd())
    try:
        with _arguments(name):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # The module itself, or a package that it is in; not one that it imports.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            msg = (
                f"There is no module {error.name!r} to import. The current directory "
                f"({Path.cwd()}) is searched, and what is installed; a file is given as "
                f"FILE.py:NAME."
            )
            raise ObjectNotFoundError(msg) from error
        raise _failed_import(name, error) from error
    except (Exception, SystemExit) as error:
        raise _failed_import(name, error) from error


@contextlib.contextmanager
def _arguments(program: str) -> Iterator[None]:
    """Code of others sees no options of this command line, of which it would know none."""
    before, sys.argv = sys.argv, [program]
    try:
        yield
    finally:
        sys.argv = before


def _is_taken(name: str, path: Path) -> bool:
    """Whether a module of another file, such as an installed one, has this name."""
    if name in sys.modules:
        origin = getattr(sys.modules[name], "__file__", None) or "built in"
    else:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            spec = None
        origin = spec.origin if spec is not None else None
    return origin is not None and Path(origin).resolve() != path.resolve()


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        msg = f"There is no file {str(path)!r}."
        raise ObjectNotFoundError(msg)
    # A tqdm.py must not take the place of the tqdm that others import.
    taken = _is_taken(path.stem, path)
    name = f"_examined_{path.stem}" if taken else path.stem
    _reachable(path.resolve().parent, last=taken)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        msg = f"{str(path)!r} cannot be imported."
        raise ObjectNotFoundError(msg)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look their module up here while it is executed.
    sys.modules[name] = module
    try:
        with _arguments(str(path)):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _failed_import(str(path), error) from error
    return module


def _failed_import(name: str, error: BaseException) -> ObjectNotFoundError:
    if isinstance(error, SystemExit):
        return ObjectNotFoundError(
            f"Importing {name} ended the program ({_exit(error)}). Put what runs it below "
            f"if __name__ == '__main__'."
        )
    return ObjectNotFoundError(
        f"Importing {name} raised {type(error).__name__}: {error} (--debug shows where)."
    )


def _exit(error: SystemExit) -> str:
    return f"SystemExit: {error.code}"


def call(factory: Callable[..., Any], name: str, returns: str) -> Any:
    """Call a factory without arguments.

    Raises
    ------
    FactoryError
        If it needs arguments, or fails.
    """
    needed = _needed(factory)
    if needed:
        msg = (
            f"{name} needs arguments ({join_names(needed)}). Write a function without arguments "
            f"that returns {returns}."
        )
        raise FactoryError(msg)
    try:
        with _arguments(name.rpartition(":")[0]):
            return factory()
    except SystemExit as error:
        msg = (
            f"{name} ended the program ({_exit(error)}). It is called without arguments, also "
            f"without those of a command line: write a function that reads none."
        )
        raise FactoryError(msg) from error
    except Exception as error:
        msg = f"{name} raised {type(error).__name__}: {error} (--debug shows where)."
        raise FactoryError(msg) from error


def _needed(factory: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # made in C, without a signature
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def build(name: str, seed: int) -> Built:
    """The model that a name stands for, with its loss and data where the factory returns them.

    The seed fixes the weights that are drawn, by the factory or when its module is imported.

    Raises
    ------
    ObjectNotFoundError, FactoryError
        If there is nothing of that name, or it makes no model.
    """
    wanted = "an nn.Module, or (model, loss_fn, data)"
    torch.manual_seed(seed)
    made = find_object(name)
    if not isinstance(made, (nn.Module, tuple)):
        torch.manual_seed(seed)  # whatever the import drew
        if not callable(made):
            msg = f"{name} is a {type(made).__name__}; expected {wanted}, or a function for it."
            raise FactoryError(msg)
        made = call(made, name, wanted)
    if isinstance(made, nn.Module):
        return Built(made)
    if isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module):
        return Built(*made, complete=True)
    form = type(made).__name__
    if isinstance(made, tuple):
        form = f"({', '.join(type(part).__name__ for part in made)})"
    msg = f"{name} gives {form}; expected {wanted}."
    raise FactoryError(msg)

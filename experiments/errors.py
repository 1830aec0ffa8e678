"""Named errors of the experiments. Every text says what was found and what to do about it."""

from __future__ import annotations


class ExperimentError(Exception):
    """Base class of every error that an experiment raises on purpose."""


class UnknownNameError(ExperimentError, ValueError):
    """An experiment, preset, data set or device has another name."""


class ClaimError(ExperimentError, ValueError):
    """A claim cannot be decided as it is stated, whatever is measured."""


class DataFormatError(ExperimentError, ValueError):
    """A data file does not hold images and labels in a form that can be read."""


class DataUnavailableError(ExperimentError, RuntimeError):
    """A data set could not be fetched."""


class MissingDependencyError(ExperimentError, ImportError):
    """A package of the extra ``experiments`` is not installed."""


class StoreError(ExperimentError, RuntimeError):
    """The store of finished cells cannot be used."""


class StoreLockedError(StoreError):
    """Another run is writing to the same store."""


class ConfigurationChangedError(StoreError):
    """The finished cells belong to another configuration, so they cannot be continued."""


class VerdictFileError(ExperimentError, ValueError):
    """A file of verdicts is missing or is not one."""


def near_names(name: str, known: list[str]) -> str:
    """Say which of the known names was probably meant, else list them all."""
    import difflib

    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(match) for match in close)}?"
    return f"known are {', '.join(known) or 'none'}"

"""Which experiments there are, what each must offer, and the options that it is given."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from experiments.claims import Claim, Verdict
from experiments.data import NAMES, Dataset, check_name, load
from experiments.errors import (
    ExperimentError,
    MissingDependencyError,
    UnknownNameError,
    near_names,
)
from experiments.ranks import current, on_first
from experiments.store import STORE_NAME, CellsInMemory, CellStore, Mode, code_fingerprint

# Names and modules, not modules: what is not asked for is not imported.
_MODULES: dict[str, str] = {
    "shortcut_depth": "experiments.shortcut_depth",
    "shortcut_training": "experiments.shortcut_training",
    "norm_preservation": "experiments.norm_preservation",
    "procrustes_resnet": "experiments.procrustes_resnet",
    "tau_scaling": "experiments.tau_scaling",
    "large_depth": "experiments.large_depth",
    "shortcut_importance": "experiments.shortcut_importance",
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A size at which an experiment is run; experiments subclass it to add what they sweep.

    Parameters
    ----------
    summary : str
        What it covers and how long it takes, in a line.
    data : str
        The data set unless ``--data`` says otherwise.
    seeds : int
        The number of seeds unless ``--seeds`` says otherwise.
    """

    summary: str
    data: str = "digits"
    seeds: int = 1


@dataclass(frozen=True)
class Options:
    """What the user asked for, with every default filled in.

    Parameters
    ----------
    experiment, preset : str
        What is run, and at which size.
    data : str
        A name or a path, see :func:`experiments.data.load`.
    device : str
        A torch device; ``"auto"`` has been resolved.
    seeds : int
        How many seeds random quantities are measured with: 0 ... seeds - 1.
    out : Path
        Where figures, tables, verdicts and the store go.
    mode : {"continue", "resume", "fresh"}
        What to do with the cells of an earlier run, see :class:`experiments.store.CellStore`.
    progress : bool
        Whether to report progress on stderr.
    """

    experiment: str
    preset: str
    data: str
    device: str
    seeds: int
    out: Path
    mode: Mode = "continue"
    progress: bool = True

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data set, loaded when it is first asked for."""
        return load(self.data)

    @property
    def loaded_dataset(self) -> Dataset | None:
        """The data set if it was loaded; some experiments need none."""
        return cast("Dataset | None", self.__dict__.get("dataset"))

    def open_store(self, *, uses_data: bool = True, **more: Any) -> CellStore:
        """Open the store of finished cells for this configuration, as a context manager.

        Parameters
        ----------
        uses_data : bool
            Whether the cells depend on the data set.
        **more
            What else decides the cells' results.

        Notes
        -----
        On several ranks all call this together, and only the first one opens the file: the others
        get a store in memory, and :func:`experiments.sweep.run_cells` keeps it the same.
        """
        import platform

        import numpy as np
        import torch

        import conditioning

        configuration = {
            "experiment": self.experiment,
            "preset": self.preset,
            "data": self.dataset.fingerprint if uses_data else None,
            "seeds": self.seeds,
            "device": self.device,
            "conditioning": conditioning.__version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
            "code": code_fingerprint(),
            **more,
        }
        here = current()
        if here.size == 1:
            return self._store_on_disk(configuration)
        # Batch normalisation sees a part of each batch, so the number of ranks decides results.
        configuration["ranks"] = here.size
        opened: list[CellStore] = []
        on_first(lambda: opened.append(self._store_on_disk(configuration)))
        return opened[0] if here.first else CellsInMemory()

    def _store_on_disk(self, configuration: Mapping[str, Any]) -> CellStore:
        store = CellStore(self.out / STORE_NAME, configuration, self.mode)
        if store.notice:
            print(f"note: {store.notice}", file=sys.stderr)
        return store


class Experiment(Protocol):
    """What the module of an experiment offers."""

    NAME: str
    TITLE: str
    PAPER: str
    PRESETS: Mapping[str, Preset]

    def claims(self) -> Sequence[Claim]:
        """State what is going to be tested; measures nothing and is quick."""

    def run(self, options: Options) -> Sequence[Verdict]:
        """Measure, draw, and decide every claim."""


def register(name: str, module: str) -> None:
    """Add an experiment by the name of its module, which is imported when it is needed."""
    _MODULES[name] = module


def names() -> list[str]:
    """List the experiments in the order in which they are shown."""
    return list(_MODULES)


def find(name: str) -> Experiment:
    """Import an experiment.

    Raises
    ------
    UnknownNameError
        There is none of this name; the text gives near ones.
    MissingDependencyError
        It needs a package that is not installed.
    ExperimentError
        Its module does not offer what :class:`Experiment` lists.
    """
    if name not in _MODULES:
        msg = f"unknown experiment {name!r}: {near_names(name, names())}"
        raise UnknownNameError(msg)
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", "conditioning", "experiments"):
            msg = f"experiment {name} cannot be imported: {error}"
            raise ExperimentError(msg) from error
        msg = f"experiment {name} needs {missing}: pip install conditioning[experiments]"
        raise MissingDependencyError(msg) from error
    return _checked(module)


def _checked(module: ModuleType) -> Experiment:
    wanted = ("NAME", "TITLE", "PAPER", "PRESETS", "claims", "run")
    missing = [attribute for attribute in wanted if not hasattr(module, attribute)]
    if missing:
        msg = f"{module.__name__} is not an experiment: it lacks {', '.join(missing)}"
        raise ExperimentError(msg)
    return cast("Experiment", module)


def takes_data(experiment: Experiment) -> bool:
    """Whether it takes a data set: ``USES_DATA = False`` in its module says that it does not."""
    return bool(getattr(experiment, "USES_DATA", True))


def default_preset(experiment: Experiment) -> str:
    """Give the preset that is run unless told otherwise: ``quick``, else the first."""
    return "quick" if "quick" in experiment.PRESETS else next(iter(experiment.PRESETS))


def resolve_device(device: str) -> str:
    """Check a device's name, and turn ``auto`` into one.

    Raises
    ------
    UnknownNameError
        It is not ``cpu``, ``cuda``, ``cuda:N`` or ``auto``, or there is no such GPU.
    """
    if device == "cpu":
        return device
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if match is None:
        msg = f"unknown device {device!r}: {near_names(device, ['cpu', 'cuda', 'cuda:0', 'auto'])}"
        raise UnknownNameError(msg)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    if int(match.group(1) or 0) >= count:
        msg = f"device {device!r} is not there, torch sees {count} GPUs: use --device cpu or auto"
        raise UnknownNameError(msg)
    return device


def options_for(
    experiment: Experiment,
    *,
    preset: str | None = None,
    data_name: str | None = None,
    device: str = "auto",
    seeds: int | None = None,
    out: str | Path | None = None,
    mode: Mode = "continue",
    progress: bool = True,
) -> Options:
    """Fill in the defaults of an experiment and check every option before anything is run."""
    preset = default_preset(experiment) if preset is None else preset
    if preset not in experiment.PRESETS:
        hint = near_names(preset, list(experiment.PRESETS))
        msg = f"{experiment.NAME} has no preset {preset!r}: {hint}"
        raise UnknownNameError(msg)
    defaults = experiment.PRESETS[preset]
    data_name = defaults.data if data_name is None else data_name
    check_name(data_name)
    seeds = defaults.seeds if seeds is None else seeds
    if seeds < 1:
        msg = f"--seeds must be at least 1, got {seeds}"
        raise ExperimentError(msg)
    return Options(
        experiment=experiment.NAME,
        preset=preset,
        data=data_name,
        device=resolve_device(device),
        seeds=seeds,
        out=Path("figures") / experiment.NAME if out is None else Path(out),
        mode=mode,
        progress=progress,
    )


def run(experiment: Experiment, options: Options) -> list[Verdict]:
    """Run an experiment, write ``verdicts.json``, and mark its cells as finished.

    Returns
    -------
    list of Verdict
        One for each claim, in the order of the claims.

    Raises
    ------
    ExperimentError
        The experiment left a claim without a verdict, or decided one that it did not state.

    Notes
    -----
    On several ranks all call this together. Files and output are those of the first one.
    """
    here = current()
    if here.size > 1 and options.data in NAMES:
        # The first rank fetches it into the cache, where the others find it.
        on_first(lambda: len(options.dataset))
    if here.first:
        return _run(experiment, options)
    # An experiment need not know of ranks: what the others draw, write and say is thrown away.
    with (
        tempfile.TemporaryDirectory() as out,
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        return _run(experiment, dataclasses.replace(options, out=Path(out), progress=False))


def _run(experiment: Experiment, options: Options) -> list[Verdict]:
    from experiments.report import environment, write_verdicts
    from experiments.store import mark_finished

    claims = [claim.id for claim in experiment.claims()]
    by_id = {verdict.claim.id: verdict for verdict in experiment.run(options)}
    if set(by_id) != set(claims):
        missing = ", ".join(sorted(set(claims) - set(by_id))) or "none"
        extra = ", ".join(sorted(set(by_id) - set(claims))) or "none"
        msg = f"{experiment.NAME}: claims without a verdict: {missing}; not stated: {extra}"
        raise ExperimentError(msg)
    verdicts = [by_id[name] for name in claims]
    dataset = options.loaded_dataset
    described = environment(
        device=options.device,
        seeds=options.seeds,
        data="" if dataset is None else dataset.name,
        fingerprint="" if dataset is None else dataset.fingerprint,
    )
    write_verdicts(
        options.out / "verdicts.json", options.experiment, options.preset, described, verdicts
    )
    # Last, so that a run that dies while drawing finds its cells again.
    mark_finished(options.out / STORE_NAME)
    return verdicts

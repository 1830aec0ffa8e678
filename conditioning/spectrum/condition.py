"""The condition number of a symmetric operator, with an enclosure and a status."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from conditioning.errors import InvalidArgumentError
from conditioning.krylov import LanczosRun, make_generator, start_for
from conditioning.operators.base import LinearOperator
from conditioning.spectrum.bounds import Options
from conditioning.spectrum.certify import certify, is_exhausted
from conditioning.spectrum.common import square
from conditioning.spectrum.full import full_spectrum
from conditioning.spectrum.results import ConditionNumber


def condition_number(
    operator: Any,
    rtol: float = 1e-2,
    zero_rtol: float = 1e-10,
    percentile: float | None = None,
    max_matvecs: int | None = None,
    failure_probability: float = 1e-6,
    seed: int | torch.Generator = 0,
    *,
    method: str = "auto",
    memory_budget: int | None = None,
    checkpoint: str | Path | None = None,
    stop_early: bool = True,
) -> ConditionNumber:
    """Condition number ``max |lambda| / min {|lambda| : |lambda| > threshold}``, enclosed.

    Parameters
    ----------
    operator : LinearOperator, Tensor, ndarray or scipy LinearOperator
        Symmetric, ``(n, n)``; may be indefinite and singular.
    rtol : float
        Stop when ``high / low <= 1 + rtol``.
    zero_rtol : float
        Eigenvalues up to ``zero_rtol * max |lambda|`` count as zero. The threshold is never
        set below four times the rounding measured in the products.
    percentile : float, optional
        Divide by this percentile of ``|lambda|`` over *all* eigenvalues (zeros included, linear
        interpolation) instead of the smallest: 10 gives the kappa_10 of "Demystifying ResNet".
    max_matvecs : int, optional
        A hard limit on the products. Default: 1000 for the matrix-free route, while the dense
        route is taken up to n = 8192 where it fits the memory. With a limit of your own the
        dense route is taken only if n products are within it.
    failure_probability : float
        Allowed to a ``certified`` enclosure. It enters as a logarithm: 1e-6 is nearly free.
    seed : int or torch.Generator
        Of the start vector.
    method : {"auto", "dense", "lanczos"}
        ``auto`` looks for an early closing of the Krylov space (degenerate spectra), then takes
        the dense route if it fits, else Lanczos.
    memory_budget : int, optional
        Bytes for the dense matrix or the Krylov basis. Default: half of what is free.
    checkpoint : path, optional
        The Lanczos run is saved there when it ends or is interrupted, and continued from there
        if the file exists.
    stop_early : bool
        Stop once the run shows, at several looks in a row, that ``max_matvecs`` cannot suffice to
        certify anything: ``needed_matvecs`` then says what would, and ``kappa_10`` is given
        instead, from at most as many products again. ``False`` spends the whole budget on a
        better lower bound.

    Returns
    -------
    ConditionNumber
        With ``value, low, high, largest, smallest, nullity, zero_threshold, status, message``.

    Raises
    ------
    InvalidArgumentError
        If an option is out of range.
    ShapeError
        If the operator is not square and symmetric.
    NonFiniteError
        If a product is not finite.

    Notes
    -----
    The statuses:

    ``exact``
        All eigenvalues, by a dense solver; the enclosure is rounding (Weyl).
    ``exhausted``
        The Krylov space closed: all distinct eigenvalues are known, except with the
        ``failure_probability`` of the result, which is larger than the one asked for where
        rounding has grown (many distinct, highly degenerate eigenvalues). Where it has grown to
        the size of the spectrum itself (about 20 such eigenvalues over two orders of
        magnitude), the closing cannot be seen and the run goes on to ``certified``.
    ``certified``
        ``low <= kappa <= high`` with probability at least ``1 - failure_probability``: Ritz value
        and residual give the sure side, exclusion by the Christoffel function the other
        (``conditioning.jacobi``).
    ``lower bound only``
        ``kappa >= low`` is certain; nothing bounds it from above yet. After an early stop ``low``
        may come from ``kappa_10`` and hold with the probability that the message states.
    ``depends on threshold``
        There are eigenvalues on both sides of the threshold within a factor of 10.
    ``not resolvable``
        What decides the answer is smaller than the rounding of the products: use float64.
    """
    options = Options(
        rtol, zero_rtol, percentile, max_matvecs, failure_probability, method, memory_budget,
        stop_early,
    )  # fmt: skip
    taken = square(operator)
    if checkpoint is not None:
        _check_path(Path(checkpoint))
    spent = taken.num_matvecs
    if method == "dense":
        return _dense(taken, options, spent)
    generator = make_generator(seed)
    dense = method == "auto" and options.dense_is_open(taken)
    if dense and percentile is not None:
        return _dense(taken, options, spent)
    run = LanczosRun(
        taken,
        start_for(taken, generator),
        measure_noise=True,
        max_steps=options.max_steps(taken),
    )
    if checkpoint is not None and Path(checkpoint).exists():
        run.load(checkpoint)
    if dense:
        # A degenerate spectrum closes the Krylov space early, far below n products.
        room = taken.shape[0]
        if max_matvecs is not None:
            room = max_matvecs - taken.shape[0] - 1 - (taken.num_matvecs - spent)
        run.extend(min(taken.shape[0] // 2, 64, max(room, 0)))
        if not is_exhausted(run, options):
            return _dense(taken, options, spent)
    try:
        return certify(run, options, spent, generator)
    finally:
        if checkpoint is not None:
            run.save(checkpoint)


def _dense(operator: LinearOperator, options: Options, spent: int) -> ConditionNumber:
    spectrum = full_spectrum(operator, options.memory_budget)
    result = spectrum.condition_number(options.zero_rtol, options.percentile)
    return replace(result, num_matvecs=operator.num_matvecs - spent)


def _check_path(path: Path) -> None:
    """Before the run, not after it."""
    if path.is_dir() or not path.parent.is_dir():
        msg = f"checkpoint must name a file in a folder that exists, got {path}."
        raise InvalidArgumentError(msg)

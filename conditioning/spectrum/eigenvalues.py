"""Extreme eigenvalues with multiplicity, and a certificate that none was missed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from conditioning.errors import InvalidArgumentError
from conditioning.jacobi import Array
from conditioning.krylov import make_generator
from conditioning.krylov.vectors import inner, norm, orthonormal
from conditioning.operators.base import LinearOperator
from conditioning.spectrum.blocked import BlockSearch
from conditioning.spectrum.common import (
    check_at_least,
    check_between,
    check_choice,
    check_counts,
    dense_fits,
    square,
)
from conditioning.spectrum.full import full_spectrum, solver_error, symmetric_part
from conditioning.spectrum.pairs import KEYS, Locked, power_pairs
from conditioning.spectrum.results import Eigenvalues, Estimate
from conditioning.spectrum.search import Search

_METHODS = ("lanczos", "power", "dense")


def eigenvalues(
    operator: Any,
    k: int = 5,
    which: str = "LM",
    method: str = "lanczos",
    rtol: float = 1e-6,
    vectors: bool = False,
    seed: int | torch.Generator = 0,
    *,
    max_matvecs: int = 1000,
    failure_probability: float = 1e-6,
    memory_budget: int | None = None,
    certify: bool = True,
    block_size: int = 1,
) -> Eigenvalues:
    """The ``k`` extreme eigenvalues of a symmetric operator, multiplicities counted.

    Parameters
    ----------
    operator : LinearOperator, Tensor, ndarray or scipy LinearOperator
        Symmetric, ``(n, n)``.
    k : int
        How many, at most ``n``.
    which : {"LM", "LA", "SA", "SM"}
        Largest magnitude, largest, smallest (most negative), or smallest magnitude. No
        Krylov method finds the smallest magnitudes on its own: ``SM`` takes ``method="dense"``;
        for large ``n`` see ``condition_number``.
    method : {"lanczos", "power", "dense"}
        Lanczos with locking, power iteration with deflation, or all eigenvalues.
    rtol : float
        Residual norms are brought below ``rtol * max |lambda|``.
    vectors : bool
        Also return the unit eigenvectors.
    seed : int or torch.Generator
    max_matvecs : int
        Products at most (the dense route takes n).
    failure_probability : float
        Allowed to the statement that no eigenvalue was missed.
    memory_budget : int, optional
        Bytes for the basis. Default: half of what is free. With less than the run would fill,
        it restarts.
    certify : bool
        False ends the Lanczos route when ``k`` pairs have converged, as ARPACK does: the values
        are eigenvalues, and none exceeds the first by more than its error, but further copies of
        a multiple eigenvalue, or a member of a cluster, may be missing. Status "not certified".
    block_size : int
        Lanczos from a block of so many vectors, at least ``k``; ``k + 6`` is a good choice. It
        takes more products, three to five times as many where there are no copies, but in blocks,
        and no second run: worth it where a product in a block costs less than about a fifth of a
        single one (``H.engine`` tells), and the more copies there are, the more.

    Returns
    -------
    Eigenvalues

    Raises
    ------
    InvalidArgumentError
        If an option is out of range.

    Notes
    -----
    A Krylov space from one vector holds one copy of each eigenvalue, and nothing of the others.
    So after convergence the pairs are put aside, and a run from a second random vector on the rest
    of the space either finds what is missing (further copies, overlooked values), or excludes it up
    to 1 % beyond the ``k``-th value. Pairs behind the wanted ones are put aside with them, also
    half converged: what couples them to the rest enters the bound squared, and the second run has
    a wider gap to work with (``conditioning.spectrum.locked``). For ``k=1`` copies do not matter,
    and the first run alone excludes a larger value.

    A block of Gaussian vectors holds as many copies as it has columns, and what it cannot have
    missed follows from its own start (``conditioning.krylov.block`` has the proof). Its basis is
    not restarted; where it fills the memory, or the block closes before its bounds are narrow (as
    on operators of few distinct eigenvalues), single vectors take the products that are left.

    A full basis is restarted from its best Ritz vectors (thick restart); the exclusion remains
    proved (``conditioning.krylov.restart``) and only costs more products. Where products are
    float32 and a float64 basis would be short, it is stored in float32 and the message says so.

    Knowing a null space beforehand would save nothing worth having: a Krylov space spends one
    dimension on it, however large it is (one product on a 33-dimensional one). Nor would a
    spectrum symmetric about zero: each product extends the Krylov space by one vector either way.
    """
    taken = square(operator)
    size = taken.shape[0]
    _check(k, size, which, method, rtol, max_matvecs, failure_probability)
    _check_block(block_size, k, size, method)
    spent = taken.num_matvecs
    small = size <= 32 or 4 * k >= size
    fits = small and size <= max_matvecs and dense_fits(taken, memory_budget)
    if method == "dense" or (method == "lanczos" and fits):
        return _dense(taken, k, which, vectors, memory_budget, spent)
    key = KEYS[which]
    generator = make_generator(seed)
    before = ""
    if block_size > 1:
        blocks = BlockSearch(taken, k, which, rtol, failure_probability, certify)
        status, message = blocks.run(block_size, max_matvecs, generator, memory_budget)
        if status != "open":
            return Eigenvalues(
                blocks.estimates, tuple(map(float, blocks.residuals)),
                blocks.vectors() if vectors else None, which, method, taken.num_matvecs - spent,
                status, message, failure_probability,
            )  # fmt: skip
        before = f"; {message}, single vectors went on"
    if method == "power":
        locked = Locked(
            torch.empty(taken.local_size, 0, dtype=torch.float64, device=taken.device),
            np.empty(0),
            np.empty(0),
        )
        status, message = power_pairs(taken, locked, k, which, rtol, max_matvecs, generator, spent)
        outer, chance = np.inf, 0.0
        coupling, rounding = _refine(taken, locked, key)
        found, residuals, basis = locked.values, locked.residuals, locked.vectors
    else:
        search = Search(
            taken, k, which, rtol, max_matvecs, failure_probability, spent, certify=certify
        )
        search.plan_memory(memory_budget)
        status, message, outer, pairs = search.run(generator)
        norms, coupling = pairs.residuals()
        chance, rounding = search.chance, pairs.rounding
        found, residuals = pairs.values[:k], norms + rounding
        basis = pairs.vectors[:, :k]
    estimates = tuple(_enclose(found, key, outer, coupling, rounding, which))
    return Eigenvalues(
        estimates, tuple(map(float, residuals)), basis if vectors else None, which, method,
        taken.num_matvecs - spent, status, message + before,
        chance if np.isfinite(outer) else 0.0,
    )  # fmt: skip


def _refine(operator: LinearOperator, locked: Locked, key: Any) -> tuple[float, float]:
    """Rayleigh-Ritz on the locked space; norm of all residuals together, and its rounding.

    A pair that was found beside others had its residual measured in what was left of the
    space; here the coupling to them is in it. One product for each pair.
    """
    basis = locked.vectors
    if not basis.shape[1]:
        return 0.0, 0.0
    basis, _ = orthonormal(operator, basis)
    images = operator.matmat(basis).to(torch.float64)
    small = inner(operator, basis, images)
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    order = np.argsort(-key(values.cpu().numpy()), kind="stable")
    values, vectors = values[order.copy()], vectors[:, order.copy()]
    residual = images @ vectors - basis @ (vectors * values)
    eps = torch.finfo(operator.dtype).eps
    rounding = 10 * eps * float(values.abs().max())
    locked.vectors, locked.values = basis @ vectors, values.cpu().numpy()
    norms = norm(operator, residual).cpu().numpy()
    locked.residuals = norms + rounding
    return float(np.sqrt((norms**2).sum())), rounding


def _check(
    k: int, size: int, which: str, method: str, rtol: float, max_matvecs: int, failure: float
) -> None:
    check_choice(tuple(KEYS), which=which)
    check_choice(_METHODS, method=method)
    check_counts(k=k, max_matvecs=max_matvecs)
    check_between(0, 1, rtol=rtol)
    check_between(0, 0.5, failure_probability=failure)
    check_at_least(2, max_matvecs=max_matvecs)
    if which == "SM" and method != "dense":
        msg = (
            "Smallest magnitudes are interior eigenvalues, which Krylov products alone do not "
            "find: use method='dense', or condition_number(), which bounds the smallest one."
        )
        raise InvalidArgumentError(msg)
    if k > size:
        msg = f"k must be at most n = {size}, got {k}."
        raise InvalidArgumentError(msg)


def _check_block(block_size: int, k: int, size: int, method: str) -> None:
    check_counts(block_size=block_size)
    if block_size == 1:
        return
    if method != "lanczos":
        msg = f"block_size is an option of method='lanczos', not of {method!r}."
        raise InvalidArgumentError(msg)
    if not k <= block_size <= size:
        msg = (
            f"A block must have at least as many columns as eigenvalues are asked for, and no more "
            f"than n: block_size between {k} and {size}, or 1, got {block_size}."
        )
        raise InvalidArgumentError(msg)


def _enclose(
    values: Array, key: Any, outer: float, coupling: float, rounding: float, which: str
) -> list[Estimate]:
    """Enclosure of the i-th eigenvalue: locked block and rest, coupled by residuals.

    The rest of the space may hold any number of eigenvalues with keys up to ``outer``, so
    the i-th key is at most the larger of ``outer`` and the i-th locked one. The coupling moves an
    eigenvalue by no more than its norm ``r`` (Weyl), and by no more than ``2 r^2 / (g + sqrt(g^2
    + 4 r^2))`` where the rest lies ``g`` away (C.-K. Li, R.-C. Li, Linear Algebra Appl. 395,
    2005, 183-190, theorem 2).
    """
    estimates = []
    keys = key(values)
    for i, value in enumerate(values):
        beyond = max(outer - float(keys[i]), 0.0)
        gap = max(float(keys[i]) - outer, 0.0)
        # Rounding of the products moves eigenvalues by its size, whatever the gap.
        moved = rounding + coupling
        if gap:
            moved = rounding + 2 * coupling**2 / (gap + np.hypot(gap, 2 * coupling))
        inward, outward = moved, moved + beyond
        towards_larger = which == "LA" or (which == "LM" and value >= 0)
        low, high = (inward, outward) if towards_larger else (outward, inward)
        estimates.append(Estimate(float(value), float(value - low), float(value + high)))
    return estimates


def _dense(
    operator: LinearOperator, k: int, which: str, vectors: bool, budget: int | None, spent: int
) -> Eigenvalues:
    basis = None
    if vectors:
        matrix, error = symmetric_part(operator, budget)
        found, basis = torch.linalg.eigh(matrix)
        values = found.cpu().numpy()
        error += solver_error(values)
    else:
        spectrum = full_spectrum(operator, budget)
        values, error = spectrum.values, spectrum.error
    order = np.argsort(-KEYS[which](values), kind="stable")[:k]
    if basis is not None:
        basis = basis[:, torch.as_tensor(order.copy(), device=basis.device)]
    return Eigenvalues(
        tuple(Estimate(float(v), float(v - error), float(v + error)) for v in values[order]),
        (error,) * k, basis, which, "dense", operator.num_matvecs - spent, "exact",
        f"all {len(values)} eigenvalues known", 0.0,
    )  # fmt: skip

"""Extreme eigenvalues with multiplicity, and a certificate that none was missed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from conditioning.errors import InvalidArgumentError
from conditioning.jacobi import Array
from conditioning.krylov import LanczosRun, make_generator, start_for
from conditioning.krylov.vectors import inner, norm, orthonormal
from conditioning.memory import available_bytes
from conditioning.operators.base import LinearOperator
from conditioning.spectrum.common import (
    check_at_least,
    check_between,
    check_choice,
    check_counts,
    dense_fits,
    square,
)
from conditioning.spectrum.full import full_spectrum, solver_error, symmetric_part
from conditioning.spectrum.measure import inverse_weight
from conditioning.spectrum.pairs import KEYS, Locked, power_pairs
from conditioning.spectrum.results import Eigenvalues, Estimate

# How far beyond the k-th value an eigenvalue that nobody saw could lie: resolving less
# costs products like 1 / sqrt of it.
_SLACK = 1e-2
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
        Bytes for the basis. Default: half of what is free.

    Returns
    -------
    Eigenvalues

    Raises
    ------
    InvalidArgumentError
        If an option is out of range.

    Notes
    -----
    A Krylov space from one vector holds one copy of each eigenvalue. So after convergence
    the pairs are locked, and a run on the rest of the space either finds what is missing
    (further copies, overlooked values), or excludes it up to 1 % beyond the ``k``-th value.
    """
    taken = square(operator)
    size = taken.shape[0]
    _check(k, size, which, method, rtol, max_matvecs, failure_probability)
    spent = taken.num_matvecs
    small = size <= 32 or 4 * k >= size
    fits = small and size <= max_matvecs and dense_fits(taken, memory_budget)
    if method == "dense" or (method == "lanczos" and fits):
        return _dense(taken, k, which, vectors, memory_budget, spent)
    key = KEYS[which]
    generator = make_generator(seed)
    locked = Locked(
        torch.empty(taken.local_size, 0, dtype=torch.float64, device=taken.device),
        np.empty(0),
        np.empty(0),
    )
    if method == "power":
        status, message = power_pairs(taken, locked, k, which, rtol, max_matvecs, generator, spent)
        outer = np.inf
    else:
        budget = available_bytes(taken.device) // 2 if memory_budget is None else memory_budget
        search = _Search(taken, k, which, rtol, max_matvecs, failure_probability, spent)
        search.max_basis = max(budget // (8 * max(taken.local_size, 1)), 2 * k + 10)
        status, message, outer = search.run(locked, generator)
        failure_probability = search.chance
    error = _refine(taken, locked, key)
    estimates = tuple(_enclose(locked.values, key, outer, error, which))
    return Eigenvalues(
        estimates, tuple(map(float, locked.residuals)),
        locked.vectors if vectors else None, which, method, taken.num_matvecs - spent, status,
        message, failure_probability if status in ("certified", "exhausted") else 0.0,
    )  # fmt: skip


def _refine(operator: LinearOperator, locked: Locked, key: Any) -> float:
    """Rayleigh-Ritz on the locked space, with the true residuals; their norm together.

    A pair that was found beside others had its residual measured in what was left of the
    space; here the coupling to them is in it. One product for each pair.
    """
    basis = locked.vectors
    if not basis.shape[1]:
        return 0.0
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
    return float(np.sqrt((norms**2).sum())) + rounding


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


def _enclose(values: Array, key: Any, outer: float, error: float, which: str) -> list[Estimate]:
    """Enclosure of the i-th eigenvalue by Weyl: locked block and rest, coupled by residuals.

    The rest of the space may hold any number of eigenvalues with keys up to ``outer``, so
    the i-th key is at most the larger of ``outer`` and the i-th locked one.
    """
    estimates = []
    keys = key(values)
    for i, value in enumerate(values):
        beyond = max(outer - float(keys[i]), 0.0)
        inward, outward = error, error + beyond
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


@dataclass
class _Search:
    """Lanczos runs on what is left of the space, until nothing wanted is left."""

    operator: LinearOperator
    k: int
    which: str
    rtol: float
    max_matvecs: int
    failure_probability: float
    spent: int
    max_basis: int = 0
    noise: float = 0.0
    chance: float = 0.0

    @property
    def left(self) -> int:
        """Products left, with one for each pair put aside to measure its residual at the end."""
        used = self.operator.num_matvecs - self.spent
        return self.max_matvecs - min(self.k, self.max_matvecs // 2) - used

    def run(self, locked: Locked, generator: torch.Generator) -> tuple[str, str, float]:
        """Fill ``locked``; return status, message and the largest key that may be missing."""
        key = KEYS[self.which]
        rounds = 0
        while True:
            full = len(locked.values) == self.k
            if self.left < 2:
                return *self._unfinished(full), np.inf
            found = LanczosRun(
                self.operator, start_for(self.operator, generator),
                deflate=locked.vectors, measure_noise=rounds == 0, max_steps=self.max_basis,
            )  # fmt: skip
            rounds += 1
            found.noise = self.noise
            floor = float(key(locked.values).min()) if full else -np.inf
            # Each round is another chance to be wrong: the rounds share the allowance.
            allowed = self.failure_probability / (rounds * (rounds + 1))
            outer, settled = self._converge(found, floor, allowed)
            self.noise = found.noise
            keys = key(found.jacobi.ritz_values)
            new = np.flatnonzero((keys > floor + self._tolerance(found)) & settled)
            if full and not len(new):
                if self._excluded(found, outer, floor):
                    self.chance = self._chance(found, self.failure_probability)
                    return *self._finished(found), max(outer, floor)
                return *self._unfinished(True), np.inf
            if not len(new):
                return *self._unfinished(False), np.inf
            best = new[np.argsort(-keys[new])][: self.k]
            ritz = torch.from_numpy(found.jacobi.ritz_vectors[:, best].copy())
            locked.add(
                found.combine(ritz), found.jacobi.ritz_values[best],
                found.jacobi.residual_norms[best] + found.guard, key, self.k,
            )  # fmt: skip

    def _tolerance(self, run: LanczosRun) -> float:
        return max(self.rtol * run.jacobi.scale, 4 * run.guard)

    def _excluded(self, run: LanczosRun, outer: float, floor: float) -> bool:
        """Whether nothing in the run's space lies noticeably beyond ``floor``."""
        return outer <= floor + _SLACK * abs(floor) + self._tolerance(run)

    def _converge(
        self, run: LanczosRun, floor: float, allowed: float
    ) -> tuple[float, NDArray[np.bool_]]:
        """Extend until what exceeds ``floor`` has converged or is excluded."""
        key = KEYS[self.which]
        while True:
            room = min(self.left - (0 if run.num_steps else 1), self.max_basis - run.num_steps)
            if room > 0:
                run.extend(min(5 if run.num_steps < 60 else run.num_steps // 12, room))
            jacobi = run.jacobi
            tolerance = self._tolerance(run)
            keys = key(jacobi.ritz_values)
            settled = jacobi.residual_norms <= tolerance
            top = np.argsort(-keys)[: self.k]
            if run.closed and not settled[top].all() and run.reopen():
                continue
            outer = self._outer(run, allowed)
            if run.closed or room <= 0:
                return outer, settled
            if np.isfinite(floor):
                beyond = top[keys[top] > floor + tolerance]
                if len(beyond) and settled[beyond].all():
                    return outer, settled
                if not len(beyond) and self._excluded(run, outer, floor):
                    return outer, settled
            elif len(top) == self.k and settled[top].all():
                return outer, settled

    def _chance(self, run: LanczosRun, allowed: float) -> float:
        """Probability with which an outer bound of the run's space may be wrong."""
        if run.complete or run.only_zeros:
            return 0.0
        # A closed run has nothing more to say: what it cannot exclude is left to chance.
        return max(allowed, 1e-2) if run.closed else allowed

    def _outer(self, run: LanczosRun, allowed: float) -> float:
        """Upper bound of the key over the space that the run lives in."""
        jacobi = run.jacobi
        if run.only_zeros:
            return run.guard
        if run.complete:
            reach = KEYS[self.which](jacobi.ritz_values) + jacobi.residual_norms
            return float(reach.max()) + run.guard
        inverse_mass = inverse_weight(self.operator.shape[0], self._chance(run, allowed))
        ends = []
        if self.which in ("LM", "LA"):
            ends.append(jacobi.right_end(inverse_mass))
        if self.which in ("LM", "SA"):
            ends.append(jacobi.mirrored().right_end(inverse_mass))
        return max(ends) + run.guard

    def _finished(self, run: LanczosRun) -> tuple[str, str]:
        if run.closed:
            return "exhausted", "the Krylov space of the rest closed: no eigenvalue is missing"
        return "certified", (
            f"no eigenvalue lies more than 1 % beyond the last value, with probability at least "
            f"1 - {self.failure_probability:g}"
        )

    def _unfinished(self, full: bool) -> tuple[str, str]:
        used = self.operator.num_matvecs - self.spent
        if full:
            return "not certified", (
                f"{self.k} pairs converged, but {used} products did not exclude a missed one "
                f"(multiplicity or cluster). Raise max_matvecs."
            )
        return "not converged", (
            f"fewer than {self.k} pairs reached rtol={self.rtol:g} within {used} products. Raise "
            f"max_matvecs, or rtol."
        )

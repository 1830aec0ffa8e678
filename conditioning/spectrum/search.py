"""The search of ``eigenvalues``: runs on what is left of the space until nothing is missing."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from conditioning.jacobi import Array, JacobiMatrix
from conditioning.krylov import start_for
from conditioning.krylov.restart import RestartedRun
from conditioning.memory import available_bytes
from conditioning.operators.base import LinearOperator
from conditioning.spectrum.locked import SharedPairs, num_worth_keeping
from conditioning.spectrum.measure import inverse_weight
from conditioning.spectrum.pairs import KEYS

# How far beyond the k-th value an eigenvalue that nobody saw could lie: resolving less
# costs products like 1 / sqrt of it.
SLACK = 1e-2
_EXTRA = 20  # pairs kept beside the wanted ones, at most
# What closed runs may leave to chance, over all rounds, where the asked allowance excludes
# nothing: they have nothing more to say.
_CLOSED = 1e-2
_AMPLE = 200  # vectors beside the wanted ones: a basis of so many is not worth halving


def vectors_that_fit(operator: LinearOperator, budget: int | None) -> int:
    """How many float64 vectors fit so many bytes: by default half of what is free."""
    if budget is None:
        budget = available_bytes(operator.device) // 2
    return operator.least(budget // (8 * max(operator.local_size, 1)))


@dataclass
class Search:
    """Lanczos runs on what is left of the space, until nothing wanted is left."""

    operator: LinearOperator
    k: int
    which: str
    rtol: float
    max_matvecs: int
    failure_probability: float
    spent: int
    certify: bool = True
    max_basis: int = 0
    basis_dtype: torch.dtype = torch.float64
    noise: float = 0.0
    chance: float = 0.0
    restarts: int = 0
    extra: int = 0
    rounds: int = field(default=0, init=False)
    claims: int = field(default=0, init=False)  # rounds that may end with the claim

    def plan_memory(self, budget: int | None) -> None:
        """How many vectors a basis may hold, and in what dtype."""
        operator = self.operator
        # The locked pairs and the work space of a step are float64 vectors too.
        room = vectors_that_fit(operator, budget) - self.k - 4
        ample = min(self.max_matvecs, 2 * self.k + _AMPLE)
        if room < ample and operator.dtype.itemsize <= 4:
            # What storing loses is what the products lose anyway.
            self.basis_dtype, room = torch.float32, 2 * room
        self.extra = max(min(_EXTRA, room // 8), 0) if self.k > 1 else 0
        self.max_basis = max(room - self.extra, 2 * self.k + 10)

    @property
    def left(self) -> int:
        """Products left."""
        return self.max_matvecs - (self.operator.num_matvecs - self.spent)

    @property
    def _near_rounding(self) -> bool:
        """Whether a product spent on measuring rounding could change what is decided.

        Far above it, what reorthogonalisation removes measures it well enough.
        """
        return self.rtol < 1e3 * torch.finfo(self.operator.dtype).eps

    def run(self, generator: torch.Generator) -> tuple[str, str, float, SharedPairs]:
        """Find the wanted pairs.

        Returns
        -------
        tuple
            Status, message, the largest key that may be missing, and the pairs.
        """
        key = KEYS[self.which]
        pairs = SharedPairs(self.operator, self.k, self.extra, key)
        outer = np.inf
        while self.left >= 2:
            found = RestartedRun(
                self.operator, start_for(self.operator, generator), key=key, wanted=self.k,
                deflate=pairs.vectors, measure_noise=self.rounds == 0 and self._near_rounding,
                max_steps=self.max_basis, basis_dtype=self.basis_dtype,
            )  # fmt: skip
            self.rounds += 1
            found.noise = self.noise
            # Each round that may end with the claim is another chance to be wrong.
            self.claims += pairs.full or not self.certify
            allowed = self.failure_probability * self._share
            outer, settled = self._converge(found, pairs, allowed)
            # Beside locked pairs less than this is rounding: it follows the scale of the whole.
            eps = float(torch.finfo(self.operator.dtype).eps)
            self.noise = max(self.noise, found.noise, eps * found.jacobi.scale)
            self.restarts += found.num_restarts
            full, floor = pairs.full, pairs.floor
            keys = key(found.jacobi.ritz_values)
            new = settled & (keys > floor + self._tolerance(found))
            if not new.any():
                outer = self._left_to_chance(found, pairs, floor, allowed, outer)
                if full and self._excluded(found, pairs.beyond(outer), floor):
                    return *self._finished(found), pairs.beyond(outer), pairs
                if full and pairs.narrow():
                    continue  # they hide more than they were taken for: again, without them
                break
            self._put_aside(found, pairs, keys, new)
            if self.k == 1:
                outer = self._left_to_chance(found, pairs, pairs.floor, allowed, outer)
                if self._excluded(found, outer, pairs.floor):
                    return *self._finished(found), max(outer, pairs.floor), pairs
                break
            if pairs.full and not self.certify:
                self.chance = 0.0 if found.complete else self.failure_probability
                return *self._one_run(), max(self._outer(found, allowed), pairs.floor), pairs
        return *self._unfinished(pairs.full), np.inf, pairs

    def _put_aside(
        self, run: RestartedRun, pairs: SharedPairs, keys: Array, settled: NDArray[np.bool_]
    ) -> None:
        """Settled pairs of a run, and of the others those that make the next run shorter."""
        jacobi = run.jacobi
        order = np.argsort(-keys, kind="stable")
        best = order[settled[order]][: self.k]
        if len(best) == self.k and self.k > 1:
            # Others follow the wanted ones in the same order.
            others = order[~np.isin(order, best)]
            order = np.concatenate([best, others])
            shares = jacobi.residual_norm * jacobi.ritz_vectors[-1, order]
            last = float(keys[best].min())
            limit = last + SLACK * abs(last)
            count = num_worth_keeping(keys[order], shares, self.k, limit, self.extra)
            best = order[: self.k + count]
        pairs.add(
            run.combine(torch.from_numpy(jacobi.ritz_vectors[:, best].copy())),
            jacobi.ritz_values[best], run.direction,
            jacobi.residual_norm * jacobi.ritz_vectors[-1, best], run.guard,
        )  # fmt: skip

    def _tolerance(self, run: RestartedRun) -> float:
        return max(self.rtol * run.jacobi.scale, 4 * run.guard)

    def _excluded(self, run: RestartedRun, outer: float, floor: float) -> bool:
        """Whether nothing in the run's space lies noticeably beyond ``floor``."""
        return outer <= self._limit(run, floor)

    def _limit(self, run: RestartedRun, floor: float) -> float:
        """Key that nothing missed may exceed."""
        small = run.guard if self.k == 1 else min(self._tolerance(run), SLACK * run.jacobi.scale)
        return floor + SLACK * abs(floor) + small

    def _excludes(self, run: RestartedRun, target: float, allowed: float) -> bool:
        """Whether ``_outer`` is at most ``target``: one point of each side instead of a search."""
        if run.only_zeros or run.complete:
            return self._outer(run, allowed) <= target
        inverse_mass = inverse_weight(self.operator.shape[0], allowed)
        return all(
            side.excludes_beyond(target - run.guard, inverse_mass) for side in self._sides(run)
        )

    def _sides(self, run: RestartedRun) -> list[JacobiMatrix]:
        sides = {"LM": (False, True), "LA": (False,), "SA": (True,)}[self.which]
        return [run.jacobi.mirrored() if side else run.jacobi for side in sides]

    def _pace(self, run: RestartedRun) -> int:
        """Products between two looks: as many as a look costs little against."""
        if run.num_steps < 100 and run.operator.device.type == "cpu":
            return 1 + run.num_steps // 40
        return 5 if run.num_steps < 60 else run.num_steps // 12

    def _converge(
        self, run: RestartedRun, pairs: SharedPairs, allowed: float
    ) -> tuple[float, NDArray[np.bool_]]:
        """Extend until what exceeds the last wanted pair has converged or is excluded."""
        key, floor = KEYS[self.which], pairs.floor
        while True:
            room = self.left - (0 if run.num_steps or not self._near_rounding else 1)
            if run.num_steps >= run.max_steps and run.complete:
                room = 0
            if room > 0:
                run.extend(min(self._pace(run), room))
            jacobi = run.jacobi
            tolerance = self._tolerance(run)
            keys = key(jacobi.ritz_values)
            settled = jacobi.residual_norms <= tolerance
            top = np.argsort(-keys)[: self.k]
            if run.closed and not settled[top].all() and run.reopen():
                continue
            if run.closed or room <= 0:
                return self._outer(run, allowed), settled
            done = len(top) == self.k and bool(settled[top].all())
            if np.isfinite(floor):
                beyond = top[keys[top] > floor + tolerance]
                if len(beyond) and settled[beyond].all():
                    return np.inf, settled
                if not len(beyond):
                    if self._excludes(run, pairs.target(self._limit(run, floor)), allowed):
                        return self._outer(run, allowed), settled
                    seen = float(keys[top[0]])
                    if not self._excluded(run, pairs.beyond(seen), floor):
                        return np.inf, settled
            elif done and self.k > 1:
                return np.inf, settled
            elif done and self._excludes(run, self._limit(run, float(keys[top[0]])), allowed):
                return self._outer(run, allowed), settled

    @property
    def _share(self) -> float:
        """Of what is left to chance in all, this round's: the shares of all rounds sum to one."""
        return 1.0 if self.k == 1 else 1 / (max(self.claims, 1) * (self.claims + 1))

    def _left_to_chance(
        self, run: RestartedRun, pairs: SharedPairs, floor: float, allowed: float, outer: float
    ) -> float:
        """Upper bound of the key at the smallest chance of a failure that excludes what it has to.

        A larger chance is an event about the same start vector that contains the smaller one, so
        that trying both adds nothing. ``chance`` is what all rounds together may fail with.
        """
        self.chance = 0.0 if run.complete or run.only_zeros else self.failure_probability
        if not run.closed or self._excluded(run, pairs.beyond(outer), floor):
            return outer
        self.chance = max(self.chance, _CLOSED)
        return self._outer(run, max(allowed, _CLOSED * self._share))

    def _outer(self, run: RestartedRun, allowed: float) -> float:
        """Upper bound of the key over the space that the run lives in."""
        jacobi = run.jacobi
        if run.only_zeros:
            return run.guard
        if run.complete:
            reach = KEYS[self.which](jacobi.ritz_values) + jacobi.residual_norms
            return float(reach.max()) + run.guard
        inverse_mass = inverse_weight(self.operator.shape[0], allowed)
        return max(side.right_end(inverse_mass) for side in self._sides(run)) + run.guard

    def _finished(self, run: RestartedRun) -> tuple[str, str]:
        if run.closed:
            text = "the Krylov space of the rest closed: no eigenvalue is missing"
            return "exhausted", text + self._how()
        return "certified", (
            f"no eigenvalue lies more than 1 % beyond the last value, with probability at least "
            f"1 - {self.failure_probability:g}{self._how()}"
        )

    def _one_run(self) -> tuple[str, str]:
        return "not certified", (
            f"{self.k} pairs reached rtol={self.rtol:g} in one run, which holds one copy of each "
            f"eigenvalue: further copies, and values that it overlooked below the first one, were "
            f"not looked for (certify=False){self._how()}"
        )

    def _how(self) -> str:
        text = ""
        if self.restarts:
            text += f"; a basis of {self.max_basis} vectors, restarted {self.restarts} times"
            text = text.replace(" 1 times", " once")
        if self.basis_dtype == torch.float32:
            text += "; basis stored in float32"
        return text

    def _unfinished(self, full: bool) -> tuple[str, str]:
        used = self.operator.num_matvecs - self.spent
        if full:
            return "not certified", (
                f"{self.k} pairs converged, but {used} products did not exclude a missed one "
                f"(multiplicity or cluster). Raise max_matvecs.{self._how()}"
            )
        return "not converged", (
            f"fewer than {self.k} pairs reached rtol={self.rtol:g} within {used} products. Raise "
            f"max_matvecs, or rtol.{self._how()}"
        )

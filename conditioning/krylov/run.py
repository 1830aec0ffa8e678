"""A Lanczos run: extended, inspected, saved and continued.

Vectors stay on the operator's device. The small tridiagonal matrix is float64 on
the host. Orthogonality is full. The three-term recurrence takes out of a product all that is
not rounding, then one pass of classical Gram-Schmidt over the whole basis takes out the rounding:
that pass cancels nothing, so a second one would find nothing ("twice is enough", Giraud, Langou,
Rozloznik, van den Eshof, Numer. Math. 101, 2005). It saves half of the reads of the basis.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conditioning.errors import (
    AsymmetricOperatorError,
    InvalidArgumentError,
    NonFiniteError,
    ShapeError,
)
from conditioning.jacobi import JacobiMatrix
from conditioning.krylov import vectors
from conditioning.krylov.vectors import Basis
from conditioning.operators.base import LinearOperator

_SMALLEST = 1e-140  # below, squares leave the range of float64


def make_generator(seed: int | torch.Generator) -> torch.Generator:
    """A CPU generator from a seed, or the generator itself.

    Random vectors are drawn on the host, so one seed gives one result on every device.
    """
    if isinstance(seed, torch.Generator):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        msg = f"seed must be an int or a torch.Generator, got {type(seed).__name__}."
        raise InvalidArgumentError(msg)
    return torch.Generator().manual_seed(int(seed))


def random_start(size: int, seed: int | torch.Generator, device: torch.device | str) -> Tensor:
    """A standard normal float64 vector of shape ``(size,)``: uniform on the sphere once scaled."""
    generator = make_generator(seed)
    vector = torch.randn(size, dtype=torch.float64, generator=generator, device=generator.device)
    return vector.to(device)


def start_for(
    operator: LinearOperator, seed: int | torch.Generator, width: int | None = None
) -> Tensor:
    """``random_start`` for an operator: its size and device, this process's entries.

    With ``width`` a block of so many columns, shape ``(n, width)``.
    """
    size, device = operator.shape[1], operator.device
    if width is None:
        return operator.local_part(random_start(size, seed, device))
    drawn = random_start(size * width, seed, device).reshape(width, size)
    return operator.local_part(drawn.T.contiguous())


def refuse_products(size: float, leak: float) -> None:
    """Refuse products of this size that no Krylov method can work with.

    ``leak`` is what they have beyond the recurrence, where a symmetric operator has nothing.
    """
    if not np.isfinite(size) or 0 < size < _SMALLEST:
        msg = (
            "A product of the operator is not finite (NaN or infinity), or of a size whose "
            "square is none in float64. Check the loss and the parameters for overflow; "
            "float64 or another scale of the loss often helps."
        )
        raise NonFiniteError(msg)
    if leak > 1e-2 * size:
        msg = (
            f"The operator is not symmetric: a part of relative size {leak / size:.1e} of a "
            f"product leaves the three-term recurrence, which rounding does not explain. "
            f"Eigenvalues here are those of symmetric operators."
        )
        raise AsymmetricOperatorError(msg)


class LanczosRun:
    """A Lanczos run that can be extended, inspected, saved and continued.

    Parameters
    ----------
    operator : LinearOperator
        Symmetric, ``(n, n)``.
    start : Tensor of shape ``(n,)``
        Not zero.
    deflate : Tensor of shape ``(n, l)``, optional
        Orthonormal columns to project out: the run then sees ``(I - V V^T) A (I - V V^T)``.
    basis_dtype : torch.dtype
        Of the stored basis. float64 also for float32 products: the basis is then
        orthogonal to 1e-16 and only the products carry rounding. float32 halves the memory;
        inner products are taken in float64 all the same, and what storing loses (3e-8 of the
        scale) is measured and added to ``guard``.
    measure_noise : bool
        Spend one product to measure the rounding of the products (by comparing
        ``A (0.7 q) / 0.7`` with ``A q``), which sets the guard of every bound.
    max_steps : int, optional
        No more basis vectors than this are made room for.

    Attributes
    ----------
    num_steps : int
        Steps done, the columns of the basis.
    max_steps : int
        Steps at most.
    closed : bool
        The Krylov space is invariant: the residual is not larger than rounding explains.
    noise : float
        Measured size of the rounding of a product with a unit vector.
    """

    def __init__(
        self,
        operator: LinearOperator,
        start: Tensor,
        *,
        deflate: Tensor | None = None,
        basis_dtype: torch.dtype = torch.float64,
        measure_noise: bool = False,
        max_steps: int | None = None,
    ) -> None:
        size = operator.shape[0]
        if operator.shape != (size, size):
            msg = f"Lanczos needs a square symmetric operator, got shape {operator.shape}."
            raise ShapeError(msg)
        if tuple(start.shape) != (operator.local_size,):
            msg = (
                f"The start vector must have shape ({operator.local_size},), got "
                f"{tuple(start.shape)}."
            )
            raise ShapeError(msg)
        if basis_dtype not in (torch.float32, torch.float64):
            msg = f"basis_dtype must be torch.float32 or torch.float64, got {basis_dtype}."
            raise InvalidArgumentError(msg)
        self.operator = operator
        self.start_norm = float(self._norm(start.to(torch.float64)))
        self.num_steps = 0
        self.closed = False
        self.noise = 0.0
        self._measure_noise = measure_noise
        self._deflate = None
        if deflate is not None and deflate.shape[1]:
            self._deflate = deflate.to(torch.float64)
        self._device = operator.device
        self._alpha: list[float] = []
        self._beta: list[float] = []
        # Sync-free devices read their scalars back in batches; the CPU has nothing to wait for.
        self._check_every = 1 if self._device.type == "cpu" else 10
        self._leak = 0.0
        self._lost = 0.0
        self._may_close = True
        self._jacobi: JacobiMatrix | None = None
        self._known_scale = 0, 0.0  # at that many steps; asked for several times in each
        self.max_steps = size if max_steps is None else min(max_steps, size)
        self._basis = self._new_basis(basis_dtype)
        vector = start.detach().to(self._device, torch.float64)
        if not (np.isfinite(self.start_norm) and self.start_norm > 0):
            msg = "The start vector of a Krylov method must be finite and not zero."
            raise InvalidArgumentError(msg)
        self._next = self._orthogonalise(vector / self.start_norm)[0]
        remaining = float(self._norm(self._next))
        if remaining < 1e-8:
            msg = "The start vector lies in the space that is projected out: draw another."
            raise InvalidArgumentError(msg)
        self._next = self._stored(self._next / remaining)[0]

    # -- the recurrence ---------------------------------------------------------------------

    def _new_basis(self, dtype: torch.dtype) -> Basis:
        return Basis(self.operator, self.operator.local_size, self.max_steps, dtype)

    def _append(self, vector: Tensor) -> None:
        self._basis.append(vector)
        self.num_steps += 1

    def _stored(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The vector as the basis will hold it, which is the one to multiply, and what is lost."""
        if self._basis.dtype == vector.dtype:
            return vector, torch.zeros((), dtype=vector.dtype, device=vector.device)
        kept = vector.to(self._basis.dtype).to(vector.dtype)
        return kept, self._norm(vector - kept)

    def _orthogonalise(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Project out basis and deflated space, in place; also the coefficients on the basis."""
        total = torch.zeros(self.num_steps, dtype=vector.dtype, device=vector.device)
        for count in (self._num_coupled(), self.num_steps):
            if self._deflate is not None:
                vector.addmv_(self._deflate, self._inner(self._deflate, vector), alpha=-1)
            coefficients = self._basis.inner(vector, count)
            self._basis.subtract_(vector, coefficients)
            total[self.num_steps - count :] += coefficients
        return vector, total

    def _num_coupled(self) -> int:
        """How many of the newest vectors a product couples to, rounding aside."""
        return min(self.num_steps, 2)

    def _inner(self, left: Tensor, right: Tensor) -> Tensor:
        return vectors.inner(self.operator, left, right)

    def _norm(self, vector: Tensor) -> Tensor:
        return vectors.norm(self.operator, vector)

    def _product(self, vector: Tensor) -> Tensor:
        product = self.operator.matvec(vector)
        # A copy: what follows works in place, and an operator may hand out what it keeps.
        return product.to(torch.float64, copy=True)

    def extend(self, num_steps: int) -> None:
        """Do up to ``num_steps`` further steps; fewer when the Krylov space closes.

        Raises
        ------
        NonFiniteError
            If a product is not finite, or too large or small for squares in float64.
        AsymmetricOperatorError
            If the products are not those of a symmetric operator.
        """
        target = min(self.num_steps + num_steps, self.max_steps)
        try:
            while self.num_steps < target and not self.closed:
                self._batch(min(self._check_every, target - self.num_steps))
        except BaseException:
            # Also on Ctrl-C: what is kept is what is complete, so that it can be continued.
            self._rewind()
            raise

    def _rewind(self) -> None:
        """Back to the last step whose scalars are known."""
        kept = len(self._alpha)
        if self.num_steps > kept:
            self._next = self._basis[kept]
            self._forget(kept)

    def _forget(self, kept: int) -> None:
        self._basis.truncate(kept)
        self.num_steps = kept

    def _batch(self, count: int) -> None:
        """``count`` steps with one read-back of the scalars at their end."""
        tiny = torch.finfo(torch.float64).tiny
        scalars = []
        noise = None
        nexts = []
        for _ in range(count):
            vector = self._next
            product = self._product(vector)
            if self._measure_noise and self.num_steps == 0:
                again = self._product(0.7 * vector) / 0.7
                noise = self._norm(again - product)
            self._append(vector)
            rest, coefficients = self._orthogonalise(product)
            leak = self._leaked(coefficients)
            beta = self._norm(rest)
            self._next, lost = self._stored(rest.div_(beta.clamp_min(tiny)))
            scalars.append(torch.stack([coefficients[-1], beta, leak, lost]))
            nexts.append(self._next)
        values = torch.stack(scalars).tolist()
        if noise is not None:
            self.noise = float(noise)
        for done, (alpha, beta, leak, lost) in enumerate(values):
            self._check_scalars(alpha, beta, leak)
            self._alpha.append(alpha)
            self._beta.append(beta)
            # What reorthogonalisation removes beyond the two newest vectors is zero in
            # exact arithmetic: its size is rounding of the products.
            self._leak = max(self._leak, leak)
            self._lost = max(self._lost, lost)
            if beta <= self._closing_norm() or self._is_noise():
                self.closed = True
                self._forget(self.num_steps - (count - done - 1))
                self._next = nexts[done]
                return
        self.closed = self.complete

    def _leaked(self, coefficients: Tensor) -> Tensor:
        """Size of what a product has beyond the two newest vectors."""
        size: Tensor = torch.linalg.vector_norm(coefficients[:-2])
        return size

    def _check_scalars(self, alpha: float, beta: float, leak: float) -> None:
        refuse_products(max(abs(alpha), beta, self._scale()), leak)

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space, so that all eigenvalues are known."""
        return self.num_steps >= self.operator.shape[0] - self._num_deflated()

    @property
    def only_zeros(self) -> bool:
        """Whether the space closed on zero eigenvalues alone: every product vanished."""
        return self.closed and self.jacobi.scale <= self.guard

    def _is_noise(self) -> bool:
        """Whether the newest residual is rounding, grown on the way.

        After as many steps as there are distinct eigenvalues the residual is zero, and
        in floating point it is what rounding made of it in the degenerate eigenspaces. It then
        drops suddenly, to the size that the recurrence predicts for rounding, and leaves every
        Ritz pair settled relative to itself: no small eigenvalue is still being formed.
        """
        steps = len(self._beta)
        newest, scale = self._beta[-1], self._scale()
        if not self._may_close or not 1 < steps <= 400:
            return False
        if newest > 0.1 * min(self._beta[:-1]) or newest > 1e-3 * scale:
            return False
        jacobi = self.jacobi
        # A null space has nothing to be relative to: it must be settled to 1e-8 of the scale.
        size = np.maximum(np.abs(jacobi.ritz_values), 1e-6 * scale)
        if np.any(jacobi.residual_norms > 1e-2 * size):
            return False
        rounding = max(self._rounding, np.finfo(np.float64).eps * scale)
        growth = jacobi.rounding_growth()
        return bool(np.isfinite(growth) and newest <= 10 * rounding * growth)

    def num_distinct(self) -> int:
        """Ritz values that are apart by more than their residuals."""
        jacobi = self.jacobi
        radius = jacobi.residual_norms + self.guard
        low, high = jacobi.ritz_values - radius, jacobi.ritz_values + radius
        return 1 + int((low[1:] > np.maximum.accumulate(high)[:-1]).sum())

    def reopen(self) -> bool:
        """Go on after a closing whose residual is too large for the caller.

        Returns
        -------
        bool
            Whether there is anything to go on with.
        """
        if self.complete or self._beta[-1] <= self._closing_norm():
            return False
        self._may_close = self.closed = False
        return True

    def _num_deflated(self) -> int:
        return 0 if self._deflate is None else self._deflate.shape[1]

    def _scale(self) -> float:
        if self._known_scale[0] != len(self._alpha):
            self._known_scale = len(self._alpha), self._measured_scale()
        return self._known_scale[1]

    def _measured_scale(self) -> float:
        beta = np.asarray(self._beta)
        pairs = np.concatenate([[0.0], beta[:-1]]) if len(beta) else np.zeros(1)
        return float(np.max(np.abs(self._alpha) + beta + pairs)) if self._alpha else 0.0

    def _closing_norm(self) -> float:
        # A residual of the size of the noise carries no direction any more.
        return 20 * self._rounding + 50 * np.finfo(np.float64).eps * self._scale()

    @property
    def _rounding(self) -> float:
        """Of the products as measured, and of a basis that is stored in less than float64."""
        return max(self.noise, self._leak, self._lost * self._scale())

    # -- what the run knows -----------------------------------------------------------------

    @property
    def guard(self) -> float:
        """Allowance for rounding, to be added to every end of every bound.

        Three times the measured noise plus 10 machine epsilons of the scale. The
        constants are a heuristic, checked on planted spectra, not a theorem.
        """
        return 3 * self._rounding + 10 * np.finfo(np.float64).eps * self._scale()

    @property
    def num_matvecs(self) -> int:
        """Products that this run has asked for and kept."""
        return self.num_steps + (1 if self._measure_noise and self.num_steps else 0)

    @property
    def jacobi(self) -> JacobiMatrix:
        """The tridiagonal matrix with the norm of the residual behind it."""
        if self._jacobi is None or self._jacobi.size != len(self._alpha):
            last = self._beta[-1] if self._beta else 0.0
            self._jacobi = JacobiMatrix(np.array(self._alpha), np.array(self._beta[:-1]), last)
        return self._jacobi

    @property
    def basis(self) -> Tensor:
        """Orthonormal basis, shape ``(n, k)``."""
        if not self.num_steps:
            return torch.empty(self.operator.local_size, 0, dtype=torch.float64)
        return self._basis.dense()

    @property
    def residual(self) -> Tensor:
        """``r`` in ``A Q = Q T + r e^T``, shape ``(n,)``."""
        norm = self._beta[-1] if self._beta else 1.0
        return self._next * norm

    @property
    def direction(self) -> Tensor:
        """The residual as a unit vector, shape ``(n,)``: the next basis vector."""
        return self._next

    def combine(self, coefficients: Tensor) -> Tensor:
        """Basis times ``coefficients`` of shape ``(k, l)``, without copying the basis."""
        return self._basis.combine(coefficients.to(self._device, torch.float64))

    def release(self) -> None:
        """Give the memory of the basis back. What the Jacobi matrix tells stays known."""
        self._basis.clear()
        self.max_steps = self.num_steps

    # -- save and continue ------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the whole state; ``load`` continues as if nothing had happened."""
        path = Path(path)
        self._rewind()
        state = {
            "size": self.operator.shape[0],
            "alpha": self._alpha,
            "beta": self._beta,
            "leak": self._leak,
            "lost": self._lost,
            "noise": self.noise,
            "closed": self.closed,
            "may_close": self._may_close,
            "start_norm": self.start_norm,
            "basis": self._basis.rows() if self.num_steps else torch.empty(0),
            "next": self._next,
        }
        temporary = path.with_name(path.name + ".part")
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, path: str | Path) -> None:
        """Continue from a state that ``save`` wrote for the same operator.

        Raises
        ------
        InvalidArgumentError
            If the file is not a state, or one of an operator of another size or of other
            values: the last recorded product is done again and compared.
        """
        state = _read(path, self._device)
        if state["size"] != self.operator.shape[0]:
            msg = (
                f"The checkpoint {path} belongs to an operator with {state['size']} rows, this "
                f"one has {self.operator.shape[0]}. Delete it or name another file."
            )
            raise InvalidArgumentError(msg)
        self.num_steps, self._jacobi, self._known_scale = 0, None, (0, 0.0)
        self.max_steps = max(self.max_steps, len(state["basis"]))
        # In the dtype of the file: rounding it again would lose what no bound knows of.
        stored = state["basis"].dtype if len(state["basis"]) else self._basis.dtype
        self._basis = self._new_basis(stored)
        for row in state["basis"]:
            self._append(row)
        self._alpha, self._beta = list(state["alpha"]), list(state["beta"])
        self._leak, self.noise = state["leak"], state["noise"]
        self._lost = state.get("lost", 0.0)
        self.closed, self._may_close = state["closed"], state["may_close"]
        self.start_norm = state["start_norm"]
        self._next = state["next"].to(torch.float64)
        if self.num_steps:
            last = self._basis[self.num_steps - 1]
            rayleigh = float(self._inner(last, self._product(last)))
            if abs(rayleigh - self._alpha[-1]) > 100 * self.guard:
                msg = (
                    f"The checkpoint {path} was made with other parameters or data: q^T A q is "
                    f"{rayleigh:.6g} now and was {self._alpha[-1]:.6g}. Delete it to start anew."
                )
                raise InvalidArgumentError(msg)


def _read(path: str | Path, device: torch.device) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:
        msg = f"{path} is not the checkpoint of a Lanczos run: {error}. Delete it to start anew."
        raise InvalidArgumentError(msg) from error
    if not isinstance(state, dict) or not {"size", "alpha", "may_close"} <= set(state):
        msg = f"{path} is not the checkpoint of a Lanczos run. Delete it to start anew."
        raise InvalidArgumentError(msg)
    return state

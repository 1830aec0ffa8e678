"""Each tool behind one interface, called as its documentation shows. Runs in a worker process.

Other tools are imported where they are used: each environment has its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.hessian_problems import HessianProblem

#: Steps that the power iterations may take for each eigenvalue.
POWER_STEPS = 1000


class OutOfTimeError(Exception):
    """A solver is stopped from inside its product, after the seconds that it was given."""


class Counted:
    """A product that counts its vectors and keeps to a deadline.

    Parameters
    ----------
    product : callable
        ``product(*arguments)``.
    seconds : float
        From now on.
    """

    def __init__(self, product: Callable[..., Any], seconds: float = float("inf")) -> None:
        self._product, self._end = product, time.perf_counter() + seconds
        self.count = 0

    def __call__(self, *arguments: Any) -> Any:
        if time.perf_counter() > self._end:
            msg = f"{self.count} products"
            raise OutOfTimeError(msg)
        vectors = arguments[-1]
        blocked = isinstance(vectors, Tensor) and vectors.ndim == 2
        self.count += vectors.shape[1] if blocked else 1
        return self._product(*arguments)


@dataclass(frozen=True)
class Wanted:
    """What a solver is asked for.

    Parameters
    ----------
    k : int
        How many eigenvalues, of largest magnitude.
    tolerance : float
    seed : int
        Of the start.
    seconds : float
        After which it is stopped.
    solver : str
        One of the tool's ``solvers``.
    """

    k: int
    tolerance: float
    seed: int
    seconds: float
    solver: str = ""


@dataclass(frozen=True)
class Top:
    """What a solver returned.

    Parameters
    ----------
    values : list of float
    converged : bool or None
        What the tool itself says: of all values. ``None`` if it does not say.
    products : int
    said : str
        In the tool's words, or how it was called.
    """

    values: list[float]
    converged: bool | None
    products: int
    said: str = ""


class Tool:
    """A Hessian of one tool.

    Attributes
    ----------
    blocks : bool
        Whether it multiplies several vectors in one call.
    solvers : tuple of str
        Names for :meth:`top`.
    """

    blocks: ClassVar[bool] = False
    solvers: ClassVar[tuple[str, ...]] = ("",)

    def __init__(self, problem: HessianProblem) -> None:
        raise NotImplementedError

    def product(self, vectors: Tensor) -> Any:
        """Multiply ``(n,)``, or ``(n, k)`` if the tool has blocks."""
        raise NotImplementedError

    def engine(self) -> str | None:
        """How it multiplies, if it says so."""
        return None

    def top(self, wanted: Wanted) -> Top:
        """The ``k`` eigenvalues of largest magnitude, as a user would ask for them.

        Raises
        ------
        OutOfTimeError
            After some seconds.
        """
        raise NotImplementedError


class Ours(Tool):
    """The library itself; ``choice`` is the argument ``engine``, and the default leaves it out."""

    blocks = True
    choice: ClassVar[str] = "auto"

    def __init__(self, problem: HessianProblem) -> None:
        from conditioning import HessianOperator

        chosen: dict[str, Any] = {} if self.choice == "auto" else {"engine": self.choice}
        data = (problem.inputs, problem.targets)
        self._operator = HessianOperator(problem.model, problem.loss, data, **chosen)

    def product(self, vectors: Tensor) -> Tensor:
        return self._operator @ vectors

    def engine(self) -> str | None:
        found = getattr(self._operator, "engine", None)
        return None if found is None else str(found)

    def top(self, wanted: Wanted) -> Top:
        from conditioning import eigenvalues

        operator: Any = self._operator
        # Below the public products, so that the solver sees the operator itself.
        operator._matmat = Counted(operator._matmat, wanted.seconds)
        try:
            found = eigenvalues(operator, wanted.k, rtol=wanted.tolerance, seed=wanted.seed)
        finally:
            del operator._matmat
        values = [estimate.value for estimate in found.values]
        converged = found.status in ("exact", "certified", "exhausted")
        return Top(values, converged, found.num_matvecs, found.status)


class Retained(Ours):
    choice = "retained"


class Linearized(Ours):
    choice = "linearized"


class Compiled(Ours):
    choice = "compiled"


class PyHessian(Tool):
    def __init__(self, problem: HessianProblem) -> None:
        from pyhessian import hessian
        from pyhessian.utils import hessian_vector_product

        problem.model.zero_grad()  # it multiplies with .grad, to which backward() adds
        data = (problem.inputs, problem.targets)
        mode = [module.training for module in problem.model.modules()]
        self._hessian = hessian(problem.model, problem.loss, data=data, cuda=False)
        for module, training in zip(problem.model.modules(), mode, strict=True):
            module.training = training
        self._multiply = hessian_vector_product
        self._shapes = [p.shape for p in self._hessian.params]
        self._sizes = [p.numel() for p in self._hessian.params]

    def product(self, vectors: Tensor) -> Any:
        parts = [v.view(s) for v, s in zip(vectors.split(self._sizes), self._shapes, strict=True)]
        return self._multiply(self._hessian.gradsH, self._hessian.params, parts)

    def top(self, wanted: Wanted) -> Top:
        torch.manual_seed(wanted.seed)
        module: Any = sys.modules["pyhessian.hessian"]
        counted = Counted(self._multiply, wanted.seconds)
        module.hessian_vector_product = counted
        try:
            values, _ = self._hessian.eigenvalues(
                maxIter=POWER_STEPS, tol=wanted.tolerance, top_n=wanted.k
            )
        finally:
            module.hessian_vector_product = self._multiply
        return Top([float(v) for v in values], None, counted.count, f"maxIter={POWER_STEPS}")


class Curvlinops(Tool):
    blocks = True

    def __init__(self, problem: HessianProblem) -> None:
        from curvlinops import HessianLinearOperator

        parameters = [p for p in problem.model.parameters() if p.requires_grad]
        data = [(problem.inputs, problem.targets)]
        self._operator = HessianLinearOperator(problem.model, problem.loss, parameters, data)

    def product(self, vectors: Tensor) -> Any:
        return self._operator @ vectors

    def top(self, wanted: Wanted) -> Top:
        import numpy as np
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

        inner = self._operator.to_scipy()
        counted = Counted(inner.matvec, wanted.seconds)
        limited = LinearOperator(inner.shape, matvec=counted, dtype=inner.dtype)
        start = np.random.default_rng(wanted.seed).standard_normal(inner.shape[0])
        try:
            found = eigsh(limited, wanted.k, which="LM", tol=wanted.tolerance, v0=start,
                          return_eigenvectors=False)  # fmt: skip
        except ArpackNoConvergence as error:
            return Top(list(map(float, error.eigenvalues)), False, counted.count, str(error))
        return Top([float(v) for v in found], True, counted.count, "scipy's eigsh")


class Eigenthings(Tool):
    #: Its default takes 2k steps; 60 is what its top-5 needs; power iteration is its other way.
    solvers = ("lanczos, default", "lanczos, max_iter=60", "power")

    def __init__(self, problem: HessianProblem) -> None:
        from hessian_eigenthings import HessianOperator
        from hessian_eigenthings.loss_fns import supervised_loss

        data = [(problem.inputs, problem.targets)]
        self._operator = HessianOperator(problem.model, data, supervised_loss(problem.loss))

    def product(self, vectors: Tensor) -> Any:
        return self._operator.matvec(vectors)

    def top(self, wanted: Wanted) -> Top:
        from hessian_eigenthings import deflated_power_iteration, lanczos

        operator: Any = self._operator
        counted = Counted(operator.matvec, wanted.seconds)
        operator.matvec = counted
        try:
            if wanted.solver == "power":
                found = deflated_power_iteration(
                    operator,
                    k=wanted.k,
                    max_iter=POWER_STEPS,
                    tol=wanted.tolerance,
                    seed=wanted.seed,
                )
            else:
                steps = {} if wanted.solver.endswith("default") else {"max_iter": 60}
                found = lanczos(
                    operator, k=wanted.k, tol=wanted.tolerance, seed=wanted.seed, **steps
                )
        finally:
            del operator.matvec
        values = [float(v) for v in found.eigenvalues]
        return Top(values, bool(found.converged.all()), counted.count, wanted.solver)


@dataclass(frozen=True)
class Kind:
    """A tool in the benchmark.

    Parameters
    ----------
    label : str
        What tables say.
    make : type
    package : str
        Whose version is quoted, and that must be installed.
    peer : bool
        Whether it lives in the other environment.
    solves : bool
        Whether it is asked for eigenvalues, too.
    """

    label: str
    make: type[Tool]
    package: str
    peer: bool = False
    solves: bool = True


KINDS: dict[str, Kind] = {
    "auto": Kind("ours", Ours, "torch"),
    "retained": Kind("ours, retained", Retained, "torch", solves=False),
    "linearized": Kind("ours, linearized", Linearized, "torch", solves=False),
    "compiled": Kind("ours, compiled", Compiled, "torch", solves=False),
    "pyhessian": Kind("PyHessian", PyHessian, "pyhessian", peer=True),
    "curvlinops": Kind("curvlinops", Curvlinops, "curvlinops-for-pytorch", peer=True),
    "eigenthings": Kind("hessian-eigenthings", Eigenthings, "hessian-eigenthings", peer=True),
}

"""The eigenvalues that every tool's values are compared with: float64, certified, found twice.

They depend on the problem alone, and in float64 a convolution takes six times as long: so they are
kept in ``hessian_references.json`` and computed anew where the loss and its gradient are others.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse.linalg import LinearOperator, eigsh

from benchmarks.hessian_problems import CASES, HessianProblem
from benchmarks.timing import Process
from benchmarks.worker import serve

FILE = "hessian_references.json"
#: Of which the errors are quoted, and how many more are known: a tie at the end is no error.
K, MORE = 5, 3
#: Where two ways do not agree to this, there is no reference.
AGREEMENT = 1e-7
_DENSE = 2000


class Disagreement(RuntimeError):
    """Two ways to the reference do not agree."""


def plain_operator(problem: HessianProblem) -> LinearOperator:
    """The Hessian by two backward passes and nothing of the library."""
    parameters = list(problem.model.parameters())
    value = problem.loss(problem.model(problem.inputs), problem.targets)
    gradient = torch.autograd.grad(value, parameters, create_graph=True)
    sizes = [p.numel() for p in parameters]

    def multiply(vector: Any) -> Any:
        flat = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64).ravel())
        parts = [v.view(p.shape) for v, p in zip(flat.split(sizes), parameters, strict=True)]
        found = torch.autograd.grad(gradient, parameters, parts, retain_graph=True)
        return torch.cat([part.reshape(-1) for part in found]).numpy()

    size = problem.size
    return LinearOperator((size, size), matvec=multiply, dtype=np.float64)


def reference(problem: HessianProblem) -> dict[str, Any]:
    """The ``K + MORE`` eigenvalues of largest magnitude.

    Returns
    -------
    dict
        ``values``, largest magnitude first; ``status`` and ``error`` as certified by the library;
        ``check`` and ``difference``: the other way, and how far apart at most relative to the
        largest.

    Raises
    ------
    Disagreement
        If they are apart, or the library did not certify them.
    """
    from conditioning import HessianOperator, eigenvalues

    double = problem.double()
    operator = HessianOperator(double.model, double.loss, (double.inputs, double.targets))
    found = eigenvalues(operator, K + MORE, rtol=1e-10, max_matvecs=3000)
    values = np.array([estimate.value for estimate in found.values])
    if found.status not in ("exact", "certified", "exhausted"):
        msg = f"The reference is not certified: {found.message}."
        raise Disagreement(msg)
    if problem.size <= _DENSE:
        check = "eigvalsh of the dense matrix"
        matrix = operator.dense()
        everything = np.linalg.eigvalsh(((matrix + matrix.T) / 2).numpy())
        others = everything[np.argsort(-abs(everything))][: K + MORE]
    else:
        # Without attention that cannot be differentiated twice, which the library goes around.
        check = "scipy's eigsh on two plain backward passes"
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            plain = plain_operator(double)
            start = np.random.default_rng(1).standard_normal(problem.size)
            others = eigsh(plain, K, tol=1e-10, ncv=40, v0=start, return_eigenvectors=False)
    difference = max(_distances(others, values)) / abs(values[0])
    if difference > AGREEMENT:
        msg = f"Two ways to the reference differ by {difference:.1e}: {values}, {others}."
        raise Disagreement(msg)
    return {
        "values": values.tolist(), "status": found.status, "products": found.num_matvecs,
        "error": max(found.residual_norms), "check": check, "difference": float(difference),
    }  # fmt: skip


def _distances(values: Any, known: Any) -> Any:
    """How far each of ``values`` is from its own entry of ``known``, none taken twice."""
    apart = abs(np.asarray(values)[:, None] - np.asarray(known)[None, :])
    rows, columns = linear_sum_assignment(apart)
    return apart[rows, columns]


def true_error(values: Sequence[float], known: Sequence[float], k: int = K) -> float:
    """Largest relative error of ``k`` values that should be those of largest magnitude.

    Both have to be right: the magnitudes, in their order (a missed eigenvalue, or a copy of one,
    shifts those after it), and each value with its sign, as one of the known ones, none taken
    twice. Ties at the end of the list are no error.

    Parameters
    ----------
    values : sequence of float
        In any order.
    known : sequence of float
        At least ``k``, largest magnitude first.
    k : int

    Returns
    -------
    float
        Infinite if fewer than ``k`` values were returned, or one is not finite.
    """
    found, truth = np.asarray(values, dtype=float), np.asarray(known, dtype=float)
    if len(found) < k or not np.isfinite(found).all():
        return float("inf")
    found = found[np.argsort(-abs(found))][:k]
    ranked = abs(abs(found) - abs(truth[:k])) / abs(truth[:k])
    return float(max(ranked.max(), (_distances(found, truth) / abs(found)).max()))


def load_or_compute(
    case: str, folder: Path, *, quick: bool, threads: int, patience: float = 7200
) -> dict[str, Any]:
    """The kept reference of a problem, or a new one, which is then kept.

    Raises
    ------
    WorkerError
        If the process that computes it ends.
    Disagreement
        If there is none.
    """
    path, key = folder / FILE, f"{case}, {'quick' if quick else 'full'}"
    kept = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    problem = CASES[case].build(quick=quick)
    mark = [problem.size, *problem.double().fingerprint()]
    for found in kept.values():  # whatever its name: the same function has the same Hessian
        if np.allclose(found["fingerprint"], mark, rtol=1e-9, atol=0):
            return dict(found)
    size = "quick" if quick else "full"
    process = Process("benchmarks.references", case, size, str(threads), patience=patience)
    process.close()
    found = process.first
    if "fails" in found:
        raise Disagreement(found["fails"])
    kept[key] = {"title": problem.title, "fingerprint": mark, **found}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    return dict(kept[key])


def main() -> None:
    """Answer with the reference of one problem."""
    warnings.simplefilter("ignore")
    case, quick, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))

    def begin() -> dict[str, Any]:
        try:
            return reference(CASES[case].build(quick=quick == "quick"))
        except Exception as error:  # the benchmark goes on without it, and says why
            return {"fails": f"{type(error).__name__}: {error}"}

    serve(begin, lambda _: None)


if __name__ == "__main__":
    main()

"""What certifying a condition number would still take, told from the run so far.

A condition number is certified where the sum of squares ``K(x)`` of the orthonormal polynomials
of the run passes ``1 / mass`` on the whole gap around zero (``conditioning.jacobi``). Two
things are known of the products that this needs.

* Over a bulk that comes closer to zero than the run resolves, solutions of the three-term
  recurrence at ``i d`` grow like ``exp(k g(i d))`` with Green's function ``g`` of the bulk, which
  the run itself measures; once a gap ``(-d, d)`` is resolved, ``K(0)`` grows at twice about that
  rate (derived here: ``g(i d)`` is ``asinh(d)`` for ``[-1, 1]``, and ``atanh(d)`` at 0 without
  the gap). Passing ``1 / mass`` (1e17 for n = 1e5 and a failure probability of 1e-6) takes
  ``log(1 / mass) / (2 g)`` products: about ``18 kappa`` for a bulk that reaches ``max|lambda|``
  on both sides, less by the bulk's share of ``max|lambda|`` beside outliers, and ``14 sqrt(kappa)``
  for a bulk on one side (``10 sqrt(kappa)`` are needed there). The certain lower bound of ``kappa``
  stands in for it, so that this errs on the side of too few, as does a run in which outliers still
  converge; and it is never more than ``n``. Degenerate spectra take far fewer: there ``K`` grows
  at the rate of their few distinct eigenvalues.
* The growth of ``log K(0)`` over the latest steps, taken to go on. In the bulk ``K`` grows like the
  number of steps, its logarithm ever more slowly, and this too errs on the side of too few.

A run is given up where both say, at several looks in a row, that the budget cannot suffice. Past
half of the budget the growth alone may say so, if by a wide margin. Growth alone says nothing
early: a degenerate spectrum looks like a bulk until its distinct eigenvalues are all seen, and
then closes within a few steps. Neither says anything close to ``n`` steps, where a run ends
by having seen everything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from conditioning.jacobi import JacobiMatrix

_PATIENCE = 5  # looks in a row, each 10 steps or a tenth of the steps after the one before
_FEWEST_STEPS = 60
_MARGIN = 3  # of a prediction by growth alone
_NEAR = 0.7  # of n: the runs of small operators that certify without a gap need 0.74 n or more


@dataclass
class Outlook:
    """Collects looks at a run, and says when its budget cannot suffice.

    Parameters
    ----------
    size : int
        ``n``: at the latest there the space closes.
    inverse_mass : float
        What ``K`` has to pass.
    last : int
        Steps at most.
    """

    size: int
    inverse_mass: float
    last: int
    _growth: list[tuple[int, float]] = field(default_factory=list)
    _hopeless: int = 0

    def look(self, jacobi: JacobiMatrix, threshold: float, certain: float) -> bool:
        """Take note of the run as it is; whether it has no prospect left.

        Parameters
        ----------
        jacobi : JacobiMatrix
        threshold : float
            What counts as zero.
        certain : float
            Certain lower bound of the condition number.
        """
        at, _ = jacobi.inverse_mass(np.array([-threshold, threshold]))
        self._growth.append((jacobi.size, float(np.log(at.min()))))
        by_kappa = needed_products(certain, jacobi, self.inverse_mass, self.size)
        by_growth = self._extrapolated()
        both = min(by_kappa, by_growth) > self.last
        late = 2 * jacobi.size >= self.last and by_growth > _MARGIN * self.last
        self._hopeless = self._hopeless + 1 if both or late else 0
        if self.last >= _NEAR * self.size or jacobi.size < _FEWEST_STEPS:
            return False
        return self._hopeless >= _PATIENCE

    def _extrapolated(self) -> float:
        """Step at which ``log K`` passes its mark at the rate of the later half of the run."""
        steps, logs = self._growth[-1]
        half = [entry for entry in self._growth if entry[0] <= steps / 2]
        if not half:
            return 0.0
        rate = (logs - half[-1][1]) / (steps - half[-1][0])
        missing = max(float(np.log(self.inverse_mass)) - logs, 0.0)
        if missing == 0:
            return float(steps)
        return steps + missing / rate if rate > 0 else float("inf")


def needed_products(certain: float, jacobi: JacobiMatrix, inverse_mass: float, size: int) -> int:
    """Products that certifying a condition number of at least ``certain`` would take, about.

    ``log(inverse_mass) / (2 g(i d))`` with ``d = max|lambda| / certain`` (the module says why),
    where ``g`` is the mean growth over the later half of the run; at most ``size``.
    """
    point, scale = 1j * max(jacobi.scale / certain, 1e-300), max(jacobi.scale, 1e-300)
    off = np.append(jacobi.off_diagonal, max(jacobi.residual_norm, 1e-20 * scale))
    half = jacobi.size // 2
    # Begun as a travelling wave, which grows from its first step on; p_j itself does not.
    waves = np.roots([1.0, -(point - jacobi.diagonal[half]) / off[half], 1.0])
    ratio = complex(waves[np.abs(waves).argmax()])
    logs = []
    for j in range(half, jacobi.size):
        ratio = (point - jacobi.diagonal[j] - (off[j - 1] if j else 0.0) / ratio) / off[j]
        logs.append(float(np.log(abs(ratio))))
    # A bulk that fills [-max|lambda|, max|lambda|] has the smallest g of all.
    growth = max(float(np.mean(logs)), float(np.arcsinh(1 / certain)))
    return int(min(float(np.log(inverse_mass)) / (2 * growth), size))

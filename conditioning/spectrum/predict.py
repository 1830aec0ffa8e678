"""What certifying a condition number would still take, told from the run so far.

A condition number is certified where the sum of squares ``K(x)`` of the orthonormal polynomials
of the run passes ``1 / mass`` on the whole gap around zero (``conditioning.jacobi``). Two
things are known of the products that this needs.

* Over a bulk that reaches down to ``max|lambda| / kappa`` on both sides of zero, polynomials
  grow by ``1 / kappa`` a step: passing ``1 / mass`` (1e17 for n = 1e5 and a failure probability
  of 1e-6) takes about ``18 kappa``, and never more than ``n``. The certain lower bound of
  ``kappa`` stands in for it, so that this errs on the side of too few. Degenerate spectra take far
  fewer: there ``K`` grows at the rate of their few distinct eigenvalues.
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

PER_KAPPA = 18
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
        by_kappa = needed_products(certain, self.size)
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


def needed_products(certain: float, size: int) -> int:
    """Products that certifying a condition number of at least ``certain`` would take, about."""
    return int(min(PER_KAPPA * certain, size))

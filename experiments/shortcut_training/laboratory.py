"""What is measured: one function for each kind of cell, from a description to plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from experiments.data import spread_out
from experiments.models import ShortcutNet, half_mean_squared_error
from experiments.models.shortcut_kinds import SHORTCUT_KINDS
from experiments.moments import Moments, virtual_samples
from experiments.shortcut_training.descent import (
    Descent,
    LinearObjective,
    Objective,
    ReluObjective,
    descend,
    spaced_steps,
    stack,
    unstack,
)
from experiments.shortcut_training.trajectories import (
    Path,
    around,
    at_levels,
    follow,
    hessian_record,
)
from experiments.store import fingerprint

if TYPE_CHECKING:
    from experiments.shortcut_training import Sizes

Cell = Mapping[str, Any]
_CURVE_POINTS = 40
# Of a path's losses and gradient norms, so many are stored.
_PATH_POINTS = 400


class Laboratory:
    """The data on the device, and the measurements that use them."""

    def __init__(self, moments: Moments, sizes: Sizes, device: str) -> None:
        self.moments, self.sizes, self.device = moments, sizes, device
        self.dim = moments.inputs.shape[1]
        few = virtual_samples(moments.inputs, moments.targets)
        # A linear network sees the moments only: these few rows have the same ones.
        self.few = (few[0].to(device), few[1].to(device))
        chosen = torch.from_numpy(spread_out(len(moments.inputs), sizes.relu_samples))
        self.samples = (moments.inputs[chosen], moments.targets[chosen])
        self._kinds: dict[str, Callable[[Cell], dict[str, Any]]] = {
            "check": self.check,
            "start": self.start,
            "path": self.path,
            "sweep": self.sweep,
            "relu": self.relu,
        }

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Measure a cell; ``cell["part"]`` says which kind it is."""
        return self._kinds[cell["part"]](cell)

    @property
    def scale(self) -> float:
        """Loss of the identity map above the least one: where nets with shortcuts start."""
        error = torch.eye(self.dim, dtype=torch.float64) - self.moments.best_map
        return float((error @ self.moments.sigma_xx * error).sum() / 2)

    @property
    def levels(self) -> list[float]:
        """Losses above the least one at which spectra are taken, the same for every net."""
        count, decades = self.sizes.levels, self.sizes.decades
        return [self.scale * 10 ** (-decades * k / (count - 1)) for k in range(count)]

    # -- pieces ---------------------------------------------------------------------------------

    def net(self, cell: Cell, *, mid: str | None = None) -> ShortcutNet:
        """The net of a cell at its initial weights.

        Nets of the same seed share no draws: else what is compared would not be independent.
        """
        kind = SHORTCUT_KINDS[cell["net"]]
        drawn_from = {key: cell[key] for key in ("net", "L", "seed")}
        seed = int(fingerprint(drawn_from)[:12], 16)
        return kind.build(self.dim, cell["L"], seed, mid=mid, device=self.device)

    def linear_objective(self, cell: Cell, dtype: torch.dtype = torch.float64) -> LinearObjective:
        """The loss of the linear nets of a cell."""
        shortcut = SHORTCUT_KINDS[cell["net"]].shortcut
        return LinearObjective(self.moments, shortcut=shortcut, device=self.device, dtype=dtype)

    def relu_objective(self, cell: Cell, dtype: torch.dtype) -> ReluObjective:
        """The loss of the nets of a cell with a ReLU in the middle of each unit."""
        shortcut = SHORTCUT_KINDS[cell["net"]].shortcut
        return ReluObjective(*self.samples, shortcut=shortcut, device=self.device, dtype=dtype)

    def _nets(self, cell: Cell) -> list[Tensor]:
        """Initial weights of the nets of all seeds of a cell."""
        seeds = range(cell["first"], cell["first"] + cell["seeds"])
        return [self.net({**cell, "seed": seed}).stacked_weights() for seed in seeds]

    def _descend(
        self, objective: Objective, nets: list[Tensor], rates: np.ndarray, dtype: torch.dtype
    ) -> tuple[dict[str, Any], Descent]:
        """Every learning rate with every net; what is returned first has a row for each rate."""
        weights = stack(net for _ in rates for net in nets).to(self.device, dtype)
        lanes = torch.from_numpy(rates).repeat_interleave(len(nets))
        steps = spaced_steps(self.sizes.num_steps, _CURVE_POINTS)
        done = descend(objective, weights, lanes, self.sizes.num_steps, steps)
        final = {"losses": done.losses, "norms": done.norms, "shares": done.shares}
        shape = (len(rates), len(nets))
        table = {key: of.to(torch.float64).reshape(shape).numpy() for key, of in final.items()}
        return {"rates": rates, **table}, done

    # -- the kinds ------------------------------------------------------------------------------

    def sweep(self, cell: Cell) -> dict[str, Any]:
        """Linear nets: all learning rates and seeds, on moments."""
        nets, rates = self._nets(cell), learning_rates(*self.sizes.rates)
        dtype = getattr(torch, self.sizes.precision)
        found, done = self._descend(self.linear_objective(cell, dtype), nets, rates, dtype)
        best = int(found["losses"].mean(1).argmin())

        def of_best(curves: Tensor) -> np.ndarray:
            chosen: np.ndarray = curves.reshape(-1, len(rates), len(nets))[:, best].numpy()
            return chosen

        return {
            **found,
            "steps": done.steps,
            "loss_curves": of_best(done.loss_curves),
            "norm_curves": of_best(done.norm_curves),
        }

    def relu(self, cell: Cell) -> dict[str, Any]:
        """Nets with a ReLU in the middle: all learning rates, on samples, in float32."""
        nets, rates = self._nets(cell), learning_rates(*self.sizes.relu_rates)
        objective = self.relu_objective(cell, torch.float32)
        found, _ = self._descend(objective, nets, rates, torch.float32)
        return {**found, "samples": len(self.samples[0])}

    def start(self, cell: Cell) -> dict[str, Any]:
        """The spectrum at initial weights."""
        net = self.net(cell)
        return dict(hessian_record(net, net.stacked_weights().detach().clone(), self.few))

    def path(self, cell: Cell) -> dict[str, Any]:
        """Trainings with a small learning rate, and the spectrum at some of their steps."""
        paths = follow(
            self.linear_objective(cell), stack(self._nets(cell)), self.sizes.path_rate,
            self.sizes.path_steps, self.levels[-1],
        )  # fmt: skip
        net = self.net({**cell, "seed": cell["first"]})
        return {"paths": [self._spectra(net, path, cell) for path in paths]}

    def _spectra(self, net: ShortcutNet, path: Path, cell: Cell) -> dict[str, Any]:
        """Spectra at some steps of a path, and its losses and gradient norms at more."""
        steps = {
            *at_levels(path.losses, self.levels[:: cell["every"]]),
            *around(path.losses, self.scale / 2, cell["around"]),
        }
        records = [
            {
                "step": step,
                "loss": path.losses[step],
                "gradient": path.gradients[step],
                **hessian_record(net, path.weights[step], self.few),
            }
            for step in sorted(steps)
        ]
        shown = np.unique(np.linspace(0, len(path.losses) - 1, _PATH_POINTS).round().astype(int))
        return {
            "records": records,
            "num_steps": len(path.losses) - 1,
            "peak": int(path.gradients.argmax()),
            "steps": shown,
            "losses": path.losses[shown],
            "gradients": path.gradients[shown],
        }

    def check(self, cell: Cell) -> dict[str, Any]:
        """Lanes against torch: the same net trained by SGD on samples, a few steps in float64."""
        mid = cell["mid"]
        net, rate, steps = self.net(cell, mid=mid), 0.05, 20
        inputs, targets = (t.to(self.device) for t in self.samples) if mid else self.few
        objective: Objective = (
            self.relu_objective(cell, torch.float64) if mid else self.linear_objective(cell)
        )
        lanes = stack([net.stacked_weights()])
        rates = lanes.new_tensor([rate])
        optimizer = torch.optim.SGD(net.parameters(), lr=rate)
        for _ in range(steps):
            loss, change = objective(lanes, rates)
            lanes -= change
            optimizer.zero_grad()
            theirs = half_mean_squared_error(net(inputs), targets)
            theirs.backward()
            optimizer.step()
        least = 0.0 if mid else self.moments.minimum_loss
        weights = net.stacked_weights().detach()
        distance = torch.linalg.vector_norm(unstack(lanes)[0] - weights)
        return {
            "weights": float(distance / torch.linalg.vector_norm(weights)),
            "loss": float((loss[0] + least - theirs.detach()).abs() / theirs.detach()),
        }


def learning_rates(first: int, last: int, per_decade: int) -> np.ndarray:
    """Learning rates from 10^first to 10^last, ``per_decade`` of them in each decade."""
    return np.asarray(10.0 ** np.linspace(first, last, (last - first) * per_decade + 1))

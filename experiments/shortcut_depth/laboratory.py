"""What is measured: one function for each kind of cell, from a description to plain numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from conditioning import (
    HessianOperator,
    condition_number,
    eigenvalues,
    full_spectrum,
    index,
    theory,
)
from conditioning.errors import NonsmoothPointWarning
from experiments.models import ACTIVATIONS, ShortcutNet, half_mean_squared_error
from experiments.models.shortcut_kinds import ORTHOGONAL, SHORTCUT_KINDS, TWO, TWO_XAVIER, XAVIER
from experiments.moments import Moments, virtual_samples

# Up to here every matrix-free number is checked against all eigenvalues of the dense Hessian.
DENSE_MAX = 4096
INITIALISATIONS = (TWO, TWO_XAVIER, ORTHOGONAL, XAVIER)
Cell = Mapping[str, Any]


class Laboratory:
    """The data, whitened and raw, on the device, and the measurements that use them."""

    def __init__(self, whitened: Moments, raw: Moments, device: str) -> None:
        self.device = device
        self.whitened, self.raw = whitened, raw
        self.dim = whitened.inputs.shape[1]
        self.residual = whitened.difference
        self.samples = (whitened.inputs.to(device), whitened.targets.to(device))
        # A linear network sees the moments only: these few rows have the same ones.
        self.few = tuple(t.to(device) for t in virtual_samples(whitened.inputs, whitened.targets))
        self._kinds: dict[str, Callable[[Cell], dict[str, Any]]] = {
            "two": self.two,
            "one": self.one,
            "smooth": self.smooth,
            "high order": self.high_order,
            "isotropic": self.isotropic,
            "zero targets": self.zero_targets,
            "initialisation": self.initialisation,
            "rotation": self.rotation,
            "relu": self.relu,
        }

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Measure a cell; ``cell["part"]`` says which kind it is."""
        return self._kinds[cell["part"]](cell)

    # -- pieces ---------------------------------------------------------------------------------

    def net(self, num_units: int, shortcut_depth: int, **options: Any) -> ShortcutNet:
        """A network of the data's width on the device."""
        return ShortcutNet(self.dim, num_units, shortcut_depth, device=self.device, **options)

    def hessian(
        self, net: nn.Module, samples: tuple[Tensor, ...], *, check: bool = True
    ) -> HessianOperator:
        """The Hessian of the half mean squared error."""
        batch = (samples[0], samples[1])
        hessian = HessianOperator(net, half_mean_squared_error, batch, check=check)
        # Which is faster is not timed: equal runs are to give equal digits.
        hessian.block_engine = "batched" if len(batch[0]) < 100 else "loop"
        return hessian

    def ends(
        self, hessian: HessianOperator, dense: HessianOperator | None = None
    ) -> dict[str, Any]:
        """Condition number by products; and by all eigenvalues where the size allows.

        ``dense`` may be the same Hessian from fewer rows, which a linear net cannot tell apart.
        """
        krylov = condition_number(hessian, method="lanczos", max_matvecs=150)
        found: dict[str, Any] = {"n": hessian.shape[0], "kappa": krylov.to_dict()}
        if hessian.shape[0] <= DENSE_MAX:
            full = full_spectrum(hessian if dense is None else dense)
            found["values"] = full.values
            found["dense"] = full.condition_number().to_dict()
            found["kappa10"] = full.condition_number(percentile=10).to_dict()
            found["index"] = full.index().to_dict()
        return found

    def largest(self, net: nn.Module, hessian: HessianOperator) -> dict[str, float]:
        """Eigenvalue of largest magnitude by three routes, the third independent of ours."""
        lanczos = eigenvalues(hessian, 1, max_matvecs=400)
        power = eigenvalues(hessian, 1, method="power", rtol=1e-4, max_matvecs=3000)
        return {
            "lanczos": float(lanczos[0]),
            "power": float(power[0]),
            "pyhessian": pyhessian_largest(net, self.few[0], self.few[1]),
        }

    # -- the kinds ------------------------------------------------------------------------------

    def two(self, cell: Cell) -> dict[str, Any]:
        """Depth-2 shortcuts at zero, linear, on all samples."""
        net = self.net(cell["L"] // 2, 2)
        few = self.hessian(net, self.few, check=False)  # the same net is checked on all samples
        found = self.ends(self.hessian(net, self.samples), few)
        if "index" not in found:
            found["index"] = index(few, 1, 2 * self.dim + 5, method="lanczos").to_dict()
        if cell["L"] <= 16:
            found["largest"] = self.largest(net, few)
        return found

    def one(self, cell: Cell) -> dict[str, Any]:
        """Depth-1 shortcuts at zero, linear."""
        net = self.net(cell["L"], 1)
        hessian = self.hessian(net, self.few)
        found = self.ends(hessian)
        predicted = theory.one_shortcut_hessian(self.whitened.sigma_xx, self.residual, cell["L"])
        expected = torch.linalg.eigvalsh(predicted).numpy()
        found["predicted"] = expected
        found["error"] = _distance(found["values"], expected)
        if cell["L"] in (2, 4, 8, 16):
            found["largest"] = self.largest(net, hessian)
        return found

    def smooth(self, cell: Cell) -> dict[str, Any]:
        """Depth-2 shortcuts at zero with activations, against the closed form with M."""
        places = {place: cell[place] for place in ("pre", "mid", "post") if cell.get(place)}
        net = self.net(cell["R"], 2, **places)
        hessian = self.hessian(net, self.samples)
        functions = {place: ACTIVATIONS[name] for place, name in places.items()}
        moment = theory.sample_residual_moment(
            self.whitened.inputs, self.whitened.targets, pre=functions.get("pre")
        )
        slopes = {
            f"{place}_slope": theory.activation_at_zero(functions[place]).slope
            for place in ("mid", "post")
            if place in functions
        }
        predicted = theory.two_shortcut_spectrum(moment, cell["R"], **slopes)
        found = self.ends(hessian)
        values = found.pop("values")
        return {
            **found,
            "predicted": predicted.condition_number(),
            "error": _distance(values, predicted.expand().numpy()),
            "gradient": float(torch.linalg.vector_norm(hessian.gradient())),
        }

    def high_order(self, cell: Cell) -> dict[str, Any]:
        """Shortcuts of depth n at zero: derivatives along a line, in order."""
        order = cell["n"]
        options = {"mid": "tanh", "post": "tanh"} if cell["activation"] == "tanh" else {}
        net = self.net(cell["R"], order, **options)
        generator = torch.Generator().manual_seed(cell["seed"])
        direction = torch.randn(
            cell["R"], order, self.dim, self.dim, dtype=torch.float64, generator=generator
        )
        coefficient = theory.leading_coefficient(self.residual, direction)
        derivatives = line_derivatives(net, direction.to(self.device), self.samples, order)
        hessian = self.hessian(net, self.samples)
        result = condition_number(hessian)
        return {
            "n": hessian.shape[0],
            "gradient": float(hessian.gradient().abs().max()),
            "derivatives": derivatives,
            "predicted": math.factorial(order) * float(coefficient),
            "zero": "zero operator" in result.message,
            "message": result.message,
        }

    def isotropic(self, cell: Cell) -> dict[str, Any]:
        """Depth-1 shortcuts with white inputs and targets (1 - s) X."""
        inputs = self.few[0]  # their second moment is the identity
        net = self.net(cell["L"], 1)
        hessian = self.hessian(net, (inputs, (1 - cell["s"]) * inputs))
        predicted = theory.one_shortcut_isotropic_spectrum(self.dim, cell["L"], cell["s"])
        found = self.ends(hessian)
        # All distinct eigenvalues, and how often each occurs.
        found["error"] = _distance(found["values"], predicted.expand().numpy())
        found["predicted"] = predicted.condition_number(nonzero=True)
        found["predicted_nullity"] = predicted.nullity
        found["predicted_values"] = predicted.expand().numpy()
        return found

    def zero_targets(self, cell: Cell) -> dict[str, Any]:
        """Depth-1 shortcuts with the raw components as inputs and zero targets."""
        scale = float(self.raw.variances[0]) ** 0.5
        rows, _ = virtual_samples(self.raw.inputs / scale, self.raw.targets)
        rows = rows.to(self.device)
        net = self.net(cell["L"], 1)
        hessian = self.hessian(net, (rows, torch.zeros_like(rows)))
        found = self.ends(hessian)
        found.pop("values")
        found["predicted"] = theory.one_shortcut_zero_target_condition_number(
            self.raw.sigma_xx / scale**2, cell["L"]
        )
        return found

    def initialisation(self, cell: Cell) -> dict[str, Any]:
        """kappa_10 at an initialisation, by all eigenvalues."""
        kind = SHORTCUT_KINDS[cell["net"]]
        net = kind.build(self.dim, cell["L"], cell["seed"], device=self.device)
        hessian = self.hessian(net, self.few)
        kappa10 = condition_number(hessian, percentile=10, method="dense")
        return {"n": hessian.shape[0], "kappa10": kappa10.to_dict()}

    def rotation(self, cell: Cell) -> dict[str, Any]:
        """A plain orthogonal net against the depth-1 shortcut net with rotated targets."""
        generator = torch.Generator().manual_seed(cell["seed"])
        plain = self.net(cell["L"], 1, shortcut=False, init="orthogonal", generator=generator)
        product = plain.end_to_end_matrix().detach()
        rotated = theory.rotate_targets(product, self.few[1])
        one = self.hessian(self.net(cell["L"], 1), (self.few[0], rotated))
        measured = full_spectrum(self.hessian(plain, self.few)).values
        return {"error": _distance(measured, full_spectrum(one).values), "n": one.shape[0]}

    def relu(self, cell: Cell) -> dict[str, Any]:
        """ReLU in the middle: what autograd says at zero, and the limit next to it."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            at_zero = self.hessian(self.net(cell["R"], 2, mid="relu"), self.samples)
        warned = any(issubclass(w.category, NonsmoothPointWarning) for w in caught)
        zero = condition_number(at_zero)
        generator = torch.Generator().manual_seed(cell["seed"])
        net = self.net(cell["R"], 2, mid="relu", init="xavier", scale=1e-6, generator=generator)
        first = torch.stack([net.unit_weights(r)[0].detach() for r in range(cell["R"])]).cpu()
        gated = theory.relu_gated_moments(self.whitened.inputs, self.whitened.targets, first)
        predicted = theory.relu_limit_spectrum(gated)
        full = full_spectrum(self.hessian(net, self.samples))
        return {
            "n": at_zero.shape[0],
            "warned": warned,
            "autograd_zero": "zero operator" in zero.message,
            "error": _distance(full.values, predicted.expand().numpy()),
            "kappa10": full.condition_number(percentile=10).to_dict(),
        }


def _distance(measured: NDArray[np.float64], predicted: NDArray[np.float64]) -> float:
    """Largest distance of the sorted spectra, multiplicities included, relative to the largest."""
    predicted = np.sort(np.asarray(predicted))
    return float(np.abs(np.sort(measured) - predicted).max() / np.abs(predicted).max())


def line_derivatives(
    net: nn.Module, direction: Tensor, samples: tuple[Tensor, ...], order: int
) -> list[float]:
    """Derivatives of order 1 ... ``order`` of the loss along ``t * direction`` at ``t = 0``.

    Nested autograd in the one variable ``t``: exact, no differences.
    """
    steps = direction.reshape(-1, *direction.shape[-2:])
    names = [name for name, _ in net.named_parameters()]
    t = torch.zeros((), dtype=torch.float64, device=samples[0].device, requires_grad=True)
    parameters = {name: t * step for name, step in zip(names, steps, strict=True)}
    outputs = functional_call(net, parameters, (samples[0],))
    value = half_mean_squared_error(outputs, samples[1])
    derivatives = []
    for _ in range(order):
        (value,) = torch.autograd.grad(value, t, create_graph=True)
        derivatives.append(float(value.detach()))
    return derivatives


def pyhessian_largest(net: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Eigenvalue of largest magnitude by PyHessian's power iteration.

    It runs on a copy, because it changes the mode and the ``.grad`` of the model it is given.
    """
    import copy

    from pyhessian import hessian

    with warnings.catch_warnings():
        # It calls backward(create_graph=True), which torch warns of.
        warnings.simplefilter("ignore")
        theirs = hessian(
            copy.deepcopy(net), half_mean_squared_error, data=(inputs, targets),
            cuda=inputs.is_cuda,
        )  # fmt: skip
        values, _ = theirs.eigenvalues(maxIter=3000, tol=1e-8, top_n=1)
    return float(values[0])

r"""Critical points of the population loss, and Hessians there by matrix-free products.

At the spurious point the loss is cubic in the filter's distance, so the Hessian alone does not say
whether it is a minimum. What does is the loss around the point, and the Hessian a little beside it.
There the filter is moved in a chart of the sphere, ``u = v + B y`` with an orthonormal basis ``B``
across ``v`` (and normalised by the net): without a chart the scale of ``u`` would add an
eigenvalue, which is zero at critical points and nowhere else.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from conditioning import HessianOperator, full_spectrum, theory
from experiments.models.two_layer_conv import TwoLayerConv, population_loss
from experiments.shortcut_importance.setting import generator, normals, on_sphere, teacher_outputs

# Losses near the spurious point differ by a cube of this from that at it.
RADII = (1e-3, 3e-3, 1e-2)
_BESIDE = 1e-3
_DIRECTIONS = 2000


def measure(k: int, p: int, ratio: float, device: str) -> dict[str, Any]:
    """Both critical points of a teacher with ``(1^T a*)^2`` at ``ratio`` of its threshold.

    Raises
    ------
    ValueError
        If there is no such teacher, or the ratio is 1: there the third order vanishes, too.
    """
    if ratio == 1:
        msg = "at the threshold itself the point is neither: take ratios below and above 1"
        raise ValueError(msg)
    source = generator(part="critical", k=k, p=p, ratio=ratio)
    v_star, a_star = _teacher(source, k, p, ratio, device)
    a_sp = theory.conv_best_outputs(math.pi, a_star)
    good, bad = _at(v_star, a_star, v_star, a_star), _at(-v_star, a_sp, v_star, a_star)
    expected = (theory.conv_optimum_spectrum(a_star, p), theory.conv_spurious_spectrum(a_star, p))
    return {
        "alignment": a_sp @ a_star,
        "optimum": {**good, "distance": _distance(good["spectrum"], expected[0])},
        "spurious": {**bad, "distance": _distance(bad["spectrum"], expected[1])},
        "around": _around(source, v_star, a_star, a_sp),
        "beside": lowest_beside(v_star, a_star, _BESIDE) / _BESIDE,
        "beside_expected": theory.conv_spurious_curvature(a_star, p),
    }


def crossing(k: int, p: int, device: str) -> dict[str, Any]:
    """Ratio to the threshold at which the smallest eigenvalue beside the point changes its sign."""
    seen: dict[float, float] = {}

    def lowest(ratio: float) -> float:
        # The same random directions at every ratio, so that the eigenvalue is a smooth function.
        v_star, a_star = _teacher(generator(part="crossing", k=k, p=p), k, p, ratio, device)
        seen[ratio] = lowest_beside(v_star, a_star, _BESIDE) / _BESIDE
        return seen[ratio]

    found = scipy.optimize.brentq(lowest, 0.5, 2.0, xtol=1e-9)
    return {"ratio": found, "products": len(seen)}


def _teacher(
    source: torch.Generator, k: int, p: int, ratio: float, device: str
) -> tuple[Tensor, Tensor]:
    share = ratio * theory.conv_spurious_threshold(k) / k
    if not 0 <= share <= 1:
        msg = f"no a* of {k} entries has (1^T a*)^2 = {ratio} of the threshold times |a*|^2"
        raise ValueError(msg)
    v_star = on_sphere(source, 1, p)[0]
    a_star = teacher_outputs(source, 1, k, math.sqrt(share), math.sqrt(1 - share))[0]
    return v_star.to(device), a_star.to(device)


def _at(u: Tensor, a: Tensor, v_star: Tensor, a_star: Tensor) -> dict[str, Any]:
    """Loss, gradient and Hessian spectrum in all parameters, by automatic differentiation."""
    net = TwoLayerConv(u - 1 / math.sqrt(len(u)), a, shortcut=True)
    loss = net.population_loss(v_star, a_star)
    gradient = torch.autograd.grad(loss, list(net.parameters()))
    operator = HessianOperator(
        lambda _: net.population_loss(v_star, a_star), None, a.new_zeros(1),
        params=dict(net.named_parameters()),
    )  # fmt: skip
    operator.block_engine = "batched"
    spectrum = full_spectrum(operator)
    return {
        "loss": loss.detach(),
        "gradient": torch.linalg.vector_norm(torch.cat(gradient)),
        "spectrum": spectrum.values,
        "error": spectrum.error,
    }


def _distance(values: np.ndarray, expected: theory.DiscreteSpectrum) -> float:
    """Largest distance to a predicted spectrum, in units of its largest eigenvalue."""
    wanted = expected.values.repeat_interleave(expected.multiplicities).numpy()
    return float(np.abs(np.sort(values) - wanted).max() / np.abs(wanted).max())


def _around(
    source: torch.Generator, v_star: Tensor, a_star: Tensor, a_sp: Tensor
) -> dict[str, Any]:
    """How the loss rises or falls in random directions, and as the filter turns."""
    across = normals(source, _DIRECTIONS, len(v_star)).to(v_star)
    across -= (across @ v_star)[:, None] * v_star
    across /= torch.linalg.vector_norm(across, dim=1, keepdim=True)
    moves = on_sphere(source, _DIRECTIONS, len(a_star)).to(a_star)
    # From moves of the filter alone to moves of the outputs alone.
    turn = torch.linspace(0, math.pi / 2, _DIRECTIONS, dtype=torch.float64).to(a_star)[:, None]
    at = theory.conv_loss(-v_star, a_sp, v_star, a_star)
    least, best, cubic = math.inf, [], []
    for radius in RADII:
        angles = radius * turn.cos()
        u = -angles.cos() * v_star + angles.sin() * across
        rises = theory.conv_loss(u, a_sp + radius * turn.sin() * moves, v_star, a_star) - at
        least = min(least, float(rises.min()))
        u = -math.cos(radius) * v_star + math.sin(radius) * across[0]
        outputs = theory.conv_best_outputs(math.pi - radius, a_star)
        best.append(theory.conv_loss(u, outputs, v_star, a_star) - at)
        cubic.append((theory.conv_loss(u, a_sp, v_star, a_star) - at) / radius**3)
    return {"least": least, "best": torch.stack(best), "cubic": torch.stack(cubic)}


def lowest_beside(v_star: Tensor, a_star: Tensor, distance: float) -> float:
    """Smallest Hessian eigenvalue at this angle from the spurious point, in a chart."""
    size = len(v_star)
    # Columns: the teacher's filter, then what is across it.
    frame = torch.linalg.qr(
        torch.cat([v_star[:, None], torch.eye(size, dtype=v_star.dtype, device=v_star.device)], 1)
    )[0]
    frame[:, 0] = v_star
    base = -math.cos(distance) * frame[:, 0] + math.sin(distance) * frame[:, 1]
    along = math.sin(distance) * frame[:, 0] + math.cos(distance) * frame[:, 1]
    basis = torch.cat([along[:, None], frame[:, 2:]], 1)
    outputs = theory.conv_best_outputs(math.pi, a_star)
    place = torch.zeros(size - 1, dtype=v_star.dtype, device=v_star.device, requires_grad=True)
    parameters = {"place": place, "outputs": outputs.clone().requires_grad_()}

    def loss(_: Tensor) -> Tensor:
        filters = base + basis @ parameters["place"]
        filters = filters / torch.linalg.vector_norm(filters)
        return population_loss(filters, parameters["outputs"], v_star, a_star)

    operator = HessianOperator(loss, None, a_star.new_zeros(1), params=parameters, check=False)
    operator.block_engine = "batched"
    return float(full_spectrum(operator).values[0])

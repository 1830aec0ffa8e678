"""Instrument checks: closed forms, products and fates against other ways to the same numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from conditioning import HessianOperator, theory
from experiments.models.two_layer_conv import TwoLayerConv
from experiments.shortcut_importance.descent import (
    OPEN,
    OPTIMUM,
    SPURIOUS,
    descend,
    descend_vectors,
    follow,
)
from experiments.shortcut_importance.setting import (
    METHODS,
    TEACHERS,
    generator,
    normals,
    on_sphere,
    random_nets,
    step_sizes,
)

Cell = Mapping[str, Any]
_POINTS, _DENSE = 200, 5
# Nets that are sampled, and batches of samples, which give the spread.
_SAMPLED, _BATCHES = 4, 16
# What counts as having arrived, for angles and relative distances.
_ARRIVED, _NEAR_PI = 1e-3, 1e-2


def _points(source: torch.Generator, count: int, p: int, k: int) -> tuple[Tensor, ...]:
    return (
        normals(source, count, p), normals(source, count, k), on_sphere(source, count, p),
        normals(source, count, k),
    )  # fmt: skip


def _arccos_loss(u: Tensor, a: Tensor, v_star: Tensor, a_star: Tensor, normalised: bool) -> Tensor:
    """The population loss as one would write it down, fit for autograd away from 0 and pi."""
    size = torch.linalg.vector_norm(u, dim=-1)
    cosine = (u * v_star).sum(-1) / size
    phi = torch.acos(cosine)
    g = (math.pi - phi) * cosine + torch.sin(phi)
    b = a if normalised else size[..., None] * a
    squares = (math.pi - 1) * (b.square().sum(-1) + a_star.square().sum(-1))
    sums = (b.sum(-1) - a_star.sum(-1)).square()
    loss: Tensor = (squares - 2 * (g - 1) * (b * a_star).sum(-1) + sums) / (4 * math.pi)
    return loss


def gradients(cell: Cell, p: int, device: str) -> dict[str, Any]:
    """Closed forms and the module against autograd through arccos, at random points."""
    k, normalised = cell["k"], cell["normalised"]
    source = generator(**cell)
    u, a, v_star, a_star = (t.to(device) for t in _points(source, _POINTS, p, k))
    net = TwoLayerConv(u - 1 / math.sqrt(p), a, shortcut=True, normalised=normalised)
    ours = net.population_loss(v_star, a_star)
    from_module = torch.autograd.grad(ours.sum(), [net.weights, net.outputs])
    x, y = u.clone().requires_grad_(), a.clone().requires_grad_()
    plain = _arccos_loss(x, y, v_star, a_star, normalised)
    from_arccos = torch.autograd.grad(plain.sum(), [x, y])
    closed = theory.conv_gradients(u, a, v_star, a_star, normalised=normalised)
    value = theory.conv_loss(u, a, v_star, a_star, normalised=normalised)
    pairs = [
        (value[:, None], plain[:, None]), (ours[:, None], plain[:, None]),
        *zip(closed, from_arccos, strict=True), *zip(from_module, from_arccos, strict=True),
    ]  # fmt: skip
    return {
        "gradients": max(_relative(one, other) for one, other in pairs),
        "hessians": max(
            _hessians(u[i], a[i], v_star[i], a_star[i], normalised) for i in range(_DENSE)
        ),
    }


def _relative(one: Tensor, other: Tensor) -> float:
    norm = torch.linalg.vector_norm
    return float((norm(one - other, dim=-1) / norm(other, dim=-1)).max().detach())


def _hessians(u: Tensor, a: Tensor, v_star: Tensor, a_star: Tensor, normalised: bool) -> float:
    """Our products against the dense Hessian by torch.func."""
    p = len(u)
    net = TwoLayerConv(u - 1 / math.sqrt(p), a, shortcut=True, normalised=normalised)
    operator = HessianOperator(
        lambda _: net.population_loss(v_star, a_star), None, a.new_zeros(1),
        params=dict(net.named_parameters()), engine="retained",
    )  # fmt: skip
    dense = torch.func.hessian(
        lambda flat: _arccos_loss(flat[:p], flat[p:], v_star, a_star, normalised)
    )(torch.cat([u, a]))
    ours = operator.dense()
    return float(torch.linalg.matrix_norm(ours - dense, 2) / torch.linalg.matrix_norm(dense, 2))


def monte_carlo(cell: Cell, device: str) -> dict[str, Any]:
    """Loss and gradients of the net on samples against the closed forms: largest distances.

    ``|a| = |a*| = 1`` and ``|u|`` about 1, so that absolute distances can be read. The spread is
    that of means of batches.
    """
    p, k, normalised = cell["p"], cell["k"], cell["normalised"]
    source = generator(**cell)
    u, v_star = (on_sphere(source, _SAMPLED, p).to(device) for _ in range(2))
    # Norms from 0.5 to 1.5: without normalisation they count.
    u *= torch.linspace(0.5, 1.5, _SAMPLED, dtype=u.dtype, device=device)[:, None]
    a, a_star = (on_sphere(source, _SAMPLED, k).to(device) for _ in range(2))
    net = TwoLayerConv(u - 1 / math.sqrt(p), a, shortcut=True, normalised=normalised)
    teacher = TwoLayerConv(v_star, a_star, shortcut=False)
    rows = []
    for _ in range(_BATCHES):
        patches = normals(source, cell["samples"] // _BATCHES, k, p).to(device)
        with torch.no_grad():
            targets = teacher(patches)
        losses = (net(patches) - targets).square().mean(-1) / 2
        slopes = torch.autograd.grad(losses.sum(), [net.weights, net.outputs])
        rows.append(torch.cat([losses.detach()[:, None], *slopes], dim=1))
    exact = torch.cat(
        [
            theory.conv_loss(u, a, v_star, a_star, normalised=normalised)[:, None],
            *theory.conv_gradients(u, a, v_star, a_star, normalised=normalised),
        ],
        dim=1,
    )
    found = torch.stack(rows)
    quantile = float(stats.t.ppf(0.975, _BATCHES - 1))
    half = quantile * found.std(0) / math.sqrt(_BATCHES)
    off = (found.mean(0) - exact).abs()
    cuts = {"loss": slice(0, 1), "filter": slice(1, 1 + p), "outputs": slice(1 + p, None)}
    return {
        name: {
            "value": off[:, cut].max(),
            "low": (off - half)[:, cut].clamp(min=0).max(),
            "high": (off + half)[:, cut].max(),
        }
        for name, cut in cuts.items()
    }


def _stages(rates: Mapping[str, Tensor], warm_up: int, steps: int) -> list[tuple[int, Tensor]]:
    return [(warm_up, rates["warm_rate"]), (steps - warm_up, rates["filter_rate"])]


def reduction(cell: Cell, p: int, device: str) -> dict[str, Any]:
    """The algorithm on vectors against three numbers, after so many steps."""
    k, steps, count = cell["k"], cell["steps"], cell["seeds"]
    method = METHODS[cell["method"]]
    nets = random_nets(TEACHERS[cell["teacher"]], method, k, p, count, generator(**cell))
    nets = nets.to(device)
    warm_up = min(method.warm_up(k), steps // 2)
    rates = step_sizes(nets.angle, k, warm_up)
    reduced = follow(nets.reduce(**rates), [steps])[0]
    after = descend_vectors(nets, rates["output_rate"], _stages(rates, warm_up, steps))
    there = after.reduce(**rates)
    size = (there.teacher_mean**2 + there.teacher_other**2).sqrt()
    return {
        "angle": (there.angle - reduced.angle).abs().max(),
        "outputs": torch.stack(
            [(there.mean - reduced.mean).abs() / size, (there.other - reduced.other).abs() / size]
        ).max(),
    }


def fates(cell: Cell, p: int, device: str) -> dict[str, Any]:
    """Whether vectors arrive where the sets of the theory say that they will."""
    k, steps, count = cell["k"], cell["steps"], cell["seeds"]
    method = METHODS[cell["method"]]
    nets = random_nets(TEACHERS[cell["teacher"]], method, k, p, count, generator(**cell))
    nets = nets.to(device)
    warm_up = method.warm_up(k)
    rates = step_sizes(nets.angle, k, warm_up)
    said = descend(nets.reduce(**rates), steps).fate
    after = descend_vectors(nets, rates["output_rate"], _stages(rates, warm_up, warm_up + steps))
    a, a_star = after.outputs, after.teacher_outputs
    norm = torch.linalg.vector_norm
    away = {
        OPTIMUM: norm(a - a_star, dim=1),
        SPURIOUS: norm(a - theory.conv_best_outputs(math.pi, a_star), dim=1),
    }
    near = {end: gap / norm(a_star, dim=1) < _ARRIVED for end, gap in away.items()}
    arrived = torch.full((count,), OPEN, device=a.device)
    arrived[(after.angle < _ARRIVED) & near[OPTIMUM]] = OPTIMUM
    arrived[(after.angle > math.pi - _NEAR_PI) & near[SPURIOUS]] = SPURIOUS
    arrived = arrived.cpu()
    return {
        "same": int(((said == arrived) & (said != OPEN)).sum()),
        "open": int(((said == OPEN) | (arrived == OPEN)).sum()),
        "optimum": int((arrived == OPTIMUM).sum()),
        "runs": count,
    }

"""What the closed forms of descent do not cover: no normalisation, and finitely many samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from conditioning import theory
from experiments.models.two_layer_conv import TwoLayerConv
from experiments.shortcut_importance.descent import OPEN, OPTIMUM, SPURIOUS, Nets, descend_vectors
from experiments.shortcut_importance.setting import (
    CNN,
    COLD,
    METHODS,
    Teacher,
    generator,
    normals,
    quarter,
    random_nets,
)

Cell = Mapping[str, Any]
# A loss below this share of the spurious point's is below every other critical value.
_BELOW = 0.5
# At the spurious point, relatively; the angle approaches pi as one over the steps.
_NEAR, _NEAR_PI = 0.1, 0.5
# Steps between two looks at nets without normalisation.
_LOOK = 1000


def _teacher(squared_norm: float) -> Teacher:
    return Teacher("", lambda _: float(squared_norm), quarter)


def without_normalisation(cell: Cell, p: int, device: str) -> dict[str, Any]:
    """Plain gradient descent in ``w`` and ``a`` of nets that do not normalise their filter.

    A run counts as global, and is taken out, once its loss is below half of that of the spurious
    point: descent cannot come back from there, and no other critical point has a loss as low (the
    loss without any filter is not below that of the spurious point). It counts as spurious if it is
    near that point in the end, and as open otherwise.
    """
    k, count, steps = cell["k"], cell["seeds"], cell["steps"]
    kinds = [(size, method) for size in cell["squared_norms"] for method in cell["methods"]]
    some = [
        random_nets(
            _teacher(size), METHODS[method], k, p, count,
            generator(part=cell["part"], k=k, size=size, method=method),
        )
        for size, method in kinds
    ]  # fmt: skip
    nets = Nets.join(some).to(device)
    fate = torch.full((len(kinds) * count,), OPEN)
    alive = torch.arange(len(fate))
    for done in range(0, steps, _LOOK):
        rate = torch.full((len(alive),), 1 / k**2, dtype=torch.float64, device=device)
        nets = descend_vectors(
            nets, rate, [(min(_LOOK, steps - done), rate)], normalised=False
        )  # fmt: skip
        won, _ = _ends(nets)
        fate[alive[won.cpu()]] = OPTIMUM
        nets, alive = nets.take(~won), alive[~won.cpu()]
        if not len(alive):
            break
    if len(alive):
        fate[alive[_ends(nets)[1].cpu()]] = SPURIOUS
    return {
        "kinds": [
            {"squared_norm": size, "method": method, **_counts(row)}
            for (size, method), row in zip(kinds, fate.reshape(len(kinds), count), strict=True)
        ]
    }


def _ends(nets: Nets) -> tuple[Tensor, Tensor]:
    """Which nets have a loss without a way back, and which are near the spurious point."""
    u, v_star, a_star = nets.filters, nets.teacher_filters, nets.teacher_outputs
    losses = theory.conv_loss(u, nets.outputs, v_star, a_star, normalised=False)
    a_sp = theory.conv_best_outputs(math.pi, a_star)
    spurious = theory.conv_loss(-v_star, a_sp, v_star, a_star)
    norm = torch.linalg.vector_norm
    scaled = norm(u, dim=1, keepdim=True) * nets.outputs
    near = norm(scaled - a_sp, dim=1) < _NEAR * norm(a_star, dim=1)
    return losses < _BELOW * spurious, (nets.angle > math.pi - _NEAR_PI) & near


def on_samples(cell: Cell, p: int, device: str) -> dict[str, Any]:
    """Trainings by autograd on a fixed set of samples for each seed, all seeds at once.

    Step sizes are ``1/k`` and, in the warm-up, ``1/k^2`` for the filter; the warm-up has ``10 k``
    steps, which nets without one spend on steps like the others: all get as many. A run ends at the
    global optimum if its loss is below half of that of the spurious point of the population, and at
    a spurious one if it is not and the angle is obtuse.
    """
    k, count, method = cell["k"], cell["seeds"], METHODS[cell["method"]]
    source = generator(**cell)
    start = random_nets(_teacher(cell["squared_norm"]), method, k, p, count, source)
    start = start.to(device)
    offset = 1 / math.sqrt(p) if method.shortcut else 0.0
    net = TwoLayerConv(start.filters - offset, start.outputs, shortcut=method.shortcut)
    teacher = TwoLayerConv(start.teacher_filters, start.teacher_outputs, shortcut=False)
    patches = normals(source, count, cell["samples"], k, p).to(device)
    with torch.no_grad():
        targets = teacher(patches)
    warm_up = 0 if method in (COLD, CNN) else 10 * k
    for step in range(10 * k + cell["steps"]):
        losses = (net(patches) - targets).square().mean(-1) / 2
        in_w, in_a = torch.autograd.grad(losses.sum(), [net.weights, net.outputs])
        with torch.no_grad():
            net.weights.sub_(in_w / (k * k if step < warm_up else k))
            net.outputs.sub_(in_a / k)
        net.renormalise()
    with torch.no_grad():
        losses = (net(patches) - targets).square().mean(-1) / 2
        angle = theory.angle_between(net.filters, start.teacher_filters)
    a_star = start.teacher_outputs
    spurious = theory.conv_loss(
        -start.teacher_filters, theory.conv_best_outputs(math.pi, a_star), start.teacher_filters,
        a_star,
    )  # fmt: skip
    fate = torch.full((count,), OPEN, device=angle.device)
    fate[losses < _BELOW * spurious] = OPTIMUM
    # The samples have a spurious optimum of their own, which is not at -v*.
    fate[(losses >= _BELOW * spurious) & (angle > math.pi / 2)] = SPURIOUS
    return {**_counts(fate), "loss": losses, "angle": angle}


def _counts(fate: Tensor) -> dict[str, int]:
    return {
        "successes": int((fate == OPTIMUM).sum()),
        "spurious": int((fate == SPURIOUS).sum()),
        "open": int((fate == OPEN).sum()),
        "runs": len(fate),
    }

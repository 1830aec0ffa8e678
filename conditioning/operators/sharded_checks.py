"""What an operator on a sharded model finds out before it is trusted: the same on all ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from conditioning.distributed import Group
from conditioning.errors import (
    AsymmetricOperatorError,
    BatchNormTrainingError,
    LossWithoutGraphError,
    NonFiniteError,
    RandomForwardError,
)
from conditioning.operators.checks import exact, random_message, warn_of_unused
from conditioning.operators.guards import isolated_randomness
from conditioning.operators.modules import join_names, random_modules, tracking_norms
from conditioning.operators.parallel import refuse_differences

if TYPE_CHECKING:
    from conditioning.operators.graphs import LossGraph
    from conditioning.operators.losses import LossOperator


def check_sharded_operator(
    operator: LossOperator, group: Group, *, check: bool, stacklevel: int
) -> None:
    """Evaluate twice and multiply two vectors, as on one rank, and decide on all ranks alike.

    Every number that decides is summed over the ranks first, and what depends on one rank's data
    only (kinks, differences of the gradient) is not looked at.

    Raises
    ------
    ConditioningError
        What was found, as one of its subclasses, on every rank.
    """
    refuse_differences(operator, group)
    if not check:
        return
    owners, layout = operator._owners, operator._layout
    norms = [name for name, _ in tracking_norms(owners)]
    if norms:
        msg = (
            f"In training mode, so the forward pass rewrites running statistics and couples the "
            f"samples of a batch: {join_names(norms)}. Call model.eval() before."
        )
        raise BatchNormTrainingError(msg)
    names = random_modules(owners)
    if names:
        raise RandomForwardError(random_message(names, [], drew=True))
    used = [False] * len(layout.names)

    def quantity(graph: LossGraph) -> list[Tensor]:
        used[:] = [u or g is not None for u, g in zip(used, graph.gradient, strict=True)]
        return operator._loss_and_gradient(graph)

    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(operator.shape[0], 2, dtype=torch.float64, generator=generator)
    probes = operator.local_part(whole).to(layout.device, layout.dtype)

    def length(vector: Tensor) -> float:
        return math.sqrt(float(operator.sum_over_shards(exact(vector).square().sum())))

    with torch.inference_mode(mode=False), isolated_randomness() as state:
        results = []
        for index in range(2):
            operator.refresh()
            loss, gradient = operator._over_batches(quantity)
            if not any(used):
                msg = (
                    f"None of the selected parameters influences the loss: "
                    f"{join_names(list(layout.names))}. Look for .detach() on the way."
                )
                raise LossWithoutGraphError(msg)
            results.append((loss, gradient, operator._matmat(probes[:, : 2 - index])))
            for what, vector in zip(("loss", "gradient", "product"), results[-1], strict=True):
                size = abs(float(vector)) if what == "loss" else length(vector)
                if not size < float("inf"):
                    msg = (
                        f"The {what} is not finite, on this or another rank. Look at the data, and "
                        f"at logarithms, divisions and overflow in half precision."
                    )
                    raise NonFiniteError(msg)
            state.reseed()
    (loss, gradient, products), again = results
    tolerance = 10 * operator._eps**0.5
    gaps = {
        "loss": (abs(float(loss - again[0])), abs(float(loss))),
        "gradient": (length(gradient - again[1]), length(gradient)),
        "product with a vector": (
            length(products[:, 0] - again[2][:, 0]),
            length(products[:, 0]),
        ),
    }
    # At a minimum all of these vanish: what is left is rounding of the terms that cancelled.
    floor = 1e3 * operator._eps * max(scale for _, scale in gaps.values())
    wrong = [what for what, (gap, scale) in gaps.items() if gap > tolerance * scale + floor]
    if wrong:
        raise RandomForwardError(random_message([], wrong, drew=False))
    left, right = (
        float(operator.sum_over_shards(exact(products[:, i]) @ exact(probes[:, 1 - i])))
        for i in (0, 1)
    )
    bound = tolerance * length(products) + floor * length(probes)
    if abs(left - right) > bound:
        msg = (
            f"<u, A v> = {left:.9g} and <v, A u> = {right:.9g} differ by more than rounding "
            f"({bound:.1e}), so the products are not those of a second derivative. Look for a "
            f"custom autograd.Function whose backward detaches or works on .data, and gradients "
            f"changed by hooks."
        )
        raise AsymmetricOperatorError(msg)
    warn_of_unused(layout.names, used, stacklevel + 1)

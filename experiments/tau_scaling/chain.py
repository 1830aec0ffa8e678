r"""Norms through very deep networks, from their exact law at a cost of ``m`` a block.

A Gaussian matrix :math:`W` is used twice by a sample: forwards on :math:`h`, and transposed on the
gradient :math:`d`. With :math:`|h| = 1` and entries from N(0, 1/m), :math:`z = W h` is a
normal vector, and given ``z`` the matrix is :math:`W = z h^T + G (I - h h^T)` with a fresh Gaussian
``G``. So :math:`W^T d = h (z \cdot d) + (I - h h^T)\, G^T d`, and :math:`G^T d` is normal with
variance :math:`|d|^2/m`. Forward and backward pass of one sample therefore have the same joint
law whether matrices are drawn or only these vectors, at any width. The nets of the module
``stack`` have matrices; the two are compared in the experiment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from conditioning.errors import InvalidArgumentError


def norms_through(
    taus: Sequence[float],
    num_blocks: int,
    width: int,
    num_nets: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Run one sample and one random gradient through each of many nets.

    Parameters
    ----------
    taus : sequence of float
        R factors; every net has its own weights at each of them.
    num_blocks, width : int
        ``L`` and ``m``.
    num_nets : int
        N at each factor.
    seed : int
        Of all draws.
    device
        Where they are made.

    Returns
    -------
    dict of str to Tensor of shape (R, N)
        Natural logarithms: ``forward`` of ``|h_L|/|h_0|`` and ``highest`` of the largest of
        ``|h_l|/|h_0|``; ``backward`` of ``|g_0|/|g_L|`` for a Gaussian gradient ``g_L``;
        ``steepest`` and ``flattest`` of the largest and the smallest ``|dF/dW_l|`` of the blocks,
        up to a factor that they have in common.

    Raises
    ------
    InvalidArgumentError
        All ReLUs of a net closed, which happens at small widths.

    Notes
    -----
    Norms are kept as logarithms and states are scaled to norm 1, which the networks allow because
    they are 1-homogeneous: with tau = 1 they leave float64 near L = 2600. States of the forward
    pass are kept for about √L blocks at a time, and are computed twice.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = (len(taus), num_nets, width)
    tau = torch.tensor(taus, dtype=torch.float64, device=device)[:, None, None]
    root = 1 / math.sqrt(width)

    def normal() -> Tensor:
        # Four times as fast as drawing in float64, and the rounding of a draw is no bias.
        return torch.randn(shape, generator=generator, device=device).double()

    def forward(h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = normal().mul_(root)
        after = torch.relu(h + tau * z)
        norm = torch.linalg.vector_norm(after, dim=-1, keepdim=True)
        return z, after > 0, after / norm, norm.log()

    h = torch.relu(normal())
    h = h / torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    length = math.isqrt(num_blocks - 1) + 1
    starts, log_norm = [], torch.zeros_like(h[..., :1])
    highest = torch.zeros_like(log_norm)
    for index in range(num_blocks):
        if index % length == 0:
            starts.append((index, h, log_norm, generator.get_state()))
        _, _, h, growth = forward(h)
        log_norm = log_norm + growth
        highest = torch.maximum(highest, log_norm)
    total = log_norm
    if not bool(total.isfinite().all()):
        msg = (
            f"all ReLUs of a net of width {width} closed in one of {num_blocks} blocks, so that "
            "nothing is left to follow: take a larger width"
        )
        raise InvalidArgumentError(msg)

    c = normal()
    c = c / torch.linalg.vector_norm(c, dim=-1, keepdim=True)
    back = torch.zeros_like(total)
    steepest, flattest = torch.full_like(total, -math.inf), torch.full_like(total, math.inf)
    for first, begin, log_begin, state in reversed(starts):
        # The same draws again; those of the backward pass go on after them.
        after = generator.get_state()
        generator.set_state(state)
        kept, state_h, log_h = [], begin, log_begin
        for _ in range(first, min(first + length, num_blocks)):
            z, open_, following, growth = forward(state_h)
            kept.append((state_h, log_h, z, open_))
            state_h, log_h = following, log_h + growth
        generator.set_state(after)
        for h, log_h, z, open_ in reversed(kept):
            d = c * open_
            size = torch.linalg.vector_norm(d, dim=-1, keepdim=True)
            of_weight = back + size.log() + log_h
            steepest, flattest = (
                torch.maximum(steepest, of_weight), torch.minimum(flattest, of_weight)
            )  # fmt: skip
            fresh = normal().mul_(size * root)
            fresh -= h * (h * fresh).sum(-1, keepdim=True)
            c = d + tau * (h * (z * d).sum(-1, keepdim=True) + fresh)
            norm = torch.linalg.vector_norm(c, dim=-1, keepdim=True)
            back, c = back + norm.log(), c / norm
    names = ("forward", "highest", "backward", "steepest", "flattest")
    found = (total, highest, back, steepest, flattest)
    return {name: one[..., 0] for name, one in zip(names, found, strict=True)}

r"""Norms of gradients across residual blocks: bounds, rates, and what to expect at initialisation.

A block maps :math:`x_l` to :math:`x_{l+1}`, with Jacobian :math:`J_l`, and the gradient norm
ratio is :math:`r_l = \|J_l^T g\| / \|g\|` with the gradient :math:`g` at its output; 1 is ideal.

Sources: "Zaeemzadeh et al." is Zaeemzadeh, Rahnavard, Shah, *Norm-Preservation: Why Residual
Networks Can Become Extremely Deep?*, arXiv:1805.07477; "Bartlett et al." is Bartlett, Evans,
Long, arXiv:1804.05012; "Hardt, Ma" is arXiv:1611.04231. "Derived here" marks what was proved or
worked out for this module, whether or not a paper has it too; "recalled" marks a statement that
was not checked against the text of its source and serves for orientation, never as a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from conditioning.errors import InvalidArgumentError, ShapeError
from conditioning.theory._checks import finite_float, positive_int, real_tensor, square_matrix

PADDING_MODES = ("zeros", "circular")

# Share of the second moment of a rectified standard normal variable that is not its mean:
# E relu(z)^2 = 1/2 and (E relu(z))^2 = 1 / (2 pi).
_CENTRED = 1 - 1 / math.pi

# ---------------------------------------------------------------------------- one block


def ratio_band(delta: float) -> tuple[float, float]:
    r"""Band :math:`[1 - \delta, 1 + \delta]` of the ratio of a block with an identity skip.

    With :math:`J = I + DF` and :math:`\|DF\|_2 \le \delta` every singular value of ``J``, and so
    every ratio, lies in the band. For a batch ``J`` is the Jacobian of the whole batch:
    block diagonal where samples are independent, and not where normalisation in training
    mode couples them. Source: derived here (Weyl); the lemma behind Zaeemzadeh et al.

    Parameters
    ----------
    delta : float
        Spectral norm of the branch's Jacobian, or ``max(sigma_max - 1, 1 - sigma_min)`` of ``J``.

    Returns
    -------
    low, high : float
        ``low`` is 0 from ``delta = 1`` on: a ratio is not negative.

    Raises
    ------
    InvalidArgumentError
        If ``delta`` is negative or not finite.

    Examples
    --------
    >>> ratio_band(0.25)
    (0.75, 1.25)
    """
    size = _not_negative(delta, "delta")
    return max(1 - size, 0.0), 1 + size


def product_bound(delta: float, num_blocks: int) -> tuple[float, float]:
    r"""Band :math:`[(1 - \delta)^L, (1 + \delta)^L]` of the product of ``L`` ratios.

    With :math:`\delta = c \log(2L) / L` (:func:`depth_rate`) the upper end is at most
    :math:`(2L)^c`: polynomial in the depth, not bounded. Source: derived here.

    Parameters
    ----------
    delta : float
        Of every block.
    num_blocks : int
        ``L``.

    Returns
    -------
    low, high : float
        ``high`` is infinite where it leaves the range of float64.

    Raises
    ------
    InvalidArgumentError
        If ``delta`` is negative or not finite, or ``num_blocks`` is not a positive integer.
    """
    low, high = ratio_band(delta)
    count = positive_int(num_blocks, "num_blocks")
    # As exponentials, because a float power overflows with an error.
    exponent = count * math.log(high)
    return low**count, math.exp(exponent) if exponent < 709 else math.inf


def branch_bound(first: Tensor, second: Tensor, slope: float = 1.0) -> float:
    r"""Bound :math:`\delta \le s^2 \|W_1\|_2 \|W_2\|_2` for a branch of two layers.

    The branch is :math:`W_2\, \rho(W_1\, \rho(x))` with :math:`|\rho'| \le s` componentwise.
    Source: derived here; recalled as part of Zaeemzadeh et al. In trained networks it is
    vacuous: it is far above 1 where the measured ratios are within a few per cent of 1.

    Parameters
    ----------
    first, second : Tensor of shape (h, d) and (d, h)
        The matrices, as ``nn.Linear`` stores them.
    slope : float
        ``s``, 1 for ReLU and tanh.

    Returns
    -------
    float
        The bound.

    Raises
    ------
    ShapeError
        If the matrices do not follow each other.
    InvalidArgumentError
        If ``slope`` is negative, or an entry is not finite.
    """
    inner, outer = real_tensor(first, "first"), real_tensor(second, "second")
    fit = inner.ndim == outer.ndim == 2 and inner.numel() and outer.numel()
    if not fit or outer.shape[1] != inner.shape[0]:
        msg = (
            f"first and second must be matrices of shape (h, d) and (c, h), got "
            f"{tuple(inner.shape)} and {tuple(outer.shape)}."
        )
        raise ShapeError(msg)
    norms = [float(torch.linalg.matrix_norm(w, 2)) for w in (inner, outer)]
    return _not_negative(slope, "slope") ** 2 * norms[0] * norms[1]


# -------------------------------------------------------------------------------- depth


def depth_rate(num_blocks: int) -> float:
    r"""Rate :math:`\log(2L) / L` at which the blocks of some optimum approach norm preservation.

    Zaeemzadeh et al., theorem 1 (as quoted in public, its hypotheses recalled): for a smooth
    invertible target map there is a choice of the ``L`` blocks with :math:`\delta \le c \log(2L)
    / L`, where ``c`` depends on the target only and is not known here. It says that such an
    optimum exists; nothing about the one that training finds, or about initialisation. Hypotheses
    and mechanism are those of Bartlett et al.

    Parameters
    ----------
    num_blocks : int
        ``L``.

    Returns
    -------
    float
        The rate, without its constant.

    Raises
    ------
    InvalidArgumentError
        If ``num_blocks`` is not a positive integer.
    """
    count = positive_int(num_blocks, "num_blocks")
    return math.log(2 * count) / count


def matrix_root_deviation(target: Tensor, num_blocks: int) -> float:
    r"""Deviation :math:`\|T^{1/L} - I\|_2` of ``L`` equal linear blocks whose product is ``T``.

    Tends to :math:`\|\log T\|_2 / L`: for linear maps the rate is ``1 / L``, without a
    logarithm. Source: derived here (principal root). Hardt, Ma, have a bound of the same rate
    for every ``T`` with positive determinant, by factors that differ; its constant, recalled, is
    :math:`2 (\sqrt{\pi} + \sqrt{3 \gamma})^2` with :math:`\gamma` the largest
    :math:`|\log \sigma_i(T)|`.

    Parameters
    ----------
    target : Tensor of shape (d, d)
        ``T``.
    num_blocks : int
        ``L``.

    Returns
    -------
    float
        The deviation, to about 1e-9 of itself (less where ``T`` is nearly without a root).

    Raises
    ------
    ShapeError
        If ``target`` is not square.
    InvalidArgumentError
        If ``T`` has no real principal logarithm (an eigenvalue is zero or negative, to rounding),
        an entry is not finite, or ``num_blocks`` is not a positive integer.

    Examples
    --------
    >>> round(matrix_root_deviation(torch.diag(torch.tensor([4.0, 1.0])), 2), 6)
    1.0
    """
    matrix = square_matrix(target, "target").cpu().numpy()
    count = positive_int(num_blocks, "num_blocks")
    eigenvalues = np.linalg.eigvals(matrix)
    # A pair near the negative axis cannot be told from a double eigenvalue on it.
    rounding = np.sqrt(np.finfo(np.float64).eps) * np.abs(eigenvalues).max()
    bad = eigenvalues[(eigenvalues.real <= 0) & (np.abs(eigenvalues.imag) <= rounding)]
    tiny = np.abs(eigenvalues) <= len(matrix) * np.finfo(np.float64).eps * np.linalg.norm(matrix, 2)
    if len(bad) or tiny.any():
        found = bad[0].real if len(bad) else 0.0
        msg = (
            f"target has no real principal root: an eigenvalue is {found:.3g}, zero or negative. "
            f"With a negative determinant no near-identity factors exist at all; choose a target "
            f"of positive determinant without eigenvalues on the negative axis."
        )
        raise InvalidArgumentError(msg)
    from scipy.linalg import expm, logm  # slow to import

    logarithm = np.asarray(logm(matrix)).real
    error = np.linalg.norm(expm(logarithm) - matrix)
    if not error <= 1e-8 * np.linalg.norm(matrix):
        msg = (
            f"The logarithm of target is inaccurate (relative error "
            f"{error / np.linalg.norm(matrix):.1e}): target is too close to one without."
        )
        raise InvalidArgumentError(msg)
    root = expm(logarithm / count)
    return float(np.linalg.norm(root - np.eye(len(matrix)), 2))


# --------------------------------------------------------------------- layers, expected


def expected_backward_gain(
    weight: Tensor,
    size: int | Sequence[int] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    padding_mode: str = "zeros",
) -> float:
    r"""Root mean square of :math:`\|W^T g\| / \|g\|` of a layer over isotropic gradients ``g``.

    It is :math:`\|W\|_F / \sqrt{n_{out}}` for the operator ``W`` of the layer. A kernel tap
    enters as often as there are output positions at which it meets the input, so that

    .. math:: \text{gain}^2 = \frac{1}{c_{out}} \sum_{\text{taps } t} \|w_t\|_F^2
              \prod_{\text{axes}} \frac{\#\{o < M : 0 \le s o + d t - p < N\}}{M} .

    With circular padding every tap meets the input everywhere: the gain is
    :math:`\|w\|_F / \sqrt{c_{out}}`, whatever kernel size and stride. Zeros at the border lose
    taps: for a 3x3 kernel with padding 1 and equal taps the gain is multiplied by
    ``(3M - 2) / (3M)`` at stride 1 and by ``(3M - 1) / (3M)`` at stride 2 (even input, ``M``
    output positions along a side). Source: derived here, exact for every weight.

    Parameters
    ----------
    weight : Tensor of shape (c_out, c_in / groups, \*kernel)
        As ``nn.Linear`` (no kernel axes) and ``nn.Conv1d`` to ``nn.Conv3d`` store it.
    size : int or sequence of int, optional
        ``N``, the sides of the input; needed with ``padding_mode="zeros"`` and a kernel.
    stride, padding, dilation : int or sequence of int
        ``s``, ``p`` and ``d``, as the convolution takes them.
    padding_mode : {"zeros", "circular"}

    Returns
    -------
    float
        The gain; 1 keeps the norm of an isotropic gradient in the mean square.

    Raises
    ------
    ShapeError
        If ``weight`` is no layer's weight, or the output would be empty.
    InvalidArgumentError
        If an option is out of range, or an entry is not finite.

    Examples
    --------
    >>> round(expected_backward_gain(torch.eye(3) * 2), 6)
    2.0
    """
    energy, outputs, _ = _energy(weight, size, stride, padding, dilation, padding_mode)
    return math.sqrt(energy / outputs)


def expected_forward_gain(
    weight: Tensor,
    size: int | Sequence[int] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> float:
    r"""Root mean square of :math:`\|W x\| / \|x\|` of a layer over isotropic inputs ``x``.

    It is :math:`\|W\|_F / \sqrt{n_{in}}`, so the squares of backward and forward gain have the
    ratio :math:`n_{in} / n_{out}`: a layer that changes the number of elements cannot preserve
    both norms. Source: derived here.

    Parameters
    ----------
    weight, size, stride, padding, dilation, padding_mode
        As :func:`expected_backward_gain` takes them; ``size`` is needed for every convolution.
    groups : int
        Of the convolution.

    Returns
    -------
    float
        The gain.

    Raises
    ------
    ShapeError
        If ``weight`` is no layer's weight, or the output would be empty.
    InvalidArgumentError
        If an option is out of range, or an entry is not finite.
    """
    if size is None and real_tensor(weight, "weight").ndim > 2:
        raise InvalidArgumentError("The forward gain of a convolution needs size.")
    energy, _, inputs = _energy(weight, size, stride, padding, dilation, padding_mode)
    return math.sqrt(energy / (inputs * positive_int(groups, "groups")))


def _energy(
    weight: Tensor,
    size: int | Sequence[int] | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    padding_mode: str,
) -> tuple[float, float, float]:
    """Squared Frobenius norm of a layer's operator, its outputs, and its inputs of one group."""
    kernel = real_tensor(weight, "weight")
    axes = kernel.ndim - 2
    if axes < 0 or not kernel.numel():
        msg = f"weight must have shape (c_out, c_in, *kernel), got {tuple(kernel.shape)}."
        raise ShapeError(msg)
    if padding_mode not in PADDING_MODES:
        msg = (
            f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}: other "
            f"modes let several taps meet one entry."
        )
        raise InvalidArgumentError(msg)
    energy = kernel.square().sum((0, 1))
    outputs, inputs = float(kernel.shape[0]), float(kernel.shape[1])
    if axes and size is None:
        if padding_mode == "zeros":
            raise InvalidArgumentError("Zero padding needs size, the sides of the input.")
        return float(energy.sum()), outputs, math.nan
    options = zip(
        _per_axis(size, "size", axes, 1) if axes else (),
        kernel.shape[2:],
        _per_axis(stride, "stride", axes, 1),
        _per_axis(padding, "padding", axes, 0),
        _per_axis(dilation, "dilation", axes, 1),
        strict=True,
    )
    for axis, (side, taps, step, border, spread) in enumerate(options):
        positions = (side + 2 * border - spread * (taps - 1) - 1) // step + 1
        if positions < 1:
            msg = f"The kernel does not fit an input of side {side} along axis {axis}."
            raise ShapeError(msg)
        if padding_mode == "circular":
            if spread * (taps - 1) >= side:
                msg = f"The kernel wraps onto itself along axis {axis}: side {side} is too short."
                raise InvalidArgumentError(msg)
            counts = torch.full((taps,), float(positions))
        else:
            places = step * torch.arange(positions) - border
            met = places + spread * torch.arange(taps)[:, None]
            counts = ((met >= 0) & (met < side)).sum(1)
        shape = [1] * axes
        shape[axis] = taps
        energy = energy * counts.to(energy).reshape(shape)
        outputs, inputs = outputs * positions, inputs * side
    return float(energy.sum()), outputs, inputs


def _per_axis(value: int | Sequence[int] | None, name: str, axes: int, at_least: int) -> list[int]:
    items = list(value) if isinstance(value, Sequence) else [value] * axes
    if len(items) != axes:
        msg = f"{name} must be one integer or {axes} of them, got {value!r}."
        raise InvalidArgumentError(msg)
    return [positive_int(item, name, at_least=at_least) for item in items]  # type: ignore[arg-type]


# ---------------------------------------------------------------------- initialisation


def initial_ratios(
    num_blocks: int,
    *,
    num_layers: int = 2,
    weight_gain: float = 2.0,
    branch_scale: float = 1.0,
    input_variance: float = 1.0,
    normalised: bool = True,
    skip: bool = True,
) -> Tensor:
    r"""Predicted ratios at initialisation of a pre-activation ReLU network of constant width.

    Blocks are :math:`x + a\, W_k\, \rho(BN(\cdots W_1\, \rho(BN(x))))`, with independent
    centred weights of variance ``weight_gain / fan_in`` and BN in training mode. The branch
    leaves variance :math:`b = \frac{a^2 g}{2} (1 - \frac1\pi)` behind, and its first BN divides
    the gradient by that of the stream, :math:`v_l = v_0 + l b`, so that

    .. math:: r_l^2 = 1 + \frac{a^2 g}{2} \left(1 - \frac1\pi\right)^{-(k-1)} \frac{1}{v_l}, \qquad
              r_l - 1 \approx \frac{(1 - 1/\pi)^{-k}}{2\,(l + v_0 / b)} .

    The mean of :math:`|1 - r_l|` therefore falls like :math:`\frac12 (1 - 1/\pi)^{-k}
    \log(L) / L`, with 1.08 for the factor at ``k = 2``: the depth rate of the theorem, for a reason
    that is not the theorem's. Without BN the variance multiplies, and every ratio is
    :math:`\sqrt{1 + a^2 (g / 2)^k}`: depth does not help, unless ``a`` falls with it.

    Source: derived here, by mean field: wide layers, large batch, a gradient that is
    independent of the forward pass and has no mean over the batch. The means of measured ratios
    of random networks of width 128 on a batch of 512 agree to 1 %.

    Parameters
    ----------
    num_blocks : int
        ``L``.
    num_layers : int
        ``k``, matrices in a branch.
    weight_gain : float
        ``g``: 2 is He's initialisation, 1/3 the default of ``nn.Linear``. With BN only that of
        the last matrix of the branch matters.
    branch_scale : float
        ``a``.
    input_variance : float
        ``v_0``, of every entry of the stream before the first block.
    normalised : bool
        Whether there is BN before every activation.
    skip : bool
        Whether there is the identity skip; without it the stream is what the branch makes.

    Returns
    -------
    Tensor of shape (L,)
        :math:`r_0, \dots, r_{L-1}`, gradient at the input of a block over that at its output.

    Raises
    ------
    InvalidArgumentError
        If a count is not a positive integer, or a scale is not positive and finite.

    Examples
    --------
    >>> [round(float(ratio), 3) for ratio in initial_ratios(3)]
    [1.571, 1.368, 1.273]
    """
    count = positive_int(num_blocks, "num_blocks")
    layers = positive_int(num_layers, "num_layers")
    share = _positive(branch_scale, "branch_scale") ** 2 * _positive(weight_gain, "weight_gain") / 2
    begin = _positive(input_variance, "input_variance")
    identity = 1.0 if skip else 0.0
    if not normalised:
        gain = share * (_positive(weight_gain, "weight_gain") / 2) ** (layers - 1)
        return torch.full((count,), math.sqrt(identity + gain), dtype=torch.float64)
    added, gain = share * _CENTRED, share * _CENTRED ** (1 - layers)
    if skip:
        variance = begin + added * torch.arange(count, dtype=torch.float64)
    else:
        variance = torch.full((count,), added, dtype=torch.float64)
        variance[0] = begin
    return torch.sqrt(identity + gain / variance)


def _not_negative(value: float, name: str) -> float:
    number = finite_float(value, name)
    if number < 0:
        msg = f"{name} must not be negative, got {number}."
        raise InvalidArgumentError(msg)
    return number


def _positive(value: float, name: str) -> float:
    number = finite_float(value, name)
    if number <= 0:
        msg = f"{name} must be positive, got {number}."
        raise InvalidArgumentError(msg)
    return number

r"""Networks whose identity shortcuts skip n matrices, and the plain nets beside them.

From Li, Jiao, Han, Weissman, *Demystifying ResNet*, arXiv:1611.01186: ``R`` units
:math:`x \mapsto x + \sigma_{post}(W^{r,n} \sigma_{mid}(\cdots W^{r,1} \sigma_{pre}(x)))`
with square matrices and no biases. Depth is the number of matrices, ``L = nR``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.errors import InvalidArgumentError, ShapeError
from experiments.models.sizes import check_sizes

Activation = Callable[[Tensor], Tensor]
Init = Literal["zero", "identity", "xavier", "orthogonal"]


def _identity(x: Tensor) -> Tensor:
    return x


def _shifted_sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x) - 0.5


def _shifted_softplus(x: Tensor) -> Tensor:
    return F.softplus(x) - math.log(2.0)


#: Elementwise activations by name; the shifted ones vanish at zero.
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "identity": _identity,
        "tanh": torch.tanh,
        "gelu": F.gelu,
        "shifted_sigmoid": _shifted_sigmoid,
        "shifted_softplus": _shifted_softplus,
        "sigmoid": torch.sigmoid,
        "softplus": F.softplus,
        "relu": torch.relu,
    }
)


class ShortcutUnit(nn.Module):
    """One unit: n matrices with activations before, between and after, and a shortcut around.

    Parameters
    ----------
    layers : iterable of nn.Linear
        The matrices, first applied first.
    pre, mid, post : callable
        Activations before the first matrix, between two, and after the last.
    shortcut : bool
        Whether the input is added to the result.
    """

    def __init__(
        self,
        layers: list[nn.Linear],
        *,
        pre: Activation,
        mid: Activation,
        post: Activation,
        shortcut: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.pre, self.mid, self.post = pre, mid, post
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., d)`` to ``(..., d)``."""
        hidden = self.layers[0](self.pre(x))
        for layer in self.layers[1:]:
            hidden = layer(self.mid(hidden))
        hidden = self.post(hidden)
        return x + hidden if self.shortcut else hidden


class ShortcutNet(nn.Module):
    r"""A network of R units with shortcuts of depth n, or its plain counterpart.

    Parameters are ordered unit by unit, matrix by matrix. The initial weights depend on
    the generator alone: they agree across devices, up to rounding across dtypes, and
    the global random state is neither read nor changed.

    Parameters
    ----------
    dim : int
        Width ``d`` of every layer.
    num_units : int
        ``R``.
    shortcut_depth : int
        Matrices in a unit, ``n``.
    pre, mid, post : str or callable, optional
        Elementwise activations before the first matrix, between two, and after the last:
        a name in :data:`ACTIVATIONS`, a callable, or ``None`` for the identity.
    shortcut : bool
        ``False`` gives the plain net, with the activations at the same positions.
    init : {"zero", "identity", "xavier", "orthogonal"}
        Initial weights: ``xavier`` is uniform on :math:`\pm\sqrt{6/(2d)}`, ``orthogonal``
        is uniform on the orthogonal group; gain 1 for both, whatever the activation.
    scale : float
        Factor on the initial weights. 0.01 with ``xavier`` is the paper's "zero init".
    generator : torch.Generator, optional
        Source of randomness; required by ``xavier`` and ``orthogonal``.
    dtype : torch.dtype
        Floating dtype of the weights.
    device : torch.device or str, optional
        Where the weights live; by default on the generator's device.

    Raises
    ------
    InvalidArgumentError
        If a size is not a positive integer, a name is unknown, ``scale`` is not finite,
        ``dtype`` is not a floating dtype, or a random ``init`` has no generator.

    Examples
    --------
    >>> net = ShortcutNet(10, num_units=8, shortcut_depth=2, mid="tanh")
    >>> net.num_layers, net(torch.ones(3, 10, dtype=torch.float64)).shape
    (16, torch.Size([3, 10]))
    """

    def __init__(
        self,
        dim: int,
        num_units: int,
        shortcut_depth: int,
        *,
        pre: str | Activation | None = None,
        mid: str | Activation | None = None,
        post: str | Activation | None = None,
        shortcut: bool = True,
        init: Init = "zero",
        scale: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "num_units": num_units, "shortcut_depth": shortcut_depth}
        check_sizes(sizes)
        if not dtype.is_floating_point:
            msg = f"dtype must be a floating dtype, got {dtype}."
            raise InvalidArgumentError(msg)
        if not math.isfinite(scale):
            msg = f"scale must be finite, got {scale}."
            raise InvalidArgumentError(msg)
        positions = {"pre": pre, "mid": mid, "post": post}
        functions = {name: _resolve(name, value) for name, value in positions.items()}
        self.dim = dim
        self.num_units = num_units
        self.shortcut_depth = shortcut_depth
        self.shortcut = shortcut
        self.is_linear = all(function is _identity for function in functions.values())
        weights = _initial_weights(init, self.num_layers, dim, generator).mul_(scale)
        weights = weights.to(dtype=dtype, device=device)
        layers = [_linear(weight) for weight in weights]
        self.units = nn.ModuleList(
            ShortcutUnit(layers[first : first + shortcut_depth], shortcut=shortcut, **functions)
            for first in range(0, self.num_layers, shortcut_depth)
        )

    @property
    def num_layers(self) -> int:
        """Number of weight matrices, ``L = nR``: the depth."""
        return self.num_units * self.shortcut_depth

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., d)`` to ``(..., d)``."""
        for unit in self.units:
            x = unit(x)
        return x

    def unit_weights(self, unit: int) -> tuple[nn.Parameter, ...]:
        """Return the n weight matrices of one unit, the first applied first.

        Parameters
        ----------
        unit : int
            0 is the unit next to the input; negative numbers count from the output.

        Returns
        -------
        tuple of nn.Parameter
            The parameters themselves, each of shape ``(d, d)``.

        Raises
        ------
        InvalidArgumentError
            If there is no such unit.
        """
        if not -self.num_units <= unit < self.num_units:
            msg = f"unit must be in {-self.num_units} .. {self.num_units - 1}, got {unit}."
            raise InvalidArgumentError(msg)
        return tuple(self.units[unit].parameters())

    def stacked_weights(self) -> Tensor:
        """Return all weight matrices as ``(R, n, d, d)``, differentiable in the parameters."""
        stack = torch.stack(list(self.parameters()))
        return stack.reshape(self.num_units, self.shortcut_depth, self.dim, self.dim)

    def end_to_end_matrix(self) -> Tensor:
        r"""Return the matrix ``A`` of a linear net: ``net(x)`` is ``x @ A.T``.

        It is :math:`\prod_r (W^{r,n} \cdots W^{r,1} + I)`, without ``I`` in a plain net,
        in ``log2 R + n`` batched products, differentiable in the parameters.

        Returns
        -------
        Tensor of shape (d, d)
            ``A``.

        Raises
        ------
        InvalidArgumentError
            If an activation is not the identity.
        """
        if not self.is_linear:
            msg = "only a linear net is one matrix: pre, mid and post must be the identity."
            raise InvalidArgumentError(msg)
        weights = self.stacked_weights()
        units = weights[:, 0]
        for layer in range(1, self.shortcut_depth):
            units = weights[:, layer] @ units
        if self.shortcut:
            units = units + torch.eye(self.dim, dtype=units.dtype, device=units.device)
        while len(units) > 1:
            last = units[len(units) // 2 * 2 :]
            units = torch.cat([units[1::2] @ units[: len(units) // 2 * 2 : 2], last])
        return units[0]


def half_mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    r"""Loss :math:`\|Y - \hat Y\|_F^2 / 2m` over the ``m`` rows of a batch.

    Parameters
    ----------
    outputs, targets : Tensor of shape (m, d)
        Predictions and targets, one sample per row.

    Returns
    -------
    Tensor of shape ()
        The loss: a mean over samples, a sum over coordinates.

    Raises
    ------
    ShapeError
        If the shapes differ or are not ``(m, d)`` with ``m >= 1``.
    """
    if outputs.ndim != 2 or outputs.shape != targets.shape or len(outputs) == 0:
        msg = (
            "outputs and targets must both have shape (m, d), m >= 1, got "
            f"{tuple(outputs.shape)} and {tuple(targets.shape)}."
        )
        raise ShapeError(msg)
    return (outputs - targets).square().sum() / (2 * len(outputs))


def half_mean_squared_error_from_moments(
    matrix: Tensor, input_moment: Tensor, cross_moment: Tensor, target_moment: Tensor
) -> Tensor:
    r"""Return that loss of the linear map ``A`` from moments alone: no sample is touched.

    .. math:: \tfrac12 \mathrm{tr}(A \Sigma_{XX} A^T) - \mathrm{tr}(\Sigma_{YX} A^T)
              + \tfrac12 \mathrm{tr}\, \Sigma_{YY}

    Parameters
    ----------
    matrix : Tensor of shape (d, d)
        ``A``, as from :meth:`ShortcutNet.end_to_end_matrix`.
    input_moment, cross_moment, target_moment : Tensor of shape (d, d)
        :math:`X^T X / m`, :math:`Y^T X / m`, :math:`Y^T Y / m`.

    Returns
    -------
    Tensor of shape ()
        The loss. Its absolute error is rounding of the terms, not of their difference.

    Raises
    ------
    ShapeError
        If the four are not square matrices of one size.
    """
    shapes = [tuple(m.shape) for m in (matrix, input_moment, cross_moment, target_moment)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][0] != shapes[0][1]:
        msg = f"matrix and moments must be square matrices of one size, got {shapes}."
        raise ShapeError(msg)
    fit = (matrix * (matrix @ input_moment / 2 - cross_moment)).sum()
    return fit + target_moment.diagonal().sum() / 2


def _resolve(position: str, activation: str | Activation | None) -> Activation:
    """Return the callable for a name, a callable or ``None``."""
    if activation is None:
        return _identity
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            msg = f"{position} must be one of {', '.join(ACTIVATIONS)}, got {activation!r}."
            raise InvalidArgumentError(msg)
        return ACTIVATIONS[activation]
    if not callable(activation):
        msg = f"{position} must be a name, a callable or None, got {type(activation).__name__}."
        raise InvalidArgumentError(msg)
    return activation


def _linear(weight: Tensor) -> nn.Linear:
    """Return a bias-free layer that holds ``weight``; the default initialisation never runs."""
    dim = len(weight)
    layer = nn.Linear(dim, dim, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    return layer


def _initial_weights(
    init: str, num_layers: int, dim: int, generator: torch.Generator | None
) -> Tensor:
    """Return float64 weights ``(L, d, d)`` on the device of the generator."""
    shape = (num_layers, dim, dim)
    if init == "zero":
        return torch.zeros(shape, dtype=torch.float64)
    if init == "identity":
        return torch.eye(dim, dtype=torch.float64).repeat(num_layers, 1, 1)
    if init not in get_args(Init):
        msg = f"init must be one of {', '.join(get_args(Init))}, got {init!r}."
        raise InvalidArgumentError(msg)
    if generator is None:
        msg = (
            f"init={init!r} is random: pass a generator, such as torch.Generator().manual_seed(0)."
        )
        raise InvalidArgumentError(msg)
    weights = torch.empty(shape, dtype=torch.float64, device=generator.device)
    if init == "xavier":
        bound = math.sqrt(6 / (2 * dim))
        return weights.uniform_(-bound, bound, generator=generator)
    q, r = torch.linalg.qr(weights.normal_(generator=generator))
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q)
    orthogonal: Tensor = q * signs[:, None, :]
    return orthogonal

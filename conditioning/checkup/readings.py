"""The parts of a checkup: what was read off blocks, layers and spectra, and what follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from conditioning.blocks import BlockJacobian
from conditioning.spectrum import ConditionNumber, Estimate
from conditioning.spectrum.results import Result

Severity = Literal["problem", "remark"]


@dataclass(frozen=True)
class Setting(Result):
    """What was examined, and how.

    Attributes
    ----------
    model, loss : str
        Class of the model, name of the loss function.
    num_parameters, num_trainable : int
    dtype, device : str
    num_batches, num_samples : int
        Of the data that the norms and the spectra are measured on.
    mode : str
        In which mode the model ran: that of training with the chance taken out, or evaluation.
    seed : int
    seconds, num_matvecs : float and int, or None
        The budget that was given.
    conditioning, torch : str
        Versions.
    notes : tuple of str
        What was switched for the measurement and back: dropout, fused attention ...
    """

    model: str
    loss: str
    num_parameters: int
    num_trainable: int
    dtype: str
    device: str
    num_batches: int
    num_samples: int
    mode: str
    seed: int
    seconds: float | None
    num_matvecs: int | None
    conditioning: str
    torch: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class BlockReading(Result):
    """One block: norms on its two sides, over the batches, and its Jacobian on the first.

    Attributes
    ----------
    name, classes, kind, shapes : str
        As of ``conditioning.blocks.Block``.
    depth : int
        Place in the order of execution, from 0.
    act_in, act_out, grad_in, grad_out : Estimate
        Frobenius norms over a batch; mean over the batches, with the least and the largest.
    ratio : Estimate
        ``grad_in / grad_out``, likewise.
    product : Estimate
        ``grad_in`` over ``grad_out`` of the last block: the ratios of this block and all after
        it, and of what runs between them.
    branch_share : float or None
        Norm of the branch over the norm of the skip where they are added, on the first batch; the
        largest, where a block has several additions.
    jacobian : BlockJacobian or None
        Extreme singular values; ``None`` where the budget did not reach.
    """

    name: str
    classes: str
    kind: str
    shapes: str
    depth: int
    act_in: Estimate
    act_out: Estimate
    grad_in: Estimate
    grad_out: Estimate
    ratio: Estimate
    product: Estimate
    branch_share: float | None
    jacobian: BlockJacobian | None

    @property
    def growth(self) -> float:
        """Norm of the activations behind the block over that in front of it."""
        return self.act_out.value / self.act_in.value if self.act_in.value else float("nan")


@dataclass(frozen=True)
class ActivationReading(Result):
    """One use of an activation function, over all batches.

    Attributes
    ----------
    name : str
        The innermost module in which it ran, with ``#2`` ... for further uses in it.
    function : str
        ``relu``, ``tanh``, ``sigmoid`` ...
    depth : int
        Place in the order of execution.
    rms_in : float
        Root mean square of what goes in.
    flat_share : float
        Share of entries at which the function is flat: its slope is at most a hundredth of its
        largest (0 for ReLU's negative side).
    dead_share : float
        Share of units (channels, or features of the last axis) that are flat at every sample and
        position of the data.
    num_units : int
    """

    name: str
    function: str
    depth: int
    rms_in: float
    flat_share: float
    dead_share: float
    num_units: int


@dataclass(frozen=True)
class LayerReading(Result):
    """A linear or convolutional layer: the scale of its weights, and its singular values.

    Attributes
    ----------
    name, classes : str
    role : {"transition", "stem", "head", "layer"}
        ``transition``: on a skip that is no identity, or bare between blocks.
    depth : int
        Place in the order of execution.
    fan_in : int
    weight_gain : float
        ``sqrt(fan_in)`` times the root mean square of the weight: 1 keeps the size of a signal
        through a linear layer, sqrt(2) through a layer and a ReLU (He, Zhang, Ren, Sun,
        arXiv:1502.01852).
    followed_by : str
        The activation function that what the layer returns goes straight into, or
        ``"normalisation"``; empty where it is something else.
    largest, smallest : Estimate or None
        Singular values of the layer as it runs, measured for transitions; ``None`` elsewhere. The
        smallest is the smallest that is not zero to rounding where all are known: a stride leaves
        zeros behind.
    operator : str
        What they belong to; empty where there are none.
    target : float or None
        The common singular value with which random gradients keep their norm,
        ``sqrt(n_out / rank)``, as :class:`conditioning.Procrustes` sets it.
    status : str
    """

    name: str
    classes: str
    role: str
    depth: int
    fan_in: int
    weight_gain: float
    followed_by: str
    largest: Estimate | None
    smallest: Estimate | None
    operator: str
    target: float | None
    status: str

    @property
    def normalised(self) -> bool:
        """Whether a normalisation follows, so that the scale of the weight does not count."""
        return self.followed_by == "normalisation"


@dataclass(frozen=True)
class RecurrentReading(Result):
    """A recurrent layer: what time does to a gradient.

    Attributes
    ----------
    name, classes : str
    num_steps : int
        Length of the sequences.
    gradient_first, gradient_last : Estimate
        Norm of the gradient at the inputs of the first tenth of the steps and of the last, per
        step; mean over the batches, with the least and the largest.
    growth_per_step : Estimate
        Factor by which the norm changes with every step back in time, from the slope of its
        logarithm over the steps.
    recurrent_norm : float
        Largest singular value of the recurrent weight (of its gates' blocks, the largest).
    """

    name: str
    classes: str
    num_steps: int
    gradient_first: Estimate
    gradient_last: Estimate
    growth_per_step: Estimate
    recurrent_norm: float


@dataclass(frozen=True)
class DensityCurve(Result):
    """A spectral density as points of a curve, and the shares it was drawn from.

    Attributes
    ----------
    nodes, weights : tuple of float
        Quadrature nodes and their shares, at most a few hundred, ascending.
    quantiles : dict of str to Estimate
        Of the eigenvalues, by their level: ``"0.1"``, ``"0.5"``, ``"0.9"``.
    status, message : str
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    quantiles: dict[str, Estimate]
    status: str
    message: str


@dataclass(frozen=True)
class SpectrumReading(Result):
    """What is known of the spectrum of one matrix.

    Attributes
    ----------
    matrix : {"Hessian", "Gauss-Newton"}
    size : int
        Rows.
    largest, smallest : Estimate
        The algebraically largest and smallest eigenvalue.
    condition : ConditionNumber
        ``max |lambda| / min |lambda|`` above the zero threshold.
    condition10 : ConditionNumber
        The same over the 10th percentile of ``|lambda|``.
    index : Estimate
        Share of negative eigenvalues.
    trace : Estimate
    density : DensityCurve
    num_matvecs : int
    seconds : float
    message : str
        How it was measured.
    """

    matrix: str
    size: int
    largest: Estimate
    smallest: Estimate
    condition: ConditionNumber
    condition10: ConditionNumber
    index: Estimate
    trace: Estimate
    density: DensityCurve
    num_matvecs: int
    seconds: float
    message: str


@dataclass(frozen=True)
class StepSize(Result):
    """How large a step of plain gradient descent may be.

    Attributes
    ----------
    largest_stable : Estimate
        ``2 (1 + momentum) / lambda_max`` of the Hessian: beyond it descent leaves a quadratic
        minimum along the steepest direction (with heavy-ball momentum: B. T. Polyak, USSR
        Comput. Math. Math. Phys. 4, 1964). Infinite where no eigenvalue is positive.
    given : float or None
        The learning rate that is used.
    momentum : float
    quotient : Estimate or None
        ``given / largest_stable``: above 1 is too large.
    """

    largest_stable: Estimate
    given: float | None
    momentum: float
    quotient: Estimate | None


@dataclass(frozen=True)
class Prediction(Result):
    """A statement of theory for a network of this depth, next to what was measured.

    Attributes
    ----------
    name : str
        What is predicted, in a few words.
    low, high : float
        The predicted range; equal for a value.
    measured : Estimate
    agrees : {"inside", "outside", "not decided"}
        ``not decided`` where the enclosure of what was measured straddles an end.
    source : str
        Paper and statement.
    note : str
        Under which assumption, and whether this network meets it.
    """

    name: str
    low: float
    high: float
    measured: Estimate
    agrees: str
    source: str
    note: str


@dataclass(frozen=True)
class Finding(Result):
    """One thing that is wrong, or worth knowing, with the number that says so.

    Attributes
    ----------
    kind : str
        A short name that programs can rely on, such as ``dead-units``.
    severity : {"problem", "remark"}
    weight : float
        By which findings are ordered: how far the number lies beyond its limit, as a logarithm.
    where : tuple of str
        Blocks or layers, the worst first; empty for the whole network.
    sentence : str
        What was measured.
    remedy : str
        What helps.
    number : Estimate
    limit : float
        Beyond which the number is a finding.
    evidence : str
        Where in the checkup the number stands, such as ``blocks[3].ratio``.
    """

    kind: str
    severity: Severity
    weight: float
    where: tuple[str, ...]
    sentence: str
    remedy: str
    number: Estimate
    limit: float
    evidence: str


@dataclass(frozen=True)
class Missing(Result):
    """Something that a complete checkup has and this one has not, or not to the wished error.

    Attributes
    ----------
    what : str
    reason : str
        And what would bring it: more seconds, float64, another kind of data ...
    """

    what: str
    reason: str

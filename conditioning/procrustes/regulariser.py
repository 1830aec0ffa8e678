"""Procrustes regularisation: layers of a model, projected while it trains."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conditioning.blocks.transitions import transition_layers, why_none
from conditioning.blocks.wrappers import unwrapped
from conditioning.errors import (
    InvalidArgumentError,
    LayerSelectionError,
    NonFiniteError,
    RankDeficientWeightError,
)
from conditioning.procrustes import routes
from conditioning.procrustes.layers import (
    Layer,
    Target,
    check_model,
    is_layer,
    named_layers,
    prepared,
)
from conditioning.procrustes.polar import METHODS
from conditioning.procrustes.report import (
    LayerReport,
    ProcrustesReport,
    checked_shapes,
    reported,
)
from conditioning.procrustes.schedule import Schedule
from conditioning.spectrum.common import check_choice, check_counts


class Procrustes:
    r"""Project layers of a model to equal singular values, once or after steps of an optimizer.

    The operator of a layer is replaced by one nearby whose non-zero singular values all are one
    number, so that the layer changes the norms of all signals (that it passes on) alike. Of a
    linear layer, a 1x1 convolution and every kernel no longer than its stride it is the nearest
    one, the polar factor of one matrix, and exact. Overlapping kernels are not always made exact,
    and have circular padding in mind, see Notes.

    Parameters
    ----------
    layers : mapping of str to nn.Module, modules, or names
        Linear, convolutional or transposed convolutional layers. Names and globs
        (``"layer*.0.downsample.0"``) are looked up in ``model``.
    model : nn.Module, optional
        For names.
    target : {"backward", "forward"}, float, or a mapping of names to these
        The common singular value: the one with which the backward pass, or the forward pass,
        keeps the norm of random signals, or a number. For a 1x1 convolution or a stem to more
        channels, ``"backward"`` is :math:`\sqrt{c_{out} / c_{in}}`; in general it is
        :math:`\sqrt{n_{out} / r}` with the rank ``r`` of the operator. Layers that a mapping
        leaves out have ``"backward"``.
    sweeps : int
        Alternating projections at a time, for overlapping kernels that one factor cannot make
        exact.
    method : {"auto", "eigh", "newton-schulz", "svd"}
        How polar factors are computed: ``auto`` takes the eigenvectors of the smaller Gram matrix
        on a CPU and Newton-Schulz steps on a GPU, both with a check that falls back to ``svd``.

    Attributes
    ----------
    layers : tuple of Layer
        With ``name``, ``module``, ``target``.
    num_projections : int
        Calls of :meth:`project`, and projections after steps; with several optimizers each counts
        those of its own layers.
    steps_since : dict of str to int
        Optimizer steps since each layer was projected.

    Raises
    ------
    LayerSelectionError
        If a name matches nothing; it says what is near.
    UnsupportedLayerError
        If a layer is of another kind.
    ParametrizedWeightError
        If a weight is computed from other parameters.
    UnsupportedParameterError
        If a weight is sharded (DTensor), not real, or has no values.
    InvalidArgumentError
        If a target is not positive, an option is out of range, or the model is no module.

    Notes
    -----
    Of overlapping kernels there are two kinds (``routes.py``). Those with at least as many output
    channels as inputs in a window (image stems), or the reverse, get orthogonal taps in one step:
    the nearest kernel of that form, which is exact. All others take ``sweeps`` alternating
    projections with the stride-aware transform ``conditioning.singular.symbol``, and
    :meth:`report` says what spread is left. That need not vanish with more sweeps: kernels whose
    operator is square (3x3 that keep the channels; 3x3 of stride 2 to four times the channels)
    come to rest with singular values that differ several times. Begin with
    ``project(sweeps=50)``, look at the report, and where a flat layer matters take a kernel as
    long as its stride (:class:`IsometricDownsample`). Layers that are flat already stay as they
    are, up to a factor.

    Both kinds speak of circular padding: with zeros at the border, as ``nn.Conv2d`` has by
    default, signals near the border lose taps, and the least singular value stays lower whatever
    is done; ``report(input_shapes=...)`` gives those of the layers as they run.

    A pickled or copied object is not attached to any optimizer.

    The method is that of A. Zaeemzadeh, N. Rahnavard, M. Shah, *Norm-Preservation: Why Residual
    Networks Can Become Extremely Deep?*, arXiv:1805.07477, where it is applied with probability
    1/2 after each step to the stem and to two 1x1 convolutions.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 1, stride=2))
    >>> procrustes = Procrustes(["0", "2"], model=model)
    >>> procrustes.project()
    >>> [round(layer.target, 3) for layer in procrustes.layers]
    [2.309, 1.414]
    >>> torch.linalg.svdvals(model[2].weight.detach().flatten(1)).round(decimals=3).unique()
    tensor([1.4140])
    """

    def __init__(
        self,
        layers: Any,
        *,
        model: nn.Module | None = None,
        target: Target = "backward",
        sweeps: int = 1,
        method: str = "auto",
    ) -> None:
        check_counts(sweeps=sweeps)
        check_choice(METHODS, method=method)
        self.layers = prepared(named_layers(layers, model), target)
        self.sweeps, self.method = sweeps, method
        self.num_projections = 0
        self._seconds = 0.0
        self._before: dict[str, Tensor] = {}
        self._after: dict[str, Tensor] = {}
        self.steps_since: dict[str, int] = dict.fromkeys((x.name for x in self.layers), 0)
        self._schedule: Schedule | None = None

    @classmethod
    def for_transitions(
        cls, model: nn.Module, inputs: Any = None, *, stem: bool = True, **options: Any
    ) -> Procrustes:
        """Take the layers in which a residual network changes the shape of its stream.

        Those are layers on skips that are no identities, bare layers between residual blocks, and
        the layers before the first block.

        Parameters
        ----------
        model : nn.Module
            A residual network.
        inputs : Tensor, tuple or dict, optional
            A sample batch. The model runs once, and what is on the skips is seen. Without it they
            are told by structure: layers that some of the repeated blocks have and others lack, or
            that lead from the width of a block's input to that of its output beside the others.
        stem : bool
            Whether layers before the first block belong to them.
        **options
            As for the class itself.

        Raises
        ------
        LayerSelectionError
            If no such layer is found; it says why.
        InvalidArgumentError
            If the model is no module.
        """
        check_model(model)
        found = transition_layers(model, inputs, is_layer, stem=stem)
        if not found:
            hint = "" if inputs is not None else " Pass a batch as inputs: it tells more, or"
            msg = (
                f"No transition layer was found in the {type(unwrapped(model)).__name__}: "
                f"{why_none(model, inputs)}.{hint or ' Please'} name the layers: "
                f"Procrustes(['layer1', ...], model=model)."
            )
            raise LayerSelectionError(msg)
        return cls(found, **options)

    def __repr__(self) -> str:
        return f"Procrustes({', '.join(f'{x.name}: {x.target:.4g}' for x in self.layers)})"

    def __getstate__(self) -> dict[str, Any]:
        # The hooks of the optimizers stay where they are.
        return {**self.__dict__, "_schedule": None}

    # -- projection ---------------------------------------------------------------------------

    def project(self, sweeps: int | None = None) -> None:
        """Project all layers now.

        Parameters
        ----------
        sweeps : int, optional
            Instead of the usual number: many at the beginning of a training, say.

        Raises
        ------
        NonFiniteError
            If a weight holds NaN or an infinity.
        RankDeficientWeightError
            If singular values of a weight are zero to rounding, so that the nearest operator is
            not unique. No layer is changed then.
        """
        check_counts(sweeps=self.sweeps if sweeps is None else sweeps)
        self._project(self.layers, self.sweeps if sweeps is None else sweeps)

    def _project(self, layers: Iterable[Layer], sweeps: int) -> None:
        begun = time.perf_counter()
        results: list[tuple[Layer, Tensor, Tensor]] = []
        # Also within inference_mode, in which tensors that are made are of no use outside.
        with torch.inference_mode(mode=False), torch.no_grad():
            for group in _groups(layers):
                results += self._projected(group, sweeps)
            for layer, _, after in results:
                layer.weight.copy_(layer.restored(after))
        for layer, before, after in results:
            self._before[layer.name], self._after[layer.name] = before, after
            self.steps_since[layer.name] = 0
        self.num_projections += 1
        self._seconds += time.perf_counter() - begun

    def _projected(self, group: list[Layer], sweeps: int) -> list[tuple[Layer, Tensor, Tensor]]:
        filters, targets = _stacked(group)
        # Entries of half precision are taken as they are: next to theirs, many a random matrix
        # would have singular values of zero.
        rounding = torch.finfo(filters.dtype).eps
        try:
            with _exactly(filters):
                after, deficient = routes.project(
                    filters, group[0].shape, targets, sweeps, self.method, rounding
                )
        except RuntimeError:
            # What decompositions raise for NaN says little.
            _refuse_non_finite(group)
            raise
        if deficient is not None and bool(deficient.any()):
            _refuse_non_finite(group)
            raise RankDeficientWeightError(_deficient_message(group, deficient))
        sizes = [layer.geometry.groups for layer in group]
        split = zip(group, filters.split(sizes), after.split(sizes), strict=True)
        return [(layer, one, other.to(layer.weight.dtype)) for layer, one, other in split]

    # -- in training ----------------------------------------------------------------------------

    def attach(
        self,
        optimizer: Any,
        every: int = 1,
        probability: float | None = None,
        seed: int = 0,
    ) -> Procrustes:
        """Project after the steps of an optimizer, from now on.

        A step that ``GradScaler`` skips is none. An attached object is attached anew, and goes on
        counting steps.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer, or several
            What changes the weights. Wrappers (accelerate, Lightning) are looked through. With
            several, each layer is projected after the steps of its own.
        every : int
            After every so many steps.
        probability : float, optional
            Project then only with this probability. The paper has 0.5.
        seed : int
            Of the draws, which depend on the number of the step and nothing else: ranks of a
            distributed run draw alike, and so does a run that was interrupted.

        Returns
        -------
        Procrustes
            The same object; keep it for :meth:`report`, or not.

        Raises
        ------
        OptimizerMismatchError
            If an optimizer is none, or a layer's weight belongs to none of them.
        InvalidArgumentError
            If ``every`` or ``probability`` is out of range.

        Notes
        -----
        A copy of an optimizer (``copy.deepcopy``, pickle) is without the hook: attach again.
        ``load_state_dict`` keeps it. An optimizer whose ``step`` calls that of its base class may
        run the hook twice a step, since torch hooks into both: project it with :meth:`project`.
        """
        schedule = Schedule(self._after_steps, self.layers, optimizer, every, probability, seed)
        if self._schedule is not None:
            # Of optimizers that come in addition nothing is known.
            known = self._schedule.num_steps[: len(schedule.num_steps)]
            schedule.num_steps[: len(known)] = known
            self._schedule.remove()
        schedule.register()
        self._schedule = schedule
        return self

    def _after_steps(self, layers: Sequence[Layer], *, now: bool) -> None:
        for layer in layers:
            self.steps_since[layer.name] += 1
        if now:
            self._project(layers, self.sweeps)

    def detach(self) -> None:
        """Stop projecting after steps; nothing happens if that was not so."""
        if self._schedule is not None:
            self._schedule.remove()
            self._schedule = None

    def penalty(self) -> Tensor:
        r"""The same wish as a soft penalty, to be added to a loss.

        Returns
        -------
        Tensor
            Scalar, differentiable by the weights: the sum over layers of the mean of
            :math:`(\sigma^2 / \sigma_{target}^2 - 1)^2` over the non-zero singular values of the
            operator, on the smallest circle that decides for overlapping kernels. Zero if and
            only if all of them are the target; :meth:`project` leaves such layers as they are.
        """
        total: Tensor | None = None
        for group in _groups(self.layers):
            filters, targets = _stacked(group)
            # A layer with groups counts as one.
            counts = [layer.geometry.groups for layer in group]
            shares = tuple(1 / count for count in counts for _ in range(count))
            with _exactly(filters):
                values = routes.penalty(filters, group[0].shape, targets)
                part = (values * routes.constant(shares, values.dtype, values.device)).sum()
            total = part if total is None else total + part.to(total.device)
        assert total is not None
        return total

    # -- what was done --------------------------------------------------------------------------

    def report(self, input_shapes: Mapping[str, Any] | None = None) -> ProcrustesReport:
        """Singular values of every layer, before and after the last projection and now.

        Parameters
        ----------
        input_shapes : mapping of str to tuple of int, optional
            Shapes of inputs without the batch axis, by layer. Of those layers also the singular
            values of the operator as it runs are given, with its padding, and kernels that overlap
            are measured on circles of that size, unless that takes long.

        Returns
        -------
        ProcrustesReport
            A sequence of :class:`LayerReport`; prints as a table.

        Raises
        ------
        LayerSelectionError
            If a name is not that of a layer.
        InvalidArgumentError
            If ``input_shapes`` is no mapping to shapes.
        ShapeError
            If a shape is not that of inputs of its layer.
        """
        shapes = checked_shapes(input_shapes)
        unknown = sorted(set(shapes) - {layer.name for layer in self.layers})
        if unknown:
            msg = (
                f"input_shapes names {', '.join(map(repr, unknown))}, but the layers are "
                f"{', '.join(repr(layer.name) for layer in self.layers)}."
            )
            raise LayerSelectionError(msg)
        rows: list[LayerReport] = [
            reported(
                layer, self._before.get(layer.name), self._after.get(layer.name),
                self.steps_since[layer.name], shapes.get(layer.name),
            )
            for layer in self.layers
        ]  # fmt: skip
        seconds = self._seconds / self.num_projections if self.num_projections else 0.0
        return ProcrustesReport(rows, self.num_projections, seconds)

    def state_dict(self) -> dict[str, Any]:
        """What a continued training needs: how many steps and projections there were, and when."""
        return {
            "layers": [layer.name for layer in self.layers],
            "num_projections": self.num_projections,
            "seconds": self._seconds,
            "steps_since": dict(self.steps_since),
            "num_steps": [] if self._schedule is None else list(self._schedule.num_steps),
            "schedule": None if self._schedule is None else self._schedule.options,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; attach to the optimizers before.

        Raises
        ------
        InvalidArgumentError
            If it is none, or that of other layers, of another number of optimizers, or of another
            ``every``, ``probability`` or ``seed``: the run would not be the same.
        """
        known = state if isinstance(state, Mapping) else {}
        missing = [key for key in self.state_dict() if key not in known]
        if missing:
            msg = (
                f"That is no state of a Procrustes: it has no {', '.join(map(repr, missing))}. "
                f"Load what state_dict() returned."
            )
            raise InvalidArgumentError(msg)
        names = [layer.name for layer in self.layers]
        steps = [] if self._schedule is None else self._schedule.num_steps
        if list(state["layers"]) != names or len(state["num_steps"]) != len(steps):
            msg = (
                f"The state is that of layers {', '.join(state['layers'])} with "
                f"{len(state['num_steps'])} optimizers attached; here they are "
                f"{', '.join(names)} with {len(steps)}."
            )
            raise InvalidArgumentError(msg)
        options = None if self._schedule is None else self._schedule.options
        if state["schedule"] != options:
            msg = (
                f"The state was attached with {_options(state['schedule'])}, and this one is with "
                f"{_options(options)}: the run would not be the same. Attach as before, then load."
            )
            raise InvalidArgumentError(msg)
        self.num_projections, self._seconds = state["num_projections"], state["seconds"]
        self.steps_since = dict(state["steps_since"])
        if self._schedule is not None:
            self._schedule.num_steps = list(state["num_steps"])


def _options(options: Mapping[str, Any] | None) -> str:
    if options is None:
        return "no schedule"
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _groups(layers: Iterable[Layer]) -> Iterator[list[Layer]]:
    """Layers of one shape, which go through one batch of polar factors."""
    found: dict[Any, list[Layer]] = defaultdict(list)
    for layer in layers:
        found[layer.shape, layer.weight.dtype, layer.weight.device].append(layer)
    yield from found.values()


def _stacked(group: list[Layer]) -> tuple[Tensor, Tensor]:
    weights = [layer.weight for layer in group]
    filters = routes.stacked(weights, [layer.geometry for layer in group])
    if filters.dtype.itemsize < 4:
        filters = filters.float()
    if filters.device.type == "mps":
        filters = filters.cpu()  # no double precision there
    targets = tuple(layer.target for layer in group for _ in range(layer.geometry.groups))
    return filters, routes.constant(targets, filters.dtype, filters.device)


def _exactly(tensor: Tensor) -> torch.autocast:
    """Without autocast, whose Gram matrices have three digits."""
    return torch.autocast(tensor.device.type, enabled=False)


def _refuse_non_finite(group: list[Layer]) -> None:
    bad = [layer.name for layer in group if not bool(torch.isfinite(layer.weight).all())]
    if bad:
        msg = (
            f"The weight of {', '.join(map(repr, bad))} holds NaN or an infinity: the training has "
            f"diverged before this projection. Look at the loss and the gradients of earlier steps."
        )
        raise NonFiniteError(msg)


def _deficient_message(group: list[Layer], deficient: Tensor) -> str:
    flags = deficient.split([layer.geometry.groups for layer in group])
    names = [layer.name for layer, each in zip(group, flags, strict=True) if bool(each.any())]
    return (
        f"The weight of {', '.join(map(repr, names))} has singular values that are zero to "
        f"rounding, so the nearest operator without them is not unique. Initialise it with full "
        f"rank (torch.nn.init.orthogonal_ on weight.flatten(1), say), or leave the layer out."
    )

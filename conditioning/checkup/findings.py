r"""Findings: what the numbers of a checkup say is wrong, the cause first.

======================== ========== ==========================================================
kind                     severity   raised where
======================== ========== ==========================================================
nonfinite                problem    NaN or an infinity came up
gradient-zero            problem    the gradient by every parameter is exactly zero
dead-units               problem    more units of an activation have no slope at any sample than
                                    chance explains
saturated-units          problem    a bounded activation is flat at more than half of its entries;
                                    sigmoids behind all layers are left out
recurrent-explodes       problem    a recurrent layer multiplies the gradient over its steps
recurrent-vanishes       problem    ... or loses it; a remark where gates can learn to keep it
transition-loses-        problem    one transition keeps less than half of the gradient's norm, and
gradient                            less than half of what other blocks keep
weight-gain              problem    the gradient is lost or explodes, and the scale of the weights
                                    accounts for most of it
unscaled-branches        problem    the gradient grows exponentially over residual blocks
gradient-vanishes,       problem    the product of all ratios is out of range, for none of the
gradient-explodes                   reasons above
activations-vanish,      problem    the same of the activations, where the gradient is in range
activations-explode
inputs-collapse          problem    in a plain net the gates are the same for all samples
learning-rate            problem    the learning rate is above the largest stable one
ill-conditioned          remark     ``kappa_10`` is beyond what gradient descent can work off
======================== ========== ==========================================================

A number counts only if its whole enclosure lies beyond the limit;
:mod:`conditioning.checkup.limits` has the limits, and where they come from. One ailment leads with
one finding: where a cause is found, the norms that follow from it are remarks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from conditioning.checkup import limits
from conditioning.checkup.along import along_depth
from conditioning.checkup.depth import base, chain_of, layers_in, returns_shares
from conditioning.checkup.readings import ActivationReading, Finding, Severity
from conditioning.checkup.results import Checkup
from conditioning.spectrum import Estimate

_BOUNDED = ("tanh", "sigmoid", "hardtanh", "relu6")
_ONE_SIDED = ("relu", "relu6", "elu", "selu", "gelu", "silu", "softplus")
#: Layers whose gates are free to keep a gradient, whatever they do at first.
_GATED = ("LSTM", "GRU", "LSTMCell", "GRUCell")
#: Condition numbers whose enclosure is one of the matrix, not of rounding or of a small budget.
_RESOLVED = ("exact", "exhausted", "certified")
#: These cut or bend the way of the gradient, so norms along the depth follow from them.
_CAUSES = ("dead-units", "saturated-units", "recurrent-explodes")


def find(report: Checkup) -> tuple[Finding, ...]:
    """What a checkup shows to be wrong, and what is worth knowing.

    Parameters
    ----------
    report : Checkup
        Its ``findings`` are not looked at.

    Returns
    -------
    tuple of Finding
        Problems first, then by weight: how far a number lies beyond its limit, as a logarithm.
    """
    rules: tuple[Callable[[Checkup], Iterator[Finding]], ...] = (
        _no_gradient, _dead, _saturated, _recurrent, _transitions, _learning_rate, _ill_conditioned,
    )  # fmt: skip
    broken = tuple(_nonfinite(report))
    if broken:
        return broken  # behind NaN every unit counts as dead, and no norm means anything
    found = [finding for rule in rules for finding in rule(report)]
    found += along_depth(report, tuple(found))
    causes = [f for f in found if f.kind in _CAUSES and f.severity == "problem"]
    if causes:
        found = [f if f in causes else _follows(f, causes[0]) for f in found]
    return tuple(sorted(found, key=lambda f: (f.severity != "problem", -f.weight)))


def _follows(finding: Finding, cause: Finding) -> Finding:
    """A norm along the depth as a consequence; findings of other kinds stay what they are."""
    if finding.severity == "remark" or finding.kind in (
        "learning-rate",
        "transition-loses-gradient",
    ):
        return finding
    where = f" of {_names(cause.where)}" if cause.where else ""
    return dataclasses.replace(
        finding,
        severity="remark",
        remedy=f"This may follow from the finding {cause.kind}{where}: look again after that.",
    )


def _names(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _weight(number: float, limit: float) -> float:
    """Distance of a number from its limit as a logarithm."""
    if number <= 0 or limit <= 0:
        return 700.0
    return min(abs(math.log(number / limit)), 700.0)


# ---------------------------------------------------------------------- one rule each


def _nonfinite(report: Checkup) -> Iterator[Finding]:
    loss, gradient = report.loss, report.gradient_norm
    evidence = "gradient_norm" if math.isfinite(loss.value) else "loss"
    number = gradient if math.isfinite(loss.value) else loss
    named: tuple[str, ...] = ()
    if report.nonfinite:
        where, look = f"{report.nonfinite}.", "Look at the module that is named"
        named = tuple(b.name for b in report.blocks if f"'{b.name}'" in report.nonfinite)[:1]
        evidence = "nonfinite"
    elif not math.isfinite(loss.value):
        where, look = f"The loss is {loss.value}.", "Look at the loss and at what goes into it"
    elif not math.isfinite(gradient.value):
        where = f"The norm of the gradient is {gradient.value}, though the loss is {loss.brief()}."
        look = "Look at parameters that enter the outputs or the loss outside of the blocks"
    else:
        return
    yield Finding(
        "nonfinite", "problem", math.inf, named, where,
        f"{look}: a division by zero, the logarithm or the root of what may be zero, an overflow "
        f"of float16, or NaN in the data. Other numbers of this checkup mean little until it is "
        f"gone.",
        number, math.inf, evidence,
    )  # fmt: skip


def _no_gradient(report: Checkup) -> Iterator[Finding]:
    norm = report.gradient_norm
    if not norm.high < limits.NO_GRADIENT:
        return
    yield Finding(
        "gradient-zero", "problem", _weight(norm.value, limits.NO_GRADIENT), (),
        f"The gradient by all trainable parameters is exactly zero, at a loss of "
        f"{report.loss.brief()}: no step of descent changes anything.",
        "Look at the loss first: probabilities that are 0 or 1 to rounding, a clamp beyond its "
        "ends, a factor of zero, or targets that are all ignored.",
        norm, limits.NO_GRADIENT, "gradient_norm",
    )  # fmt: skip


def _dead(report: Checkup) -> Iterator[Finding]:
    found = [
        (index, use)
        for index, use in enumerate(report.activations)
        if use.function in _ONE_SIDED
        and use.num_units
        and use.dead_share > limits.dead_limit(use.num_units)
    ]
    if not found:
        return
    index, first = min(found, key=lambda entry: entry[1].depth)
    others = [use.name for _, use in found if use is not first]
    behind = ""
    if others:
        behind = f" So are those of {_names(others)} behind it."
    limit = limits.dead_limit(first.num_units)
    whole = " No gradient passes it." if first.dead_share == 1 else ""
    yield Finding(
        "dead-units", "problem", _weight(first.dead_share, limit),
        (first.name, *others),
        f"{first.dead_share:.0%} of the {first.num_units} units of '{first.name}' "
        f"({first.function}) are flat for every sample; chance explains up to {limit:.0%}."
        f"{whole}{behind}",
        "Look at the bias in front of it and at the scale of its input (root mean square "
        f"{first.rms_in:.3g}): draw the layer anew with biases of zero, and lower the learning "
        "rate if it died in training. A LeakyReLU cannot die.",
        Estimate.exact(first.dead_share), limit, f"activations[{index}].dead_share",
    )  # fmt: skip


def _saturated(report: Checkup) -> Iterator[Finding]:
    found = [
        (index, use)
        for index, use in enumerate(report.activations)
        if use.function in _BOUNDED
        and use.flat_share > limits.SATURATED
        and _high(use)
        and not returns_shares(use, report.layers)
    ]
    if not found:
        return
    found.sort(key=lambda entry: -entry[1].flat_share)
    index, worst = found[0]
    names = tuple(use.name for _, use in found)
    more = f" So is that of {_names(names[1:])}." if len(names) > 1 else ""
    yield Finding(
        "saturated-units", "problem", _weight(worst.flat_share, limits.SATURATED), names,
        f"{worst.flat_share:.0%} of what goes into '{worst.name}' ({worst.function}) lies where it "
        f"is flat: the root mean square there is {worst.rms_in:.3g}.{more}",
        f"Bring the input of '{worst.name}' to a root mean square of about 1: scale the data, draw "
        f"the weights in front of it with gain {limits.RIGHT_GAIN.get(worst.function, 1.0):.3g}, "
        f"or normalise.",
        Estimate.exact(worst.flat_share), limits.SATURATED, f"activations[{index}].flat_share",
    )  # fmt: skip


def _high(use: ActivationReading) -> bool:
    """Whether it is flat because of large inputs: ReLU6 is flat below zero like every ReLU."""
    return use.function != "relu6" or use.rms_in > 6


def _recurrent(report: Checkup) -> Iterator[Finding]:
    for index, entry in enumerate(report.recurrent):
        steps = entry.num_steps - 1
        if steps < 1 or math.isnan(entry.growth_per_step.value):
            continue
        growth = entry.growth_per_step
        # What the whole sequence may do, spread over the steps.
        bound = limits.fair_factor(entry.num_steps) ** (1 / steps)
        where = f"blocks of the recurrent weight of '{entry.name}'"
        said = (
            f"Over the {entry.num_steps} steps of '{entry.name}' ({entry.classes}) the gradient is "
            f"multiplied by {growth.brief()} with each step back in time, "
            f"{growth.value**steps:.2g} over all of them; the largest singular value of its "
            f"recurrent weight is {entry.recurrent_norm:.3g}."
        )
        evidence = f"recurrent[{index}].growth_per_step"
        if growth.low > bound:
            yield Finding(
                "recurrent-explodes", "problem", steps * _weight(growth.value, bound),
                (entry.name,), said,
                f"Draw the {where} orthogonal (torch.nn.init.orthogonal_), and clip the norm of "
                f"the gradient.",
                growth, bound, evidence,
            )  # fmt: skip
        elif growth.high < 1 / bound:
            gated = entry.classes in _GATED
            severity: Severity = "remark" if gated else "problem"
            remedy = (
                "Set the bias of the forget gates to 1 or more if it has to remember that long "
                "(of a GRU, that of the update gates)."
                if gated
                else f"Draw the {where} orthogonal, or use an LSTM or GRU."
            )
            yield Finding(
                "recurrent-vanishes", severity, steps * _weight(growth.value, 1 / bound),
                (entry.name,), said, remedy, growth, 1 / bound, evidence,
            )  # fmt: skip


def _transitions(report: Checkup) -> Iterator[Finding]:
    known = chain_of(report).known
    for block in known:
        others = sorted(b.ratio.value for b in known if b is not block)
        if block.kind != "transition" or not others:
            continue
        usual = others[len(others) // 2]
        limit = limits.TRANSITION * min(usual, 1.0)
        if not block.ratio.high < limit:
            continue
        layers = [
            layer
            for layer in layers_in(block.name, report.layers)
            if layer.role == "transition" or layer.name == base(block.name)
        ]
        about = ""
        for layer in layers:
            if layer.largest is not None and layer.target is not None:
                about = (
                    f" The largest singular value of '{layer.name}' is {layer.largest.brief()}; "
                    f"{layer.target:.3g} keeps the norm of random gradients."
                )
                break
        names = [layer.name for layer in layers] or [block.name]
        yield Finding(
            "transition-loses-gradient", "problem", _weight(block.ratio.value, limit),
            (block.name, *(layer.name for layer in layers if layer.name != block.name)),
            f"The gradient leaves the transition '{block.name}' with {block.ratio.brief()} of its "
            f"norm; half of the other blocks keep {usual:.3g} or more.{about}",
            f"Make {_names(names)} norm-preserving: conditioning.Procrustes({names}, model=model) "
            f"sets all singular values equal, at the value that keeps the norm, and holds them "
            f"there in training.",
            block.ratio, limit, f"blocks[{report.blocks.index(block)}].ratio",
        )  # fmt: skip


def _learning_rate(report: Checkup) -> Iterator[Finding]:
    steps = report.step_size
    if steps is None or steps.quotient is None or not steps.quotient.low > limits.STEP:
        return
    bound = "2 (1 + momentum) / lambda_max" if steps.momentum else "2 / lambda_max"
    yield Finding(
        "learning-rate", "problem", _weight(steps.quotient.value, limits.STEP), (),
        f"The learning rate {steps.given:g} is {steps.quotient.brief()} times the largest stable "
        f"one, {bound} = {steps.largest_stable.brief()}: plain gradient descent leaves the "
        f"neighbourhood along the steepest direction.",
        f"Use {steps.largest_stable.low / 2:.2g} or less (half of the largest stable one), or "
        f"raise it to the wished value over the first steps.",
        steps.quotient, limits.STEP, "step_size.quotient",
    )  # fmt: skip


def _ill_conditioned(report: Checkup) -> Iterator[Finding]:
    # The Gauss-Newton matrix has no say: it is zero wherever parameters outnumber the outputs.
    spectrum = report.hessian
    # Where it is not resolvable the lower end is that of rounding, not of the network.
    if spectrum is None or spectrum.condition10.status not in _RESOLVED:
        return
    if not spectrum.condition10.low > limits.CONDITION:
        return
    number, negative = spectrum.condition10.estimate, spectrum.index.value
    meaning = (
        f"along a tenth of the directions gradient descent at its largest stable step needs some "
        f"{number.low / 2:.2g} steps to reduce an error by 1/e."
        if negative <= limits.INDEFINITE
        else f"along a tenth of the directions the loss is so much less curved than along the "
        f"steepest one. {negative:.0%} of the eigenvalues are negative, so this is no minimum, and "
        f"the number does not say how fast descent gets to one."
    )
    yield Finding(
        "ill-conditioned", "remark", _weight(number.low, limits.CONDITION), (),
        f"kappa_10 of the Hessian is at least {number.low:.3g}: {meaning}",
        "Normalise inputs and activations, or use a method that rescales directions (Adam, K-FAC, "
        "Shampoo).",
        number, limits.CONDITION, "hessian.condition10",
    )  # fmt: skip

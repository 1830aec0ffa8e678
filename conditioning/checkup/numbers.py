"""Every number of a checkup by the part of the network that it belongs to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from conditioning.checkup.readings import SpectrumReading
from conditioning.spectrum import Estimate

if TYPE_CHECKING:
    from conditioning.checkup.results import Checkup

_WEIGHTS: tuple[str, ...] = ()
_FORWARD = ("data",)
_BACKWARD = ("data", "loss")
_NONE = 0.01  # a share, or a distance from the ideal, that counts as none


class Number(NamedTuple):
    """A number, what it depends on besides the weights, and what it is compared by.

    ``needs`` names the data and the loss where it rests on them; ``form`` are the shapes that it
    belongs to; ``floor`` is the magnitude below which it counts as none; ``scale`` the size of
    what was subtracted or averaged to get it, whose rounding it has at least.
    """

    estimate: Estimate
    needs: tuple[str, ...]
    floor: float = 0.0
    form: str = ""
    scale: float = 0.0


Key = tuple[str, str, str]  # part, name, quantity


def parts_of(report: Checkup) -> list[tuple[str, str]]:
    """The network, and all that has a name in it: kind and name of each, once."""
    return [("network", ""), *((part, name) for part, name, _ in _named(report))]


def numbers(report: Checkup) -> dict[Key, Number]:
    """All numbers by part, name and quantity; what was not measured is not there."""
    found = {("network", "", quantity): number for quantity, number in _network(report)}
    readers = {
        "block": _block, "layer": _layer, "activation": _activation,
        "recurrent layer": _recurrent,
    }  # fmt: skip
    for part, name, reading in _named(report):
        for quantity, number in readers[part](reading):
            found[part, name, quantity] = number
    return found


def _named(report: Checkup) -> Iterator[tuple[str, str, Any]]:
    """Every reading with a name; one that comes again has its count behind it."""
    groups: dict[str, Iterable[Any]] = {
        "block": report.blocks, "layer": report.layers, "activation": report.activations,
        "recurrent layer": report.recurrent,
    }  # fmt: skip
    for part, readings in groups.items():
        seen: Counter[str] = Counter()
        for reading in readings:
            seen[reading.name] += 1
            again = f" ({seen[reading.name]})" if seen[reading.name] > 1 else ""
            yield part, f"{reading.name}{again}", reading


def needs_of(evidence: str) -> tuple[str, ...]:
    """What the number that a finding rests on depends on besides the weights."""
    group, _, quantity = re.sub(r"\[\d+\]", "", evidence).partition(".")
    if group == "layers" or quantity == "recurrent_norm":
        return _WEIGHTS
    if group == "activations":
        return _FORWARD
    if group == "blocks" and quantity.startswith(("act_", "branch_share", "jacobian")):
        return _FORWARD
    return _BACKWARD


def form_of(reading: Any) -> str:
    """The shapes of a block, or what a layer is: of another form it is another one."""
    if hasattr(reading, "fan_in"):
        return f"{reading.classes}, fan_in {reading.fan_in}"
    return getattr(reading, "shapes", "")


def _share(estimate: Estimate, needs: tuple[str, ...], form: str = "") -> Number:
    return Number(estimate, needs, _NONE, form, 1.0)


def _network(report: Checkup) -> Iterator[tuple[str, Number]]:
    yield "loss", Number(report.loss, _BACKWARD)
    yield "gradient norm", Number(report.gradient_norm, _BACKWARD)
    if report.blocks:
        yield "product of ratios", Number(report.product, _BACKWARD)
        yield "mean |1 - ratio|", _share(report.mean_deviation, _BACKWARD)
    for spectrum in (report.hessian, report.gauss_newton):
        if spectrum is not None:
            yield from _spectrum(spectrum)
    if report.step_size is not None:
        yield "largest stable step", Number(report.step_size.largest_stable, _BACKWARD)
        if report.step_size.quotient is not None:
            yield "learning rate over that", Number(report.step_size.quotient, _BACKWARD)


def _spectrum(spectrum: SpectrumReading) -> Iterator[tuple[str, Number]]:
    known = {
        "lambda_max": spectrum.largest,
        "lambda_min": spectrum.smallest,
        "kappa": spectrum.condition.estimate,
        "kappa_10": spectrum.condition10.estimate,
        "share negative": spectrum.index,
        "trace": spectrum.trace,
    }
    known |= {f"quantile {level}": value for level, value in spectrum.density.quantiles.items()}
    for name, value in known.items():
        make = _share if name == "share negative" else Number
        yield f"{spectrum.matrix} {name}", make(value, _BACKWARD)


def _block(block: Any) -> Iterator[tuple[str, Number]]:
    for name in ("act_in", "act_out"):
        yield name, Number(getattr(block, name), _FORWARD, form=block.shapes)
    for name in ("grad_in", "grad_out", "ratio", "product"):
        yield name, Number(getattr(block, name), _BACKWARD, form=block.shapes)
    if block.branch_share is not None:
        yield "branch share", _share(Estimate.exact(block.branch_share), _FORWARD, block.shapes)
    if block.jacobian is not None:
        for name, value in (
            ("sigma_max", block.jacobian.largest), ("sigma_min", block.jacobian.smallest)
        ):  # fmt: skip
            yield name, Number(value, _FORWARD, form=block.shapes)


def _layer(layer: Any) -> Iterator[tuple[str, Number]]:
    form = form_of(layer)
    yield "weight gain", Number(Estimate.exact(layer.weight_gain), _WEIGHTS, form=form)
    if layer.largest is not None:
        yield "sigma_max", Number(layer.largest, _WEIGHTS, form=form)
    if layer.smallest is not None:
        yield "sigma_min", Number(layer.smallest, _WEIGHTS, form=form)


def _activation(use: Any) -> Iterator[tuple[str, Number]]:
    yield "rms in", Number(Estimate.exact(use.rms_in), _FORWARD)
    yield "flat share", _share(Estimate.exact(use.flat_share), _FORWARD)
    yield "dead share", _share(Estimate.exact(use.dead_share), _FORWARD)


def _recurrent(layer: Any) -> Iterator[tuple[str, Number]]:
    yield "first tenth", Number(layer.gradient_first, _BACKWARD)
    yield "last tenth", Number(layer.gradient_last, _BACKWARD)
    yield "growth per step", Number(layer.growth_per_step, _BACKWARD)
    yield "recurrent norm", Number(Estimate.exact(layer.recurrent_norm), _WEIGHTS)

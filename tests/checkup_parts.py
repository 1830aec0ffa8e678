"""Parts of a checkup made by hand, one call each, for tests of the findings."""

from __future__ import annotations

import dataclasses
import math

from checkups import checkup

from conditioning import Estimate
from conditioning.checkup import ActivationReading, BlockReading, LayerReading
from conditioning.checkup.findings import find

NAN = Estimate(math.nan, math.nan, math.nan)
HE = math.sqrt(2)
BEYOND = 1.05  # by so much a number lies beyond its limit, and inside with the inverse


def exact(value):
    return Estimate(value, value, value)


def block(depth, ratio, *, kind="identity", name=None, product=NAN, act=(1.0, 1.0), shapes=None):
    ratio = ratio if isinstance(ratio, Estimate) else exact(ratio)
    return BlockReading(
        name or f"b.{depth}", "Block", kind, shapes or "8x16 -> 8x16", depth, exact(act[0]),
        exact(act[1]), ratio, exact(1.0), ratio, product, None, None,
    )  # fmt: skip


def chain(ratios, *, kind="identity", product=None, **more):
    """Blocks with these ratios, and the checkup's product."""
    blocks = tuple(block(i, r, kind=kind, **more) for i, r in enumerate(ratios))
    norm, linked = 1.0, []
    for entry in reversed(blocks):
        after, norm = norm, norm * float(entry.ratio)
        linked.append(dataclasses.replace(entry, grad_in=exact(norm), grad_out=exact(after)))
    blocks = tuple(reversed(linked))
    whole = exact(math.prod(float(b.ratio) for b in blocks)) if product is None else product
    return clean(blocks=blocks, product=whole)


def layer(depth, gain, *, name=None, role="layer", followed_by="relu"):
    return LayerReading(
        name or f"b.{depth}.w", "Linear", role, 2 * depth, 16, gain, followed_by, None, None, "",
        None, "",
    )  # fmt: skip


def use(name, *, function="relu", dead=0.0, flat=0.5, units=64, depth=1, rms=1.0):
    return ActivationReading(name, function, depth, rms, flat, dead, units)


def clean(**changes):
    """A checkup without any finding, with some fields changed."""
    base = dataclasses.replace(
        checkup(findings=False), recurrent=(), step_size=None, predictions=(), layers=(),
        activations=(), hessian=None, gauss_newton=None,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def kinds(report, severity=None):
    return [f.kind for f in find(report) if severity in (None, f.severity)]


def lead(report):
    findings = find(report)
    assert findings, "no finding at all"
    return findings[0]


def check_complete(report):
    """Each finding has a number beyond its limit, a weight, a place in the checkup and a remedy."""
    for finding in find(report):
        number = finding.number
        assert finding.limit < number.low or number.high < finding.limit
        assert finding.weight > 0
        assert finding.remedy.endswith(".")
        assert finding.sentence.endswith(".")
        found = eval(f"report.{finding.evidence}", {"report": report})
        assert found is not None

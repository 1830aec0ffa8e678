"""A checkup as one HTML page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from conditioning.checkup.drawings import drawings
from conditioning.checkup.results import Checkup
from conditioning.checkup.text import elapsed, spent_by_stage
from conditioning.spectrum import ConditionNumber, Estimate

_LONG = 24  # rows from which on a table scrolls in a box of its own
_NAMED = ("blocks", "activations", "layers", "recurrent")  # tables with a row for each name
_SHOWN = 6  # names that a finding lists before the others are folded away

# What each status means, in the order in which the legend explains them.
STATUSES = {
    "exact": "computed from all eigenvalues or singular values; only rounding is left",
    "exhausted": "the iteration came to its end, so it has seen every distinct value",
    "certified": "both ends are enclosed; certain, or up to the stated probability of failure",
    "estimated": "from random vectors; the enclosure may fail with a small probability",
    "one-sided": "one of the two ends is bounded from one side only",
    "lower bound only": "the number is certain from below; nothing bounds it from above",
    "not certified": "small residuals, but nothing excludes a value that was missed",
    "depends on threshold": "eigenvalues lie so near zero that what counts as zero decides",
    "not resolvable": "lost in rounding at this precision; float64 may resolve it",
    "undefined": "there is nothing that could be measured",
    "inside": "the whole enclosure of what was measured lies in the predicted range",
    "outside": "no part of the enclosure lies in the predicted range",
    "not decided": "the enclosure straddles an end of the predicted range",
}
_COMPLETENESS = {
    "complete": "Everything that was asked for was measured",
    "out of budget": "Stopped by its budget",
    "interrupted": "Interrupted before its end",
}


@dataclass(frozen=True)
class Verdict:
    """One sentence for the head of the page in two parts, of which the first says it all.

    Attributes
    ----------
    tone : {"problem", "remark", "fine"}
    headline, rest : str
    """

    tone: str
    headline: str
    rest: str


def page(report: Checkup) -> str:
    """The whole checkup as one HTML page, figures included as SVG.

    Every number with an enclosure carries its place in the JSON (``data-path``) and the exact
    values (``data-value``, ``data-low``, ``data-high``). Names of models and layers are escaped.
    """
    marks = _marks(report)
    spectra = [
        (path, spectrum)
        for path, spectrum in (("hessian", report.hessian), ("gauss_newton", report.gauss_newton))
        if spectrum is not None
    ]
    levels = {level for _, spectrum in spectra for level in spectrum.density.quantiles}
    template = _environment().get_template("page.html.jinja")
    return template.render(
        report=report,
        setting=report.setting,
        verdict=verdict(report),
        completeness=_COMPLETENESS[report.status],
        figures=drawings(report, marks),
        marks=marks,
        anchors=_anchors(report),
        legend={name: STATUSES[name] for name in STATUSES if name in _statuses(report)},
        spectra=spectra,
        levels=sorted(levels, key=float),
        reason=functools.partial(_reason, report),
        elapsed=elapsed(report),
        stages=spent_by_stage(report),
        long=_LONG,
        shown=_SHOWN,
    )  # fmt: skip


def notebook(report: Checkup, height: int = 720) -> str:
    """The page in a frame of its own, so that its style and a notebook's leave each other alone.

    Parameters
    ----------
    report : Checkup
    height : int
        Of the frame, in pixels.
    """
    # Without it a link to a section would load the notebook into the frame.
    inside = page(report).replace("<head>", '<head><base href="about:srcdoc">', 1)
    return str(
        Markup(
            '<iframe title="Checkup of {}" sandbox="allow-same-origin" '
            'style="width:100%;height:{}px;border:0" srcdoc="{}"></iframe>'
        ).format(report.setting.model, height, inside)
    )


def verdict(report: Checkup) -> Verdict:
    """What the findings come to; without problems, what was measured and what was not."""
    problems = report.problems
    remarks = len(report.findings) - len(problems)
    aside = f"; {_count(remarks, 'remark')} besides" if remarks else ""
    headline = f"{_count(len(problems), 'problem')} found"
    first = report.nonfinite or ("" if math.isfinite(report.loss.value) else "the loss")
    if first:
        named = f"NaN or an infinity came up: {first}{aside}."
        known = (headline, f": {named}") if problems else ("Not finite", f": {named}")
        return Verdict("problem", *known)
    if problems:
        where = f", the weightiest in {problems[0].where[0]}" if problems[0].where else ""
        return Verdict("problem", headline, f"{where}{aside}.")
    absent = ", ".join(entry.what for entry in report.missing)
    absent = f"; not measured or not certified: {absent}" if absent else ""
    measured = ", ".join(_measured(report))
    if not measured:
        return Verdict("remark", "Next to nothing was measured", f"{absent}{aside}.")
    tone = "fine" if report.status == "complete" and not remarks else "remark"
    rest = f": {measured}{absent}{aside}."
    return Verdict(tone, "No problem found in what was measured", rest)


def _measured(report: Checkup) -> list[str]:
    jacobians = sum(block.jacobian is not None for block in report.blocks)
    counts = (
        (len(report.blocks), "norms of {}", "block"),
        (jacobians, "{}", "Jacobian"),
        (len(report.activations), "{}", "activation"),
        (len(report.layers), "weights of {}", "layer"),
        (len(report.recurrent), "{}", "recurrent layer"),
    )
    found = [form.format(_count(number, what)) for number, form, what in counts if number]
    spectra = (report.hessian, report.gauss_newton)
    found += [f"spectrum of the {s.matrix}" for s in spectra if s is not None]
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _reason(report: Checkup, *words: str) -> str:
    """Why there is nothing to show, by what the checkup says of what it lacks."""
    found = [
        entry.reason
        for entry in report.missing
        if any(word.lower() in entry.what.lower() for word in words)
    ]
    return "; ".join(dict.fromkeys(found))


def _statuses(report: Checkup) -> set[str]:
    found = {layer.status for layer in report.layers}
    found |= {block.jacobian.status for block in report.blocks if block.jacobian is not None}
    found |= {prediction.agrees for prediction in report.predictions}
    for spectrum in (report.hessian, report.gauss_newton):
        if spectrum is not None:
            found |= {spectrum.condition.status, spectrum.condition10.status}
            found.add(spectrum.density.status)
    return found


def _marks(report: Checkup) -> dict[str, str]:
    """Anchors of the entries that a finding is about, with the severity; problems win."""
    marks: dict[str, str] = {}
    for finding in report.findings:
        anchor = _anchor(finding.evidence)
        table = anchor.partition("-")[0]
        entries = getattr(report, table) if table in _NAMED else ()
        named = [f"{table}-{i}" for i, e in enumerate(entries) if e.name in finding.where]
        for place in {anchor, *named}:
            if marks.get(place) != "problem":
                marks[place] = finding.severity
    return marks


def _anchors(report: Checkup) -> set[str]:
    """The ids that the page has for entries of the checkup."""
    found = {"loss", "gradient_norm", "product", "mean_deviation"}
    for name in (*_NAMED, "predictions"):
        found |= {f"{name}-{i}" for i in range(len(getattr(report, name)))}
    for name in ("hessian", "gauss_newton", "step_size"):
        found |= {name} if getattr(report, name) is not None else set()
    return found


def _anchor(path: str) -> str:
    """``blocks[3].ratio`` -> ``blocks-3``."""
    found = re.match(r"(\w+)(?:\[(\d+)\])?", path)
    if found is None:
        return ""
    return found[1] if found[2] is None else f"{found[1]}-{found[2]}"


def _number(estimate: Estimate, path: str, absent: str = "NaN") -> Markup:
    """An estimate as it prints itself, with its exact values for programs.

    ``absent`` are the words for NaN, which in a spectrum means that a number was not measured.
    """
    shown = (absent, "") if math.isnan(estimate.value) else _split(estimate)
    return _marked(path, estimate.value, estimate.low, estimate.high, *shown)


def _condition(number: ConditionNumber, path: str) -> Markup:
    """A condition number in the words in which it prints itself."""
    if math.isnan(number.value):
        shown = ("not defined", "")
    elif math.isinf(number.high):
        shown = (f"≥ {number.low:.4g}", "no upper bound")
    else:
        shown = _split(number.estimate)
    return _marked(path, number.value, number.low, number.high, *shown)


def _marked(path: str, value: float, low: float, high: float, text: str, enclosure: str) -> Markup:
    form = (
        '<span class="n" data-path="{}" data-value="{!r}" data-low="{!r}" data-high="{!r}">{}{}'
        "</span>"
    )
    small = Markup(" <small>{}</small>").format(enclosure) if enclosure else ""
    return Markup(form).format(path, float(value), float(low), float(high), text, small)


def _split(estimate: Estimate) -> tuple[str, str]:
    """The number and its enclosure, out of how an estimate prints itself."""
    text, _, enclosure = str(estimate).partition(" ")
    return _proper(text), _proper(enclosure)


def _proper(text: str) -> str:
    """Minus signs and infinities as they are set in print."""
    return re.sub(r"(?<![\w.])-(?=\d|inf)", "\u2212", text).replace("inf", "∞")


def _single(value: float | None, path: str, form: str = "#.3g") -> Markup:
    """A number without an enclosure; a dash where there is none."""
    if value is None:
        return Markup('<span class="none">–</span>')
    return Markup('<span class="n" data-path="{}" data-value="{!r}">{}</span>').format(
        path, float(value), _plain(value, form)
    )


def _plain(value: float, form: str = ".4g") -> str:
    return "NaN" if math.isnan(value) else _proper(f"{value:{form}}".removesuffix("."))


def _name(name: str) -> Markup:
    """The name of a module, which may be broken into lines behind its dots."""
    return Markup(".<wbr>").join((name or "(model)").split("."))


def _names(names: Iterable[str]) -> Markup:
    return Markup(", ").join(Markup("<code>{}</code>").format(_name(name)) for name in names)


@functools.cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("conditioning.checkup"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        number=_number, condition=_condition, single=_single, plain=_plain, name=_name,
        names=_names, anchor=_anchor, svg=Markup, count=_count,
    )  # fmt: skip
    return found

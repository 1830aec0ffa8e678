"""Directives that write the page of an experiment from its committed results.

``experiment``
    What is measured, after which paper, how it is run, and how many claims hold.
``experiment-figure``
    A committed figure, and what the claims that it shows say now.
``verdict-table``
    Every claim with its prediction, its measured value and its verdict.

Nothing is copied: numbers and verdicts are read from ``figures/NAME/verdicts.json`` when the
pages are built, and a page is built again when that file changes. What a figure shows is said in
its page by ids of claims; an id that the file does not have is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.parsers.rst.directives.images import Figure
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from experiments import registry
from experiments.report import number, read_verdicts, with_enclosure

ROOT = Path(__file__).resolve().parent.parent.parent
FIGURES = ROOT / "figures"
VERDICTS = ("holds", "fails", "not decided")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def _float(value: float | str | None) -> float:
    """A number as ``verdicts.json`` holds it: null is NaN, infinities are words."""
    return math.nan if value is None else float(value)


def measured(claim: Mapping[str, Any]) -> str:
    """The measured value with its enclosure, as the command line prints it."""
    value, low, high = (_float(claim[key]) for key in ("measured", "low", "high"))
    return with_enclosure(value, low, high)


def predicted(claim: Mapping[str, Any]) -> str:
    """The prediction, as a relation, a number, or both, and what may lie between."""
    relation, value = claim["relation"], claim["predicted"]
    known = value if isinstance(value, str) else number(_float(value))
    text = known if relation in (None, known) else f"{relation} = {known}"
    return f"{text} ({claim['tolerance']})"


def counts(claims: Sequence[Mapping[str, Any]]) -> str:
    """How many claims hold, fail, and are not decided."""
    verdicts = [claim["verdict"] for claim in claims]
    hold, fail, still_open = (verdicts.count(verdict) for verdict in VERDICTS)
    return f"{len(claims)} claims: {hold} hold, {fail} fail, {still_open} not decided"


def verdict_mark(claim: Mapping[str, Any]) -> nodes.inline:
    """The verdict in words; its class gives it a colour."""
    verdict = claim["verdict"]
    return nodes.inline("", verdict, classes=["verdict", verdict.replace(" ", "-")])


class _FromResults(SphinxDirective):
    """A directive whose page is built again when the results that it reads change."""

    def results(self, name: str) -> dict[str, Any]:
        """The content of ``verdicts.json``.

        Raises
        ------
        Error
            There is no such experiment; said at the line of the page.
        """
        if name not in registry.names():
            msg = f"no experiment {name!r}; there are {', '.join(registry.names())}"
            raise self.error(msg)
        path = FIGURES / name / "verdicts.json"
        self.env.note_dependency(str(path))
        return read_verdicts(path)


class ExperimentDirective(_FromResults):
    """``.. experiment:: NAME``: what it is, in a list of fields."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Build the list."""
        name = self.arguments[0]
        document = self.results(name)
        module = registry.find(name)
        environment = document["environment"]
        data = environment["data"] or "none: inputs are drawn"
        fields: list[tuple[str, list[nodes.Node]]] = [
            ("What", [nodes.Text(module.TITLE)]),
            ("Paper", self._paper(module.PAPER)),
            ("Verdicts", [nodes.Text(counts(document["claims"]))]),
            ("Run", [nodes.literal("", f"python -m experiments {name}")]),
            (
                "Committed run",
                [
                    nodes.Text(
                        f"preset {document['preset']}, data {data}, {environment['seeds']} "
                        f"seed{'' if environment['seeds'] == 1 else 's'}, {environment['device']}, "
                        f"torch {environment['torch']}"
                    )
                ],
            ),
        ]
        found = nodes.field_list(classes=["experiment"])
        for label, content in fields:
            body = nodes.field_body("", nodes.paragraph("", "", *content))
            found += nodes.field("", nodes.field_name("", label), body)
        return [found]

    @staticmethod
    def _paper(text: str) -> list[nodes.Node]:
        match = ARXIV.search(text)
        if match is None:
            return [nodes.Text(text)]
        link = nodes.reference("", match[0], refuri=f"https://arxiv.org/abs/{match[1]}")
        return [nodes.Text(text[: match.start()]), link, nodes.Text(text[match.end() :])]


class ExperimentFigure(Figure, _FromResults):
    """``.. experiment-figure:: NAME/FIGURE``: a figure with the claims that it shows.

    ``:claims:`` are the ids of these claims, ``:alt:`` says what is to be seen. The content is the
    caption.
    """

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {
        "alt": directives.unchanged_required,
        "claims": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        """Build the figure, and below it the claims."""
        name, _, figure = self.arguments[0].partition("/")
        claims = {claim["id"]: claim for claim in self.results(name)["claims"]}
        path = FIGURES / name / f"{figure}.png"
        if not path.is_file():
            msg = f"{path.relative_to(ROOT)} is not there"
            raise self.error(msg)
        if not self.options.get("alt"):
            msg = f"{self.arguments[0]} has no :alt: text"
            raise self.error(msg)
        ids = self.options.pop("claims", "").split()
        unknown = [one for one in ids if one not in claims]
        if unknown or not ids:
            msg = f":claims: {unknown or 'is missing'}; {name} has {', '.join(claims)}"
            raise self.error(msg)
        up = "../" * (1 + self.env.docname.count("/"))
        self.arguments = [f"{up}figures/{name}/{figure}.png"]
        self.options["target"] = self.arguments[0]
        made = super().run()
        return [*made, self._claims([claims[one] for one in ids])]

    def _claims(self, claims: Sequence[Mapping[str, Any]]) -> nodes.bullet_list:
        found = nodes.bullet_list(classes=["shown-claims"])
        for claim in claims:
            line = nodes.paragraph("", "", verdict_mark(claim), nodes.Text(" "))
            line += [nodes.literal("", claim["id"]), nodes.Text(f" {claim['statement']} ")]
            line += nodes.inline("", f"Measured: {measured(claim)}.", classes=["measured"])
            found += nodes.list_item("", line)
        return found


class VerdictTable(_FromResults):
    """``.. verdict-table:: NAME``: all claims."""

    required_arguments = 1
    COLUMNS = (("verdict", 10), ("claim", 46), ("predicted", 22), ("measured", 22))

    def run(self) -> list[nodes.Node]:
        """Build the table."""
        claims = self.results(self.arguments[0])["claims"]
        table = nodes.table(classes=["verdicts"])
        group = nodes.tgroup(cols=len(self.COLUMNS))
        table += group
        for _, width in self.COLUMNS:
            group += nodes.colspec(colwidth=width)
        head = nodes.row()
        for label, _ in self.COLUMNS:
            head += nodes.entry("", nodes.paragraph("", label))
        group += nodes.thead("", head)
        body = nodes.tbody()
        group += body
        for claim in claims:
            body += self._row(claim)
        return [table]

    def _row(self, claim: Mapping[str, Any]) -> nodes.row:
        statement = nodes.paragraph("", "", nodes.literal("", claim["id"]))
        statement += nodes.Text(f" {claim['statement']}")
        source = nodes.paragraph("", claim["source"], classes=["source"])
        value = nodes.paragraph("", measured(claim))
        place = [nodes.paragraph("", claim["run"], classes=["source"])] if claim["run"] else []
        note = [nodes.paragraph("", claim["note"], classes=["source"])] if claim["note"] else []
        return nodes.row(
            "",
            nodes.entry("", nodes.paragraph("", "", verdict_mark(claim))),
            nodes.entry("", statement, source),
            nodes.entry("", nodes.paragraph("", predicted(claim))),
            nodes.entry("", value, *place, *note),
        )


def setup(app: Sphinx) -> dict[str, Any]:
    """Tell Sphinx of the directives."""
    app.add_directive("experiment", ExperimentDirective)
    app.add_directive("experiment-figure", ExperimentFigure)
    app.add_directive("verdict-table", VerdictTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

"""Formulas as MathML, which browsers draw themselves: no script, no font, no network."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

_ENVIRONMENT = re.compile(r"\\begin\{(\w+)\}.*?\\end\{\1\}", re.DOTALL)
# LaTeX that the translator does not know, in its words.
_SAME = {r"\dots": r"\ldots"}


def _translated(node: nodes.Element, *, as_block: bool) -> str:
    text = node.astext()
    for command, known in _SAME.items():
        text = text.replace(command, known)
    # Lines that are aligned, outside of matrices, which bring their own environment.
    if "&" in _ENVIRONMENT.sub("", text):
        text = rf"\begin{{aligned}}{text}\end{{aligned}}"
    try:
        return str(tex2mathml(text, as_block=as_block))
    except Exception as error:
        msg = f"this formula has no MathML ({error}): {text}"
        raise ExtensionError(msg) from error


def _inline(translator: Any, node: nodes.Element) -> None:
    translator.body.append(_translated(node, as_block=False))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.Element) -> None:
    translator.body.append(f'<div class="math">{_translated(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Tell Sphinx of the renderer, which ``html_math_renderer`` then names."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

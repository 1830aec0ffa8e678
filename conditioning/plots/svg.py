"""Figures as SVG for a page: small, the same for the same numbers, and coloured by the page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure

from conditioning.plots.axes import style

# By role. In the SVG each becomes a CSS variable with this colour behind it: a page in the dark
# sets the variables, and the file alone still has its colours.
ROLES = {
    "ink": "#20262e",
    "muted": "#66707c",
    "grid": "#e2e6ea",
    "first": "#1f6fb2",
    "second": "#c4521a",
    "third": "#2b8467",
    "alarm": "#b3261e",
}
INK, MUTED, GRID, FIRST, SECOND, THIRD, ALARM = ROLES.values()

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
# Written out by some versions of matplotlib, in the shorthand by others.
_FAMILY = re.compile(r"(font-family: |font: [^;]*?\d(?:\.\d+)?px )[^;]*")


@contextmanager
def page_style() -> Iterator[None]:
    """The look of figures for a page: text as text, no background, colours by their role."""
    with style():
        mpl.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "conditioning",
                "font.family": "sans-serif",
                "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: one layout anywhere
                "font.size": 10.5,
                "axes.titlesize": 11.5,
                "axes.labelsize": 10.5,
                "xtick.labelsize": 10,
                "ytick.labelsize": 10,
                "legend.fontsize": 10,
                "axes.titleweight": "bold",
                "axes.edgecolor": MUTED,
                "axes.labelcolor": INK,
                "axes.linewidth": 0.8,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.facecolor": "none",
                "figure.facecolor": "none",
                "grid.color": GRID,
                "text.color": INK,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "xtick.labelcolor": INK,
                "ytick.labelcolor": INK,
                "legend.labelcolor": INK,
                "axes.formatter.use_mathtext": False,
                "axes.unicode_minus": True,
            }
        )
        yield


def to_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as one ``<svg>`` element, to stand inside an HTML page.

    Parameters
    ----------
    figure : Figure
        Drawn under :func:`page_style`; call this under it, too.
    name : str
        Prefix of the ids, so that several figures can stand in one page: letters, digits, dashes.
    title, description : str
        What those who do not see it are told.

    Returns
    -------
    str
        The same text for the same figure. Colours of ``ROLES`` are ``var(--plot-ROLE, ...)``, the
        font is ``var(--plot-font, ...)``.
    """
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with warnings.catch_warnings():
        # The browser has its own fonts: a name in Chinese is drawn, whatever DejaVu lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    for child in root.findall(f"{_SVG}metadata"):
        root.remove(child)
    _own_ids(root, name)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if _LINK in element.attrib:
            element.set("href", element.attrib.pop(_LINK))
        if "style" in element.attrib:
            element.set("style", _by_role(element.attrib["style"]))
    for number, (tag, text) in enumerate((("title", title), ("desc", description))):
        child = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        child.text = text
        root.insert(number, child)
    size = {"width": root.attrib.pop("width"), "height": root.attrib.pop("height")}
    root.attrib.update(
        {
            "xmlns": _SVG.strip("{}"),
            "role": "img",
            "aria-labelledby": f"{name}-title {name}-desc",
            # A page may give it any width; alone it has the one it was drawn for.
            **{key: value.removesuffix("pt") for key, value in size.items()},
        }
    )
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode")).strip()


def _own_ids(root: ElementTree.Element, name: str) -> None:
    """Drop the ids that nothing refers to and prefix the others."""
    used = set()
    pattern = re.compile(r"url\(#([^)]+)\)")
    for element in root.iter():
        used.update(pattern.findall(" ".join(element.attrib.values())))
        used.add(element.attrib.get(_LINK, "#")[1:])
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id" and value not in used:
                del element.attrib[key]
            elif key == "id":
                element.set(key, f"{name}-{value}")
            elif key == _LINK:
                element.set(key, f"#{name}-{value[1:]}")
            else:
                element.set(key, pattern.sub(rf"url(#{name}-\1)", value))


def _by_role(text: str) -> str:
    for role, color in ROLES.items():
        text = text.replace(color, f"var(--plot-{role}, {color})")
    return _FAMILY.sub(r"\1var(--plot-font, sans-serif)", text)

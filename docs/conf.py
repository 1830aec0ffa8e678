"""How Sphinx builds the documentation: ``make docs``. No page needs the network to be built."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The page of an experiment reads its module, which a wheel has but a mere checkout has not.
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import conditioning  # noqa: E402

project = "conditioning"
author = "The conditioning developers"
copyright = author
release = version = conditioning.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "experiment_pages",
    "mathml",
]
exclude_patterns = ["_build"]
suppress_warnings: list[str] = []

# -- reference ------------------------------------------------------------------------------
autosummary_generate = False
autodoc_member_order = "bysource"
# Types are in the docstrings, with their shapes and units; signatures would say them twice.
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False
python_use_unqualified_type_names = True
# With -n every reference to this package must be found. Others have no inventory here: fetching
# theirs would need the network.
nitpick_ignore_regex = [("py:.*", r"(?!conditioning\.|experiments\.).*")]

# -- pages ----------------------------------------------------------------------------------
html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"conditioning {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
html_theme_options = {"sidebar_hide_name": False}
pygments_style = "default"
pygments_dark_style = "monokai"

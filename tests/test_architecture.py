"""Imports go one way, and only the figures import what draws."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From left to right: a module may import those before it. Modules of one entry are a package.
ORDER = (
    "errors", "memory", "jacobi", "distributed", "operators", "krylov", "spectrum", "blocks",
    "norms", "singular", "procrustes", "theory", "plots", "checkup", "cli",
    "__main__",
)  # fmt: skip
FILES = sorted((ROOT / "conditioning").rglob("*.py"))


def imports_of(path, *, at_run_time):
    """Absolute names that a file imports; without those for type checkers or inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = tree.body if at_run_time else ast.walk(tree)
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def place(path):
    """The top-level module of a file of the library."""
    return path.relative_to(ROOT / "conditioning").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_imports_one_to_its_right(path):
    here = place(path)
    if here == "__init__":
        return
    assert here in ORDER, f"give {here} its place in the order"
    for name in imports_of(path, at_run_time=True):
        if name.startswith("conditioning."):
            assert ORDER.index(name.split(".")[1]) <= ORDER.index(here), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_figures_import_what_draws_and_nothing_imports_the_experiments(path):
    names = [name.split(".")[0] for name in imports_of(path, at_run_time=True)]
    assert "experiments" not in names
    if place(path) != "plots":
        assert not {"seaborn", "matplotlib"} & set(names)


def test_importing_the_library_loads_nothing_slow():
    """Nor does writing a product down: half a second of imports would make it pay much later."""
    slow = ["scipy", "pandas", "matplotlib", "seaborn", "sklearn", "torch._dynamo", "sympy"]
    code = f"""
import sys, torch
already = set(sys.modules)
import conditioning, conditioning.cli.parser
print([name for name in {slow} if name in set(sys.modules) - already])
batch = torch.ones(2, 3), torch.ones(2, 1)
H = conditioning.HessianOperator(
    torch.nn.Linear(3, 1), torch.nn.MSELoss(), batch, engine="linearized"
)
H @ torch.ones(4)
assert H.engine.name == "linearized"
print([name for name in sys.modules if name.startswith("torch._dynamo.")])
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["[]", "[]"]


@pytest.mark.parametrize("folder", ["conditioning", "experiments"])
def test_files_have_one_topic(folder):
    sizes = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert max(sizes.values()) <= 500, max(sizes, key=sizes.get)

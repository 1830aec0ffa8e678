# Everything a fresh machine needs is git, make and Python >= 3.10 with its venv module.
#
#   make PYTHON=python3.12 test           another interpreter
#   make PIP_ARGS="..." reproduce         further options for pip, for instance
#       "--extra-index-url https://download.pytorch.org/whl/cpu"  for a small CPU-only torch
#   make ARGS="--data mnist" reproduce    further options for the experiments

PYTHON ?= python3
VENV ?= .venv
PEERS := .venv-peers
DIST ?= dist
DOCS ?= docs/_build/html
PIP_ARGS ?=
ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help reproduce bench bench-hessian bench-quick peers test lint docs wheel clean

help:  ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

reproduce: $(VENV)/.installed-experiments  ## Install, measure, print the verdicts, draw the figures
	$(BIN)/python -m experiments shortcut_depth $(ARGS)
	$(BIN)/python -m experiments shortcut_training $(ARGS)
	$(BIN)/python -m experiments norm_preservation $(ARGS)
	$(BIN)/python -m experiments procrustes_resnet $(ARGS)
	$(BIN)/python -m experiments tau_scaling $(ARGS)
	$(BIN)/python -m experiments large_depth $(ARGS)
	$(BIN)/python -m experiments shortcut_importance $(ARGS)

bench: $(VENV)/.installed-bench  ## Install other tools too, and measure what tracking and projection cost
	$(BIN)/python -m benchmarks.gradient_norms --peers $(ARGS)
	$(BIN)/python -m benchmarks.procrustes $(ARGS)
	$(BIN)/python -m benchmarks.cost

# Other tools for Hessians live apart: what they bring along must not change what is measured here.
bench-hessian: $(VENV)/.installed-bench peers  ## Measure Hessian products beside other tools (40 min)
	$(BIN)/python -m benchmarks.hessian $(ARGS)
	$(BIN)/python -m benchmarks.hessian_tables

bench-quick: $(VENV)/.installed-bench peers  ## The same on small problems (5 min); changes no table
	$(BIN)/python -m benchmarks.hessian --quick $(ARGS)

peers: $(PEERS)/.installed  ## Install other tools for Hessians into .venv-peers

test: $(VENV)/.installed-test  ## Install and run the tests
# One thread for each of the two processes and of what they start. Files in their order, not by
# the number of their tests: files of few, long tests would run alone at the end.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.installed-lint  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy conditioning experiments

# Warnings are errors, a reference to a name that is not there among them. It fetches nothing.
docs: $(VENV)/.installed-docs  ## Build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -b html -n -W --keep-going --quiet $(ARGS) docs $(DOCS)
	@echo "the documentation is in $(DOCS)/index.html"

# The build runs without isolation, so that its setuptools is the pinned one. Going through the
# source archive keeps files of the working tree out of the wheel that nobody ships.
wheel: $(VENV)/.installed-lint  ## Build, check, install and import the wheel
	rm -rf $(DIST) $(VENV)-wheel
	$(BIN)/python -m build --no-isolation --outdir $(DIST) .
	$(BIN)/twine check --strict $(DIST)/*
	$(BIN)/python .ci/check_wheel.py $(DIST)/*.whl
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python $(PIP_INSTALL) $(DIST)/*.whl
	cd $(VENV)-wheel && bin/python -c "import conditioning, experiments; print('imported', conditioning.__version__)"
	cd $(VENV)-wheel && bin/python -m experiments
	cd $(VENV)-wheel && bin/conditioning --version
	rm -rf $(VENV)-wheel

clean:  ## Remove the environment, builds and caches
	rm -rf $(VENV) $(VENV)-wheel $(PEERS) $(DIST) build docs/_build *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=...") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra: a second call has nothing to do until a requirement changes.
$(VENV)/.installed-%: setup.cfg setup.py constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP_INSTALL) -e ".[$*]"
	@touch $@

# The last three would bring torchvision, which they do not import for a Hessian.
$(PEERS)/.installed: setup.cfg setup.py constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP_INSTALL) -e ".[peers]"
	$(PEERS)/bin/python $(PIP_INSTALL) --no-deps curvlinops-for-pytorch hessian-eigenthings backpack-for-pytorch
	@touch $@

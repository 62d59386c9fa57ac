# One command for each job; `make` alone lists them. A job makes .venv first if there is none.
#
#   make demo PYTHON=python3.12              the Python that makes .venv (3.10 or newer)
#   make test WORKERS=1 ARGS="-k golden"     how many processes, and anything that pytest takes

PYTHON ?= python3
OLDEST_PYTHON ?= python3.10
WORKERS ?= 2
ARGS ?=

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
BIN := .venv/bin
READY := .venv/.ready
OLDEST := build/oldest

# With `--constraint LOCK` only what the project asks for is installed, at the versions of the lock.
INSTALL := -m pip install --disable-pip-version-check
TEST := -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help env demo test docs shapes lint format lock lock-oldest test-oldest

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ------------------------------------------------------------------------------ environment
env: $(READY) ## the environment .venv with the project in it

# Newer than the locks and pyproject.toml once they are installed, so a second call is immediate.
$(READY): pyproject.toml requirements/lock.txt requirements/oldest.txt | $(BIN)/python
	@echo "Installing into .venv: several GB with PyTorch, some minutes, once."
	lock=$$($(BIN)/python -c 'import sys; print(("oldest", "lock")[sys.version_info >= (3, 11)])'); \
		$(BIN)/python $(INSTALL) --constraint requirements/$$lock.txt --editable '.[dev]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else \
		"dino needs Python 3.10 or newer, for example: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

# ------------------------------------------------------------------------------ every day
demo: $(READY) ## train on the embedded photographs: a table, and runs/demo/report.html
	$(BIN)/dino pretrain demo --data demo --out runs/demo

test: $(READY) ## every test
	$(BIN)/python $(TEST)

shapes: $(READY) ## every test, with all tensor signatures of dino checked at run time
	PYTHONPATH=tests $(BIN)/python $(TEST) -p helpers.checked \
		--jaxtyping-packages=dino,helpers.checked.check

docs: $(READY) ## the documentation as a site that needs no network: build/docs/index.html
	$(BIN)/python -m sphinx --fail-on-warning --quiet --builder html docs build/docs
	@echo build/docs/index.html

lint: $(READY) ## format, lint, types, import floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py

format: $(READY) ## rewrite what can be rewritten
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# ------------------------------------------------------------------------------ versions
# What pip would install, one name==version a line. No host and no hash: a lock says which versions,
# your own pip settings say from where.
LOCKED := sed -n 's/^Would install //p' | tr ' ' '\n' | sed 's/-\([^-]*\)$$/==\1/' \
	| grep -v '^dino[-_]ssl=' | LC_ALL=C sort -f
RESOLVE := $(INSTALL) --dry-run --ignore-installed

lock: $(BIN)/python ## requirements/lock.txt anew: the newest of all that pyproject.toml allows
	@mkdir -p build
	$< $(RESOLVE) '.[dev]' | $(LOCKED) > build/lock.txt
	@{ echo "# The newest versions that pyproject.toml allows, made by 'make lock' and used by"; \
		echo "# 'make' on Python 3.11 and newer. Linux names more packages than other systems need."; \
		cat build/lock.txt; } > requirements/lock.txt

lock-oldest: $(OLDEST)/bin/python ## requirements/oldest.txt anew: the lower bounds themselves
	grep -oE '"[a-z][a-z-]*>=[0-9.]+"' pyproject.toml | tr -d '"' | sed 's/>=/==/' > build/bounds.txt
	$< $(RESOLVE) --only-binary :all: --constraint build/bounds.txt '.[dev]' \
		| $(LOCKED) > build/oldest.txt
	@{ echo "# The lower bounds of pyproject.toml, made by 'make lock-oldest' with Python 3.10: used by"; \
		echo "# 'make test-oldest', and by 'make' on Python 3.10."; \
		cat build/oldest.txt; } > requirements/oldest.txt

test-oldest: $(OLDEST)/.ready ## every test with the oldest Python and the oldest versions
	$(OLDEST)/bin/python $(TEST)

$(OLDEST)/bin/python:
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$@ $(INSTALL) --upgrade pip

$(OLDEST)/.ready: pyproject.toml requirements/oldest.txt | $(OLDEST)/bin/python
	$(OLDEST)/bin/python $(INSTALL) --constraint requirements/oldest.txt --editable '.[dev]'
	@touch $@

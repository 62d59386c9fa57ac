# One command for each job; `make` alone lists them. Every job makes .venv first if there is none.
#
#   make demo PYTHON=python3.12     the Python that makes .venv (3.10 or newer)
#   make test WORKERS=1 ARGS="-k golden"

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
OLDEST := build/oldest

# pip install -c LOCK: what is installed has the version of the lock, and nothing else is installed.
INSTALL := -m pip install --disable-pip-version-check
PYTHON_IS_OLD := -c 'import sys; sys.exit(sys.version_info >= (3, 11))'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env demo test lint format lock lock-oldest test-oldest clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1 | /p' $(MAKEFILE_LIST) | column -t -s '|'

env: $(STAMP) ## the environment .venv, with the project in it
$(STAMP): pyproject.toml requirements/lock.txt requirements/oldest.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"dino needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (PyTorch comes along: several GB, some minutes, once)."
	if $(BIN)/python $(PYTHON_IS_OLD); then lock=lock; else lock=oldest; fi; \
		$(BIN)/python $(INSTALL) --constraint requirements/$$lock.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## train on the embedded photographs: a table and runs/demo/report.html
	$(BIN)/dino pretrain demo --data demo --out runs/demo

test: $(STAMP) ## every test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(STAMP) ## format, lint, types, import floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py tests/test_imports.py

format: $(STAMP) ## rewrite what can be rewritten
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(STAMP) ## requirements/lock.txt anew: the newest of all that pyproject.toml allows
	$(call write_lock,$(BIN)/python,$(BIN)/python,-e '.[dev]',lock)

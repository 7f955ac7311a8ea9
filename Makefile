# `make demo` and `make test` need Python 3.10 or newer, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
DEVELOPING = $(VENV)/.developing
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-thorough check docs clean

help:
	@echo "make demo            install into $(VENV), train a small model for about a minute, let it write"
	@echo "make test            install into $(VENV), run the test suite"
	@echo "make test-thorough   the tests that take long, or need Slurm, Open MPI or root"
	@echo "make check           lint, format and types"
	@echo "make docs            write the generated pages of docs/ anew"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[plot]'
	@touch $@

$(DEVELOPING): $(INSTALLED)
	$(INSTALL) -e '.[dev]'
	# For the schemas that they publish; what they would run with is not needed.
	$(INSTALL) --no-deps kubeflow-training skypilot
	@touch $@

demo: $(INSTALLED)
	$(BIN)/dtt train --name demo --fresh
	@echo
	$(BIN)/dtt generate runs/demo --prompt "Once upon a time" --num-samples 3 --seed 1
	@echo
	@echo "The picture of the loss is runs/demo/loss.png"

test: $(DEVELOPING)
	$(BIN)/python -m pytest

test-thorough: $(DEVELOPING)
	$(BIN)/python -m pytest -m thorough

check: $(DEVELOPING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/dtt config docs -o docs/configuration.md

clean:
	rm -rf $(VENV) build *.egg-info

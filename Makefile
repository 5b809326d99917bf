# `make demo` and `make test` set up what they need; nothing has to be installed by hand but
# Python 3.11 or later and make. pip's own configuration (mirrors, proxies) is honoured.
.DEFAULT_GOAL := help
.PHONY: help demo test soak lint format lock clean

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)) python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes
PACKAGES := comms stages pipar_jax configs experiments tests
# Arguments for pytest, for instance: make test ARGS="tests/comms -k frame"
ARGS ?=

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.base  ## train with FL, SL, SFL and PiPar on this machine and compare (three minutes)
	@$(BIN)/pipar quickstart

test: $(VENV)/.dev  ## run the tests, two files at a time (ARGS="-n 0": one)
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

soak: $(VENV)/.dev  ## run full-size tests and hold durations to limits: long, on a quiet machine
	@$(BIN)/python -m pytest -m "soak or timed" $(ARGS)

lint: $(VENV)/.dev  ## check style and types
	@$(BIN)/ruff format --check $(PACKAGES)
	@$(BIN)/ruff check $(PACKAGES)
	@$(BIN)/mypy

format: $(VENV)/.dev  ## format the sources
	@$(BIN)/ruff check --fix --quiet $(PACKAGES) || true
	@$(BIN)/ruff format $(PACKAGES)

lock: $(VENV)/.dev  ## update the lock files from pyproject.toml
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(call compile,requirements.txt)
	@$(call compile,requirements-dev.txt,--extra dev --constraint requirements.txt)

define compile
	echo '# Made by `make lock`: versions and hashes for every Python from 3.11; names no host.' > $(1)
	$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
		--no-annotate --no-header $(2) >> $(1)
endef

clean:  ## remove the environment, caches and build products; runs/ stays
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find $(PACKAGES) -type d -name __pycache__ -prune -exec rm -rf {} +

# One stamp per lock file, written last, so that an interrupted set-up starts again.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
		"pipar_jax needs Python 3.11 or later, and $(PYTHON) is %d.%d. Install a later one, or name it:" \
		" make PYTHON=/path/to/python3.12" % sys.version_info[:2])'
	@echo "Setting up $(VENV) with $(PYTHON) (once)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) -m venv failed. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

# The project itself comes last, without dependencies: it is built by the locked setuptools, and
# editable, so that changes take effect at once. Its command is $(BIN)/pipar.
$(VENV)/.base: $(VENV)/.python requirements.txt pyproject.toml
	@echo "Installing the locked requirements (a few minutes the first time)"
	@$(PIP) -r requirements.txt
	@awk '/^setuptools==/, !/\\$$/' requirements-dev.txt | $(PIP) -r /dev/stdin
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-index \
		--no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base requirements-dev.txt
	@echo "Installing the locked tools for development"
	@$(PIP) -r requirements-dev.txt
	@touch $@

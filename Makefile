# Everything works from a fresh clone with Python 3.11 and make alone: each target makes what it needs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
EXTRAS := hf,diffusion,graph,data,export,api,bench,docs,dev
# libraries whose numbers the tests compare with; what they need beside is there, but for torchvision
PEERS := torchdistill pytorch-metric-learning

.PHONY: help venv run test lint types tests vision docs verify tables clean

help:  ## show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 16

venv: $(READY)  ## create the environment in .venv, with pinned versions

$(READY): pyproject.toml constraints.txt
	@echo "creating the environment in .venv (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(PEERS)
	@touch $(READY)

run: $(READY)  ## the main job on the embedded digits, a tour through systems of every family, and a report
	@$(BIN)/still tour

test: lint types tests  ## lint, types, floors, tests

lint: $(READY)
	@echo "lint"
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports

types: $(READY)
	@echo "types"
	@$(BIN)/mypy

tests: $(READY)
	@echo "tests (two workers)"
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest

vision:  ## timm and torchvision with the systems on them, in an environment of their own: some GB
	@test -x .venv-vision/bin/python || $(PYTHON) -m venv .venv-vision
	@.venv-vision/bin/pip install --quiet --disable-pip-version-check torch torchvision timm
	@.venv-vision/bin/pip install --quiet --disable-pip-version-check -e '.[hf,vision]' pytest pytest-xdist beartype
	@.venv-vision/bin/python -m pytest -n 0 tests/test_hub_vision.py tests/test_systems_vision.py

docs: $(READY)  ## build the site into site/, offline, warnings as errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

verify: $(READY)  ## measure every claim over seeds 0 to 4, all arms (long; it goes on where it was)
	@$(BIN)/still verify --all --full

tables: $(READY)  ## write the tables of README.md anew from results/
	@$(BIN)/python -m stillhouse.report.tables README.md

bench: $(READY)  ## speed and memory beside TRL and bare PyTorch loops (a few minutes)
	@$(BIN)/python -m benchmarks

clean:  ## remove the environment, caches of the tools and runs
	rm -rf .venv .venv-vision runs site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# Targets that run Python set up .venv first; to use another interpreter: make PYTHON=python3.12 ...
PYTHON ?= python3
TABLE ?= digits
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
LOCK_VENV := .venv-lock
WHEEL_VENV := .venv-wheel

.DEFAULT_GOAL := help
.PHONY: help setup train reproduce-table verify status claims sweep benchmark check-gpu docs wheel test lint lock clean

help: ## shows this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'
	@echo "  TABLE=digits|mnist|cifar10|... (configs/table) selects the table; ARGS='...' adds Hydra overrides, such as ARGS='data.root=/data'"

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
	touch $@

setup: $(VENV)/.installed ## creates .venv with the exact versions of requirements.lock

train: setup ## trains one network: make train ARGS='arrangement=mosaic data=mnist seed=3'
	$(BIN)/python scripts/train.py $(ARGS)

reproduce-table: setup ## performs the unrecorded runs of TABLE, and writes the table and its figure
	$(BIN)/python scripts/reproduce_table.py table=$(TABLE) $(ARGS)

verify: setup ## performs all runs of TABLE again, in runs/verify, and compares them with results/tables; fails if they differ
	$(BIN)/python scripts/reproduce_table.py table=$(TABLE) --verify $(ARGS)

status: setup ## shows which runs of TABLE are done, running, failed or left to do
	$(BIN)/python scripts/reproduce_table.py table=$(TABLE) --status $(ARGS)

claims: setup ## writes a verdict on each claim of the paper from the committed records: results/CLAIMS.md
	$(BIN)/python scripts/claims.py $(ARGS)

sweep: setup ## example of --multirun on all cores: arrangement x seed, then one CSV file of all runs
	$(BIN)/python scripts/train.py -m hydra/launcher=cores arrangement=gabor,mosaic seed=0,1 paths.runs=runs/sweep $(ARGS)
	$(BIN)/python scripts/collect.py runs=runs/sweep file=results/sweep.csv

benchmark: setup ## measures the cost of analytic layers relative to plain ones: results/benchmarks/
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gabornet==0.2.0
	$(BIN)/python benchmarks/layer.py $(ARGS)
	$(BIN)/python benchmarks/factored.py $(ARGS)

check-gpu: setup ## tests a CUDA device and measures costs on it: results/benchmarks/<device>.md; ARGS='data=/data' to find MNIST
	$(BIN)/python benchmarks/check_gpu.py $(ARGS)

docs: setup ## builds the documentation as a site: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: setup ## builds and checks the package acl: dist/; installs it into an empty environment and runs an example there
	rm -rf dist $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/pip install --quiet --disable-pip-version-check build twine
	$(WHEEL_VENV)/bin/python -m build --quiet --outdir dist .
	$(WHEEL_VENV)/bin/twine check --strict dist/*
	$(PYTHON) -m venv --clear $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/pip install --quiet --disable-pip-version-check dist/*.whl scikit-learn
	cd $(WHEEL_VENV) && bin/python ../examples/minimal.py

test: setup ## runs all tests; ARGS='-m slow' for the slow ones, ARGS='-m slurm' on a machine with Slurm
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

lint: setup ## checks formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# uv does not read pip's configuration; another package index is given by its variables, such as UV_INDEX_URL.
lock: ## resolves requirements.lock for Linux, macOS and Windows; ARGS=--upgrade takes the newest versions
	$(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/pip install --quiet --disable-pip-version-check uv==0.13.9
	$(LOCK_VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --extra dev --custom-compile-command 'make lock' --output-file requirements.lock pyproject.toml $(ARGS)

clean: ## removes .venv, caches and what was built; keeps runs/, data/ and results/
	rm -rf $(VENV) $(LOCK_VENV) $(WHEEL_VENV) build dist site .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

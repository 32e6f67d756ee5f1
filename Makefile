# The first Python that is new enough; override with `make PYTHON=/path/to/python3.12 test`.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# How many processes test side by side: most tests wait for Kafka, so more than there are processors.
WORKERS ?= 6
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-containers test-cluster test-postgres campaign lint format venv clean

help: ## Show what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## Orders against killed and frozen processes, on a real Kafka and PostgreSQL; then count
	@$(BIN)/python -m examples.shop.demo

# Hundreds of processes start: where bytecode is switched off, each would compile all it imports.
test: export PYTHONDONTWRITEBYTECODE =
test: lint ## Everything: lint, types, import rules, tests (pass T='tests/cli -k once' for some of them)
	@echo "== tests"
	@$(BIN)/python -m pytest $(or $(T),-n $(WORKERS) --durations=15)

test-containers: $(READY) ## docker-compose.yml, Dockerfile and testcontainers on a real container engine (INSTALL=1: with what it needs)
	@echo "== container engine and images"
	@$(BIN)/python -m tests.containers.build_images $(if $(INSTALL),--install)
	@echo "== containers"
	@$(BIN)/python -m pytest tests/containers --durations=15

test-cluster: $(READY) ## Transforms, workers and relay on three brokers that die, freeze and move: minutes, on a quiet machine
	@$(BIN)/python -m pytest tests/cluster --durations=15

test-postgres: $(READY) ## The spine on the oldest and newest PostgreSQL and through PgBouncer (pass PARTS='14 pgbouncer' for some)
	@$(BIN)/python -m tests.postgres.tier $(PARTS) -- -n $(WORKERS)

# Each goes on where it was stopped, and adds to docs/campaign/.
MINUTES ?= 10
campaign: $(READY) ## Crashes without end: forked processes, models, client errors, the full stack, three brokers, cuts, planted bugs; then the report (MINUTES=10)
	@echo "== forked"
	@$(BIN)/python -m tests.campaign.forked --kills 1000000000 --minutes $(MINUTES)
	@echo "== model"
	@$(BIN)/python -m tests.campaign.model
	@echo "== client errors"
	@$(BIN)/python -m tests.campaign.client_errors --check
	@echo "== full stack"
	@$(BIN)/python -m tests.campaign.full --minutes $(MINUTES)
	@$(BIN)/python -m tests.campaign.full --minutes $(MINUTES) --seed 2 --pairs
	@$(BIN)/python -m tests.campaign.full --minutes $(MINUTES) --seed 3 --outages
	@echo "== three brokers"
	@$(BIN)/python -m tests.cluster.campaign --minutes $(MINUTES)
	@echo "== cuts"
	@$(BIN)/python -m tests.campaign.cuts --minutes $(MINUTES)
	@echo "== planted bugs"
	@$(BIN)/eo dev run -- $(BIN)/python -m tests.campaign.mutation --minutes $(MINUTES)
	@$(BIN)/python -m tests.campaign.report

lint: $(READY) ## Style, types and import rules
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== mypy"
	@$(BIN)/mypy
	@echo "== import rules"
	@$(BIN)/lint-imports

format: $(READY) ## Write the code as ruff would
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

venv: $(READY) ## A virtual environment with everything installed

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Install one, or: make PYTHON=/path/to/python ..." >&2; exit 3; }
	@echo "== virtual environment $(VENV) with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) -m venv failed: on Debian and Ubuntu install python3-venv." >&2; exit 3; }
	@# Dependency groups need pip 25.1; what comes with Python is often older.
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --editable '.[dev,testing]' --group tools
	@touch $(READY)

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

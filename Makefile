# What one can do here. `make demo` and `make test` need Python 3.11 or newer, pip and make; they make .venv themselves.
PYTHON ?= python3
DEMO_ARGS ?=
TEST_ARGS ?=
REPOSITORY ?= model_repository
TRITON_ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
RUNTIME := .venv/triton
BASE := .venv-base/.installed
CODE := train serve export commands cli.py app.py tests benchmarks

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check bench triton triton-runtime fmt

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

demo: $(INSTALLED) | try-runtime ## the whole path, from pictures to the web page (DEMO_ARGS="--images DIR --minutes 10 --no-app")
	$(BIN)/simclr demo $(DEMO_ARGS)

test: $(INSTALLED) $(BASE) $(RUNTIME) ## every test, with the real Triton server, a browser and a torch-free install
	SIMCLR_BASE_PYTHON=$(CURDIR)/.venv-base/bin/python $(BIN)/python -m pytest $(TEST_ARGS)

test-slow: ## as test, with the long tests (kill -9, bit flips, a full disk, many processes) at their full length
	$(MAKE) test TEST_ARGS="--full tests/slow $(TEST_ARGS)"

check: $(INSTALLED) ## lint, format, types, import rules, unit and contract tests
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports > .lint-imports.log || { cat .lint-imports.log; exit 1; }
	$(BIN)/python -m pytest -q tests/unit tests/contract

bench: $(INSTALLED) .venv-peers/.installed ## loss, augmentation and pretraining beside lightly (about an hour)
	$(BIN)/python benchmarks/loss.py --peer-python .venv-peers/bin/python --repeats 3 --timeout-s 150
	$(BIN)/python benchmarks/augment.py --peer-python .venv-peers/bin/python
	$(BIN)/python benchmarks/throughput.py --peer-python .venv-peers/bin/python
	$(BIN)/python benchmarks/pretrain.py --peer-python .venv-peers/bin/python

triton: $(INSTALLED) $(RUNTIME) ## serve REPOSITORY=model_repository with the real Triton server
	$(BIN)/simclr triton --repository $(REPOSITORY) $(TRITON_ARGS)

triton-runtime: $(RUNTIME) ## install the Triton server that needs no container (Linux x86-64)

fmt: $(INSTALLED) ## format the code
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $$($(PYTHON) --version) is too old, 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,dev]'
	@touch $@

$(RUNTIME): | $(INSTALLED)
	$(BIN)/python -m serve.triton_server --install

# The demo goes on in-process where the server cannot be installed, and says so.
.PHONY: try-runtime
try-runtime: $(INSTALLED)
	@$(MAKE) --no-print-directory $(RUNTIME) || true

$(BASE): pyproject.toml $(wildcard serve/*.py serve/*/*.py commands/*.py) cli.py app.py
	$(PYTHON) -m venv .venv-base
	.venv-base/bin/python -m pip install --quiet --disable-pip-version-check .
	@touch $@

.venv-peers/.installed: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt
	@touch $@

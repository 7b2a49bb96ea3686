# make demo       a search on scikit-learn's digits, start to end, on this machine
# make test       the core tests (a few minutes)
# make test-all   every test this machine can run; what it cannot run is named at the end
# make lint       ruff and mypy
# make venv       only the environment in .venv, with everything the tests need
# make bench-venv the same, with the packages that studies/bench compares hpsched with
# make clean      remove .venv, caches, builds and the demo's folder
#
# PYTHON=python3.12 chooses another interpreter (3.11 or newer); DEMO_ARGS and PYTEST_ARGS are
# handed on. Once installed, nothing here needs the network.

PYTHON ?= python3
DEMO_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --constraint constraints.txt
CORE := not slow and not gpu and not browser and not mariadb and not bench

.PHONY: demo test test-all lint venv bench-venv clean

demo: $(VENV)/.installed-demo
	$(BIN)/hpsched demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 -m "$(CORE)" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(VENV)/.installed-dev

bench-venv: $(VENV)/.installed-bench

# pip leaves alone what is installed and satisfies the ranges.
$(VENV)/.installed-demo: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing hpsched and the demo's requirements into $(VENV)"
	$(INSTALL) --editable '.[demo,dashboard]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing hpsched and what its tests need into $(VENV)"
	$(INSTALL) --editable '.[demo,dashboard,postgres,mysql,dev]'
	@touch $@ $(VENV)/.installed-demo

BENCH_REQUIREMENTS := $(wildcard studies/bench/requirements*.txt)
$(VENV)/.installed-bench: $(VENV)/.installed-dev $(BENCH_REQUIREMENTS)
	@echo "Installing the packages of studies/bench into $(VENV)"
	$(INSTALL) --requirement studies/bench/requirements.txt \
	    --requirement studies/bench/requirements-search.txt
	$(INSTALL) --no-deps --requirement studies/bench/requirements-no-deps.txt \
	    --requirement studies/bench/requirements-search-no-deps.txt
	@touch $@

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { \
	    echo "No '$(PYTHON)' here: install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "hpsched needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "Name a newer one: make PYTHON=python3.12" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "'$(PYTHON)' cannot make environments: install its venv module (Debian: python3-venv)." >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist hpsched-demo .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# make demo       a search on scikit-learn's digits, start to end, on this machine
# make test       the core tests (a few minutes)
# make test-all   every test this machine can run; what it cannot run is named at the end
# make lint       ruff and mypy
# make venv       only the environment in .venv, with everything the tests need
# make docs       the documentation's pages, in build/docs
# make ray-venv   the environment, with Ray, for the tests of `worker attach --ray`
# make frameworks-venv  the same, with the training frameworks and trackers of hpsched/integrations
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
CORE := not slow and not gpu and not browser and not mariadb and not bench and not frameworks

.PHONY: demo test test-all lint docs venv ray-venv frameworks-venv bench-venv clean

demo: $(VENV)/.installed-demo
	$(BIN)/hpsched demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 -m "$(CORE)" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-ray $(VENV)/.installed-bench $(VENV)/.installed-frameworks
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx -W --keep-going -n -q docs build/docs
	@echo "The documentation is in build/docs/index.html"

venv: $(VENV)/.installed-dev

ray-venv: $(VENV)/.installed-ray

frameworks-venv: $(VENV)/.installed-frameworks

bench-venv: $(VENV)/.installed-bench

# pip leaves alone what is installed and satisfies the ranges.
$(VENV)/.installed-demo: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing hpsched and the demo's requirements into $(VENV)"
	$(INSTALL) --editable '.[demo,dashboard]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing hpsched and what its tests need into $(VENV)"
	$(INSTALL) --editable '.[demo,dashboard,postgres,mysql,docs,dev]'
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-ray: $(VENV)/.installed-dev
	@echo "Installing Ray into $(VENV)"
	$(INSTALL) --editable '.[ray]'
	@touch $@

# fastai and its declared requirements, less torchvision, are among those of studies/bench.
FINDERS := studies/bench/requirements.txt
FINDERS_NO_DEPS := studies/bench/requirements-no-deps.txt
$(VENV)/.installed-frameworks: $(VENV)/.installed-dev $(FINDERS) $(FINDERS_NO_DEPS)
	@echo "Installing training frameworks and trackers into $(VENV)"
	$(INSTALL) --editable '.[lightning,transformers,keras,ignite,tensorboard,mlflow,wandb]' \
	    'hydra-core>=1.3' --requirement $(FINDERS)
	$(INSTALL) --no-deps --requirement $(FINDERS_NO_DEPS)
	@touch $@

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

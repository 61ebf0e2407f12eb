# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make quickstart   train, probe and print results on built-in scenes
#   (make quickstart-geodit: the same for the vision-language model)
#   make test         the test suite and the linter
# and `make slow` runs the heavier checks that `make test` leaves out: whole runs, more processes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Large arrays in huge pages, see common_jax/host_memory.py.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Runs and tests start many processes: kept bytecode serves them all (in __pycache__, `make clean`).
export PYTHONDONTWRITEBYTECODE =

.PHONY: quickstart quickstart-geodit test lint slow lock clean

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.runtime: requirements.lock pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.test: requirements-test.lock $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet -r requirements-test.lock
	touch $@

quickstart: $(VENV)/.runtime
	$(BIN)/python -m examples.quickstart --workdir=runs/quickstart

quickstart-geodit: $(VENV)/.runtime
	$(BIN)/python -m examples.quickstart_geodit --workdir=runs/quickstart_geodit

PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
test: lint
	$(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

slow: $(VENV)/.test
	$(PYTEST) -m slow

# Fresh environments from pyproject.toml, written down without local version suffixes.
FREEZE = .cache/lock/bin/python -m pip freeze --exclude-editable --all | grep -v '^pip==' | sed -E 's/\+[A-Za-z0-9.]+//'
lock:
	rm -rf .cache/lock && $(PYTHON) -m venv .cache/lock
	.cache/lock/bin/python -m pip install --quiet --upgrade pip setuptools
	.cache/lock/bin/python -m pip install --quiet -e .
	$(FREEZE) > requirements.lock
	.cache/lock/bin/python -m pip install --quiet -c requirements.lock -e '.[test]'
	$(FREEZE) > requirements-test.lock

clean:
	rm -rf $(VENV) .cache build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

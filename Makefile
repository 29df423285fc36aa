# make run     the benchmark of config.yaml      (make run ARGS="--configfile workflow/configs/smoke.yaml")
# make test    the fast tests                    (make test ARGS="-k flow")
# make report  Snakemake's own report of a finished run
# make lint    all static checks
# make lock    write envs/requirements.lock from the packages in .venv
# make clean   remove caches; results and .venv stay
# Set-up happens by itself, in .venv, and costs nothing when it is up to date.

PYTHON ?= python3
CORES ?= all
ARGS ?=
BIN := .venv/bin
READY := .venv/.ready

# the interpreter that makes .venv is looked up without .venv
OUTER_PYTHON := PATH="$(PATH)" $(PYTHON)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: run test report lint lock clean setup
.DEFAULT_GOAL := run

run: $(READY)
	@snakemake --workflow-profile local --cores $(CORES) $(ARGS)

test: $(READY)
	@python -m pytest $(ARGS)

report: $(READY)
	@snakemake --workflow-profile local --report results/snakemake-report.html $(ARGS)

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	snakefmt --check Snakefile workflow
	snakemake --lint

lock: $(READY)
	@python envs/lock.py

setup: $(READY)

$(READY): envs/requirements.lock pyproject.toml
	@$(OUTER_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Longstride needs Python 3.11 or newer; $(PYTHON) is $$($(OUTER_PYTHON) --version 2>&1)." \
	    "Name another one: make PYTHON=python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "setting up .venv ..." >&2; $(OUTER_PYTHON) -m venv --clear .venv; }
	@echo "installing the locked packages (a few minutes the first time) ..." >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r envs/requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	@rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache src/*.egg-info
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

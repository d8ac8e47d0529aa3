# Two commands on a fresh machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help

# A stamp is touched only once pip has finished, so an install that was cut off is done again.
.venv/.resode: pyproject.toml
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(0 if sys.version_info >= (3, 11) else "resode needs Python >= 3.11, and $(PYTHON) is " + v + "; name another: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing resode and its dependencies into .venv (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/.resode-test: .venv/.resode
	@echo "Installing the test tools into .venv ..."
	@$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

# torchdyn and torchode ask for versions of other packages that do not go with ours, and run without them all the same.
.venv/.resode-bench: .venv/.resode
	@echo "Installing the peers of the benchmark into .venv ..."
	@$(BIN)/python -m pip install --quiet --editable '.[bench]'
	@$(BIN)/python -m pip install --quiet --no-deps torchdyn==1.0.6 torchode==1.0.1 torchtyping==0.1.5
	@touch $@

.PHONY: demo test test-full figures bench lint clean help
demo: .venv/.resode  ## train three nets on digits, analyse them, write a report (about 3 minutes)
	@$(BIN)/resode demo

# A file of tests stays in one process, with the nets that its tests share.
test: .venv/.resode-test  ## run the whole test suite, on all cores
	@$(BIN)/python -m pytest -n auto --dist loadfile

test-full: .venv/.resode-test  ## check gradients on every solver x mode x norm x dropout into results/ (6 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m experiments.gradient_product cpu --out "runs/test-full/$$(date +%Y%m%d-%H%M%S)" --publish results

figures: .venv/.resode  ## draw every figure of paper_figs/ from results/ into paper_figs/out/
	@$(BIN)/python -m paper_figs

bench: .venv/.resode-bench  ## time our ODE block against torchdiffeq, torchdyn and torchode on this machine
	@$(BIN)/python -m experiments.bench_ode cpu --out "runs/bench/$$(date +%Y%m%d-%H%M%S)"

lint: .venv/.resode-test  ## ruff and import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

clean:  ## remove .venv, runs/ and caches; results/ stay
	rm -rf .venv runs paper_figs/out build *.egg-info .pytest_cache .ruff_cache .import_linter_cache

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# make first    notebooks 01 and 02 alone, then the page: runs/figures/index.html, meant for three minutes
# make study    run the study on real data (profile quick) into runs/, its page in runs/figures/: meant for ten minutes
# make test     lint, types, unit tests, and the notebooks against their committed outputs: some minutes
# make test-all what takes longer too: several processes, killed runs, compilers, JupyterLab in a browser
# make lint     ruff and mypy alone
# make lab      JupyterLab on this machine
# make gpu      add your GPU's row in ten minutes: self-check, timings, records, figures, a folder to send us
# make figures  rebuild figures/ from the records of the repository alone
# make pictures PNGs of the main figures, from the same records (needs Chromium or Chrome)
#
# Each target first makes .venv if it is missing or pyproject.toml has changed. PYTHON=python3.12 chooses
# the interpreter, TORCH=torch==2.11.0 another torch of the allowed range. For a smaller torch without CUDA, or the CUDA 12.6 build that a V100 needs:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install first study test test-all lint unit notebooks lab gpu figures pictures

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# A compute thread that waits gives its core away soon (GNU OpenMP's default is to spin for milliseconds): whatever
# else runs on the machine then costs its share and not twenty times that. docs/log.md has the figures.
export GOMP_SPINCOUNT ?= 10000
PYTHON ?= python3
PROFILE ?= quick
BIN := .venv/bin
# The torch that is installed here, of the range that pyproject.toml allows.
TORCH := torch==2.13.0
INSTALLED := .venv/.installed-$(shell (echo '$(TORCH)'; cat pyproject.toml) | cksum | cut -d' ' -f1)

help:
	@sed -n 's/^# \{0,1\}//; 1,/^$$/p' Makefile | sed '/^$$/q'

install: $(INSTALLED)

$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "reclib needs Python 3.11 or later; PYTHON=/path/to/python3.11 make ... chooses one" >&2; \
	  exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"  # first and alone: a failure here is torch's build
	$(BIN)/python -m pip install --quiet --editable '.[study,test]'
	@rm -f .venv/.installed-*
	@touch $@

first: $(INSTALLED)
	$(BIN)/python -m reclib run 01 02 --profile $(PROFILE)
	$(BIN)/python -m reclib collect

study: $(INSTALLED)
	$(BIN)/python -m reclib run-all --profile $(PROFILE)

# Two at a time, for two cores; from make 4 on, what each prints comes when it ends.
test: $(INSTALLED)
	$(MAKE) --no-print-directory --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) lint unit notebooks

test-all: test
	$(BIN)/python -m pytest -m slow

unit: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" --ignore tests/experiments/test_notebooks.py

notebooks: $(INSTALLED)
	$(BIN)/python -m pytest tests/experiments/test_notebooks.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: $(INSTALLED)
	$(BIN)/jupyter lab --ip 127.0.0.1 --LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

gpu: $(INSTALLED)
	@$(BIN)/python benchmarks/gpu.py --out gpu-row || [ $$? = 1 ]  # 1: a stage failed, the others count
	@$(BIN)/python -m reclib merge gpu-row/executed
	@$(BIN)/python -m reclib collect
	@echo "The records are in runs/executed/, runs/figures/index.html shows them. Please send us the folder gpu-row/."

figures: $(INSTALLED)
	$(BIN)/python -m reclib collect --commit

pictures: $(INSTALLED)
	$(BIN)/python -m reclib pictures

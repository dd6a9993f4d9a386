# Every habit is one word. `make` alone prints this list.
PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
AREA     ?=
NAME     ?=
JOBS     ?= 2

BIN := $(VENV)/bin
PY  := $(BIN)/python
export PATH := $(abspath $(BIN)):$(PATH)
export MPLBACKEND ?= agg
# Many small problems on few cores: one thread each is faster and repeatable.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install run test lint sync notebooks pytest smoke figures site lab doctor topic outputs export clean prepare distclean

help: ## print this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q $(PIP_ARGS) -c constraints.txt -e ".[run,data,hpc,language]"
	@touch $@

$(VENV)/.all: $(VENV)/.base
	$(PY) -m pip install -q $(PIP_ARGS) -c constraints.txt -e ".[run,data,hpc,language,lab,docs,peers,dev]"
	@touch $@

install: $(VENV)/.all ## virtual environment with everything but GPU packages

run: $(VENV)/.base ## set up, then FedPM's study: progress, claims table, figures
	$(PY) -m yokolab run fedpm --profile cpu

test: $(VENV)/.all lint sync notebooks pytest smoke site ## set up, then every check

lint: $(VENV)/.all
	ruff check nbs tests docs benchmarks
	ruff check --isolated --select F821,F811 yokolab # is everything exported that it needs?

sync: $(VENV)/.all ## is yokolab/ what the notebooks export?
	$(PY) -m pytest -p no:cacheprovider tests/test_sync.py

notebooks: $(VENV)/.all ## run every method notebook (studies run by papermill)
	nbdev-test --n-workers $(JOBS) --skip-file-re '_study[.]ipynb$$|^[_.]'

pytest: $(VENV)/.all
	$(PY) -m pytest -n $(JOBS) --dist loadfile

smoke: $(VENV)/.all ## every study at the smoke profile
	$(PY) -m yokolab run all --profile smoke

figures: $(VENV)/.base ## every study at the cpu profile, promoted to figures/
	$(PY) -m yokolab run all --profile cpu
	$(PY) -m yokolab figures

site: $(VENV)/.all ## build the documentation into _site/
	$(PY) -m yokolab site

lab: $(VENV)/.all ## open JupyterLab
	$(PY) -m jupyter lab nbs

doctor: $(VENV)/.base ## what this machine can do
	$(PY) -m yokolab doctor

topic: $(VENV)/.all ## a new topic: make topic AREA=20_federated NAME=my_method
	$(PY) -m yokolab new "$(AREA)" "$(NAME)"
	nbdev-export

outputs: $(VENV)/.all ## refresh the stored outputs of one notebook: make outputs NB=nbs/...
	nbdev-test --save --n-workers 0 $(NB)
	nbdev-clean

export: $(VENV)/.all ## notebooks -> yokolab/, README.md
	nbdev-export
	$(PY) -m yokolab readme

clean: $(VENV)/.all ## strip what notebooks should not carry
	nbdev-clean

prepare: clean export test ## the one command before a push

distclean:
	rm -rf $(VENV) _site docs/_stage runs *.egg-info

# Every target sets up what it needs in .venv. Variables: PYTHON=python3.12, NB=nbs/tokens/20_masking.ipynb,
# LAB_FLAGS="--no-browser --port=8899", STEPS="tree lint" (a part of make test).
PYTHON    ?= python3
VENV      ?= .venv
BIN       := $(VENV)/bin
LAB_FLAGS ?=
NB        ?=
STEPS     ?=
AS_ROOT   := $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: help lab tour test notebooks docs bench venv
.DEFAULT_GOAL := help

help:
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

lab: venv         ## open JupyterLab on the tour
	$(BIN)/jupyter-lab $(AS_ROOT) --ip=127.0.0.1 --LabApp.default_url=/lab/tree/nbs/tour.ipynb --LabApp.news_url=None $(LAB_FLAGS)

tour: venv        ## run the tour without a browser and write it as one page, _out/tour.html
	$(BIN)/python tools/notebooks.py page nbs/tour.ipynb _out/tour.html

test: venv        ## run everything CI runs (STEPS="tree lint" for a part)
	$(BIN)/python tools/check.py $(STEPS)

notebooks: venv   ## run the chapters at full budget, outputs ready to commit (NB=path for one)
	$(BIN)/python tools/notebooks.py run $(NB)

docs: venv        ## build the site into _docs/
	$(BIN)/python docs/build.py

bench: venv       ## run every benchmark
	@for b in benchmarks/[a-z]*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

venv: $(BIN)/.installed  ## make .venv and install the lab with everything it needs

$(BIN)/.installed: settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "The lab needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | tail -1)." >&2; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),venv) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' comes without the venv module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV): a few minutes, once (PyTorch is large)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(if $(CI),--quiet) --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@$(BIN)/jupyter labextension disable --level=sys_prefix @jupyterlab/apputils-extension:announcements 2>/dev/null  # no question about news
	@touch $@

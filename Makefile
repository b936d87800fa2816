# make book    build the book (PROFILE=smoke|quick|full; quick is the default) and print the page to open
# make test    lint, unit tests, notebooks at the smoke profile, site, browser tests
# make help    the rest
# Works with GNU make 3.81 and BSD tools (macOS).

PROFILE ?= quick
# The first of these that is Python 3.11, 3.12 or 3.13 makes .venv; `make book PYTHON=/path/to/python` chooses another.
PYTHON ?= python3 python3.13 python3.12 python3.11
CONSTRAINTS ?= constraints.txt

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c "$(CONSTRAINTS)")

ifeq ($(filter $(PROFILE),smoke quick full),)
$(error PROFILE=$(PROFILE): choose smoke (minutes, for tests), quick (what readers see) or full (for a GPU))
endif

.PHONY: help book pdf test fast lab bench sweep gpu gpu-merge mutants format readme clean

help:
	@echo "make book [PROFILE=quick]   execute the notebooks, build the site, print the page to open"
	@echo "                            smoke: for tests; quick: what readers see; full: for a GPU"
	@echo "make pdf [PROFILE=quick]    the same as one file, _build/PROFILE/book.pdf (needs Chromium)"
	@echo "make test                   everything that CI checks"
	@echo "make fast                   lint and the fast unit tests only"
	@echo "make lab                    JupyterLab on the notebooks"
	@echo "make bench                  benchmarks of sampling, guidance, training, schedule learning and live figures"
	@echo "make sweep NOTEBOOK=... GRID=... OUT=... [WORKERS=1 | CLUSTER=tcp://host:8786]"
	@echo "                            a notebook with every combination of parameters, resumable, on Dask"
	@echo "make gpu MINUTES=8 [OUT=folder] [DATA=folder] [FROM=packs] [ONLY='checks race28-*'] [DRY=1]"
	@echo "                            what wants a GPU, the most worth first, resumable; DRY=1 prints the plan"
	@echo "make gpu-merge [FROM=packs] [ONLY=pieces]"
	@echo "                            what it left, as results in book/results"
	@echo "make mutants                small faults in the core's mathematics, one at a time: which do the tests miss?"
	@echo "                            an hour or two of one core, resumable; writes tests/mutants.md"
	@echo "make format                 format the code and strip the notebooks' outputs"
	@echo "make readme                 bring the README's tables and its figure up to date"
	@echo "make clean                  remove _build and caches (keeps .venv and _runs)"

book: $(READY)
	@$(BIN)/python book/build.py --profile "$(PROFILE)"

pdf: book
	@$(BIN)/python book/pdf.py --profile "$(PROFILE)"

test: fast
	PYTHONPATH="$(CURDIR)/tests/offline" $(BIN)/python book/build.py --profile smoke
	$(BIN)/python -m pytest -q -n auto --dist worksteal --durations=25 -m "slow or browser"

fast: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow and not browser"

lab: $(READY)
	$(BIN)/jupyter-lab notebooks

bench: $(READY)
	$(BIN)/python benchmarks/sampler.py
	$(BIN)/python benchmarks/guidance.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/schedule.py
	$(BIN)/python benchmarks/live.py

WORKERS ?= 1
sweep: $(READY)
	@test -n "$(NOTEBOOK)" -a -n "$(GRID)" -a -n "$(OUT)" || { \
	  echo "make sweep NOTEBOOK=08_stable_diffusion GRID=grid.yaml OUT=_runs/sweep: all three are needed" >&2; exit 2; }
	$(BIN)/python -m bilevel_core.lab.sweep "$(NOTEBOOK)" "$(GRID)" "$(OUT)" --workers "$(WORKERS)" --cluster "$(CLUSTER)"

# Also without make or .venv: python3 -m bilevel_core.lab.gpu --minutes 8. ONLY: names of pieces, * stands for anything.
MINUTES ?= 8
CHOSEN = $(if $(FROM),--from $(FROM)) $(if $(ONLY),--only $(foreach name,$(ONLY),'$(name)'))
gpu: $(READY)
	$(BIN)/python -m bilevel_core.lab.gpu --minutes $(MINUTES) $(if $(OUT),--out $(OUT)) $(if $(DATA),--data $(DATA)) $(CHOSEN) $(if $(DRY),--dry)

gpu-merge: $(READY)
	$(BIN)/python -m bilevel_core.lab.gpu merge $(CHOSEN)

# Takes up a run that was stopped. MUTANTS="name ..." (wildcards allowed) tries only those, whatever is known of them.
MUTANTS ?=
mutants: $(READY)
	$(INSTALL) -e ".[mutants]"
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 1 $(MUTANTS)
	$(BIN)/python tests/mutants.py

format: $(READY)
	$(BIN)/nbstripout --keep-id notebooks/*.ipynb
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: $(READY)
	$(BIN)/python book/build.py --write-readme

clean:
	rm -rf _build build dist mutants *.egg-info .pytest_cache .ruff_cache .hypothesis
	find bilevel_core book tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are made last: an interrupted installation is taken up again, a finished one is re-used
# until the packages asked for change.
$(READY): $(BIN)/python pyproject.toml $(wildcard $(CONSTRAINTS))
	@echo "Installing the packages of the book into $(VENV) (once; some minutes)"
	$(INSTALL) -e ".[book,test]"
	@touch $@

$(BIN)/python:
	@set -- $(PYTHON); if [ -x "$(PYTHON)" ]; then set -- "$(PYTHON)"; fi; \
	for p in "$$@"; do \
	  if "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    echo "Creating $(VENV) with $$("$$p" --version)"; \
	    "$$p" -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "$$p could not create $(VENV); on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; \
	  fi; \
	done; \
	echo "The book needs Python 3.11, 3.12 or 3.13; tried:" >&2; \
	for p in "$$@"; do echo "  $$p: $$("$$p" --version 2>&1 | tail -n 1)" >&2; done; \
	echo "Install one of them, or name it: make book PYTHON=/path/to/python3.12" >&2; exit 1

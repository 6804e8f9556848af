# Every target sets up what it needs on its first call: see .ci/setup_env.py.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=

setup := $(PYTHON) .ci/setup_env.py
onedl := PATH="$(CURDIR)/.venv/bin:$$PATH"
openmmlab := PATH="$(CURDIR)/.venv-openmmlab/bin:$$PATH"
jobs := -n auto --maxprocesses 8 --dist loadfile  # ARGS='-n 0' to debug

.DEFAULT_GOAL := help
.PHONY: help demo demo-detection test test-openmmlab lint format clean distclean python

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 18
	@echo 'PYTHON=... picks the interpreter, ARGS=... is handed to the demo or to pytest.'

demo: python  ## Train on digit scenes, compare in work_dirs/demo/index.html. Compiles nothing.
	@$(setup) --level basic
	$(onedl) python tools/demo/run.py $(ARGS)

demo-detection: python  ## The same with detectors, in work_dirs/demo_detection. Needs mmcv's operators, as test.
	@$(setup)
	$(onedl) python tools/demo/run.py --task detection $(ARGS)

test: python  ## Run the tests. The first call may compile mmcv's operators (10 to 20 minutes).
	@$(setup)
	$(onedl) python -m pytest $(jobs) $(ARGS)

test-openmmlab: python  ## Run the same tests on the OpenMMLab originals.
	@$(setup) --family openmmlab
	$(openmmlab) python -m pytest $(jobs) $(ARGS)

lint: python  ## Check style, formatting and types.
	@$(setup) --level basic
	$(onedl) ruff check .
	$(onedl) ruff format --check .
	$(onedl) mypy

format: python  ## Mend style and formatting.
	@$(setup) --level basic
	$(onedl) ruff check --fix .
	$(onedl) ruff format .

clean:  ## Remove caches and what was built.
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## Remove the environments too.
	rm -rf .venv .venv-openmmlab

python:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'Python 3.10 or later is needed: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }

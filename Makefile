# The one door for people and for continuous integration. Every target first sets up what it needs in .venv.

PYTHON ?= python3
PYTEST_ARGS ?= -n 2
PIP_ARGS ?=
GPU_ARGS ?=
ATTACK_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FOLDERS := llm_runtime envs agents experiments
TYPING := .typing/trainpilot/__init__.py
# Not those that need a GPU, a model or packages to be installed first, or that take many hours.
BENCHMARKS := $(filter-out benchmarks/gpu_check.py benchmarks/smollm2.py benchmarks/fine_tuning.py benchmarks/export_formats.py benchmarks/live_budgets.py benchmarks/engines.py benchmarks/_%.py,$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: setup demo test lint types bench attack gpu-check docs docs-site clean help

setup: $(READY)  ## create .venv with everything that the other targets need

demo: $(READY)  ## steer a small model on this machine; results: runs/demo
	$(BIN)/trainpilot demo --out runs/demo

test: $(READY)  ## run the tests; choose with PYTEST_ARGS="-k reward"
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY) $(TYPING)  ## check style, formatting and who imports whom, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd .typing && ../$(BIN)/lint-imports --config ../pyproject.toml

# The links give mypy and import-linter the import names: .typing/trainpilot/envs is the folder envs/. Paths, never
# `-p trainpilot`: that would check an installed copy.
types: $(READY) $(TYPING)  ## check types, strictly
	$(BIN)/mypy $(TYPING) $(FOLDERS:%=.typing/trainpilot/%)
	$(BIN)/mypy --allow-untyped-defs --allow-untyped-calls --allow-incomplete-defs --no-warn-unused-ignores tests

bench: $(READY)  ## run every benchmark, one after the other (about two and a half hours); results: benchmarks/results
	set -e; for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python $$file; done

attack: $(READY)  ## attack the promises of the docs, about 25 minutes of one core; result: docs/reliability.md
	$(BIN)/python -m tests.attack $(ATTACK_ARGS)

gpu-check: $(READY)  ## try everything that needs an NVIDIA GPU, about an hour; refuses without one (exit status 2)
	@$(BIN)/python benchmarks/gpu_check.py $(GPU_ARGS)

docs: $(READY)  ## write the generated pages of docs/ anew from code and results
	$(call generate,trainpilot.agents.logging.tags,docs/metrics.md)
	$(call generate,docs.generate.environment,docs/environment.md)
	$(call generate,docs.generate.benchmark,docs/benchmark.md)

# A page is written beside the old one first, so that a failure leaves the old one.
define generate
	$(BIN)/python -m $(1) > $(2).new || { rm -f $(2).new; exit 1; }
	mv $(2).new $(2)
endef

# The link gives mkdocstrings the import names, as it does for `types`. The variable silences an advertisement.
docs-site: $(VENV)/.ready-docs $(TYPING)  ## build the documentation site, strictly; result: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(TYPING): trainpilot/__init__.py
	if [ -L .typing/trainpilot ]; then rm .typing/trainpilot; fi
	mkdir -p .typing/trainpilot
	for path in trainpilot/__init__.py trainpilot/py.typed $(FOLDERS); do ln -sfn ../../$$path .typing/trainpilot/; done

clean:  ## remove caches and build outputs; .venv and runs stay
	rm -rf build dist site *.egg-info .typing .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "  %-10s %s\n", $$1, $$2 }'

# Anew whenever a dependency changes. setuptools is named because venv brings an old one or none.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=80"
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt $(PIP_ARGS) -e ".[dev]"
	touch $@

$(VENV)/.ready-docs: $(READY)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt $(PIP_ARGS) -e ".[docs]"
	touch $@

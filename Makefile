# The README's two commands are `make demo` and `make test`; each makes the environment it needs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed

.PHONY: demo test test-full lint format clean gpu

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

# Everything that only a GPU can tell (benchmarks/gpu.py). GPU_PYTHON names a Python that has torch; without it, PYTHON
# if it has torch, else the environment of `make test`. GPU_OPTIONS: for example --out DIR.
gpu:
	@if [ -z "$(GPU_PYTHON)" ] && ! $(PYTHON) -c "import torch" 2>/dev/null; then $(MAKE) $(STAMP) && $(RUN) -m benchmarks.gpu $(GPU_OPTIONS); \
	else $(or $(GPU_PYTHON),$(PYTHON)) -m benchmarks.gpu $(GPU_OPTIONS); fi

format: $(STAMP)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

$(STAMP): pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[train,eval,export,llm,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist runs

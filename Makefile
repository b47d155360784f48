# The README's two commands are `make demo` and `make test`; each makes the environment it needs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed
EXTRAS := train,eval,export,llm,data,docs,dev
VERSIONS := .ci/versions.txt
# Build tools come first and the build is not isolated, so that they are of the tested set too.
INSTALL = -m pip install --quiet --disable-pip-version-check
BUILD_TOOLS := scikit-build-core cmake ninja
comma := ,

.PHONY: demo test test-full test-newest test-oldest versions lint format clean gpu docs

demo: $(STAMP)
	$(RUN) -m tokenizers_mm.cli demo

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -m "not full"

test-full: $(STAMP)
	$(RUN) -m pytest -m full

# The newest release of every package, whatever the tested set says. NEWEST: which tests.
NEWEST ?= tests/llm tests/train tests/export tests/checkpoints
test-newest:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(INSTALL) --upgrade --upgrade-strategy eager $(BUILD_TOOLS)
	TOKENIZERS_MM_BUILD_CUDA=0 PATH="$(CURDIR)/.venv-newest/bin:$$PATH" .venv-newest/bin/python $(INSTALL) --upgrade --upgrade-strategy eager \
	  --no-build-isolation --config-settings=build-dir=build/newest -e ".[$(EXTRAS)]"
	.venv-newest/bin/python .ci/upstream.py $(VERSIONS) $(NEWEST)

# The lowest releases that pyproject.toml names: the library alone, then with every extra.
test-oldest:
	bash .ci/oldest "$(PYTHON)" "" tests/kernels tests/functional tests/quantizers tests/models tests/checkpoints
	bash .ci/oldest "$(PYTHON)" train,eval,export,llm tests

# Renew the tested set: the newest releases for every Python that is supported, in one file of versions.
versions: $(STAMP)
	$(RUN) $(INSTALL) uv
	$(VENV)/bin/uv pip compile pyproject.toml --quiet --upgrade --universal --python-version 3.10 --no-header \
	  --no-annotate $(foreach extra,$(subst $(comma), ,$(EXTRAS)),--extra $(extra)) | grep -Ev '^(nvidia|cuda|triton)' >$(VERSIONS)
	$(MAKE) $(STAMP)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

# Everything that only a GPU can tell (benchmarks/gpu.py). GPU_PYTHON names a Python that has torch; without it, PYTHON
# if it has torch, else the environment of `make test`. GPU_OPTIONS: for example --out DIR.
gpu:
	@if [ -z "$(GPU_PYTHON)" ] && ! $(PYTHON) -c "import torch" 2>/dev/null; then $(MAKE) $(STAMP) && $(RUN) -m benchmarks.gpu $(GPU_OPTIONS); \
	else $(or $(GPU_PYTHON),$(PYTHON)) -m benchmarks.gpu $(GPU_OPTIONS); fi

docs: $(STAMP)
	$(RUN) -m mkdocs build --quiet

format: $(STAMP)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

$(STAMP): pyproject.toml CMakeLists.txt $(VERSIONS) $(wildcard csrc/*)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) $(INSTALL) -c $(VERSIONS) $(BUILD_TOOLS)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) $(INSTALL) -c $(VERSIONS) --no-build-isolation -e ".[$(EXTRAS)]"
	touch $(STAMP)

clean:
	rm -rf .venv .venv-newest .venv-oldest build dist runs

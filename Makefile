# The same verbs for people and for CI. `install` makes ./.venv; every other verb depends on it.
# But bench-gpu: it runs on machines where nothing can be installed.
# PYTHON names the interpreter that makes the environment; ARGS goes to pytest.

PYTHON ?= python3
ARGS ?=
PARTS ?=
DRY ?=
BIN := .venv/bin
STAMP := .venv/installed
LIBRARY := moe_serve/kernels/_cpu*.so
NATIVE := $(wildcard moe_serve/kernels/native/*.cpp moe_serve/kernels/native/*.h)

# the oldest Triton that kernels run on; the newest is in constraints.txt
OLDEST_TRITON := 3.6.0
OLDEST_TRITON_IN := .venv/triton-$(OLDEST_TRITON)

.PHONY: help install check test test-oldest-triton bench bench-gpu build demo clean

help:
	@echo "make install | check | test | test-oldest-triton | bench | bench-gpu | build | demo | clean"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "$(PYTHON) is Python %d.%d; moe-serve needs 3.11 or newer: make PYTHON=python3.12 install" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	rm -f $(LIBRARY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@ls $(LIBRARY) >/dev/null 2>&1 || echo "make: no native kernels, the slow ones will run; $(BIN)/pip install -v -e . shows why"
	@touch $@

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: install
	$(BIN)/python -m pytest $(ARGS)

$(OLDEST_TRITON_IN): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$(OLDEST_TRITON)

test-oldest-triton: install $(OLDEST_TRITON_IN)
	PYTHONPATH=$(OLDEST_TRITON_IN) EXPECTED_TRITON=$(OLDEST_TRITON) $(BIN)/python -m pytest $(ARGS) tests/kernels \
		-k "is_expected or row_functions or (triton-exact and (equal or reference or float64 or in_parts \
		or sorted_by_expert or left_out or (bits_of_layer and cache)))"

bench: install
	$(BIN)/moe-serve bench latency
	$(BIN)/moe-serve bench throughput
	$(BIN)/python -m benchmarks.peers --rounds 5 --jobs 1x128/16,4x128/16

# Needs nothing installed but what docs/gpu.md names: PYTHON runs it from the tree. PARTS: all, or
# some; DRY=1 walks them on a CPU; ARGS go to it.
bench-gpu:
	DRY=$(DRY) PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m benchmarks.gpu $(PARTS) $(ARGS)

build: install
	$(BIN)/python -m build

demo: install
	$(BIN)/moe-serve generate "Once upon a time, there was a little girl named Lily." --max-tokens 160

clean:
	rm -rf .venv build dist *.egg-info $(LIBRARY) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

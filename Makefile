# Every target sets up .venv by itself; a second run downloads nothing.
#   make demo       train a small MoE on real text over two processes, adaptive against static
#   make check      ruff, pyright, import contracts, house rules
#   make test       every test but the long matrix; make test-full runs that too
#   make bench      the planner's and the balance benchmarks

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.anabranch-stamp
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: setup demo test test-full check bench

setup: $(STAMP)

# torch goes in first, as the CPU build where pip's configured sources offer one (PIP_EXTRA_INDEX_URL or
# PIP_FIND_LINKS can name more), so that the project's own install takes no other. A torch >= 2.13 that is
# already in .venv stays as it is, CUDA and Neuron builds included.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "anabranch needs Python >= 3.11: make setup PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13))' 2>/dev/null \
		|| $(BIN)/pip install --quiet 'torch==2.13.0+cpu' 2>/dev/null \
		|| $(BIN)/pip install --quiet 'torch==2.13.0'
	$(BIN)/pip install --quiet -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/anabranch train --model tiny --data stdlib --ranks 2 --steps 120 --compare static \
		--out runs/demo --overwrite

test: $(STAMP)
	$(PYTEST) -m "not full"

test-full: $(STAMP)
	$(PYTEST) --hypothesis-profile=explore

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(PYTEST) -q tests/test_house_rules.py tests/test_exported_members.py

bench: $(STAMP)
	$(BIN)/anabranch bench planner
	$(BIN)/anabranch bench balance --json runs/bench-balance.json

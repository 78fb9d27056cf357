# The two commands of a newcomer: `make demo` and `make test`. Both set everything up by
# themselves (uv, then .venv from requirements.lock); a second call does no set-up work.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-faults golden audit lint types layers format lock clean
.DELETE_ON_ERROR:

# Any Python of the supported range may start the set-up; uv then picks the same one for .venv.
PYTHON ?= python3
UV := $(or $(shell command -v uv 2>/dev/null),.tools/bin/uv)
# Ray workers start from this folder's own interpreter; no download of another Python, no
# usage report, and one quiet default for every job and test.
export UV_PYTHON_DOWNLOADS := never
export RAY_USAGE_STATS_ENABLED := 0
export RAY_ENABLE_UV_RUN_RUNTIME_ENV := 0
export PATH := $(CURDIR)/.venv/bin:$(PATH)

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.installed  ## .venv from requirements.lock (done by demo and test on their own)

.tools/bin/uv:
	@echo "set-up: installing uv into .tools/"
	@$(PYTHON) -m venv .tools
	@.tools/bin/python -m pip install --quiet --disable-pip-version-check uv

.venv/.installed: requirements.lock | $(filter .tools/bin/uv,$(UV))
	@echo "set-up: installing the locked packages into .venv/"
	@$(UV) venv --quiet --allow-existing --python '>=3.11,<3.14' .venv
	@$(UV) pip sync --quiet --compile-bytecode --require-hashes --python .venv/bin/python requirements.lock
	@touch $@

demo: setup  ## the whole path on the embedded benchmark, offline
	@python -m jobs.pipeline preset=demo

test: setup lint types layers  ## linters, types, layer contracts and the tests
	@python -m pytest -n 2 -m 'not slow' --durations=15

test-slow: setup  ## the costly tests: kills, full disks, every damage
	@python -m pytest -n 2 -m slow --durations=15 || [ $$? -eq 5 ]  # 5: no test is marked slow

test-faults: setup  ## every fault test 20 times beside a busy CPU (hours)
	@python -m tests.faults --times 20

golden: setup  ## record the demo and one epoch of every method, compare with tests/golden
	@python -m tests.golden.record one_epoch demo --into outputs/golden
	@python -m tests.golden.compare tests/golden/one_epoch.json outputs/golden/one_epoch.json
	@python -m tests.golden.compare tests/golden/demo.json outputs/golden/demo.json

audit: | $(filter .tools/bin/uv,$(UV))  ## known weaknesses of the locked packages (skips offline)
	@.ci/audit $(UV)

lint: setup
	@ruff format --check .
	@ruff check .

types: setup
	@mypy

layers: setup
	@lint-imports

format: setup  ## rewrite the code in house style
	@ruff format .
	@ruff check --fix .

lock: | $(filter .tools/bin/uv,$(UV))  ## write requirements.lock anew from pyproject.toml
	@$(UV) pip compile pyproject.toml --group dev --extra onnxruntime --universal --generate-hashes \
	  --no-header --no-annotate --quiet --output-file requirements.lock

clean:  ## remove what demo wrote (the set-up stays)
	@rm -rf outputs

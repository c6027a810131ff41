# Everything starts here: `make quickstart`, `make test`. Both create .venv on their first run and are safe to run again.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin

.PHONY: quickstart test test-slurm lint soak bench bench-data evidence clean

quickstart: .venv/installed
	$(BIN)/headrace quickstart --workdir $(or $(WORKDIR),quickstart)

# Three workers keep two cores busy: a rank that starts waits more than it computes. Python starts some hundred times: what one
# process has compiled the next one reads, whatever the environment says.
test: export PYTHONDONTWRITEBYTECODE =
test: lint
	$(BIN)/pytest -m "not slow and not slurm" -n 3 --dist loadfile --no-loadscope-reorder

# A Slurm cluster of virtual machines; needs root and Debian's slurm-wlm, munge, iproute2.
test-slurm: .venv/installed
	$(BIN)/pytest -m "slurm and not slow"

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# FAULTS=200: so many random faults in one run, 30 without it. What has been tried is kept in build/results (or
# HEADRACE_RESULTS): a soak that was stopped goes on there when it is started again, and tells again what has failed.
soak: .venv/installed
	$(BIN)/pytest

bench: .venv/installed
	$(BIN)/python -m tests.benchmarks.train_speed $(BENCH)
	$(BIN)/python -m tests.benchmarks.checkpoint_speed
	$(BIN)/python -m tests.benchmarks.manifest_speed
	$(BIN)/python -m tests.benchmarks.check_cost
	$(BIN)/python -m tests.benchmarks.gpu_speed

bench-data: .venv/installed
	$(BIN)/python -m tests.benchmarks.data_speed
	$(BIN)/python -m tests.benchmarks.scale
	$(BIN)/python -m tests.benchmarks.prepare_memory $(BENCH)

evidence: .venv/installed
	$(BIN)/python -m tests.benchmarks.evidence $(if $(CORPORA),--corpora $(CORPORA)) $(if $(NANOGPT),--nanogpt $(NANOGPT)) $(EVIDENCE)

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no python3 found; on Debian or Ubuntu run: sudo apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; install Python 3.11 or newer, or run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv module; on Debian or Ubuntu run: sudo apt-get install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@

clean:
	rm -rf .venv quickstart build

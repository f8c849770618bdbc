# make demo: the whole loop on real vLLM.  make test: everything that is checked.  Both set up .venv first.
PYTHON ?= python3
ENGINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

BIN := .venv/bin
SETUP := .venv/.sloguard-$(ENGINE)
PINS := deploy/requirements

.PHONY: setup demo test chaos soak bench-optimizers bench-ablation bench-repair bench-guard bench-live lint format proto proto-check clean

setup: $(SETUP)

$(SETUP): $(PINS)/engine-$(ENGINE).txt $(PINS)/sloguard.txt $(PINS)/dev.txt $(PINS)/install.sh pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	@echo "setup, once: everything goes into .venv, for ENGINE=$(ENGINE)"
	@$(PYTHON) -m venv --clear .venv
	@sh $(PINS)/install.sh $(ENGINE)
	@touch $@

demo: setup
	$(BIN)/python deploy/demo/run.py

# Tests that serve with real vLLM run one by one: two engines bind their workers to the same core of two, and starve each
# other. Most of the rest waits: four at once are no load for two cores.
test: setup
	$(BIN)/python -m pytest -m "not engine" -n 4 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m engine

# Faults at random moments of every state, on fake engines; RUNS=300 takes a quarter of an hour.
RUNS ?= 200
AGENT_RUNS ?= 20
SEED ?= 0

chaos: setup
	$(BIN)/python tests/chaos/campaign.py --runs $(RUNS) --seed $(SEED)
	$(BIN)/python tests/chaos/agent_campaign.py --runs $(AGENT_RUNS) --seed $(SEED)

# Six hours of a service in 20 minutes, with traffic, windows and faults: memory, descriptors, threads and disk are flat.
soak: setup
	$(BIN)/python tests/chaos/soak.py

# Both put their table into benchmarks/README.md; minutes on two cores.
BENCH := $(BIN)/sloguard dev bench optimizers --seeds 50 --into benchmarks/README.md \
	--landscape benchmarks/landscapes/paper.py --landscape benchmarks/landscapes/crash_rich.py

bench-optimizers: setup
	$(BENCH)

bench-ablation: setup
	$(BENCH) --ablation
	$(BENCH) --no-guard --optimizers tba-tpe,sloguard

# Both ask vLLM whether the guard is right: 2,000 configurations by its own checks; architectures that it builds on the
# meta device (a table in benchmarks/README.md), and starts at the memory edge.
bench-repair: setup
	$(BIN)/python benchmarks/repair.py

bench-guard: setup
	$(BIN)/python benchmarks/architectures.py --into benchmarks/README.md
	$(BIN)/python benchmarks/guard.py $(ENGINE) --results build/guard-$(ENGINE).jsonl

# 200 random live changes of a running engine under load, on the CPU build.
bench-live: setup
	$(BIN)/python benchmarks/live_changes.py

lint: setup proto-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The generator pins protobuf 5.29, vLLM needs a newer one: it has an environment of its own.
.venv-proto: $(PINS)/proto.txt
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/pip install --quiet --disable-pip-version-check -r $(PINS)/proto.txt
	touch .venv-proto

proto: .venv-proto
	sh protos/generate.sh .

proto-check: .venv-proto
	cd protos && ../.venv-proto/bin/buf lint && ../.venv-proto/bin/buf format --diff --exit-code
	sh protos/generate.sh build/proto
	diff -r --exclude=__init__.py --exclude=__pycache__ build/proto/vllm_sloguard/wire vllm_sloguard/wire

clean:
	rm -rf .venv .venv-proto build demo-state

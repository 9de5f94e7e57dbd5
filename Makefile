# lora-gateway: what to type. `make` alone lists it.
#
#   ACCEL=auto   which lock: cpu, cuda, or auto (cuda where nvidia-smi lists a GPU, else cpu)
#   ARGS="..."   passed on to `gateway serve`, pytest or the benchmark
#   PYTHON=...   the CPython 3.11 to build .venv from

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

ACCEL ?= auto
ARGS ?=
PYTHON ?= python3.11

BUILD := $(ACCEL)
ifeq ($(ACCEL),auto)
BUILD := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo cuda || echo cpu)
endif
ifeq ($(filter cpu cuda,$(BUILD)),)
$(error ACCEL is cpu, cuda or auto, not "$(ACCEL)")
endif

comma := ,
empty :=
space := $(empty) $(empty)
BIN := .venv/bin
UV := $(BIN)/uv
UV_QUIET := $(UV) --quiet

# Slow mirrors and short outages are waited out.
export UV_HTTP_TIMEOUT ?= 180
export UV_HTTP_RETRIES ?= 8
ifeq ($(HOME),)
export HOME := $(CURDIR)/.venv/home
endif

# Where the CPU build of torch comes from: a folder of wheels that pip was told of, or
# else torch's own index. The CUDA build is the usual one.
CPU_SOURCE := --torch-backend cpu
ifneq ($(PIP_FIND_LINKS)$(UV_FIND_LINKS),)
CPU_SOURCE := --find-links $(subst $(space),$(space)--find-links ,$(strip $(or $(PIP_FIND_LINKS),$(subst $(comma),$(space),$(UV_FIND_LINKS)))))
endif
SOURCE := $(if $(filter cpu,$(BUILD)),$(CPU_SOURCE))

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' Makefile

# --- environments -----------------------------------------------------------

PLATFORM := CPython 3.11 Linux x86_64
platform_found = $(shell $(PYTHON) -c 'import platform as p, sys; print(p.python_implementation(), "%d.%d" % sys.version_info[:2], p.system(), p.machine())' 2>/dev/null)
platform_check = $(if $(filter-out "$(PLATFORM)","$(platform_found)"),$(error \
  the locks are for CPython 3.11 on x86-64 Linux, but $(PYTHON) is $(or $(platform_found),not there); \
  name another with PYTHON=))

.venv/.uv: requirements/uv.txt
	$(platform_check)
	@echo 'setup: .venv with $(PLATFORM)'
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip --quiet --disable-pip-version-check --retries 8 install -r requirements/uv.txt
	@mkdir -p $(HOME) && touch $@

# .venv holds a lock, and once tests or linters have run the dev lock on top, which then
# stays. The stamps say which.
LOCKS := requirements/uv.txt requirements/$(BUILD).txt
PROJECTS := pyproject.toml clients/python/pyproject.toml
SERVE_READY := .venv/.serve-$(BUILD)
DEV_READY := .venv/.dev-$(BUILD)
READY := $(if $(wildcard $(DEV_READY)),$(DEV_READY),$(SERVE_READY))

FIRST_TIME = $(if $(wildcard .venv/lib/*/site-packages/torch),,$(comma) which downloads $(SIZE))
SIZE := $(if $(filter cpu,$(BUILD)),about 1.2 GB,several GB)
define install
	@echo 'setup: .venv from $(1)$(FIRST_TIME)'
	@[[ $(BUILD) = cpu ]] || nvidia-smi -L >/dev/null 2>&1 || echo 'setup: note: nvidia-smi lists no GPU here'
	@rm -f .venv/.serve-* .venv/.dev-*
	@$(UV_QUIET) pip sync --compile-bytecode --python $(BIN)/python $(SOURCE) $(1)
	@$(UV_QUIET) pip install --python $(BIN)/python --no-deps --no-build-isolation \
	  -e . -e clients/python
	@touch $@
endef

$(SERVE_READY): .venv/.uv $(LOCKS) $(PROJECTS)
	$(call install,$(LOCKS))

$(DEV_READY): .venv/.uv $(LOCKS) requirements/dev.txt $(PROJECTS)
	$(call install,$(LOCKS) requirements/dev.txt)

# The code generators want an older protobuf than the server.
.venv-proto/.ready: requirements/proto.txt | .venv/.uv
	@echo 'setup: .venv-proto with $<'
	@$(UV_QUIET) venv --clear --python $(BIN)/python .venv-proto
	@$(UV_QUIET) pip sync --python .venv-proto/bin/python $<
	@touch $@

.PHONY: setup
setup: $(READY) ## Make .venv from the lock that ACCEL picks
	@:

.PHONY: lock
COMPILE := $(UV_QUIET) pip compile --python $(BIN)/python --python-version 3.11 \
  --python-platform x86_64-unknown-linux-gnu --override requirements/overrides.txt \
  --custom-compile-command 'make lock' --no-emit-package lora-gateway $(if $(UPGRADE),--upgrade)
lock: .venv/.uv ## Compile requirements/*.in to locks (UPGRADE=1: to the newest releases)
	@echo 'lock: requirements/cpu.txt'
	@$(COMPILE) $(CPU_SOURCE) --override requirements/overrides-cpu.txt \
	  requirements/cpu.in -o requirements/cpu.txt
	@echo 'lock: requirements/cuda.txt'
	@$(COMPILE) requirements/cuda.in -o requirements/cuda.txt
	@echo 'lock: requirements/dev.txt'
	@$(COMPILE) $(CPU_SOURCE) --override requirements/overrides-cpu.txt \
	  $$(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' requirements/cpu.txt) \
	  requirements/dev.in -o requirements/dev.txt
	@echo 'lock: requirements/proto.txt'
	@$(COMPILE) requirements/proto.in -o requirements/proto.txt
	@sed -i -e '/^# The following packages were excluded/,$$d' -e '/^$$/d' \
	  requirements/{cpu,cuda,dev,proto}.txt

# --- the contract -----------------------------------------------------------

GENERATED := clients/python/lora_gateway/v1
PROTOS := $(sort $(wildcard proto/lora_gateway/v1/*.proto))

# Messages of all files, and stubs of those that define a service, into a folder.
define generate
protoc() { PATH="$(CURDIR)/.venv-proto/bin:$$PATH" python -m grpc_tools.protoc -I proto "$$@"; }; \
  protoc --python_out="$$out" --mypy_out=quiet:"$$out" $(PROTOS); \
  protoc --grpc_python_out="$$out" --mypy_grpc_out=quiet:"$$out" $$(grep -l '^service ' $(PROTOS))
endef

.PHONY: proto
proto: .venv-proto/.ready ## Generate the Python code of proto/
	@echo 'proto: $(GENERATED)'
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; $(generate); \
	  rm -f $(GENERATED)/*_pb2.py* $(GENERATED)/*_pb2_grpc.py*; \
	  cp "$$out"/lora_gateway/v1/* $(GENERATED)/

.PHONY: proto-check
proto-check: .venv-proto/.ready
	@echo 'generated code is current'
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; $(generate); \
	  diff -ru -x __init__.py -x __pycache__ "$$out/lora_gateway/v1" $(GENERATED) \
	  || { echo 'run `make proto`' >&2; exit 1; }

.PHONY: proto-release
proto-release: $(DEV_READY) ## Record proto/ as released: lint refuses what breaks it
	@echo 'proto: released.binpb'
	@$(BIN)/buf build --exclude-source-info -o proto/released.binpb

# --- daily work -------------------------------------------------------------

.PHONY: lint
lint: $(DEV_READY) ## Ruff, mypy, buf, and whether generated code is current
	@echo 'ruff check' && $(BIN)/ruff check --quiet
	@echo 'ruff format' && $(BIN)/ruff format --quiet --diff
	@echo 'mypy' && $(BIN)/mypy --no-error-summary
	@echo 'buf lint' && $(BIN)/buf lint
	@echo 'buf format' && $(BIN)/buf format --diff --exit-code
	@echo 'buf breaking' && $(BIN)/buf breaking --against proto/released.binpb
	@$(MAKE) proto-check

.PHONY: format
format: $(DEV_READY) ## Format Python and proto files, and fix what ruff can
	@$(BIN)/ruff check --fix --quiet || true
	@$(BIN)/ruff format --quiet
	@$(BIN)/buf format --write

.PHONY: test
QUICK := $(BIN)/python -m pytest -m 'not slow and not gpu'
# Tests of real engines measure time, and run alone. Those of jobs wait for processes most of the
# time, and run beside the others.
test: $(DEV_READY) ## The quick tests, real engines on the CPU among them
ifneq ($(ARGS),)
	@$(QUICK) $(ARGS)
else
	@code=0; $(QUICK) tests/e2e || code=$$?; \
	  jobs=$$(mktemp); trap 'kill $$! 2>/dev/null || true; rm -f "$$jobs"' EXIT; \
	  $(QUICK) tests/trainer >"$$jobs" 2>&1 & \
	  $(QUICK) --ignore=tests/e2e --ignore=tests/trainer || code=$$?; \
	  wait $$! || code=$$?; cat "$$jobs"; exit $$code
endif

.PHONY: test-full
test-full: $(DEV_READY) ## All tests; those on a GPU too where ACCEL finds one
	@$(BIN)/python -m pytest -m '$(if $(filter cuda,$(BUILD)),,not gpu)' $(ARGS)

.PHONY: serve
# The adapter that we ship fits the model that is served by default.
PIRATE := $(if $(GATEWAY_MODEL)$(filter --model --model=%,$(ARGS)),,--adapter pirate=examples/adapters/pirate)
serve: $(READY) ## Run the gateway; ARGS="..." are its flags
	@exec $(BIN)/gateway serve $(PIRATE) $(ARGS)

.PHONY: demo
demo: $(READY) ## The whole story in minutes: serve, train, canary, evaluate, promote
	@exec $(BIN)/python examples/demo.py $(ARGS)

# vLLM's Rust front end is in the wheel for GPUs alone: beside the CPU engine that wheel has a place
# of its own.
PEERS_READY := $(if $(filter cpu,$(BUILD)),.venv-bench/.ready)
.venv-bench/.ready: requirements/bench.txt | .venv/.uv
	@echo 'setup: .venv-bench with $<, which downloads about 500 MB'
	@$(UV_QUIET) venv --clear --python $(BIN)/python .venv-bench
	@$(UV_QUIET) pip sync --python .venv-bench/bin/python $<
	@touch $@

.PHONY: bench
bench: $(DEV_READY) $(PEERS_READY) ## Measure against the bare engine and vLLM's servers; adapters; imports; training; turns; shards
	@$(BIN)/python -m tests.bench $(ARGS)
	@$(BIN)/python -m tests.bench.adapters
	@$(BIN)/python -m tests.bench.labels
	@$(BIN)/python -m tests.bench.imports
	@$(BIN)/python -m tests.bench.datasets
	@$(BIN)/python -m tests.bench.training
	@$(BIN)/python -m tests.bench.slots
	@$(MAKE) bench-ring
	@$(MAKE) bench-edge ARGS=

.PHONY: bench-ring
bench-ring: $(DEV_READY) ## Measure how adapters and their load are spread over shards
	@$(BIN)/python -m tests.bench.ring

.PHONY: bench-edge
bench-edge: $(DEV_READY) ## Measure the edge without an engine: workers on one port, memory of open streams
	@$(BIN)/python -m tests.bench.edge $(ARGS)

.PHONY: profile
profile: $(DEV_READY) ## Draw flame graphs of a worker under load into build/profile; ARGS="--seconds 20"
	@$(BIN)/python -m tests.bench.profile $(ARGS)

.PHONY: bench-loads
bench-loads: $(DEV_READY) ## Measure what loads of adapters cost those who decode, and who waits for them
	@$(BIN)/python -m tests.bench.loads $(ARGS)
	@$(BIN)/python -m tests.bench.loads --wide --rank 64 --rate 3 --first-tokens 20 $(ARGS)

.PHONY: screenshot
screenshot: $(DEV_READY) ## Take the pictures of the status page in docs/ again (needs Chromium)
	@$(BIN)/python -m tests.screenshot

.PHONY: chaos
chaos: $(DEV_READY) ## Kill engines and workers of a gateway under load; ARGS="--blows 10 --seed N"
	@$(BIN)/python -m tests.chaos $(ARGS)

.PHONY: clean
clean: ## Remove environments, caches and build output; state/ stays
	@rm -rf .venv .venv-* build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -prune -exec rm -rf {} + -o -name '*.egg-info' -prune -exec rm -rf {} +

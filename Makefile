# `make demo` and `make test` work in a fresh clone: the first of them creates .venv. See README.md.

PYTHON ?= python3
TORCH_INDEX ?=
RANKS ?= 2
CONFIG ?= zero2
PYTEST_ARGS ?=
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/installed
# What the demo runs in: everything where that is installed already, otherwise the package and what draws its picture.
RUNNABLE := $(if $(wildcard .venv/installed),.venv/installed,.venv/runnable)
SOURCES := pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
PIP_INSTALL = $(BIN)/python -m pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test test-adversarial test-device test-experts test-gpu test-long bench-gpu test-cluster test-inference test-integrations test-monitors test-pairs test-pipeline test-soak test-autotuning test-edits test-sequence test-tensor lint format bench native clean test-wire

demo: $(RUNNABLE)
	$(BIN)/deepspeed --num_accelerators $(RANKS) --run_dir runs/gpt-$(CONFIG) examples/gpt/train.py --deepspeed_config examples/gpt/$(CONFIG).json

# A file's tests go to one worker, which keeps their pools of ranks. WORKERS=0 runs them in one process.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# Variants that `make test` leaves out (pytest.mark.quick), of folders without a long target of their own.
test-long: $(INSTALLED)
	DS_TEST_LONG=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/engine tests/zero tests/comm tests/checkpoint tests/memory \
	    tests/examples $(PYTEST_ARGS)

# Every ZeRO stage and combination under the newest libraries; writes docs/compatibility.md.
test-integrations: $(INSTALLED)
	$(BIN)/python -m pytest tests/integrations --matrix --compatibility docs/compatibility.md $(PYTEST_ARGS)

# Experts: every family, placement and combination; writes docs/composability.md.
test-experts: $(INSTALLED)
	$(BIN)/python -m tests.parallel.expert.composability
	DS_TEST_LONG=1 $(BIN)/python -m pytest tests/parallel/expert tests/examples/test_moe_example.py $(PYTEST_ARGS)

# Debian or Ubuntu, root: the real sshd, pdsh, Open MPI, MPICH and Slurm on nodes made of network namespaces.
CLUSTER_PACKAGES = openssh-server openssh-client pdsh openmpi-bin mpich slurm-wlm slurmctld slurmd munge iproute2 numactl

# Thirty families of Hugging Face's, each alone, padded left and right, against the model itself.
test-inference: $(INSTALLED)
	DS_TEST_LONG=1 $(BIN)/python -m pytest tests/inference $(PYTEST_ARGS)

test-cluster: $(INSTALLED)
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(CLUSTER_PACKAGES)
	DS_TEST_CLUSTER=1 $(BIN)/python -m pytest tests/cluster $(PYTEST_ARGS)

test-monitors: $(INSTALLED)
	$(PIP_INSTALL) -e '.[dev,monitor]'
	$(BIN)/python -m pytest tests/monitor $(PYTEST_ARGS)

# Saving under fire: processes killed, system calls that fail, files damaged, a disk that is full (root), each as often as ROUNDS says.
ROUNDS ?= 200

test-soak: $(INSTALLED)
	$(BIN)/python -m tests.soak.crash --rounds $(ROUNDS)
	$(BIN)/python -m tests.soak.errors --rounds $(ROUNDS)
	$(BIN)/python -m pytest tests/checkpoint/test_damage.py tests/checkpoint/test_durability.py

# Fewer bytes on the wire: every 1-bit optimizer, quantized exchange and resumed run against a simulation in one process.
test-wire: $(INSTALLED)
	DS_TEST_LONG=1 $(BIN)/python -m pytest tests/engine/test_onebit.py tests/engine/test_onebit_divided.py tests/engine/test_quantized.py \
	    tests/comm/test_quantized_exchanges.py tests/comm/test_shared.py tests/comm/test_exchange.py \
	    tests/comm/test_coalesced.py tests/comm/test_sparse.py tests/comm/test_secondary.py tests/kernels $(PYTEST_ARGS)

# Sequences in parts: 2, 3 and 4 ranks at every stage, packed and padded, odd lengths, batches of three, against one process.
test-sequence: $(INSTALLED)
	DS_TEST_LONG=1 $(BIN)/python -m pytest tests/parallel/sequence $(PYTEST_ARGS)

# Pipelines: every schedule at every stage, three dims on eight ranks, all families, random costs up to 64 stages x 512 micro-batches.
test-pipeline: $(INSTALLED)
	DS_TEST_LONG=1 $(BIN)/python -m pytest tests/parallel/pipeline tests/examples/test_pipeline_example.py $(PYTEST_ARGS)

# Two ways of dividing ranks at once: every pair at every stage on 4 and 8 ranks, and checkpoints from one to another.
test-pairs: $(INSTALLED)
	DS_TEST_LONG=1 $(BIN)/python -m pytest tests/parallel/test_pairs.py $(PYTEST_ARGS)

# Layers cut over ranks: 34 families on 2, 3 and 4 ranks against one process, every plan of Transformers, a thousand steps.
test-tensor: $(INSTALLED)
	DS_TEST_LONG=1 $(BIN)/python -m pytest tests/parallel/tensor $(PYTEST_ARGS)

# The autotuner and the planner, with real trials of real scripts.
test-autotuning: $(INSTALLED)
	DS_TEST_LONG=1 $(BIN)/python -m pytest tests/autotuning tests/planner tests/memory/test_scaling.py $(PYTEST_ARGS)

# Scripts that edit their model while it trains, as many as ROUNDS says, against plain PyTorch.
test-edits: $(INSTALLED)
	$(BIN)/python -m tests.soak.edits --rounds $(ROUNDS)

# Every stage, tier, precision and accumulation on the simulated device; how often the host waits for it.
test-device: $(INSTALLED)
	DS_TEST_DEVICE=1 $(BIN)/python -m pytest tests/device $(PYTEST_ARGS)
	$(BIN)/python -m tests.device.waits

# Asynchronous work as late as the rules allow and in other legal orders, SEEDS of them; then waits taken away one by one.
SEEDS ?= 200

test-adversarial: $(INSTALLED)
	$(BIN)/python -m tests.device.adversity --seeds $(SEEDS)
	$(BIN)/python -m tests.device.mutations

# On a machine with an accelerator, no network: training against the oracle, then speed and memory beside FSDP2, as gpu.md and gpu.json.
# Without one: make test-gpu GPU_ARGS=--simulate, make bench-gpu GPU_ARGS=--tiny.
GPU_ARGS ?=

test-gpu: $(INSTALLED)
	$(BIN)/python -m tests.device.on_accelerator $(GPU_ARGS)

bench-gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py $(GPU_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/step_time.py --model gpt
	$(BIN)/python benchmarks/step_time.py --model layers

# Compile csrc/ into this checkout again, without installing.
native:
	$(BIN)/python setup.py --quiet build_ext --inplace

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build *.egg-info deepspeed/lib

# torch comes first and alone, so that the build chosen here is the one everything else resolves against.
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) torch
	touch $@

# csrc/ is compiled by these.
.venv/runnable: .venv/torch $(SOURCES)
	$(PIP_INSTALL) -e '.[demo]'
	touch $@

$(INSTALLED): .venv/torch $(SOURCES)
	$(PIP_INSTALL) -e '.[dev,hf,lightning]'
	touch $@

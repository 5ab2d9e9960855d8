# Each target sets up .venv when it is missing or out of date; nothing outside this folder is touched.
#
#   make demo         compile the model in examples/models and let it write
#   make test         pytest; ARGS="tests/test_kernels.py -v" chooses
#   make test-sanitized  tests of the kernels, which stop at the first access out of bounds (GCC on Linux)
#   make bench        benchmarks/run.py
#   make bench-peers  benchmarks/peers.py: edgert beside other runtimes, which get an environment of their own
#   make bench-quality  benchmarks/quality.py: what compressing costs, beside others; ARGS="--shared FOLDER"
#   make bench-mixed  benchmarks/mixed_speed.py: how fast a mix of precisions decodes, beside f16, INT8 and INT4
#   make bench-service  benchmarks/service.py: what the service costs, carries and survives
#   make models       benchmarks/models.py: every family of models through all of edgert; ARGS="llama4 gemma4_moe"
#   make fuzz         benchmarks/fuzz.py: a service under attack
#   make lint         ruff and mypy
#   make clean        remove build/ and caches; .venv stays

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.complete
DEMO := build/demo.edge
DEMO_MODEL := examples/models/bookworm
TORCH := torch==2.13.0
PEERS := build/peers

.DELETE_ON_ERROR:
.PHONY: setup demo test test-sanitized bench bench-peers bench-quality bench-mixed bench-service models fuzz lint clean

setup: $(STAMP)

# torch alone first: where an index or folder offers a CPU build of it, pip takes that one. It stays on the second
# command line because optimum-intel asks for torchvision without a version, and the newest would replace torch.
$(STAMP): pyproject.toml $(wildcard kernels/CMakeLists.txt kernels/src/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install $(TORCH) --editable ".[compile,serve]" --group dev
	@# PyPI's torchvision is built for CUDA: beside a CPU torch its import fails, and with it transformers'.
	$(BIN)/python -c "import torchvision" 2>/dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchvision
	touch $@

$(DEMO)/manifest.json: $(wildcard $(DEMO_MODEL)/*) | $(STAMP)
	$(BIN)/edgert compile $(DEMO_MODEL) -o $(DEMO) --weights int4 --force

demo: $(DEMO)/manifest.json
	$(BIN)/edgert plan $(DEMO)
	$(BIN)/edgert run $(DEMO) "It was a dark night, and" --max-tokens 120

# Two files at a time: most tests use one core.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Only the kernels are instrumented, so Python must be given the sanitizers' runtime before all else, and libstdc++ with
# it, whose exceptions it watches. TBB would load its helper in a way that the runtime refuses. Leaks are not looked for:
# Python and OpenVINO keep much until the end. What a report says goes to the terminal, past pytest's capture. Attention
# over long caches runs once, in the plugin: on every instruction set, checked, it would take a minute.
SANITIZED := build/sanitized
SANITIZED_TESTS := $(wildcard $(addprefix tests/test_,kernels.py \
    $(addprefix kernel_,linear.py embedding.py isa.py refusals.py attention.py attention_batched.py \
    attention_refusals.py)))

test-sanitized: $(STAMP)
	$(BIN)/cmake -S kernels -B $(SANITIZED) -G Ninja -DEDGERT_SANITIZE=ON -DCMAKE_CXX_COMPILER=$(CXX) \
	    -DOpenVINO_DIR="$$($(BIN)/python -c 'import openvino as o; print(o.__path__[0])')/cmake" >/dev/null
	$(BIN)/cmake --build $(SANITIZED)
	$(BIN)/cmake --install $(SANITIZED) --prefix $(SANITIZED)/installed >/dev/null
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1 \
	    TBB_ENABLE_SANITIZERS=1 PYTHONPATH=tests EDGERT_KERNELS_FROM=$(SANITIZED)/installed \
	    $(BIN)/python -m pytest -q --capture=sys -p kernels_from $(SANITIZED_TESTS) \
	    --deselect tests/test_kernel_attention.py::test_long_ones_too_with_any_number_of_threads $(ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-peers: $(STAMP) $(PEERS)/.complete
	$(BIN)/python benchmarks/peers.py $(ARGS)

bench-quality: $(STAMP) $(PEERS)/.complete
	$(BIN)/python benchmarks/quality.py $(ARGS)

bench-mixed: $(STAMP)
	$(BIN)/python benchmarks/mixed_speed.py $(ARGS)

bench-service: $(STAMP) $(DEMO)
	$(BIN)/python benchmarks/service.py $(ARGS)

models: $(STAMP)
	$(BIN)/python benchmarks/models.py $(ARGS)

fuzz: $(STAMP) $(DEMO)
	$(BIN)/python benchmarks/fuzz.py $(ARGS)

# Builds llama.cpp twice: half an hour on two cores.
$(PEERS)/.complete: benchmarks/peers-requirements.txt benchmarks/runtimes/install.py
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python benchmarks/runtimes/install.py
	touch $@

# mypy sees the package as it is installed, with converters/ inside: a copy, because it knows no mapped folders.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed
	cp -Rp edgert build/typed/edgert && cp -Rp converters build/typed/edgert/converters
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p edgert

clean:
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

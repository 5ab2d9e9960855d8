# Each target sets up .venv when it is missing or out of date; nothing outside this folder is touched.
#
#   make demo     compile the model in examples/models and let it write
#   make test     pytest; ARGS="tests/test_kernels.py -v" chooses
#   make bench    benchmarks/run.py
#   make lint     ruff and mypy
#   make clean    remove build/ and caches; .venv stays

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.complete
DEMO := build/demo.edge
DEMO_MODEL := examples/models/bookworm
TORCH := torch==2.13.0

.DELETE_ON_ERROR:
.PHONY: setup demo test bench lint clean

setup: $(STAMP)

# torch alone first: where an index or folder offers a CPU build of it, pip takes that one. It stays on the second
# command line because optimum-intel asks for torchvision without a version, and the newest would replace torch.
$(STAMP): pyproject.toml $(wildcard kernels/CMakeLists.txt kernels/src/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install $(TORCH) --editable ".[compile]" --group dev
	@# PyPI's torchvision is built for CUDA: beside a CPU torch its import fails, and with it transformers'.
	$(BIN)/python -c "import torchvision" 2>/dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchvision
	touch $@

$(DEMO)/manifest.json: $(wildcard $(DEMO_MODEL)/*) | $(STAMP)
	$(BIN)/edgert compile $(DEMO_MODEL) -o $(DEMO) --weights int4 --force

demo: $(DEMO)/manifest.json
	$(BIN)/edgert plan $(DEMO)
	$(BIN)/edgert run $(DEMO) "It was a dark night, and" --max-tokens 120

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py $(ARGS)

# mypy sees the package as it is installed, with converters/ inside: a copy, because it knows no mapped folders.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed
	cp -Rp edgert build/typed/edgert && cp -Rp converters build/typed/edgert/converters
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p edgert

clean:
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

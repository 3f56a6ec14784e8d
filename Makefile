# Every target sets up what it needs: a Python (>= 3.10) with pip and venv is enough.
PYTHON ?= python3
VENV ?= .venv
OLDEST_TRANSFORMERS = 5.17.0
WORKERS ?= auto
BIN = $(VENV)/bin

MODELS = -m models/qwen2-d128 -m models/gemma4-d256-512
DEMO = --ctx-size 512 --chunks 24 --decode 8

.PHONY: bench-cpu bench-gpu build demo test test-oldest test-metal test-arm test-gpu lint readme clean

$(VENV)/ready: pyproject.toml constraints.txt hatch_build.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "gyrokv needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]' ruff
	touch $@

build: $(VENV)/ready  ## the compiled CPU backend anew, where its sources have changed; without a compiler it stays away
	$(BIN)/python hatch_build.py --if-needed

demo: build  ## the main job on the bundled models: what each KV format costs, then some text
	mkdir -p build
	$(BIN)/gyrokv compare $(MODELS) -f models/heldout.txt $(DEMO) --json build/demo.json --plot build/demo.svg --html build/demo.html
	$(BIN)/gyrokv generate -m models/qwen2-d128 -ctk q8_0 -ctv turbo4 -n 64 --temp 0.6 -p 'def read_lines(path):'

test: build  ## the whole suite on this machine, without an accelerator
	$(BIN)/python -m pytest -n $(WORKERS)

test-oldest: build  ## the transformers integration on the oldest release supported
	test -d build/oldest/transformers || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--target build/oldest transformers==$(OLDEST_TRANSFORMERS)
	PYTHONPATH=build/oldest $(BIN)/python -m pytest -n $(WORKERS) tests/test_hf_*.py

test-metal: build  ## what `make test` cannot run of Metal: MLX's own source and mlx-lm's models, clang's check of pointers
	test -d build/metal/mlx_lm || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--target build/metal --no-deps mlx mlx-cpu mlx-lm ziglang
	PYTHONPATH=build/metal $(BIN)/python -m pytest -n $(WORKERS) tests/test_mlx*.py tests/test_metal_spaces.py

test-arm: build  ## the CPU's kernels for ARM, by an emulator (Debian's g++-aarch64-linux-gnu and qemu-user)
	PYTHONPATH=tests $(BIN)/python -c 'import sys; from arm_host import host; sys.exit(host.missing() or 0)'
	$(BIN)/python -m pytest -n $(WORKERS) tests/test_cpu_arm.py

test-gpu:  ## tests that need an accelerator, with the torch of $(PYTHON); records the counts
	PYTHONPATH=src $(PYTHON) benchmarks/record_tests.py --out benchmarks/results/gpu_tests.json -- -m gpu

bench-cpu: $(VENV)/ready build  ## speed of the CPU kernels on this machine, llama.cpp beside them where llama-cpp-python and gguf are installed
	$(BIN)/python benchmarks/cpu.py

bench-gpu:  ## speed of the GPU kernels beside PyTorch's, with the torch of $(PYTHON)
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py
	PYTHONPATH=src $(PYTHON) benchmarks/gpu_prefill.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python benchmarks/readme.py --check

readme: $(VENV)/ready  ## write the generated tables of README.md anew
	$(BIN)/python benchmarks/readme.py

clean:
	rm -rf $(VENV) build dist src/gyrokv/backends/cpu/_core.* .pytest_cache .hypothesis .ruff_cache

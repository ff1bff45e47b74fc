# The commands of this repository; each creates the environment it needs.
#   make demo   train on composed scenes and draw what was learned    make test   the test suite
#   make lint   ruff, mypy and clang-format                           make clean  remove what these made
#   make sanitize   op tests under ASan and UBSan                     make races  op tests under ThreadSanitizer
#   make matrix     error budgets under several BLAS and instruction sets
#   make fuzz   other cases every time, FUZZ times as many as make test (10)
#   make compilers  aarch64 and clang (installed)

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: demo test fuzz matrix sanitize races compilers lint clean

# Installs are editable: a plain one would leave sadcl.kernels out when Python runs from this folder.
$(VENV)/train.stamp: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[train]'
	touch $@

$(VENV)/test.stamp: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[train,test,emoji,export,tensorboard,lint]'
	touch $@

demo: $(VENV)/train.stamp
	$(BIN)/sadcl fetch || { \
		echo "training on drawings (emoji) instead of photos"; \
		$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[train,emoji]'; }
	$(BIN)/sadcl train

# Two processes of one thread each: what needs more threads sets them. make test PYTEST_ARGS="-n 0 tests/ops" for one.
test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

FUZZ ?= 10
fuzz: $(VENV)/test.stamp
	SADCL_FUZZ=$(FUZZ) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/ops/test_fuzz.py $(PYTEST_ARGS)

matrix: $(VENV)/test.stamp
	$(BIN)/python -m tests.matrix

# The op tests on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer (g++; about ten minutes).
# Python itself is not instrumented, so the runtime is preloaded; leaks are the interpreter's business.
SANITIZED_TESTS ?= -m op tests/ops
sanitize: $(VENV)/test.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -q setuptools wheel pybind11
	SADCL_SANITIZE=address $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	test -f build/sanitize/lib/sadcl/_C*.so
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
		$(BIN)/python -m pytest -q -x -o pythonpath="build/sanitize/lib ." -p no:cacheprovider $(SANITIZED_TESTS)

# The same tests under ThreadSanitizer at 2 to 8 threads. It understands OpenMP through LLVM's runtime and its tool Archer
# alone (Debian: clang-19 libclang-rt-19-dev libomp-19-dev; LLVM 14's runtime cannot be preloaded), and is told to pass over
# what is not instrumented: Python, torch and its libgomp. setarch -R: it wants addresses that randomisation may take.
LLVM ?= 19
RACED_TESTS ?= $(SANITIZED_TESTS)
races: $(VENV)/test.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -q setuptools wheel pybind11
	CC=clang-$(LLVM) CXX=clang++-$(LLVM) SADCL_SANITIZE=thread \
		$(BIN)/python setup.py -q build --build-base build/races --build-lib build/races/lib
	test -f build/races/lib/sadcl/_C*.so
	for threads in 2 3 8; do \
		LD_PRELOAD="$$(clang++-$(LLVM) -print-file-name=libclang_rt.tsan-x86_64.so)" OMP_NUM_THREADS=$$threads \
		OMP_WAIT_POLICY=passive KMP_BLOCKTIME=0 \
		OMP_TOOL_LIBRARIES="$$(clang++-$(LLVM) -print-resource-dir)/../../libarcher.so" \
		TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66 log_path=build/races/report" \
			setarch -R $(BIN)/python -m pytest -q -x -o pythonpath="build/races/lib ." -p no:cacheprovider \
			-k "not fork and not instruction_set" $(RACED_TESTS) || { cat build/races/report.* 2>/dev/null; exit 1; }; \
	done

# The kernels by other compilers, warnings being errors: aarch64 (NEON) and clang. Compiled, not run.
KERNELS = $(filter-out csrc/module.cpp,$(wildcard csrc/*.cpp))
STRICT = -std=c++17 -O2 -c -o /dev/null -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp -Wall -Wextra -Werror
compilers:
	for file in $(KERNELS); do \
		aarch64-linux-gnu-g++ $(STRICT) -DSADCL_ISA=portable -DSADCL_FLOAT64=1 -Icsrc $$file || exit 1; \
		clang++ $(STRICT) -DSADCL_ISA=portable -DSADCL_FLOAT64=1 -Icsrc $$file || exit 1; \
		clang++ $(STRICT) -DSADCL_ISA=avx2 -mavx2 -mfma -mf16c -Icsrc $$file || exit 1; \
	done
	clang++ $(STRICT) -DSADCL_ISA=avx512_bf16 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 \
		-Icsrc csrc/sscl.cpp
	clang++ $(STRICT) -DSADCL_ISA=avx512_popcnt -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq \
		-mavx512vpopcntdq -Icsrc csrc/mlc.cpp

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .mypy_cache sadcl.egg-info sadcl/_C*.so

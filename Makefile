# The commands of this repository; each creates the environment it needs.
#   make demo   train on composed scenes and draw what was learned    make test   the test suite
#   make lint   ruff and mypy                                         make clean  remove what these made

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: demo test lint clean

# Installs are editable: a plain one would leave sadcl.kernels out when Python runs from this folder.
$(VENV)/train.stamp: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[train]'
	touch $@

$(VENV)/test.stamp: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[train,test,emoji,export,tensorboard]'
	touch $@

$(VENV)/lint.stamp: $(VENV)/test.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[lint]'
	touch $@

demo: $(VENV)/train.stamp
	$(BIN)/sadcl fetch || { \
		echo "training on drawings (emoji) instead of photos"; \
		$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[train,emoji]'; }
	$(BIN)/sadcl train

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .mypy_cache sadcl.egg-info sadcl/_C*.so

# make demo   set everything up and run the demo (about three minutes after installation)
# make test   set everything up and run the tests
# make check  lint, types, and whether the pins agree with the ranges

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo test check clean
.DELETE_ON_ERROR:

demo: $(VENV)/runtime
	$(BIN)/lora-mini demo

test: $(VENV)/testing
	$(BIN)/python -m pytest

check: $(VENV)/testing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python $(VENV)
	$(BIN)/python tests/check_pins.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime: $(VENV)/bin/python requirements.txt pyproject.toml
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)/testing: $(VENV)/runtime requirements-test.txt
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) runs build

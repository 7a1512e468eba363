# make demo [MINUTES=5]   make the environment, train on captioned shapes, draw, score
# make test               the same environment, then every test on the CPU
# make quick              only the quick tests
PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 5
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)

demo: $(VENV)/run.txt
	$(BIN)/python -m experiments.demo --minutes=$(MINUTES)

test: $(VENV)/dev.txt
	$(BIN)/python -m pytest -q -n auto --maxprocesses=8 --dist loadgroup

quick: $(VENV)/dev.txt
	$(BIN)/python -m pytest -q -n auto --maxprocesses=8 --dist loadgroup -m "not slow"

$(VENV)/run.txt: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip freeze > $@

$(VENV)/dev.txt: requirements-dev.txt $(VENV)/run.txt
	$(BIN)/python -m pip install -r requirements-dev.txt
	$(BIN)/python -m pip freeze > $@

.PHONY: demo test quick

# `make` or `make help` lists what there is. Everything installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e
.DEFAULT_GOAL := help

# Unset, `accelerate launch` gives a process one thread, also where it has a CPU alone.
hpd embed-distill lealla multi-sense: export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)

hpd: .venv/demo  ## HPD: distil all-MiniLM-L6-v2 into 3 layers and 128 dimensions, offline (ARGS="--help" for flags)
	$(BIN)/accelerate launch recipes/hpd.py $(ARGS)

embed-distill: .venv/demo  ## EmbedDistill: a small query encoder over the teacher's index of a dictionary, offline
	$(BIN)/accelerate launch recipes/embed_distill.py $(ARGS)

lealla: .venv/demo  ## LEALLA: a thin, deep student that finds verses of old Bibles in a modern one, offline
	$(BIN)/accelerate launch recipes/lealla.py $(ARGS)

multi-sense: .venv/demo  ## Multi-sense: a dictionary of what all-MiniLM-L6-v2's tokens mean, and 3 layers that speak it, offline
	$(BIN)/accelerate launch recipes/multi_sense.py $(ARGS)

test: .venv/test  ## the fast tests (ARGS="-k name")
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: .venv/test-all  ## all tests, those of several processes and kills too
	$(BIN)/python -m pytest $(ARGS)

check: .venv/test  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/demo  ## memory of caching and training at two sizes (several minutes)
	$(BIN)/python benchmarks/memory.py $(ARGS)

hub-demo: .venv/test-all  ## train, publish, open and describe a student against a server of the Hub's protocol on this machine
	$(BIN)/python tests/hub_server/demo.py $(ARGS)

cards: .venv/test  ## make the table and the cards of the committed results again
	$(BIN)/python recipes/results/make.py

.venv/%: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) ".[$*]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## */\t/' | expand -t 12

.PHONY: hpd embed-distill lealla multi-sense test test-all check bench hub-demo cards help

# make demo | bench | test | test-all | nested | kills | service | fuzz | sanitize | check | build | install | clean
# Every target sets up what it needs first (tools/setup); nothing is done twice.

PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
PYTEST_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?=
SANITIZE_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo bench test test-fast test-all nested kills service fuzz sanitize check lint build install setup clean

help:
	@echo 'make demo      real guests on hcd: PIO and MMIO, then a table of what every path cost'
	@echo 'make bench     hcd and qemu-storage-daemon side by side (BENCH_ARGS=--help has more)'
	@echo 'make test      the fast tests, then one guest per path'
	@echo 'make test-all  the same, and the long ones'
	@echo 'make nested    hypercall doorbells on a stock kernel with emulated SVM (part of make test too)'
	@echo 'make kills     kill -9 of hcd, twenty times, under a guest that writes (two times in make test)'
	@echo 'make service   the systemd units in a Debian guest with systemd (part of make test too)'
	@echo 'make fuzz      codec, rings and devices under random input, a minute each (FUZZ_ARGS=--help has more)'
	@echo 'make sanitize  the same and the data plane tests, with the compiled part under ASan and UBSan'
	@echo 'make check     ruff, mypy and the fast tests'
	@echo 'make build     set up .venv and compile the data plane'
	@echo 'make install   for the whole machine, with systemd units (DESTDIR, PREFIX, DEPS=no: see tools/install)'
	@echo 'make clean     remove what the build made (not .venv, not the cache of guest kernels)'

setup:
	@tools/setup guests

build:
	@tools/setup build

install: build
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' DEPS='$(DEPS)' INTERPRETER='$(INTERPRETER)' tools/install

demo: setup
	@$(PYTHON) -m hcd.demo

bench: setup
	@$(PYTHON) -m hcd.bench $(BENCH_ARGS)

# One run, one summary; tests/conftest.py puts the guests last.
test: setup
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-all: setup
	$(PYTEST) $(PYTEST_ARGS)

kills: setup
	HCD_KILLS=20 $(PYTEST) -s tests/guests/test_restart.py $(PYTEST_ARGS)

nested: setup
	$(PYTEST) tests/nested $(PYTEST_ARGS)

service: setup
	$(PYTEST) tests/service $(PYTEST_ARGS)

fuzz: build
	$(PYTHON) -m tests.fuzz $(FUZZ_ARGS)

sanitize: build
	@tools/sanitize $(SANITIZE_ARGS)

test-fast: build
	$(PYTEST) -m 'not guest and not long and not slow' $(PYTEST_ARGS)

lint: build
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

check: lint test-fast

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f .venv/*.stamp hcd/*/*.so
	for source in hcd/*/*.pyx; do rm -f "$${source%.pyx}.c"; done
	find hcd protocols tests -name __pycache__ -type d -prune -exec rm -rf {} +

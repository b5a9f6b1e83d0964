# The one entry point for every check; CI runs `make test`.
#
#   make setup             set a machine up (see mk/setup.mk); the other targets do it themselves
#   make demo              the main job on real input: a filesystem whose image shrinks while it is used
#   make demo IMAGE=path   the same on a copy of an image of yours
#   make test              everything CI runs
#   make lib               the C library; make install PREFIX= DESTDIR= installs it with its header
#   make wheel             the Python wheel
#   make bench             how fast, beside the raw file, QEMU and other libraries (see mk/bench.mk)
#   make soak MINUTES=n    long random runs from a fresh seed, n minutes in all (see mk/soak.mk)
#   make models            the concurrent parts in thousands of interleavings each (see mk/models.mk)
#   make miri              undefined behaviour and data races in the core's unit tests (see mk/miri.mk)
#   make sanitize          the C programs and the library under AddressSanitizer and ThreadSanitizer (see mk/sanitize.mk)
#   make fuzz SECONDS=n    coverage-guided fuzzing, n seconds a target (see mk/fuzz.mk)
#   make clean

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# Cargo uses all cores by itself; recipes that run in order give a log that can be read.
.NOTPARALLEL:

CARGO ?= cargo
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)

include mk/setup.mk
include $(filter-out mk/setup.mk,$(sort $(wildcard mk/*.mk)))

.PHONY: help test rust-format rust-lint rust-test pytest clean

help:
	@sed -n 's/^#   make/  make/p' Makefile

test: setup rust-format rust-lint header-check rust-test models fuzz-slice lib bench-smoke python-dev python-lint pytest

rust-format: system
	$(CARGO) fmt --all --check

# pyo3 asks an interpreter for its version when it is compiled.
rust-lint rust-test: export PYO3_PYTHON = $(CURDIR)/$(VENV_BIN)/python

rust-lint: $(VENV_READY)
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	# As it is shipped: without the deliberate mistakes that tests are built with.
	$(CARGO) clippy --workspace --locked -- -D warnings
	# What only the model checker's scenes are compiled into.
	$(CARGO) clippy -p qcow-recycler --all-targets --features models --locked -- -D warnings

# Not those packages that have no tests in Rust, and many dependencies: cargo would choose features for them that it does not choose
# for the core alone, and compile the engine's tests again for whatever else runs those.
RUST_TESTED := --workspace --exclude qcow-recycler-python --exclude qcowrecycle-header --exclude qcow-lossy

# nextest runs the test programs side by side, but no examples in comments: of those only the core's are Rust.
rust-test: $(VENV_READY)
	if command -v cargo-nextest >/dev/null; then \
		$(CARGO) nextest run $(RUST_TESTED) --locked; \
		$(CARGO) test -p qcow-recycler --locked --doc -q; \
	else \
		$(CARGO) test $(RUST_TESTED) --locked -q; \
	fi
	# Deliberate mistakes, which break the library for a whole process.
	$(CARGO) test -p qcow-recycler --locked -q --test simulation mutations:: -- --ignored --nocapture

# A process for each core. PYTEST= takes further arguments, such as PYTEST='-k crash -x', or -n0 for one process, as --pdb needs.
pytest: setup lib python-dev
	$(VENV_BIN)/python -m pytest -q -n auto --dist worksteal tests/ $(PYTEST)

clean:
	$(CARGO) clean
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

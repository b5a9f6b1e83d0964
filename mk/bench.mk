# Benchmarks: this library beside the raw file, QEMU and other qcow2 libraries. docs/PERFORMANCE.md says how.
#
#   bench                   all rows: some twenty minutes; the table, and build/bench/bench.json and .svg
#   bench QUICK=1           all rows in a few minutes, into build/bench/quick.json and .svg
#   bench ROWS=read,flush   some rows; `make bench-rows` names them
#   bench-report            the last full run's results into docs/PERFORMANCE.md and README.md; RESULTS= names another
#   bench-smoke             does it build and run at all? for make test
#
# BENCH_TMPFS= and BENCH_DISK= name the directories for images: in memory (some 8 GiB), and on a disk (some 12 GiB).

BENCH_TMPFS ?= /dev/shm
BENCH_DISK ?= build/bench
BENCH_TARGET := $(abspath $(TARGET_DIR))/bench
BENCH_CARGO = QCR_LIB_DIR=$(abspath $(LIB_DIR)) CARGO_TARGET_DIR=$(BENCH_TARGET) $(CARGO)
BENCH_FLAGS := --manifest-path bench/Cargo.toml --locked
BENCH_PLACES := --tmpfs=$(BENCH_TMPFS) --disk=$(BENCH_DISK) --output=build/bench
# It conducts and measures nothing itself, so it need not be fast.
BENCH := $(BENCH_TARGET)/debug/qcow-recycler-bench

RESULTS ?= build/bench/bench.json

.PHONY: bench bench-build bench-rows bench-report bench-smoke

# For the row of compaction on XFS, which only root can measure.
ifeq ($(shell id -u),0)
bench: SYSTEM_PROGRAMS += mkfs.xfs:xfsprogs
endif
bench: setup bench-build
	BENCH_PROGRAMS=$(BENCH_TARGET)/release $(BENCH) $(if $(QUICK),--quick) --rows=$(ROWS) $(BENCH_PLACES)

# imago's two features exclude one another: each gets a cargo of its own.
bench-build: lib
	$(BENCH_CARGO) build $(BENCH_FLAGS) -p qcow-recycler-bench
	$(BENCH_CARGO) build $(BENCH_FLAGS) --release -p bench-library -p bench-qcow2-rs
	$(BENCH_CARGO) build $(BENCH_FLAGS) --release -p bench-imago-sync
	$(BENCH_CARGO) build $(BENCH_FLAGS) --release -p bench-imago-async

bench-rows: bench-build
	$(BENCH) rows

bench-report:
	$(BENCH_CARGO) run -q $(BENCH_FLAGS) -p qcow-recycler-bench -- report --results=$(RESULTS) \
		--page=docs/PERFORMANCE.md --readme=README.md --plot=docs/performance.svg

# Without the peers, without optimisation, and with disks so small that it takes seconds.
bench-smoke: setup lib
	$(CARGO) fmt --manifest-path bench/Cargo.toml --all --check
	$(BENCH_CARGO) build $(BENCH_FLAGS) -p qcow-recycler-bench -p bench-library
	BENCH_PROGRAMS=$(BENCH_TARGET)/debug $(BENCH) --tiny $(BENCH_PLACES)

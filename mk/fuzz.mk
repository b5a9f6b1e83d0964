# Fuzzing. The bounded part that needs no nightly compiler is recycler/tests/hostile.rs, which rust-test runs.
#
#   fuzz SECONDS=n   each target of fuzz/ for n seconds; what is found lies in fuzz/artifacts, new inputs in build/fuzz
#   fuzz-slice       the same for a minute in all, for make test; only where a nightly compiler and cargo-fuzz are
#   fuzz-corpus      make fuzz/corpus anew with qemu-img
#   fuzz-tools       a nightly compiler, and cargo-fuzz in build/tools
#
# An input again: make fuzz-replay TARGET=image INPUT=fuzz/artifacts/image/crash-...

SECONDS ?= 60
FUZZ_TARGETS := image entries header options
FUZZ_CARGO := PATH="$(CURDIR)/build/tools/bin:$$PATH" cargo +nightly fuzz
FUZZ_FLAGS := --fuzz-dir fuzz --target-dir $(abspath $(TARGET_DIR))/fuzz
# Seconds, MiB and bytes: an input that takes more is a finding.
FUZZ_LIMITS := -timeout=20 -rss_limit_mb=2048 -malloc_limit_mb=256 -max_len=131072 -len_control=0

.PHONY: fuzz fuzz-slice fuzz-soak fuzz-build fuzz-tools fuzz-corpus fuzz-replay

fuzz: fuzz-tools
	set -e; for target in $(FUZZ_TARGETS); do \
		mkdir -p build/fuzz/$$target; \
		$(FUZZ_CARGO) run $(FUZZ_FLAGS) $$target build/fuzz/$$target fuzz/corpus/$$target -- \
			-max_total_time=$(SECONDS) $(FUZZ_LIMITS) -print_final_stats=1 -print_funcs=0 -verbosity=0; \
	done

fuzz-slice:
	if PATH="$(CURDIR)/build/tools/bin:$$PATH" cargo +nightly fuzz --version >/dev/null 2>&1; then \
		$(MAKE) fuzz SECONDS=15; \
	else \
		echo 'No nightly compiler with cargo-fuzz (make fuzz-tools): the targets ran on their corpus in rust-test only.'; \
	fi

# All targets, TOTAL seconds in all.
fuzz-soak:
	$(MAKE) fuzz SECONDS=$$(( $(TOTAL) / $(words $(FUZZ_TARGETS)) ))

fuzz-build: fuzz-tools
	$(FUZZ_CARGO) build $(FUZZ_FLAGS)

fuzz-tools: nightly
	PATH="$(CURDIR)/build/tools/bin:$$PATH" cargo fuzz --version >/dev/null 2>&1 || \
		cargo install cargo-fuzz --locked --version '^0.13' --root build/tools

fuzz-replay: fuzz-tools
	$(FUZZ_CARGO) run $(FUZZ_FLAGS) $(TARGET) $(INPUT)

fuzz-corpus: system
	$(PYTHON) fuzz/make_corpus.py

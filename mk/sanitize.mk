# The C programs of tests/c and ffi/examples and the whole library, standard library included, under sanitizers: with a
# nightly compiler (see mk/setup.mk); the C side is gcc's, with the run-time that the Rust compiler brings.
#
#   sanitize          under AddressSanitizer (with UndefinedBehaviorSanitizer in C) and under ThreadSanitizer
#   sanitize-address  under the one
#   sanitize-thread   under the other

SANITIZERS := address thread
SANITIZE_TARGET := x86_64-unknown-linux-gnu
SANITIZE_DIR = $(abspath $(TARGET_DIR))/sanitize

.PHONY: sanitize $(SANITIZERS:%=sanitize-%)

sanitize: $(SANITIZERS:%=sanitize-%)

$(SANITIZERS:%=sanitize-%): sanitize-%: setup nightly-parts
	RUSTFLAGS=-Zsanitizer=$* cargo +nightly rustc --locked -Zbuild-std --target $(SANITIZE_TARGET) \
		--target-dir $(SANITIZE_DIR)/$* -p qcowrecycle-ffi --lib --crate-type staticlib
	QCR_SANITIZER=$* QCR_SANITIZED=$(SANITIZE_DIR)/$*/$(SANITIZE_TARGET)/debug/libqcowrecycle.a \
		$(VENV_BIN)/python -m pytest -q tests/test_sanitizers.py $(PYTEST)

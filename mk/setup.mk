# Sets a machine up that has only Rust, Python, gcc, make and apt: what make needs, and what to do where it is missing.
#
#   setup     everything below; other fragments depend on $(VENV_READY) and on `system`
#   system    the programs of the host, installed by apt when this is root, named otherwise
#   nightly   a nightly compiler by rustup, for fuzzing; nightly-parts adds what miri and the sanitizers need of it
#   $(VENV_READY)  the virtual environment .venv with the tools of tests/requirements.txt

VENV := .venv
VENV_READY := $(VENV)/.ready
VENV_BIN := $(VENV)/bin
PYTHON ?= python3

# program:package of Debian and Ubuntu
SYSTEM_PROGRAMS := \
	cc:gcc \
	g++:g++ \
	pkg-config:pkg-config \
	cmake:cmake \
	qemu-img:qemu-utils \
	qemu-io:qemu-utils \
	qemu-nbd:qemu-utils \
	mke2fs:e2fsprogs \
	debugfs:e2fsprogs \
	e2fsck:e2fsprogs \
	valgrind:valgrind \
	strace:strace

# e2fsprogs live in sbin, which is not on every user's path.
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: setup system nightly nightly-parts
setup: system $(VENV_READY)

system:
	@set -e; missing=''; \
	for pair in $(SYSTEM_PROGRAMS); do \
		command -v "$${pair%%:*}" >/dev/null 2>&1 || missing="$$missing $${pair##*:}"; \
	done; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'Python 3.11 or later is needed as $(PYTHON); make PYTHON=... names another.' >&2; exit 1; }; \
	$(PYTHON) -c 'import ensurepip, venv' >/dev/null 2>&1 || missing="$$missing python3-venv"; \
	missing=$$(printf '%s\n' $$missing | sort -u | tr '\n' ' '); \
	if [ -n "$${missing% }" ]; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
			echo "Installing $$missing"; \
			apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$missing; \
		else \
			echo "Missing programs. As root: apt-get install $$missing" >&2; exit 1; \
		fi; \
	fi; \
	for tool in cargo rustfmt cargo-clippy; do \
		command -v $$tool >/dev/null 2>&1 || { \
			echo "Rust 1.90 or later with rustfmt and clippy is needed ($$tool not found): https://rustup.rs" >&2; exit 1; }; \
	done

nightly:
	cargo +nightly --version >/dev/null 2>&1 || rustup toolchain install nightly --profile minimal

nightly-parts: nightly
	rustup component add --toolchain nightly miri rust-src

# Made anew from nothing when the list of tools changes, so that nothing left over can be relied on.
$(VENV_READY): tests/requirements.txt mk/setup.mk | system
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV_BIN)/python -m pip install -q --disable-pip-version-check -r tests/requirements.txt
	touch $@

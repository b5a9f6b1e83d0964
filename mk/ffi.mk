# The C library and its header.
#
#   lib             the library, in $(LIB_DIR)
#   header          write include/qcowrecycle.h anew from ffi/src
#   header-check    fail if that would change it
#   install PREFIX= DESTDIR=   the library, its header, and files for pkg-config and CMake
#   c-tests         the tests of the C interface alone
#
# QCR_PROFILE=dev builds without optimisation. This file also works on its own: make -f mk/ffi.mk install

CARGO ?= cargo
QCR_PROFILE ?= release
TARGET_DIR ?= $(or $(CARGO_TARGET_DIR),target)
LIB_DIR := $(TARGET_DIR)/$(if $(filter dev,$(QCR_PROFILE)),debug,$(QCR_PROFILE))

PREFIX ?= /usr/local
DESTDIR ?=
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include

LIB_VERSION := $(shell sed -n 's/^\#define QCR_VERSION_[A-Z]* //p' include/qcowrecycle.h | paste -sd.)
# As in ffi/build.rs; changes when the ABI breaks.
LIB_SONAME := libqcowrecycle.so.0
LIB_FILE := libqcowrecycle.so.$(LIB_VERSION)
# What `cargo rustc -p qcowrecycle-ffi -- --print native-static-libs` names.
LIB_PRIVATE := -lgcc_s -lutil -lrt -lpthread -lm -ldl -lc

INSTALL := install -D -m 644
ifneq ($(DESTDIR),)
INSTALL_ROOT := $(abspath $(DESTDIR))
endif

.PHONY: lib header header-check install c-tests

# The link is for programs that run with this library before it is installed.
lib:
	$(CARGO) build --locked --profile $(QCR_PROFILE) -p qcowrecycle-ffi $(if $(FEATURES),--features $(FEATURES))
	ln -sf libqcowrecycle.so $(LIB_DIR)/$(LIB_SONAME)

header:
	$(CARGO) run --locked -q -p qcowrecycle-header

header-check:
	$(CARGO) run --locked -q -p qcowrecycle-header -- --check

install: lib
	$(INSTALL) $(LIB_DIR)/libqcowrecycle.so $(INSTALL_ROOT)$(LIBDIR)/$(LIB_FILE)
	ln -sf $(LIB_FILE) $(INSTALL_ROOT)$(LIBDIR)/$(LIB_SONAME)
	ln -sf $(LIB_SONAME) $(INSTALL_ROOT)$(LIBDIR)/libqcowrecycle.so
	$(INSTALL) $(LIB_DIR)/libqcowrecycle.a $(INSTALL_ROOT)$(LIBDIR)/libqcowrecycle.a
	$(INSTALL) include/qcowrecycle.h $(INSTALL_ROOT)$(INCLUDEDIR)/qcowrecycle.h
	set -e; for file in \
		pkgconfig/qcowrecycle.pc \
		cmake/qcowrecycle/qcowrecycle-config.cmake \
		cmake/qcowrecycle/qcowrecycle-config-version.cmake; \
	do \
		mkdir -p "$$(dirname "$(INSTALL_ROOT)$(LIBDIR)/$$file")"; \
		sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@LIBDIR@|$(LIBDIR)|' -e 's|@INCLUDEDIR@|$(INCLUDEDIR)|' \
			-e 's|@VERSION@|$(LIB_VERSION)|' -e 's|@SONAME@|$(LIB_SONAME)|' \
			-e 's|@LIBS_PRIVATE@|$(LIB_PRIVATE)|' -e 's|@LINK_PRIVATE@|$(subst $() ,;,$(LIB_PRIVATE))|' \
			"ffi/packaging/$$(basename $$file).in" > "$(INSTALL_ROOT)$(LIBDIR)/$$file"; \
	done

c-tests: $(VENV_READY)
	$(or $(VENV_BIN),.venv/bin)/python -m pytest -q tests/test_c_abi.py

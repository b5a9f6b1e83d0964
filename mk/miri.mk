# Undefined behaviour and data races in the core's unit tests, by miri: it sees what the memory orderings allow, stale values
# too. With a nightly compiler (see mk/setup.mk).
#
#   miri       everything that does not talk to the system, and the scenes of recycler/src/models once
#   miri-many  those scenes and the slices, epochs and moves with SEEDS= schedules each

SEEDS ?= 32
MIRI := $(CARGO) +nightly miri test --locked -p qcow-recycler --lib --
MIRI_MODULES := buf:: check:: clusters:: format:: image:: metadata:: models:: recycler:: units::

.PHONY: miri miri-many

miri: nightly-parts
	PROPTEST_CASES=4 MIRIFLAGS='-Zmiri-disable-isolation -Zmiri-ignore-leaks' $(MIRI) $(MIRI_MODULES)

miri-many: nightly-parts
	MIRIFLAGS='-Zmiri-disable-isolation -Zmiri-ignore-leaks -Zmiri-many-seeds=0..$(SEEDS)' $(MIRI) models:: clusters:: metadata::

# Long random runs.
#
#   soak MINUTES=n   all parts of mk/soak.toml from a seed of the clock's, on all cores, n minutes in all; then a sum of
#                    what was done. SEED=n starts from that seed, ONLY=word runs the parts with that word in their names.
#
# Whoever has something that can run for long adds it to mk/soak.toml and lets it print lines such as
# `soak: crash_images=1234`; mk/soak.py adds them up.

MINUTES ?= 60

.PHONY: soak
soak: setup lib python-dev
	$(VENV_BIN)/python mk/soak.py $(MINUTES) $(SEED) $(if $(ONLY),--only '$(ONLY)')

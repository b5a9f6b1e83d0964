# Interleavings.
#
#   models         the scenes of recycler/src/models in thousands of interleavings each, for about half a minute
#   models-build   what that runs

MODELS := $(CARGO) test --locked -p qcow-recycler --features models --lib

.PHONY: models models-build

models:
	$(MODELS) models:: -- --nocapture

models-build:
	$(MODELS) --no-run

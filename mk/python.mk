# The Python wheel, its checks, and the main job on real input.
#
#   wheel        build/wheels/qcow_recycler-*.whl
#   python-dev   the wheel, installed into .venv
#   python-lint  ruff, mypy, and the stubs against the compiled module
#   demo         IMAGE=path: on a copy of that image; DEMO='...': arguments of demo/demo.py

WHEELS := build/wheels

.PHONY: wheel python-dev python-lint demo

wheel: $(VENV_READY)
	rm -rf $(WHEELS)
	PATH="$(CURDIR)/$(VENV_BIN):$$PATH" $(VENV_BIN)/maturin build --release --locked --strip \
		--manifest-path python/Cargo.toml --interpreter $(CURDIR)/$(VENV_BIN)/python --out $(WHEELS)

python-dev: wheel
	$(VENV_BIN)/python -m pip install -q --disable-pip-version-check --no-deps --force-reinstall $(WHEELS)/*.whl

python-lint: python-dev
	$(VENV_BIN)/ruff check python tests demo mk
	$(VENV_BIN)/ruff format --check python tests demo mk
	$(VENV_BIN)/mypy --config-file python/pyproject.toml python/python demo
	cd build && ../$(VENV_BIN)/python -m mypy.stubtest qcow_recycler._ext --mypy-config-file ../python/pyproject.toml

demo: setup python-dev
	$(VENV_BIN)/python demo/demo.py --directory build/demo $(if $(IMAGE),--image '$(IMAGE)') $(DEMO)

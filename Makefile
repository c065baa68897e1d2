# make demo: train on generated streets, measure, look.  make test: all tests.  make soak: the long tests.
# Each installs what it needs into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test soak soak-short lint format lock docs clean

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "mmseg_volo requires Python 3.10 or newer; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[onedl,report,look,tensorboard,pretrain,geo,completion,datasets,export,openvino,corruptions,docs,dev]' --constraint constraints.txt
	touch $@

demo: .venv/installed
	$(BIN)/mmseg-volo demo

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

SOAK := bad_input bounded hostile_files hostile_rasters kills large_raster non_finite processes ray_kills same_seed

soak: $(SOAK:%=soak-%)
soak-short: $(SOAK:%=short-%)

$(SOAK:%=soak-%): soak-%: .venv/installed
	$(BIN)/python tests/soak/$*.py

$(SOAK:%=short-%): short-%: .venv/installed
	$(BIN)/python tests/soak/$*.py --short

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/claims.py
	$(BIN)/python .ci/lock.py --check

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Keeps constraints.txt; needs a network. UPGRADE=1 takes the newest versions.
lock: .venv/installed
	$(BIN)/python .ci/lock.py $(if $(UPGRADE),--upgrade)

docs: .venv/installed
	$(BIN)/sphinx-build --fail-on-warning --keep-going -b html docs docs/_build/html

clean:
	rm -rf .venv build dist docs/_build *.egg-info .pytest_cache .ruff_cache .mypy_cache

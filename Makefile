# The tools of the environment that is active; PYTHON=.venv/bin/python for another.
PYTHON ?= python

.PHONY: test kernels lint format types demo docs clean

test:
	$(PYTHON) -m pytest -q -n auto

# The kernels' tests in Triton's interpreter, then every kernel compiled for every architecture, with no GPU.
kernels:
	$(PYTHON) -m pytest -q -n auto tests/kernels
	$(PYTHON) -m iwm_fast.kernels.aot

lint: types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

demo:
	$(PYTHON) -m iwm_fast demo --out runs/demo

# The generated pages of docs/reference/, and the site in site/ (pip install '.[docs]').
docs:
	$(PYTHON) -m tools.documentation
	$(PYTHON) -m mkdocs build --strict

clean:
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

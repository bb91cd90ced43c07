# Every target sets itself up: .venv, dependencies, the demo's model (see scripts/install). The second time that is quick.
# PYTHON=/path/to/python3.12 chooses the interpreter of a new .venv; ARGS=... is handed on: make demo ARGS=--no-tui,
# make test ARGS="-k sse".

PYTHON_IN_VENV := .venv/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-clients check format bench wheel lock clean

help: ## Show these targets.
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "make %-12s %s\n", $$1, $$2 }'

install: ## Make or renew .venv; every other target does it by itself.
	@PYTHON="$(PYTHON)" scripts/install

demo: install ## Open the control center with a small model of its own, on ports that are free.
	@$(PYTHON_IN_VENV) demo/demo.py $(ARGS)

test: install ## Run the whole test suite.
	@$(PYTHON_IN_VENV) -m pytest -q $(ARGS)

test-clients: install ## Test against large client libraries as well, which are installed for it.
	@$(PYTHON_IN_VENV) -m pip --disable-pip-version-check install --quiet uv
	@UV_SYSTEM_CERTS=1 .venv/bin/uv pip install --quiet --python $(PYTHON_IN_VENV) --constraint requirements.lock --group clients
	@$(PYTHON_IN_VENV) -m pytest -q tests/clients $(ARGS)

check: install ## Check format, lint, types and the layers of the architecture.
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m mypy
	$(PYTHON_IN_VENV) -m mypy demo/demo.py bench/run.py
	.venv/bin/lint-imports

format: install ## Format the code, and mend what lint can.
	$(PYTHON_IN_VENV) -m ruff check --fix .
	$(PYTHON_IN_VENV) -m ruff format .

bench: install ## Measure speed and size, and compare with the budgets. Wants an otherwise idle machine.
	@$(PYTHON_IN_VENV) -m bench.run $(ARGS)

wheel: install ## Build the wheel into dist/.
	@mkdir -p dist
	$(PYTHON_IN_VENV) -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist/*.whl

lock: install ## Choose the newest versions that pyproject.toml allows, and write requirements.lock.
	$(PYTHON_IN_VENV) -m pip --disable-pip-version-check install --quiet uv
	{ echo "# Exact versions for development on Python 3.11 to 3.14, written by \`make lock\` from pyproject.toml."; \
	  UV_SYSTEM_CERTS=1 .venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    --no-emit-index-url --extra builtin --group dev pyproject.toml; } > .venv/requirements.lock
	mv .venv/requirements.lock requirements.lock

clean: ## Remove what was built, cached and installed here (.venv and .demo too).
	rm -rf .venv .demo dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis snapshot_report.html
	find bench demo docs llamarunner scripts tests tui -name __pycache__ -type d -prune -exec rm -rf {} +

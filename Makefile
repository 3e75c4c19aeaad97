# `make demo` serves the demo site, `make test` runs every test. Both install what they need.

PYTHON ?= python3
PORT ?= 8000
VENV := .venv
ARGS ?=
# The integration tests wait more than they compute, so they run in more processes than a small
# machine has cores. `make test ARGS="-n 0"` runs one test after the other.
PARALLEL := -n 3 --dist loadfile

# If PYTHON is set, only that interpreter is used. Otherwise the first of these that runs is used.
ifeq ($(origin PYTHON),file)
PYTHONS := $(PYTHON) python3.13 python3.12 python3.11
else
PYTHONS := $(PYTHON)
endif

PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: help
help:
	@echo "make demo    serve the demo site on http://127.0.0.1:$(PORT)/ (PORT=... for another port)"
	@echo "make demo-cluster  the same on three server processes, ports 8001 to 8003"
	@echo "make test-unit  run the unit tests, which need Django and pytest only (ARGS=... for pytest)"
	@echo "make test    run the unit and the integration tests, with coverage (ARGS=... for pytest)"
	@echo "make test-faults  run the fault suite (SEED=... for another run, ARGS=--rst for a table)"
	@echo "make bench   measure this project and others, and write its page in docs/ (needs a C compiler;"
	@echo "             measures nginx with nchan too if it is installed)"
	@echo "make bench-short  run the benchmarks that noise does not affect; fails on a regression"
	@echo "make docs    build the documentation site in docs/_build/html (warnings are errors)"
	@echo "make pictures  make the pictures of the documentation from the demo (needs Chromium)"
	@echo "make lint    check style and format"
	@echo "make types   check types"
	@echo "make clean   remove everything that these commands made, also $(VENV) and the databases"
	@echo "             of the demo and of the examples"
	@echo "The commands use $(VENV). They make it with $(PYTHON) (PYTHON=... for another one, 3.11 or newer)."

.PHONY: demo
demo: $(VENV)/installed-demo
	@exec $(VENV)/bin/python testproject/manage.py demo --port $(PORT)

.PHONY: demo-cluster
demo-cluster: $(VENV)/installed-demo-cluster
	@exec $(VENV)/bin/python testproject/manage.py demo_cluster \
		--port $(if $(filter file,$(origin PORT)),8001,$(PORT))

.PHONY: test-unit
test-unit: $(VENV)/installed-test-unit
	@exec $(VENV)/bin/python -m pytest -n 2 tests/unit $(ARGS)

.PHONY: test
test: $(VENV)/installed-test
	@exec $(VENV)/bin/python -m pytest $(PARALLEL) --cov --cov-report=term-missing $(ARGS)

.PHONY: test-faults
test-faults: $(VENV)/installed-test
	@exec $(VENV)/bin/python -m pytest -q --no-cov tests/faults $(ARGS)

.PHONY: bench
bench: $(VENV)/installed-bench
	@exec $(VENV)/bin/python -m benchmarks $(ARGS)

.PHONY: bench-short
bench-short: $(VENV)/installed-test
	@exec $(VENV)/bin/python -m benchmarks.short

.PHONY: docs
docs: $(VENV)/installed-docs
	@$(VENV)/bin/python -m sphinx -M html docs docs/_build -nWq --keep-going
	@echo "Open docs/_build/html/index.html."

.PHONY: pictures
pictures: $(VENV)/installed-test
	@$(PIP_INSTALL) -r docs/pictures/requirements.txt
	@PYTHONPATH=. $(VENV)/bin/python docs/pictures/make_pictures.py

.PHONY: lint
lint: $(VENV)/installed-lint
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

.PHONY: types
types: $(VENV)/installed-lint $(VENV)/installed-test
	$(VENV)/bin/python -m mypy

.PHONY: clean
clean:
	rm -rf $(VENV) build dist benchmarks/build docs/_build *.egg-info .coverage .coverage.* htmlcov
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf docs/examples/node_modules
	rm -f docs/examples/static/datastar.js docs/examples/static/react-app.js docs/examples/static/ai-sdk-app.js
	rm -f docs/examples/*.sqlite3 docs/examples/*.sqlite3-*
	rm -f testproject/demo.sqlite3 testproject/demo.sqlite3-*
	find django_eventsource testproject tests benchmarks docs -name __pycache__ -prune \
		-exec rm -rf {} + 2>/dev/null || true

# One stamp for each dependency group of pyproject.toml. The groups are installed beside each other
# in one environment. pip 25.1 is the first version that can install one. setuptools warns at each
# editable installation that folders may hide the package.
$(VENV)/installed-%: setup.cfg pyproject.toml $(VENV)/pyvenv.cfg
	@echo "Installing django-eventsource and its dependency group $* into $(VENV) ..."
	@$(PIP_INSTALL) 'pip>=25.1'
	@PYTHONWARNINGS=ignore $(PIP_INSTALL) --editable . --group $*
	@touch $@

# The environment is made again if it does not run. Its interpreter may have been removed, or
# making it was interrupted.
ifneq ($(shell $(VENV)/bin/python -c 'import pip; print("runs")' 2>/dev/null),runs)
.PHONY: $(VENV)/pyvenv.cfg
endif

# Each interpreter is run, because a version manager's shim may stand for one that is missing.
$(VENV)/pyvenv.cfg:
	@for python in $(PYTHONS); do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "Making $(VENV) with $$($$python --version) ($$python) ..."; \
			$$python -m venv --clear $(VENV) && exit 0; \
			rm -rf $(VENV); exit 1; \
		fi; \
	done; \
	echo "Python 3.11 or newer is needed, and none of these is one: $(PYTHONS)." >&2; \
	echo "Set PYTHON to its path: make PYTHON=/path/to/python3" >&2; \
	exit 1

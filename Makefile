# Every target sets up what it needs: a virtual environment of its own, pinned requirements, the native build.
# A stamp file marks each step that is done, so that a second run does nothing.

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
# Folders too, whose times change when a source is added or removed.
NATIVE_SOURCES := $(shell find csrc) setup.py pyproject.toml
CXX_FILES := $(shell find csrc benchmarks tools -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
PYTHON_FILES := d2moe_ext python_tests examples tools setup.py $(wildcard benchmarks)

# The oldest supported releases, in a second environment and a copy of the sources, so that neither build touches the other.
OLDEST := .venv-oldest
OLDEST_SOURCES := build/oldest

# A CUDA build of torch, in the user's cache as it is some gigabytes, named by what is installed in it.
CUDA_NAME := $(shell cksum < requirements-cuda.txt | cut -d' ' -f1)
CUDA := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/d2moe_ext/cuda-$(CUDA_NAME)
CUDA_SOURCES := build/cuda

# On a machine with a GPU, with the torch of $(PYTHON), no environment of ours, and no network or git: results go into the
# folder RESULTS, and COMMIT says what they are of. HEADERS is a folder with what the toolkit lacks, cuBLAS's headers for one.
# LIMIT is in seconds from here on, the build among them.
RESULTS ?=
COMMIT ?=
HEADERS ?=
LIMIT ?= 540
GPU_SOURCES := build/gpu
STARTED := $(shell date +%s)

# What the quality study is judged by; `make quality JUDGE=test` once options are chosen.
JUDGE ?= selection

.PHONY: demo quality bench test test-matrix cuda-emulated-check cuda-build-check gpu-check gpu-bench lint format build clean
.DELETE_ON_ERROR:

demo: build
	$(BIN)/d2moe demo

quality: build
	$(BIN)/python -m benchmarks.quality --model examples/pydoc_moe --text calibration=python --text selection=python \
		--text test=python --text out=headers --judge $(JUDGE) --figures --results build/quality/results --write build/quality/quality.md

# Half an hour on a quiet machine; not for CI. The page lies beside the results; docs/performance.md is made of saved ones.
BENCH := build/performance
bench: build
	mkdir -p $(BENCH)/results
	$(BIN)/python -m benchmarks.bench_layer --write $(BENCH)/results/layer.json
	$(BIN)/python -m benchmarks.bench_layer --growth --write $(BENCH)/results/growth.json
	$(BIN)/python -m benchmarks.bench_model --json > $(BENCH)/results/model.json
	$(BIN)/python -m benchmarks.performance --results $(BENCH)/results --write $(BENCH)/performance.md

test: build
	$(BIN)/python -m pytest --cov=d2moe_ext --cov-report=term:skip-covered --cov-fail-under=90

test-matrix: $(OLDEST)/.requirements
	rm -rf $(OLDEST_SOURCES)
	mkdir -p $(OLDEST_SOURCES)
	git ls-files -z --cached --others --exclude-standard | tar -c --null -T - --ignore-failed-read | tar -x -C $(OLDEST_SOURCES)
	cd $(OLDEST_SOURCES) && D2MOE_CUDA=0 $(CURDIR)/$(OLDEST)/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .
	cd $(OLDEST_SOURCES) && $(CURDIR)/$(OLDEST)/bin/python -m pytest

# CUDA kernels on a CPU, thread after thread, through the tests that a GPU would run; needs neither nvcc nor a GPU.
EMULATED := build/emulated
cuda-emulated-check: build
	mkdir -p $(EMULATED)
	D2MOE_EMULATED_CUDA=$(EMULATED) $(BIN)/python -m pytest -m cuda -q $(shell grep -l 'mark\.cuda' python_tests/test_*.py)

# Compiles for two architectures and loads what came of it; needs nvcc and no GPU.
cuda-build-check: $(CUDA)/.requirements
	rm -rf $(CUDA_SOURCES)
	mkdir -p $(CUDA_SOURCES)
	git ls-files -z --cached --others --exclude-standard | tar -c --null -T - --ignore-failed-read | tar -x -C $(CUDA_SOURCES)
	cd $(CUDA_SOURCES) && $(CUDA)/bin/python -m tools.cuda_build_check --log ../cuda-build.log

gpu-check:
	$(PYTHON) -m tools.gpu_check --results "$(RESULTS)" --commit "$(COMMIT)" --headers "$(HEADERS)"

# Goes on where an earlier run of the same commit, GPU and torch stopped.
gpu-bench:
	@test -n "$(RESULTS)" -a -n "$(COMMIT)" || { echo "gpu-bench: RESULTS and COMMIT must be given." >&2; exit 2; }
	$(PYTHON) -m tools.gpu_build --headers "$(HEADERS)"
	cd $(GPU_SOURCES) && $(PYTHON) -m benchmarks.gpu --results "$(abspath $(RESULTS))" --commit "$(COMMIT)" \
		--limit $(LIMIT) --started $(STARTED)

lint: $(VENV)/.requirements
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(CXX_FILES)

build: $(VENV)/.built

clean:
	rm -rf $(VENV) $(OLDEST) build dist demo-out *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f d2moe_ext/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.built: $(VENV)/.requirements $(NATIVE_SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

# --clear: what an interrupted installation left behind is not built upon.
%/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; say which: make PYTHON=...")'
	$(PYTHON) -m venv --clear $*
	@touch $@

$(VENV)/.requirements: requirements.txt | $(VENV)/.created
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(OLDEST)/.requirements: requirements-oldest.txt | $(OLDEST)/.created
	$(OLDEST)/bin/python -m pip install --quiet -r requirements-oldest.txt
	@touch $@

$(CUDA)/.requirements: requirements-cuda.txt | $(CUDA)/.created
	$(CUDA)/bin/python -m pip install --quiet -r requirements-cuda.txt
	@touch $@

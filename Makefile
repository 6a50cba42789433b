# Every target sets up what it needs in .venv; nothing else on the machine is touched.
PYTHON ?= python3
# `make gpu` installs nothing: torch, triton, ninja, pytest and hypothesis are this interpreter's.
GPU_PYTHON ?= $(PYTHON)
STAGES ?=
VENV ?= .venv
BIN = $(VENV)/bin
CPU_TESTS = kl features relation rkd rkd_sequence graph stream pool nodes
SOURCES = setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-long sanitize gpu resources style clean

demo: $(VENV)/built  ## distil a student on real data, three to four minutes with the set-up
	$(BIN)/python examples/distill_digits.py

test: $(VENV)/built  ## lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

test-long: $(VENV)/built  ## the same tests with many more random inputs, and the slow ones
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -m 'not gpu'

# What runs a compiler or measures the memory of a process is left out.
sanitize: $(VENV)/built  ## the CPU kernels' tests under AddressSanitizer and UBSan, in six minutes: no access beyond any tensor
	rm -rf build/sanitize && mkdir -p build/sanitize && cp -r kdfast build/sanitize
	CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all" LDFLAGS=-fsanitize=address,undefined KDFAST_CUDA=0 \
	  $(BIN)/python setup.py --quiet build_ext --build-lib build/sanitize --build-temp build/sanitize/objects
	cd build/sanitize && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(abspath $(BIN))/python -m pytest -c $(CURDIR)/pyproject.toml \
	  $(addprefix $(CURDIR)/tests/,test_parity.py $(addprefix ops/test_,$(CPU_TESTS:=.py))) \
	  --capture=sys -k 'not compile and not memory and not 2_31'

gpu:  ## on a machine with an NVIDIA GPU: build, prove, measure, report in 9 minutes; STAGES="build parity" runs some
	$(GPU_PYTHON) benchmarks/gpu.py $(STAGES)

resources: $(VENV)/built  ## write anew what Triton kernels need of each GPU (tests/ops/resources), after a change of one
	$(BIN)/python tests/ops/resources.py

style: $(VENV)/installed  ## rewrite files to the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build demo_output kdfast/*.so *.egg-info

$(VENV)/installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torchdistill==1.1.5
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

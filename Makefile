# One command to see it work: make demo.  One command to test it: make test.  `make` alone lists the rest.
SHELL   := /bin/bash
PYTHON  ?= python3
VENV    ?= .venv
RUN      = $(VENV)/bin/python
READY    = $(VENV)/.ready
EXTRAS  ?= dev
# uv installs several times faster than pip; it must be told of the local wheels that pip already knows.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# pip compiles what it installs and uv does not; without it the first command spends more time on torch's sources than on the model.
export UV_COMPILE_BYTECODE ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint types docs bench clean

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

# uv where it can be had, pip where not; nothing is built in isolation, so that no network is needed twice.
INSTALL  = $$($(RUN) -c 'import uv' 2>/dev/null && echo $(RUN) -m uv pip install -q -p $(RUN) || echo $(RUN) -m pip install -q) --no-build-isolation
CLAIMS   = step verify pipeline tiles chain plan

# Rebuilt only when the packaging changes, so every other call starts at once and needs no network.
$(READY): setup.cfg pyproject.toml
	@echo "setting up $(VENV) (once; a minute or so)"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(RUN) -c 'import uv' 2>/dev/null || $(RUN) -m pip install -q uv 2>/dev/null || true
	@$(INSTALL) 'setuptools>=77' && $(INSTALL) -e '.[$(EXTRAS)]'
	@rm -rf .dev && mkdir -p .dev/hocket && for f in api/*; do ln -s ../../$$f .dev/hocket/; done && ln -s ../../compiler ../../passes ../../runtime .dev/hocket/
	@touch $@

demo: $(READY)  ## train a small Llama on two local ranks, prove it, and show what each pass did
	$(RUN) -m hocket demo

test: $(READY)  ## run the tests
	$(RUN) -m pytest -n 2

slow: $(READY)  ## run the long suites too
	$(RUN) -m pytest -n 2 -m "slow or not slow"

lint: $(READY)  ## ruff, format check, mypy --strict
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy | sed 's#^\.dev/hocket/##'; exit $${PIPESTATUS[0]}

docs: $(READY)  ## build the documentation into docs/_build
	@$(RUN) -c 'import sphinx, myst_parser, furo' 2>/dev/null || $(INSTALL) -e '.[docs]'
	$(RUN) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(READY)  ## measure every claim beside its peers, and rewrite the tables of the documentation (minutes)
	@set -e; for claim in $(CLAIMS); do if test -f benchmarks/$$claim.py; then $(RUN) benchmarks/$$claim.py; fi; done

clean:  ## forget the virtual environment and every build product
	rm -rf $(VENV) .dev build dist docs/_build *.egg-info

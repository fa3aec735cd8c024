# Each target sets up what it needs. A stamp is the date of its last setup, so
# nothing is done twice: .venv/.installed (packages), .venv/.compiled (the C
# extension), */node_modules/.installed (npm packages).

PYTHON ?= $(or $(shell which python3.11),python3)
BIN := .venv/bin

C_SOURCES := $(wildcard csrc/*.c)
C_CHECKED := $(C_SOURCES) $(wildcard examples/c/*.c tests/c/*.c)
C_STRICT := -std=c11 -Icsrc -O2 -Wall -Wextra -Wconversion -Wshadow -Wundef -Wpedantic -Werror

.PHONY: help demo serve test check format proto fuzz coverage bench clean
.DELETE_ON_ERROR:

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: .venv/.compiled  ## Play an engine against a real server (ARGS="--policy elastic")
	$(BIN)/odma demo $(ARGS)

serve: .venv/.compiled  ## Run the service (ARGS="--help")
	$(BIN)/odma serve $(ARGS)

test: .venv/.compiled examples/javascript/node_modules/.installed  ## Run the tests (ARGS="-k floors")
	$(BIN)/python -m pytest $(ARGS)

check: .venv/.compiled tools/node_modules/.installed  ## Format, lint, types, C warnings, generated code, floors, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	set -e; for file in $(C_CHECKED); do $(CC) $(C_STRICT) -c -o /dev/null $$file; done
	$(BIN)/python tools/genproto.py --check
	$(BIN)/python -m pytest -q tests/test_floors.py
	tools/node_modules/.bin/buf lint proto

format: .venv/.installed  ## Format Python and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: .venv/.installed  ## Regenerate odma_service/rpc from proto
	$(BIN)/python tools/genproto.py

fuzz:  ## Fuzz batches and files with clang (SECONDS=60); crashes stay in build/fuzz
	sh tools/fuzz.sh $(or $(SECONDS),60)

coverage:  ## Print the branch coverage of csrc by the C tests and the fuzz corpus
	sh tools/coverage.sh

bench: .venv/.compiled  ## Run every benchmark; each prints JSON
	set -e; for file in $(wildcard bench/*.py); do $(BIN)/python $$file; done

clean:  ## Back to a fresh clone: removes .venv, node_modules and all that was built
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf tools/node_modules examples/javascript/node_modules odma_service/_native/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# An editable install compiles too, so it renews both stamps.
.venv/.installed: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[trace,predictor,dev]'
	touch $@ .venv/.compiled

.venv/.compiled: $(C_SOURCES) $(wildcard csrc/*.h) odma_service/_native/build.py | .venv/.installed
	if [ -n "$$(find $^ -newer $@ 2>&1)" ]; then $(BIN)/python setup.py --quiet build_ext --inplace; fi
	touch $@

%/node_modules/.installed: %/package.json
	cd $* && npm install --no-save --loglevel=error
	touch $@

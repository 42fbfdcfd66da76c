# `make serve` and `make test` are all that a newcomer needs; both install what is missing first.
PYTHON ?= python3.11
BIN := .venv/bin
# pip and uv spell the same setting differently. Where a machine names no wheel folder, uv knows PyTorch's CPU builds.
FIND_LINKS := $(or $(UV_FIND_LINKS),$(shell echo "$(PIP_FIND_LINKS)" | tr ' ' ','))
TORCH := $(if $(FIND_LINKS),,--torch-backend cpu)
UV := UV_FIND_LINKS="$(FIND_LINKS)" $(BIN)/uv
# Tests and tools must not write beside the sources, nor wait for a hub that is not needed.
export HF_HUB_OFFLINE ?= 1
export PYTHONWARNINGS ?= ignore

.PHONY: serve test test-fast check abilities bench lock clean

serve: .venv/installed ## start router and engine with the shipped abilities
	@exec $(BIN)/act-serve serve $(ARGS)

# Servers, clusters and clients share a machine with whatever else runs on it. At most three of their tests may fail once
# and pass at a second try, with both tracebacks printed; a wrong number is wrong at the first.
RETRY := --reruns 1 --max-suite-reruns 3 --rerun-show-tracebacks \
	$(addprefix --rerun-exclude-path tests/,kernels delta models pipeline engine profile benchmarks)

test: .venv/installed ## all tests, those with the real engine too
	$(BIN)/pytest -m "" $(RETRY) $(ARGS)

test-fast: .venv/installed ## the tests that need no engine
	$(BIN)/pytest $(ARGS)

check: .venv/installed ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Profiles name versions of other abilities (extract@2, reason@5), and only in an empty store do versions count from 1.
REBUILD ?= build/abilities

abilities: .venv/installed ## rebuild the shipped abilities from their profiles, into the empty folder REBUILD
	@test -z "$$(ls -A $(REBUILD) 2>/dev/null)" || \
		{ echo "$(REBUILD) is not empty, so versions would not count from 1; name another folder with REBUILD=..." >&2; exit 1; }
	$(BIN)/act-serve build-delta --store $(REBUILD) $(addprefix profiles/abilities/,fr.yaml es.yaml de.yaml extract.yaml reason.yaml)
	$(BIN)/act-serve build-delta --store $(REBUILD) $(addprefix profiles/abilities/,es-2.yaml reason-2.yaml)
	$(BIN)/act-serve build-delta --store $(REBUILD) profiles/abilities/reason-2.yaml # once more, from where that ended
	$(BIN)/act-serve build-delta --store $(REBUILD) profiles/abilities/reason-3.yaml
	$(BIN)/act-serve build-delta --store $(REBUILD) profiles/abilities/extract-2.yaml
	$(BIN)/act-serve build-delta --store $(REBUILD) profiles/abilities/fr-2.yaml
	$(BIN)/act-serve build-delta --store $(REBUILD) profiles/abilities/reason-4.yaml
	$(BIN)/act-serve build-delta --store $(REBUILD) $(addprefix profiles/abilities/,extract-3.yaml de-2.yaml reason-5.yaml)
	$(BIN)/act-serve build-delta --store $(REBUILD) $(addprefix profiles/abilities/,es-3.yaml es-4.yaml fr-3.yaml)

bench: .venv/installed ## throughput of the engine, as ratios to the base model
	$(BIN)/python -m benchmarks.engine_throughput $(ARGS)

lock: .venv/installed ## resolve the dependencies again
	$(UV) pip compile pyproject.toml --extra build --extra serve --extra dev -o requirements.lock \
		--no-header --no-annotate --python-version 3.11 --upgrade

.venv/installed: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; name another 3.11 with PYTHON=..." >&2; exit 1; }
	@echo "installing into .venv (one to two minutes) ..."
	@test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet --disable-pip-version-check uv; }
	@$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps $(TORCH) -r requirements.lock -e .
	@touch $@

clean:
	rm -rf .venv build *.egg-info

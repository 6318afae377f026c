# make demo           DiffiT on digits, from data to score, in a few minutes
# make demo-sets      set-conditioned DiT on letters of unseen scripts, in under ten minutes
# make demo-features  photographs from text and image features, in four minutes
# make test           all tests
# make lint           ruff
# Each target prepares .venv first, which is quick if .venv is up to date.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.complete

.PHONY: demo demo-sets demo-features test lint format venv clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/python demo.py

demo-sets: $(STAMP)
	$(BIN)/python demo.py --letters

demo-features: $(STAMP)
	$(BIN)/python demo.py --features

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(STAMP)

$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.12"; exit 1; }
	@test ! -L .venv || rm .venv  # Remove only a link: its target belongs to others.
	$(PYTHON) -m venv --clear .venv
	@# Python compiles files on import; compiling all of them now takes most of a minute.
	$(BIN)/python -m pip install --quiet --no-compile --requirement requirements.txt
	@touch $@

clean:
	rm -rf .venv demo-out

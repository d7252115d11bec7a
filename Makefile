# make setup   creates .venv and installs what requirements.txt pins
# make demo    trains and evaluates on the embedded data set; results in runs/digits/
# make methods evaluates methods that need no training on the demo's checkpoint; results in runs/digits/methods/
# make trained trains methods of configs/methods.py from the demo's dense checkpoint and evaluates each; goes on where it was stopped
# make hello   asks the model that ships here three questions about a picture, dense and dynamic side by side; results in runs/hello/
# make test    runs the tests; make test-slow the long ones that it leaves out, make test-faults kills and damages the programs
# make lint    checks style and formatting; make format mends them
# PYTHON=python3.12 uses that one, in an environment of its own (.venv-python3.12); 3.11 to 3.13 work.
PYTHON ?= python3
VENV := .venv$(patsubst %,-%,$(filter-out python3,$(notdir $(PYTHON))))
BIN := $(VENV)/bin
RUN := runs/digits

.PHONY: setup hello demo methods trained test test-slow test-faults lint format clean

setup: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements-cloud.txt requirements-serve.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "error: Python 3.11, 3.12 or 3.13 is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@

hello: setup
	$(BIN)/python -m dynllava_jax.hello

# Large pages: a step's temporaries are mapped anew each time, and touching them page by page took a tenth of it.
demo: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
demo: setup
	$(BIN)/python train.py --config=configs/digits.py:base --workdir=$(RUN)/base
	$(BIN)/python train.py --config=configs/digits.py:dynamic --workdir=$(RUN)/dynamic --config.init_from=$(RUN)/base/checkpoints
	$(BIN)/python -m dynllava_jax.training.plot --in_turn $(RUN)/training.png $(RUN)/base $(RUN)/dynamic
	$(BIN)/python eval.py --config=configs/digits.py:eval --checkpoint=$(RUN)/dynamic/checkpoints --out=$(RUN)

methods: setup
	@test -d $(RUN)/dynamic/checkpoints || { echo "error: no checkpoint in $(RUN)/dynamic/checkpoints; run 'make demo' first"; exit 1; }
	$(BIN)/python eval.py --config=configs/digits.py:methods --checkpoint=$(RUN)/dynamic/checkpoints --out=$(RUN)/methods

TRAINED ?= videollm_mod pmod dpn moe_llava icae deer dynamic_context_pruning

trained: setup
	@test -d $(RUN)/base/checkpoints || { echo "error: no checkpoint in $(RUN)/base/checkpoints; run 'make demo' first"; exit 1; }
	@test -d $(RUN)/upcycled || $(BIN)/python convert_weights.py --src=$(RUN)/base/checkpoints --dst=$(RUN)/upcycled --upcycle=4
	@set -e; for name in $(TRAINED); do \
	  from=$(RUN)/base/checkpoints; [ $$name != moe_llava ] || from=$(RUN)/upcycled; \
	  $(BIN)/python train.py --config=configs/methods.py:$$name --workdir=$(RUN)/$$name --config.init_from=$$from; \
	  [ $$name != deer ] || $(BIN)/python -m dynllava_jax.calibrate --config=configs/methods.py:deer_eval --checkpoint=$(RUN)/deer/checkpoints; \
	  $(BIN)/python eval.py --config=configs/methods.py:$${name}_eval --checkpoint=$(RUN)/$$name/checkpoints --out=$(RUN)/$$name/eval; \
	done

PYTEST := $(BIN)/python -m pytest -q --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) tests

test-slow: setup
	$(PYTEST) -m slow tests

test-faults: setup
	@counts=$$(mktemp); FAULT_COUNTS=$$counts $(PYTEST) -m faults tests; status=$$?; cat $$counts; rm $$counts; exit $$status

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs

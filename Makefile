# Every target works as the first command on a machine with Python >= 3.11, make and a package
# index: it makes .venv, installs what it needs, and runs. Packages have the versions of
# constraints.txt and the hashes of requirements/; torch alone, of which every platform has other
# builds and which brings CUDA along, is pinned without a hash.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
LOCK := pyproject.toml constraints.txt $(wildcard requirements/*.txt)
DEV := compare,excel,data,attacks,transformers,ray,onnx,docs,dev

.PHONY: demo test lint docs results log-results pictures bench gpu api dist lock clean

demo: .venv/.demo  ## Compare five losses on digits (about a minute)
	$(BIN)/penex compare

test: .venv/.dev  ## The whole test suite, the code blocks of README and docs included, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/.dev  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.dev  ## The documentation, into docs/_build/html, and a check of its links; warnings are errors
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html
	$(BIN)/python docs/check_site.py
	$(BIN)/python -m pytest tests/test_readme.py

# What docs/choosing.md shows of weight decay.
DECAY := --data digits --train-size 300 --weight-decay 0.01 --losses cross-entropy,penex=0.1,penex=0.03

results: .venv/.dev  ## Regenerate the numbers and the picture of README and docs
	$(BIN)/penex compare --out build/results/digits
	$(BIN)/penex compare --data digits --train-size 300 --label-noise 0.2 --out build/results/digits-noisy
	$(BIN)/penex compare $(DECAY) --out build/results/weight-decay
	$(BIN)/penex compare $(DECAY) --gradient-scale own --out build/results/weight-decay-own
	$(BIN)/python docs/make_results.py build/results

# What docs/log-penex.md compares: equal budgets of tuning, five seeds, networks of one kind.
LOG_LOSSES := cross-entropy,label-smoothing,confidence-penalty,focal,z-loss,penex,log-penex
LOG_COMPARE = $(BIN)/penex compare --losses $(LOG_LOSSES) --tune 12 --seeds 5 --epochs 60 --model mlp
LOG_DIGITS := --data digits --train-size 300
LOG_LETTER = $(DATA)/letter/letter-recognition.csv --target Letter --train-size 1000
LOG_FASHION = hub:zalando-datasets/fashion_mnist --data-dir $(DATA)/fashion_mnist --train-size 1000

log-results: .venv/.dev  ## Regenerate the tables of docs/log-penex.md (half an hour)
	@test -e "$(DATA)/letter/letter-recognition.csv" -a -d "$(DATA)/fashion_mnist" || \
	  { echo "make log-results DATA=FOLDER: FOLDER holds letter/letter-recognition.csv (UCI) and fashion_mnist/ (the hub's Parquet files)"; exit 2; }
	$(LOG_COMPARE) $(LOG_DIGITS) --out build/results/log-penex/digits
	$(LOG_COMPARE) $(LOG_DIGITS) --label-noise 0.2 --out build/results/log-penex/digits-noisy
	$(LOG_COMPARE) $(LOG_LETTER) --out build/results/log-penex/letter
	$(LOG_COMPARE) $(LOG_LETTER) --label-noise 0.3 --out build/results/log-penex/letter-noisy
	$(LOG_COMPARE) $(LOG_FASHION) --out build/results/log-penex/fashion
	$(LOG_COMPARE) $(LOG_FASHION) --label-noise 0.3 --out build/results/log-penex/fashion-noisy
	$(BIN)/python docs/make_log_results.py build/results/log-penex

pictures: .venv/.dev  ## Regenerate the pictures of the pages that explain the losses
	$(BIN)/python docs/make_pictures.py
	$(BIN)/python docs/make_log_penex.py

bench: .venv/.dev  ## Time and memory on the CPU, and docs/performance.md regenerated (some minutes)
	$(BIN)/python -m benchmarks.loss
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.linear
	$(BIN)/python -m benchmarks.page
	$(BIN)/python -m benchmarks.linear_page

gpu: .venv/.dev  ## The tests that need a CUDA device, then the benchmarks on it
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu: torch finds no CUDA device")'
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m benchmarks.loss --device cuda
	$(BIN)/python -m benchmarks.memory --device cuda
	$(BIN)/python -m benchmarks.step --device cuda
	$(BIN)/python -m benchmarks.linear --device cuda
	$(BIN)/python -m benchmarks.page
	$(BIN)/python -m benchmarks.linear_page

api: .venv/.dev  ## Accept a change of public names: regenerates tests/api.txt and docs/command-line.md
	$(BIN)/python tests/test_api.py > tests/api.txt
	$(BIN)/python docs/make_command_line.py

dist: .venv/.dev  ## Wheel and sdist, checked, into dist
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

lock: .venv/.dev  ## Write the installed versions to constraints.txt, their hashes to requirements
	( grep '^#' constraints.txt; $(BIN)/python -m pip list --format=freeze --exclude-editable \
	  | grep -vE '^(pip|setuptools|wheel)==' | sed 's/+cpu$$//' ) > constraints.new
	mv constraints.new constraints.txt
	$(HASHES) --extra compare --output-file requirements/compare.txt
	$(HASHES) $(foreach extra,$(subst $(comma), ,$(DEV)),--extra $(extra)) --output-file requirements/dev.txt

comma := ,
HASHES = $(BIN)/uv pip compile --quiet --universal --python-version 3.11.5 --generate-hashes \
  --no-annotate --constraint constraints.txt --override requirements/without-torch.in \
  --custom-compile-command 'make lock' pyproject.toml

clean:  ## Remove the environment and what was built
	rm -rf .venv docs/_build docs/auto_examples dist build

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv .venv

.venv/.demo: $(LOCK) | .venv/bin/python
	$(PIP) install --require-hashes --no-deps --requirement requirements/compare.txt
	$(PIP) install --constraint constraints.txt --editable '.[compare]'
	@touch $@

.venv/.dev: $(LOCK) | .venv/bin/python
	$(PIP) install --require-hashes --no-deps --requirement requirements/dev.txt
	$(PIP) install --constraint constraints.txt --editable '.[$(DEV)]'
	@touch $@ .venv/.demo

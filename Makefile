# Every target makes its own environment first (scripts/setup.sh) and passes ARGS on:
#   make demo ARGS="--episodes 40"      make test ARGS="-k jacobi -x"

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
export VENV
unexport PYTHONDONTWRITEBYTECODE # compiling torch and transformers anew in every process takes seconds
ifeq ($(shell uname -s),Linux)
export MUJOCO_GL ?= egl
endif

# Markdown is wrapped at 100 columns (.mdformat.toml).
PAGES := README.md CHANGELOG.md CONTRIBUTING.md CODE_OF_CONDUCT.md SECURITY.md docs recipes weights

.PHONY: help demo ros-demo test test-3.13 site lint format install install-lint clean

help:
	@echo "make demo     the shipped policies in simulation: table, plots and clips in outputs/demo"
	@echo "make ros-demo the same behind ROS 2: two nodes, command rate, jitter, success, a bag"
	@echo "make test     the tests (ARGS=... goes to pytest; -n 0 for one process)"
	@echo "make test-3.13  tests of decoding and policies with Python 3.13"
	@echo "make lint     ruff check, ruff format --check, mdformat --check (Markdown at 100 columns), mypy"
	@echo "make site     the documentation as a site, in site/; show it with: python -m http.server -d site"
	@echo "make format   let ruff repair and format what it can"
	@echo "make install  only the environment ($(VENV)); make install-lint adds ruff, mypy and pre-commit"
	@echo "make clean    remove caches and build output; keeps $(VENV) and outputs"

demo:
	@scripts/setup.sh --gl export
	@$(VENV)/bin/ceed-vla demo $(ARGS)

ros-demo:
	@scripts/setup.sh --gl ros2 export
	@$(VENV)/bin/ceed-vla ros-demo $(ARGS)

test:
	@scripts/setup.sh --gl test docs ros2 vlm metaworld libero export cluster viz
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Decoding and policies with the other Python that is supported.
test-3.13:
	@VENV=.venv.3.13 PYTHON=3.13 scripts/setup.sh test
	@.venv.3.13/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/ceed_vla/policy \
		tests/ceed_vla/test_decoding_*.py tests/ceed_vla/test_exactness.py tests/ceed_vla/test_recorded_decodings.py $(ARGS)

lint:
	@scripts/setup.sh test lint ros2 vlm metaworld export
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mdformat --check $(PAGES)
	$(VENV)/bin/mypy

site:
	@scripts/setup.sh docs
	@$(VENV)/bin/python scripts/site.py

format:
	@scripts/setup.sh test lint ros2 vlm metaworld export
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/mdformat $(PAGES)

install:
	@scripts/setup.sh

install-lint:
	@scripts/setup.sh test lint ros2 vlm metaworld export

clean:
	rm -rf build dist install log .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf *.egg-info lerobot_policy_ceed_vla/*.egg-info lerobot_policy_ceed_vla/build
	find . -name .venv -prune -o -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

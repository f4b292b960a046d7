# Shortcuts for developers; run bash setup.sh with EXTRAS=test or dev first.
VENV ?= .venv
RUFF := $(if $(filter none,$(VENV)),ruff,$(VENV)/bin/ruff)

.PHONY: help style quality test

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*## /\1\t/p' Makefile

style:  ## format the code and mend what ruff can mend
	$(RUFF) format .
	$(RUFF) check --fix .

quality:  ## check format and lint rules, changing nothing
	$(RUFF) format --check .
	$(RUFF) check .

test:  ## install and run the tests
	VENV=$(VENV) bash scripts/test.sh

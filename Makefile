# Shortcuts for dev.py, which needs no make. Options: make test ARGS="-k artifact"
PYTHON ?= python3
ARGS ?=

.PHONY: serve test lint train setup clean

serve test lint train setup clean:
	$(PYTHON) dev.py $@ $(ARGS)

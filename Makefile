# Shortcuts for dev.py, which needs no make. Options: make test ARGS="-k artifact",
# make gate ARGS="--data DATASET --skip garak --skip pyrit"
PYTHON ?= python3
ARGS ?=

.PHONY: serve test lint docs train gate setup clean clients-check

serve test lint docs train gate setup clean:
	$(PYTHON) dev.py $@ $(ARGS)

# The Python clients of tests/clients, in an environment of their own (600 MB, a minute).
clients-check:
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install -q -r requirements/clients.txt
	$(PYTHON) dev.py test tests/clients $(ARGS)

# Every target sets up what it needs and says so. Two commands to know: make demo, make test.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
unexport PYTHONDONTWRITEBYTECODE
UV := $(shell command -v uv 2>/dev/null || echo .build/uv/bin/uv)
PY := .venv/bin/python
DEBIAN := chromium buildah containernetworking-plugins debootstrap libseccomp-dev nftables

.PHONY: help setup demo test test-jobs test-others test-others-then-e2e test-gpu e2e lint format bench generate debian programs cluster clean

help: ## Say what there is
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 20

setup: .venv/.complete ## Make .venv with everything in it; .venv/bin/kubepeft is then the command

$(UV):
	@echo "── uv: not on this machine, installing it from PyPI into .build/uv"
	@python3 -m venv .build/uv && .build/uv/bin/pip install --quiet --disable-pip-version-check uv

.venv/.complete: pyproject.toml uv.lock | $(UV)
	@echo "── .venv: installing the locked packages (torch and its libraries take 5.6 GB of disk; a minute or more the first time)"
	@$(UV) sync --quiet --locked --all-extras --all-groups --compile-bytecode
	@touch $@

demo: setup ## Fine-tune a small model on this machine and answer prompts with it (about three minutes after setup)
	@$(PY) examples/quickstart/demo.py

test: setup programs lint ## Check everything: lint, types, tests on real servers, FineTunes in real pods (see e2e)
	@echo "── tests (three quarters of an hour on two cores): those of the jobs beside the others, which end to end ones follow"
	@$(MAKE) --no-print-directory --keep-going --jobs 2 test-jobs test-others-then-e2e

test-others-then-e2e:
	@failed=0; for one in test-others e2e; do $(MAKE) --no-print-directory $$one || failed=1; done; exit $$failed

test-jobs: setup ## Of the tests, those of prepare, train and infer
	@$(PY) -m pytest tests/jobs | sed --unbuffered 's/^/jobs    /'

test-others: setup programs ## Of the tests, those of types, storage, operator, chart and the test bed
	@$(PY) -m pytest tests/api tests/storage tests/operator tests/chart tests/cluster | sed --unbuffered 's/^/others  /'

test-gpu: setup ## What only a GPU can show; not part of make test, for CI has none
	@$(PY) -m pytest tests/gpu

e2e: setup programs ## The chart, the images and real pods on a real one-node Kubernetes (Linux, root; half an hour, 30 GB of disk)
	@echo "── end to end: images, chart and pods on a one-node Kubernetes"
	@$(PY) -m pytest tests/e2e -o timeout=1200 | sed --unbuffered 's/^/e2e     /'

lint: setup ## Style, types, and which part may import which
	@echo "── ruff, mypy, import-linter"
	@.venv/bin/ruff check --quiet .
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-logo > .build/lint-imports.log || { cat .build/lint-imports.log; exit 1; }

format: setup ## Mend what ruff can mend
	@.venv/bin/ruff check --fix --quiet . && .venv/bin/ruff format --quiet .

generate: setup ## Write the files that follow from code: CRDs, reference, dashboards, table of PEFT methods
	@$(PY) -m tests.generated --write

bench: setup ## Measure against the others in the same run; see docs/benchmarks.md
	@$(PY) bench/train.py && $(PY) bench/infer.py && $(PY) bench/prepare.py

cluster: setup programs ## A shell with a real one-node Kubernetes and the chart in it (Linux, root); gone when you leave it
	@$(PY) -m tests.cluster.shell

programs: debian ## Build what the tests start: Kubernetes, containerd, an S3 server … (15 minutes of Go, once; kept in ~/.cache/kubepeft)
	@python3 tests/cluster/build.py

debian: ## Install the Debian packages of the tests where they are missing and this is root
	@missing=(); for one in $(DEBIAN); do dpkg-query -W -f='$${Status}' $$one 2>/dev/null | grep -q 'ok installed' || missing+=($$one); done; \
	if (( $${#missing[@]} )); then \
	  if [[ $$(id -u) == 0 ]] && command -v apt-get >/dev/null; then echo "── Debian packages: installing $${missing[*]}"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $${missing[@]} >/dev/null; \
	  else echo "── not installed: $${missing[*]} (the tests that need them are skipped; install them as root)"; fi; fi

clean: ## Remove what was built here
	rm -rf .venv .build

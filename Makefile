# `make help` lists the targets. Needs Python 3.11 or 3.12 with venv; everything else goes into .venv.
SHELL := /bin/bash
PROFILE ?= quick
CORES ?= 2
GPUS ?= 1
# Part of the models: not those whose rows are in the folder HAVE; those that fit a pattern in ONLY
HAVE ?=
ONLY ?=
# MB that the jobs of `make run` share: all of this machine's, where the system tells
MEM_MB ?= $(shell awk '/^MemTotal/ {print int($$2 / 1000)}' /proc/meminfo 2>/dev/null)
# Pythons of environments with libraries that do not fit into this one, for `bench`: docs/pooling.md
PEERS ?=
VENV ?= .venv
PY := $(VENV)/bin/python

export TOKENIZERS_PARALLELISM := false
# nothing but `fetch` asks the hub for anything, and only profiles with hub names need that
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

NOTEBOOKS := $(PY) -m l2p_utils.notebooks
# glibc would give large blocks back after each use, and wait for pages when it takes them again:
# a tenth of the time of training
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592
SNAKEMAKE = $(KEEP_MEMORY) $(PY) -m snakemake --cores $(CORES) \
	--resources gpu=$(GPUS) $(addprefix mem_mb=,$(MEM_MB)) \
	--config "profile=$(PROFILE)" $(if $(HAVE),"have=$(HAVE)") $(if $(ONLY),"only=$(ONLY)") \
	--rerun-incomplete --nolock --scheduler greedy --quiet all

.PHONY: help run plan verify fetch test lab figures notebooks site bench clean setup
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12

# First a picture, and what all else needs: a failure there ends the run at once.
run: setup  ## run a profile, or resume it: PROFILE=quick (default), offline, smoke, paper, mine.yaml
	@$(NOTEBOOKS) check "$(PROFILE)"
	@$(SNAKEMAKE) --until token_pooling mine baseline && $(SNAKEMAKE) --keep-going; status=$$?; \
		$(NOTEBOOKS) report "$(PROFILE)" && exit $$status

plan: setup  ## check a profile and its data, and show the jobs of `make run`
	@$(NOTEBOOKS) plan "$(PROFILE)" $(if $(HAVE),--have "$(HAVE)")

# A reference without a spread is refused before the run; compared with itself, it is silent.
verify: setup  ## run quick, and hold its rows against the spread of the reference's training seeds
	@$(PY) -m l2p_utils.results data/offline >/dev/null
	@$(MAKE) --no-print-directory run PROFILE=quick HAVE= ONLY=
	@$(PY) -m l2p_utils.results runs/quick/results

fetch: setup  ## bring here what a profile needs from the hub (`make run` does it first)
	@env -u HF_HUB_OFFLINE $(PY) -m l2p_utils.hub "$(PROFILE)"

test: setup  ## run the tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

lab: setup  ## open the notebooks in JupyterLab; LAB="--port 9999 --ip 0.0.0.0": its own options
	@# kernels start in the project's folder, as headless ones do: paths mean the same in both
	@$(PY) -m jupyter lab --ServerApp.root_dir="$(CURDIR)/notebooks" \
		--AsyncMappingKernelManager.root_dir="$(CURDIR)" $(LAB)

figures: setup  ## redraw figures/ from data/
	@$(PY) -m l2p_utils.figures
	@$(PY) -m l2p_utils.benchmark
	@$(PY) -m l2p_utils.frontier
	@$(PY) -m l2p_utils.index predict

notebooks: setup  ## execute the stored notebooks again from data/; copy 01-03 from a finished quick
	@$(NOTEBOOKS) refresh

site: setup  ## README, docs, notebooks and figures as a static site in site/, from what is stored
	@rm -rf build/site && mkdir -p build/site/source
	@$(PY) -m sphinx -q -W --keep-going -c docs -d build/site/doctrees build/site/source build/site/html
	@rm -rf site && mv build/site/html site && echo "Open site/index.html, or serve the folder site."

bench: setup  ## measure beside the libraries that people use: executes 10_speed
	@$(NOTEBOOKS) run notebooks/10_speed.ipynb runs/bench/10_speed.ipynb --parameters measure=True \
		"peers=[$(foreach python,$(PEERS),'$(python)',)]" $(BENCH)

clean:  ## remove runs/ (and say how much it was); .venv stays
	@if [ -d runs ]; then du -sh runs | sed 's/\t.*/ in runs\/ removed/'; rm -rf runs; \
	else echo "nothing to remove: there is no runs/"; fi

# The copy of the lock file is written last: it stands for a complete installation of that lock.
# After an interrupted one, distributions without INSTALLER are half-written: they are removed, the
# others kept.
setup:
	@cmp -s requirements.lock $(VENV)/installed.lock && exit 0; \
	set -e; \
	$(PY) -m pip --version >/dev/null 2>&1 || { $(find_python); \
		echo "Creating $(VENV) with $$($$python --version)"; $$python -m venv --clear $(VENV); }; \
	find $(VENV)/lib -maxdepth 4 -name '*.dist-info' -not -exec test -e '{}/INSTALLER' \; \
		-prune -exec rm -r '{}' +; \
	echo "Installing requirements.lock into $(VENV): about 6 GB, two to four minutes"; \
	$(PY) -m pip install --require-hashes -r requirements.lock; \
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .; \
	cp requirements.lock $(VENV)/installed.lock

define find_python
for python in python3 python3.12 python3.11 ""; do \
	[ -z "$$python" ] && { echo "make needs Python 3.11 or 3.12 with venv; found none among" \
		"python3 ($$(python3 --version 2>&1)), python3.12, python3.11. Install one" \
		"(Debian, Ubuntu: apt install python3.12 python3.12-venv) and try again." >&2; exit 1; }; \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
		2>/dev/null && break; \
done
endef

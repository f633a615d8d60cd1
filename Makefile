# make nuclei, make demo, make demo-classify, make test: each sets up its own environment in .venv first (needs Python 3.11 or newer, nothing else).
NEW_ENOUGH = -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
RUN = $(VENV)/bin/python
# How threads that wait for one another do it: spinning for long stalls beside other work (python -m fast.doctor).
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 100
endif
ALL_CORES = -n logical --maxprocesses 8
# Runs every cell, with its asserts, in the environment's own kernel; figures and times may differ from the stored ones.
# The longest first.
LONGEST = notebooks/12_training.ipynb
NBVAL = $(ALL_CORES) --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=300 $(LONGEST) \
	$(filter-out $(LONGEST),$(wildcard notebooks/*.ipynb))

KERNELS = -q parity_tests/ops/test_merging_cpu.py parity_tests/ops/test_sampling_cpu.py \
	parity_tests/ops/test_attention.py parity_tests/ops/test_nearest.py \
	parity_tests/ops/test_nearest_paths.py parity_tests/ops/test_ordering.py
FAST = -q parity_tests/test_golden.py parity_tests/test_golden_segmentation.py parity_tests/test_mirror.py $(KERNELS)

.PHONY: nuclei demo demo-classify test test-fast test-kernels sanitize test-notebooks notebooks lab docs lint bench clean

nuclei: $(VENV)/installed
	$(RUN) -m train.predict fast/weights/nuclei_samples --pretrained nuclei --out outputs/nuclei

demo: $(VENV)/installed
	$(RUN) -m train.demo

demo-classify: $(VENV)/installed
	$(RUN) -m train.demo_classify

test: $(VENV)/installed
	$(RUN) -m pytest $(ALL_CORES) --dist worksteal
	$(RUN) -m pytest $(NBVAL)

# What a change of fast/ breaks first: golden vectors, the mirror, the operators' parity.
test-fast: $(VENV)/installed
	$(RUN) -m pytest $(FAST)

# The compiled kernels alone; make test-kernels CXX=clang++ for another compiler.
test-kernels: $(VENV)/installed
	CXX="$(CXX)" $(RUN) -m pytest $(KERNELS)

# The same under the sanitizers; make sanitize CXX=clang++ for those of clang. Their runtime comes before Python's own
# libraries; libstdc++ as well, or the sanitizer cannot follow what PyTorch throws.
ifneq (,$(findstring clang,$(CXX)))
sanitize: ASAN = libclang_rt.asan-$(shell uname -m).so
sanitize: SHARED = -shared-libasan
else
sanitize: ASAN = libasan.so
endif
sanitize: $(VENV)/installed
	CXX="$(CXX)" AFF_NATIVE_FLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined $(SHARED)" \
		LD_PRELOAD="$$($(CXX) -print-file-name=$(ASAN)):$$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(RUN) -m pytest $(KERNELS)

test-notebooks: $(VENV)/installed
	$(RUN) -m pytest $(NBVAL)

notebooks: $(VENV)/installed
	$(RUN) notebooks/execute.py

lab: $(VENV)/installed
	$(RUN) -m jupyter lab --notebook-dir notebooks

# The site, with the notebooks' stored outputs: open build/docs/index.html. A broken link is an error.
docs: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(RUN) -m sphinx -q -W --keep-going -c docs . build/docs

bench: $(VENV)/installed
	$(RUN) -m benchmarks.run
	$(RUN) -m benchmarks.plot
	$(RUN) -m benchmarks.table

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/installed: pyproject.toml constraints.txt Makefile
	@$(or $(PYTHON),false) $(NEW_ENOUGH) || \
		{ echo "error: no Python 3.11 or newer was found; name one: make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,test,notebooks]"
	@touch $@

clean:
	rm -rf $(VENV) build docs/api outputs .pytest_cache .ruff_cache .hypothesis

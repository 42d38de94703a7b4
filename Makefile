# Each target does all its own set-up: a Python 3.11+ with venv is all that must be there.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= 2.13.0
DEMO   := runs/demo

.PHONY: demo reason test test-portable test-lowest test-slow test-dist test-peers test-browser test-gpu gpu-check sanitize check format clean

# ---- set-up ----

# Without an NVIDIA GPU the CPU build of torch is enough, and several GB smaller: a local wheel if pip finds one,
# else PyTorch's CPU index.
$(BIN)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then \
		$(BIN)/pip install -q "torch==$(TORCH)"; \
	else \
		$(BIN)/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null || \
		$(BIN)/pip install -q "torch==$(TORCH)+cpu" --extra-index-url https://download.pytorch.org/whl/cpu 2>/dev/null || \
		$(BIN)/pip install -q "torch==$(TORCH)"; \
	fi
	touch $@

$(BIN)/leanseek.stamp: $(BIN)/torch.stamp pyproject.toml CMakeLists.txt $(wildcard leanseek/native/kernels/*)
	$(BIN)/pip install -q -e ".[test,check]"
	touch $@

# ---- the main job: raw text -> tokens -> a trained model -> its report -> text it writes ----

demo: $(BIN)/leanseek.stamp
	test -d corpora/shakespeare || $(BIN)/leanseek data fetch shakespeare --out corpora/shakespeare
	$(BIN)/leanseek data prepare corpora/shakespeare --out shards/shakespeare --train-tokenizer 4096
	rm -rf $(DEMO) $(DEMO)-unbalanced
	$(BIN)/leanseek train configs/demo-unbalanced.toml --minutes 2
	$(BIN)/leanseek train configs/demo.toml --minutes 6.5 --compare $(DEMO)-unbalanced
	$(BIN)/leanseek generate $(DEMO) "KING HENRY." --max-tokens 120 --seed 1
	@echo "The report: $(DEMO)/report.html"

# A model that learns to reason: pre-training, SFT, GRPO, distillation, and a page that tells the story.
reason: $(BIN)/leanseek.stamp
	test -d corpora/shakespeare || $(BIN)/leanseek data fetch shakespeare --out corpora/shakespeare
	$(BIN)/python experiments/reason/run.py

# ---- checks ----

QUICK := -m "not slow and not peer and not gpu and not browser"
# A process a core, each of one thread; a file's tests stay together, with their fixtures.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile
SHARED := OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)

test: $(BIN)/leanseek.stamp
	$(SHARED) $(QUICK)
	$(MAKE) test-portable

# What a CPU of another kind computes: torch confined to AVX2, with the AVX2 kernels (where they run), then with none.
# Left out is what a CPU does not decide: GPU kernels by an interpreter, and what the engine does around a step. The
# kernels' own tests force every variant in `make test`. The first pass also tries torch's form of each op, and the engine
# on it, by name; the second judges what finds no kernels.
CONFINED := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
ELSEWHERE := ops/test_triton ops/test_cpu_ ops/test_any_bits ops/test_sampling ops/test_tracing ops/test_dispatch \
	ops/test_long ops/test_machine ops/test_numa ops/test_stale_kernels ops/test_survey engine/test_asynchronous \
	engine/test_faults engine/test_guidance engine/test_llm engine/test_packed_copy engine/test_pages engine/test_sampler \
	engine/test_scheduling engine/test_text model/test_balance model/test_gate
WITHOUT_KERNELS := tests/ops/test_invariant.py tests/engine/test_engine.py tests/model/test_formulas.py \
	tests/model/test_mtp.py tests/model/test_packing.py tests/model/test_parity.py tests/model/test_precision.py
PORTABLE := $(QUICK) $(foreach name,$(ELSEWHERE),--ignore-glob "tests/$(name)*") tests/ops tests/engine tests/model
test-portable: $(BIN)/leanseek.stamp
	if $(BIN)/python -c "from leanseek import native; raise SystemExit('avx2' not in native.usable_variants())"; then \
		$(CONFINED) LEANSEEK_CPU=avx2 $(SHARED) $(PORTABLE); fi
	$(CONFINED) LEANSEEK_CPU=none $(SHARED) $(QUICK) $(WITHOUT_KERNELS)

# The lowest versions that pyproject.toml allows of all that is used at run time but torch, in an environment of their own.
# transformers, schemathesis and lm-eval ask for newer ones, so the tests that judge by them are left out. The kernels
# are those that the first environment has built in this checkout.
LOWEST := .venv-lowest
LOWEST_TESTS := tests/server tests/data tests/cli tests/checkpoint/test_training_checkpoint.py \
	tests/checkpoint/test_convert.py tests/checkpoint/test_broken.py
test-lowest: $(BIN)/leanseek.stamp
	$(PYTHON) -m venv $(LOWEST)
	$(BIN)/python -c "import re, tomllib; \
		print(*(re.sub('>=.*', '', d) + '==' + d.split('>=')[1] for d in \
		tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'] if not d.startswith('torch')), sep='\n')" \
		> $(LOWEST)/lowest.txt
	torch="torch==$$($(BIN)/python -c 'import torch; print(torch.__version__)')"; \
		$(LOWEST)/bin/pip install -q "$$torch" 2>/dev/null || \
		$(LOWEST)/bin/pip install -q "$$torch" --extra-index-url https://download.pytorch.org/whl/cpu
	$(LOWEST)/bin/pip install -q -c $(LOWEST)/lowest.txt --config-settings=wheel.cmake=false -e . \
		pytest pytest-timeout pytest-xdist hypothesis openai httpx zstandard
	OMP_NUM_THREADS=1 $(LOWEST)/bin/pytest $(PARALLEL) $(QUICK) $(LOWEST_TESTS) --ignore tests/server/test_fuzz.py \
		--ignore tests/server/test_page.py --ignore tests/server/test_lm_eval.py --ignore tests/server/test_templates.py \
		-k "not transformers_reads_it and not from_a_given_tokenizer_to_the_exports"

test-slow: $(BIN)/leanseek.stamp
	$(BIN)/pytest -m "slow and not distributed"

# Everything that forms a group of processes, gloo on this machine; `make test` runs the quick part.
test-dist: $(BIN)/leanseek.stamp
	$(SHARED) -m "distributed and not gpu"

# Peers that take long to install: llama.cpp is compiled from its sdist, TRL brings pandas and datasets.
test-peers: $(BIN)/leanseek.stamp
	$(BIN)/pip install -q llama-cpp-python==0.3.36 trl==1.16.0 reasoning-gym==0.1.25
	$(BIN)/pytest -m peer

# The chat page in a real headless Chromium, which must be installed.
test-browser: $(BIN)/leanseek.stamp
	$(BIN)/pytest -m browser

test-gpu: $(BIN)/leanseek.stamp
	$(BIN)/pytest -m gpu

# On a GPU machine, at most eight minutes: tests, the engine, training and kernels, into benchmarks/results/. Takes the
# Python it is given, with what that has installed: PYTHON=python3 where the virtual environment cannot be made.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

# The kernels' tests under AddressSanitizer and UBSan. Two to three minutes on 2 cores. The instrumented libraries
# stand in the checkout while the tests run; the plain ones come back when these pass, fail or are interrupted.
SANITIZERS = $$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)
sanitize: $(BIN)/leanseek.stamp
	cmake -S . -B build/sanitize -DLEANSEEK_SANITIZE=ON -DLEANSEEK_OUTPUT=$(CURDIR)/build/sanitize/lib && \
		cmake --build build/sanitize --parallel $$(nproc)
	mkdir -p build/plain && cp leanseek/native/*.so build/plain/
	trap 'cp --remove-destination build/plain/*.so leanseek/native/' EXIT; trap 'exit 130' INT TERM; \
		cp --remove-destination build/sanitize/lib/*.so leanseek/native/ && \
		LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -p no:cacheprovider --capture=sys \
		-m "not slow and not gpu" --ignore tests/ops/test_triton_fp8.py tests/ops tests/fp8/test_kernels.py

check: $(BIN)/leanseek.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(BIN)/leanseek.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(LOWEST) build runs corpora shards

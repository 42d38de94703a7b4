# Each target does all its own set-up: a Python 3.11+ with venv is all that must be there.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= 2.13.0
DEMO   := runs/demo

.PHONY: demo test test-slow test-peers test-browser test-gpu gpu-check sanitize check format clean

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

$(BIN)/leanseek.stamp: $(BIN)/torch.stamp pyproject.toml CMakeLists.txt $(wildcard leanseek/ops/cpu/kernels/*)
	$(BIN)/pip install -q -e ".[test,check]"
	touch $@

# ---- the main job: raw text -> tokens -> a trained model -> its report -> text it writes ----

demo: $(BIN)/leanseek.stamp
	test -d corpora/shakespeare || $(BIN)/leanseek data fetch shakespeare --out corpora/shakespeare
	$(BIN)/leanseek data prepare corpora/shakespeare --out shards/shakespeare --train-tokenizer 4096
	rm -rf $(DEMO) $(DEMO)-unbalanced
	$(BIN)/leanseek train configs/demo-unbalanced.toml
	$(BIN)/leanseek train configs/demo.toml --compare $(DEMO)-unbalanced
	$(BIN)/leanseek generate $(DEMO) "KING HENRY." --max-tokens 120 --seed 1
	@echo "The report: $(DEMO)/report.html"

# ---- checks ----

test: $(BIN)/leanseek.stamp
	$(BIN)/pytest -m "not slow and not peer and not gpu and not browser"

test-slow: $(BIN)/leanseek.stamp
	$(BIN)/pytest -m slow

# Peers that take long to install: llama.cpp is compiled from its sdist.
test-peers: $(BIN)/leanseek.stamp
	$(BIN)/pip install -q llama-cpp-python==0.3.36
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
	mkdir -p build/plain && cp leanseek/ops/cpu/*.so build/plain/
	trap 'cp --remove-destination build/plain/*.so leanseek/ops/cpu/' EXIT; trap 'exit 130' INT TERM; \
		cp --remove-destination build/sanitize/lib/*.so leanseek/ops/cpu/ && \
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
	rm -rf $(VENV) build runs corpora shards

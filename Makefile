# Each target does all its own set-up: a Python 3.11+ with venv is all that must be there.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= 2.13.0
DEMO   := runs/demo

.PHONY: demo test test-slow test-peers test-browser test-gpu sanitize check format clean

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

$(BIN)/leanseek.stamp: $(BIN)/torch.stamp pyproject.toml CMakeLists.txt $(wildcard leanseek/ops/cpu/*.cpp leanseek/ops/cpu/*.h)
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

# The kernels' tests under AddressSanitizer and UBSan; the plain libraries come back afterwards.
sanitize: $(BIN)/leanseek.stamp
	mkdir -p build/plain && cp leanseek/ops/cpu/*.so build/plain/
	cmake -S . -B build/sanitize -DLEANSEEK_SANITIZE=ON && cmake --build build/sanitize
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/pytest -p no:cacheprovider tests/ops/test_cpu_packed.py tests/ops/test_stack_step.py \
		tests/ops/test_cpu_training.py tests/ops/test_cpu_rowwise.py tests/ops/test_sampling.py tests/fp8/test_kernels.py; \
		status=$$?; cp build/plain/*.so leanseek/ops/cpu/; exit $$status

check: $(BIN)/leanseek.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(BIN)/leanseek.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build runs corpora shards

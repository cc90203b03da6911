# The project's one task runner: what it runs is what CI runs.

VENV := .venv
BIN := $(VENV)/bin
DEMO_READY := $(VENV)/.demo-ready
READY := $(VENV)/.ready
RELEASE := .cache/release/bin
RELEASE_READY := .cache/release/.ready
ROOMS := attestor_commands attestor_eif attestor_io keypolicy nitrosim nsm
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
CC ?= cc

.PHONY: help demo test coverage lint bench chaos libnsm wheels wheels-test foreign-test sbom sbom-tools audit image eif \
	nitrosim-image vm-test eif-test sdk-test terraform-test lock clean

help:
	@echo 'make demo    decrypt a secret with the simulated enclave and KMS'
	@echo 'make test    run all tests'
	@echo 'make coverage  the same, with branch coverage'
	@echo 'make lint    ruff, mypy --strict, import-linter and, where they are installed, shellcheck and terraform fmt'
	@echo 'make bench   compare with a plain boto3 script'
	@echo 'make chaos   let every file system call fail, and signals come beside each: half an hour (needs root or user namespaces)'
	@echo 'make libnsm  build nsm/libnsm.so from the patched crate (needs cargo)'
	@echo 'make wheels  what a release consists of, in dist/ (needs Rust with four targets; release/build-wheels --help)'
	@echo 'make wheels-test  try them: this machine, musl under its own loader (needs musl-tools)'
	@echo 'make foreign-test  try the wheel for arm64 under qemu-user (needs root, debootstrap, qemu-user-static, binfmt-support)'
	@echo 'make audit   look up the locked packages among the known vulnerabilities'
	@echo 'make image   build the enclave image of Dockerfile.enclave (needs root, buildah, debootstrap)'
	@echo 'make sbom    the bill of materials of that image, in dist/'
	@echo 'make eif     an enclave image file of it, with a kernel of Debian or what EIF_FLAGS names (enclave/build-eif --help)'
	@echo 'make nitrosim-image build the image of containers/nitrosim, and try it (as make image)'
	@echo 'make vm-test boot that image in a virtual machine and test it there (needs qemu as well)'
	@echo 'make eif-test boot enclave image files in the nitro-enclave machine of QEMU, which it builds (as make image)'
	@echo 'make sdk-test call attestor serve from SDKs for Go and JavaScript (needs go, node and npm)'
	@echo 'make terraform-test validate enclave/terraform against the provider (needs tofu or terraform, and their registry)'
	@echo 'make lock    renew requirements/ (needs uv)'
	@echo 'make clean   remove what was built'

demo: $(DEMO_READY) transport
	@PATH="$(abspath $(BIN)):$$PATH" nitrosim/demo.sh
	@echo 'to have attestor and nitrosim on the PATH of this shell:'
	@echo '    export PATH="$(abspath $(BIN)):$$PATH"'

# three workers on two cores: some tests wait for a deadline to pass
test: $(READY) transport
	$(BIN)/python -m pytest -n 3 $(PYTEST_FLAGS)

coverage: $(READY) transport
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 -k 'not without_permission' $(PYTEST_FLAGS) # nobody may not write its data
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --show-missing --skip-covered

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@rm -rf $(IMPORTS) && mkdir -p $(IMPORTS)/attestor && ln -s $(abspath attestor.py) $(IMPORTS)/attestor/__init__.py
	@for room in $(ROOMS); do ln -s "$(CURDIR)/$$room" $(IMPORTS)/; done
	cd $(IMPORTS) && $(abspath $(BIN))/lint-imports --no-logo --no-cache $(abspath pyproject.toml)
	@if command -v shellcheck >/dev/null; then set -x; shellcheck --external-sources $(SCRIPTS); \
	else echo 'shellcheck is not installed: scripts are not checked'; fi
	@for tool in tofu terraform; do ! command -v $$tool >/dev/null || { set -ex; $$tool fmt -check -diff enclave/terraform; break; }; done

# import-linter reads packages alone: in this folder the script is one
IMPORTS := .cache/imports

SCRIPTS := .ci/run containers/nitrosim/build nitrosim/demo.sh patches/build-libnsm release/build-wheels \
	$(addprefix tests/,eif_judge/build foreign/run vm/run vm/init vm/program eif_vm/run eif_vm/scenario eif_vm/program) \
	$(addprefix enclave/,assemble build-eif build-image buildah.sh entrypoint.sh) \
	enclave/terraform/user-data.sh \
	$(addprefix enclave/parent/,build-eif common.sh configure make-signing-key run-enclave tag-node)

# BENCH_FLAGS='--before REVISION' compares with another commit
bench: $(READY) transport
	$(BIN)/python -m tests.bench $(BENCH_FLAGS)

# CHAOS_FLAGS=--short is the part of it that .ci/run runs; a violation names the flags that repeat it alone
chaos: $(READY) transport
	$(BIN)/python -m tests.chaos $(CHAOS_FLAGS)

# With cargo on the path the patched library is built and used; without it, /dev/nsm is used directly.
.PHONY: transport
transport: $(DEMO_READY)
	@if ! command -v cargo >/dev/null; then echo 'transport: /dev/nsm directly, since cargo is not installed'; \
	elif echo 'building nsm/libnsm.so where it is not up to date: some ten seconds' && patches/build-libnsm; then echo 'transport: the patched library, nsm/libnsm.so'; \
	else echo 'transport: /dev/nsm directly, since libnsm.so cannot be built (see above)'; fi

libnsm:
	patches/build-libnsm

# WHEELS_FLAGS=--twice is what shows that the bytes are the same
wheels: $(RELEASE_READY)
	PATH="$(abspath $(RELEASE)):$$PATH" release/build-wheels $(WHEELS_FLAGS)

wheels-test: $(READY)
	$(BIN)/python -m pytest -m wheels

# FOREIGN_FLAGS='--arch amd64' on an arm64 machine
foreign-test:
	tests/foreign/run $(FOREIGN_FLAGS)

audit: $(RELEASE_READY)
	for lock in requirements/*.txt; do $(RELEASE)/pip-audit --strict --require-hashes --disable-pip --requirement "$$lock" || exit; done

# IMAGE names another one than this machine's: attestor-enclave-arm64
IMAGE := attestor-enclave
sbom-tools: $(RELEASE_READY)
sbom: $(RELEASE_READY)
	@test -e .cache/image/$(IMAGE).tar || { echo 'there is no image $(IMAGE): make image' >&2; exit 1; }
	mkdir -p dist
	SOURCE_DATE_EPOCH=0 $(RELEASE)/python -m release.sbom image .cache/image/$(IMAGE).tar >dist/$(IMAGE).cdx.json

# Debian, root, buildah and debootstrap; the virtual machine wants qemu as well. Both say what is missing.
image:
	enclave/build-image $(IMAGE_FLAGS)

eif: $(DEMO_READY)
	enclave/build-image $(if $(filter --kernel --blobs,$(EIF_FLAGS)),,--kernel) $(IMAGE_FLAGS)
	enclave/build-eif --force --image attestor-enclave $(EIF_FLAGS) .cache/image/attestor-enclave.eif

nitrosim-image:
	containers/nitrosim/build --try

vm-test:
	tests/vm/run

# QEMU and the device of its vsock are built once, and kept in .cache
eif-test: $(READY) transport
	tests/eif_vm/run

sdk-test: $(READY) transport
	$(BIN)/python -m pytest -m sdks

# The provider is downloaded, some hundred MB
terraform-test:
	@command -v tofu || command -v terraform || { echo 'neither tofu nor terraform is installed' >&2; exit 1; }
	set -x; tool=$$(command -v tofu || command -v terraform); export TF_DATA_DIR='$(CURDIR)/.cache/terraform'; \
	$$tool -chdir=enclave/terraform fmt -check -diff && $$tool -chdir=enclave/terraform init -backend=false -input=false && \
	$$tool -chdir=enclave/terraform validate

# UPGRADE= keeps the versions that are locked already
UPGRADE ?= --upgrade
lock:
	@for lock in run: build:build esdk:esdk serve:serve sim:sim dev:build,sim,esdk,serve,dev release:release; do \
		set -- "$${lock%%:*}" $$(echo "$${lock#*:}" | tr ',' ' '); name=$$1; shift; \
		uv pip compile pyproject.toml $$(for extra; do echo "--extra $$extra"; done) --universal \
			--python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links $(UPGRADE) \
			--custom-compile-command 'make lock' --quiet --output-file "requirements/$$name.txt"; \
	done

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# What the demonstration runs, and nothing of a developer's tools
$(DEMO_READY): requirements/sim.txt requirements/build.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo 'Python 3.11 or newer is missing; on Debian: apt-get install python3 python3-venv' >&2; exit 1; }
	@command -v $(firstword $(CC)) >/dev/null || { echo 'a C compiler is missing; on Debian: apt-get install gcc libc6-dev' >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo 'the venv module of Python is missing; on Debian: apt-get install python3-venv' >&2; exit 1; }
	@echo 'setting up $(VENV): some ten seconds, once'
	@"$(PYTHON)" -m venv --clear $(VENV)
	@echo 'installing what the demonstration needs into it (requirements/sim.txt): some twenty seconds, once'
	@$(INSTALL) --require-hashes -r requirements/sim.txt -r requirements/build.txt
	@$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(READY): requirements/dev.txt $(DEMO_READY)
	@echo 'installing what tests and lint need (requirements/dev.txt): a minute at most, once'
	@$(INSTALL) --require-hashes -r requirements/dev.txt
	@touch $@

# What builds a release: 400 MB, zig and its C libraries for the most part, so that no developer has to have it
$(RELEASE_READY): requirements/release.txt
	@echo 'setting up .cache/release (requirements/release.txt): a minute, once'
	@"$(PYTHON)" -m venv --clear .cache/release
	@$(RELEASE)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/release.txt
	@touch $@

clean:
	rm -rf $(VENV) .cache build dist nsm/libnsm.so .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache

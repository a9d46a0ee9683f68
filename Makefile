# The two commands of the README are `demo` and `test`; the others are their parts.
.PHONY: build demo test lint bench stress conformance clean

build: ## programs, guest kernel and initramfs, in target/bulkhead
	@tests/scripts/build

demo: build ## a container in a KVM guest, on this machine or in the emulated host
	@tests/scripts/demo

test: build ## unit tests here, end-to-end tests where KVM can boot a guest
	@tests/scripts/test

lint: ## formatting and clippy, warnings denied
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features --locked -- -D warnings

bench: build ## the figures of the README
	@tests/scripts/bench

stress: build ## 100 guests, four at a time, in the emulated host
	@tests/scripts/stress

conformance: ## RUNTIME_TOOLS=DIR [CONTEST=DIR]: suites of other projects, built beforehand, against bulkhead and runc
	@tests/scripts/conformance $(if $(RUNTIME_TOOLS),--runtime-tools '$(RUNTIME_TOOLS)') $(if $(CONTEST),--contest '$(CONTEST)')

clean:
	cargo clean

//! What the end-to-end tests share: bundles, the commands under test and the leak checker.
//!
//! The tests see Bulkhead as its users do: programs that are called with a bundle, and what is left on the host
//! afterwards. They run as root where /dev/kvm boots guests, one at a time, since each compares the whole host
//! before and after.

// A test helper that can't do its work ends the test.
#![allow(clippy::unwrap_used)]

pub mod bundle;
pub mod command;
pub mod console;
pub mod container;
pub mod initramfs;
pub mod leaks;
pub mod machine;
pub mod processes;
pub mod steps;
pub mod watch;

use std::path::PathBuf;

/// Folder of the build under test, laid out as installed: `bin/` and `lib/bulkhead/`.
///
/// # Panics
/// Without the variable `BULKHEAD_DIST`: these tests never guess what they test.
pub fn dist() -> PathBuf {
    std::env::var_os("BULKHEAD_DIST").map(PathBuf::from).expect(
        "BULKHEAD_DIST names the folder of the build under test (tests/scripts/test sets it)",
    )
}

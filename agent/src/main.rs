//! The guest's /init.
//!
//! It has a C `main` in place of a Rust one: what the standard library does before a Rust `main` takes a dozen
//! system calls, and it aborts where descriptors 0 to 2 are closed and there is no /dev/null, as in an initramfs
//! that holds nothing else.
#![no_main]

use std::ffi::{c_char, c_int};

#[unsafe(no_mangle)]
extern "C" fn main(_count: c_int, _arguments: *const *const c_char) -> c_int {
    bulkhead_agent::pid1::run()
}

//! Fault points (`vmm/src/fault.rs`) that several test programs go through.

/// The steps of a process that stands for a container's, in the order in which they come.
pub const PROXY: [&str; 7] = [
    "proxy: forked",
    "proxy: set up",
    "proxy: told to go",
    "proxy: connected",
    "proxy: attaching streams",
    "proxy: process ended",
    "proxy: output written",
];

//! Links the agent at a fixed address.
//!
//! A static-pie program relocates itself before its first instruction: for this one 16,000 relocations over 75 pages,
//! more work than everything it does until it dials the host. What address randomisation is worth to PID 1 of a
//! guest, which takes input from its own host only, is less. The stack, the heap and mappings stay randomised.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // The last word on the kind of output is the linker driver's: these override rustc's -static-pie.
    println!("cargo::rustc-link-arg-bins=-static");
    println!("cargo::rustc-link-arg-bins=-no-pie");
}

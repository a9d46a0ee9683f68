//! `bulkhead`: stub.
fn main() {}

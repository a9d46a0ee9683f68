//! Bulkhead's virtual machine monitor: one KVM guest per process.

pub mod boot;
pub mod bus;
pub mod client;
pub mod cmdline;
pub mod control;
pub mod cpuid;
pub mod end;
pub mod layout;
pub mod loader;
pub mod machine;
pub mod memory;
pub mod mptable;
pub mod probe;
pub mod serial;
pub mod server;
pub mod socket;
pub mod sync;
pub mod timeline;
pub mod vcpu;
pub mod virtio;

/// Stack of every thread that the VMM starts (`std::thread::Builder::stack_size`). The default of 2 MiB is what a huge page covers:
/// where the host gives huge pages to all, the first touch of such a stack would clear 2 MiB and keep them.
pub const STACK_SIZE: usize = 256 << 10;

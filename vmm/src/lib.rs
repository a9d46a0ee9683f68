//! Bulkhead's virtual machine monitor: one KVM guest per process.

pub mod boot;
pub mod bus;
pub mod client;
pub mod cmdline;
pub mod control;
pub mod cpuid;
pub mod end;
pub mod fault;
pub mod layout;
pub mod loader;
pub mod machine;
pub mod memory;
pub mod mptable;
pub mod probe;
pub mod rate;
pub mod serial;
pub mod server;
pub mod socket;
pub mod sync;
pub mod template;
pub mod thread;
pub mod timeline;
pub mod vcpu;
pub mod vcpu_state;
pub mod virtio;

pub use thread::STACK_SIZE;

//! Bulkhead's virtual machine monitor: one KVM guest per process.

pub mod control;
pub mod virtio;

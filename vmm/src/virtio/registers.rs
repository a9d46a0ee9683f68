//! The registers of the virtio-mmio slots as memory that the guest loads from.
//!
//! KVM maps the pages read-only (`KVM_MEM_READONLY`, Documentation/virt/kvm/api.rst, 4.35): a load of a register is a load from memory
//! and stays in guest code, a store leaves the guest as for any device. Linux loads InterruptStatus in each interrupt; as
//! an exit to the VMM that would cost more than all the rest of the interrupt.
//!
//! The guest can't write here, and the VMM never believes what it reads here but for the interrupt's bits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{MmapRegion, VolatileMemory};

use crate::layout;

const PAGE: usize = 4096;

/// The registers of all slots, empty ones first.
#[derive(Debug, Clone)]
pub struct RegisterMemory(Arc<MmapRegion>);

impl RegisterMemory {
    /// Registers of `slots` slots, all of them zero.
    pub fn new(slots: usize) -> Result<Self, MmapRegionError> {
        let length = slots * layout::VIRTIO_MMIO_SIZE as usize;
        MmapRegion::new(length.next_multiple_of(PAGE)).map(|memory| Self(Arc::new(memory)))
    }

    /// Gives the registers to a VM as memory slot `slot`, at the slots' address.
    pub fn register(&self, vm: &VmFd, slot: u32) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: layout::VIRTIO_MMIO_BASE,
            memory_size: self.0.size() as u64,
            userspace_addr: self.0.as_ptr() as u64,
        };
        // SAFETY: the region is mapped, and stays so as long as the machine, which owns both the VM and the registers. What
        // the guest sees of it is accessed atomically only.
        unsafe { vm.set_user_memory_region(region) }
    }

    /// The registers of one slot.
    pub fn slot(&self, index: usize) -> SlotRegisters {
        SlotRegisters {
            memory: Arc::clone(&self.0),
            base: index * layout::VIRTIO_MMIO_SIZE as usize,
        }
    }
}

/// The registers of one slot, by their offsets in it. Those that do not exist are nowhere, and read as zero.
#[derive(Debug, Clone)]
pub struct SlotRegisters {
    memory: Arc<MmapRegion>,
    base: usize,
}

impl SlotRegisters {
    /// What the driver loads from now on.
    pub fn set(&self, offset: u32, value: u32) {
        if let Some(register) = self.register(offset) {
            register.store(value.to_le(), Ordering::Release);
        }
    }

    /// Sets bits of a register.
    pub fn set_bits(&self, offset: u32, bits: u32) {
        if let Some(register) = self.register(offset) {
            register.fetch_or(bits.to_le(), Ordering::AcqRel);
        }
    }

    /// Clears bits of a register.
    pub fn clear_bits(&self, offset: u32, bits: u32) {
        if let Some(register) = self.register(offset) {
            register.fetch_and(!bits.to_le(), Ordering::AcqRel);
        }
    }

    /// Adds one to a register.
    pub fn increment(&self, offset: u32) {
        if let Some(register) = self.register(offset) {
            register.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// What the driver loads.
    pub fn get(&self, offset: u32) -> u32 {
        self.register(offset)
            .map_or(0, |register| u32::from_le(register.load(Ordering::Acquire)))
    }

    fn register(&self, offset: u32) -> Option<&AtomicU32> {
        let offset = usize::try_from(offset).ok()?;
        if offset >= layout::VIRTIO_MMIO_SIZE as usize {
            return None;
        }
        self.memory.get_atomic_ref(self.base + offset).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_share_no_register() {
        let memory = RegisterMemory::new(9).unwrap();
        let last = layout::VIRTIO_MMIO_SIZE as u32 - 4;
        for index in 0..9 {
            memory.slot(index).set(0, index as u32 + 1);
            memory.slot(index).set(last, index as u32 + 100);
        }
        for index in 0..9 {
            assert_eq!(memory.slot(index).get(0), index as u32 + 1);
            assert_eq!(memory.slot(index).get(last), index as u32 + 100);
        }
    }

    #[test]
    fn there_is_nothing_beyond_a_slot_or_between_words() {
        let memory = RegisterMemory::new(2).unwrap();
        for offset in [layout::VIRTIO_MMIO_SIZE as u32, u32::MAX, 2, 5] {
            memory.slot(0).set(offset, u32::MAX);
            assert_eq!(memory.slot(0).get(offset), 0, "{offset:#x}");
        }
        for offset in (0..layout::VIRTIO_MMIO_SIZE as u32).step_by(4) {
            assert_eq!(memory.slot(0).get(offset), 0);
            assert_eq!(memory.slot(1).get(offset), 0);
        }
    }
}

//! Virtio devices and what they share: the device trait, the interrupt line and the queues handed over at DRIVER_OK.
//!
//! A device knows nothing of its transport (`mmio`), and the transport nothing of a device but this trait. The transport
//! freezes the queue configuration at DRIVER_OK (virtio 1.2, 2.1 and 3.1.1) and only then hands the queues over, so
//! a device never sees one change below it.

pub mod console;
mod driver_queue;
pub mod event;
pub mod fs;
pub mod mmio;
#[cfg(test)]
mod mock_driver;
mod registers;
pub mod rng;
pub mod vsock;

use std::sync::Arc;

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_STATUS,
};
use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

pub use self::registers::{RegisterMemory, SlotRegisters};

/// Guest memory as every device sees it: cheap to clone, and regions may be added while the guest runs.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A device's way to interrupt the guest: the transport's InterruptStatus register and an irqfd.
#[derive(Debug)]
pub struct Interrupt {
    registers: SlotRegisters,
    irqfd: EventFd,
}

impl Interrupt {
    /// Wraps an eventfd that KVM knows as the irqfd of the device's line, and the registers of the device's slot.
    pub fn new(irqfd: EventFd, registers: SlotRegisters) -> Self {
        Self { registers, irqfd }
    }

    /// Tells the driver that the device has put buffers on a used ring (virtio 1.2, 4.2.2, InterruptStatus bit 0).
    pub fn signal_used_buffers(&self) {
        self.signal(VIRTIO_MMIO_INT_VRING);
    }

    /// Tells the driver that the configuration space has changed (InterruptStatus bit 1).
    pub fn signal_config_change(&self) {
        // 4.2.2.1: it changes with each change of the configuration space.
        self.registers.increment(VIRTIO_MMIO_CONFIG_GENERATION);
        self.signal(VIRTIO_MMIO_INT_CONFIG);
    }

    /// A write to InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.registers
            .clear_bits(VIRTIO_MMIO_INTERRUPT_STATUS, bits);
    }

    fn signal(&self, bits: u32) {
        self.registers.set_bits(VIRTIO_MMIO_INTERRUPT_STATUS, bits);
        // An eventfd write fails only when its counter is full: then the interrupt is pending already.
        let _ = self.irqfd.write(1);
    }
}

/// One virtqueue in the hands of a device.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Checked and frozen configuration of the queue.
    pub queue: Queue,
    /// Signalled by KVM (ioeventfd) when the driver writes QueueNotify for this queue.
    pub kick: EventFd,
}

/// Everything a device gets when the driver has set DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub memory: Memory,
    /// Features that the driver accepted; a subset of those offered.
    pub features: u64,
    /// The device's queues, in order; one that the driver left disabled is not ready (`Queue::ready`).
    pub queues: Vec<ActiveQueue>,
    /// The device's interrupt.
    pub interrupt: Arc<Interrupt>,
}

/// Why a device could not start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver enabled too few queues.
    #[error("the driver enabled {got} of the {wanted} queues that the device needs")]
    MissingQueues {
        /// Queues enabled.
        got: usize,
        /// Queues needed.
        wanted: usize,
    },
    /// A thread or a file descriptor could not be made.
    #[error("cannot start the device's worker")]
    Worker(#[source] std::io::Error),
}

/// A virtio device (virtio 1.2, chapter 5), as the transport drives it.
///
/// A device runs on threads of its own (with [`crate::STACK_SIZE`]) or on the VMM's event loop ([`event`]); the transport's calls come
/// from vCPU threads and must return at once.
pub trait VirtioDevice: Send {
    /// Device type (virtio 1.2, section 5).
    fn device_type(&self) -> u32;

    /// Name for logs, thread names and `info`.
    fn name(&self) -> &'static str;

    /// Largest size of each queue, a power of two; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits offered. The transport adds VIRTIO_F_VERSION_1.
    fn features(&self) -> u64;

    /// The device's configuration space, at most [`mmio::CONFIG_LEN`] bytes. The driver can't change it.
    fn config(&self) -> &[u8] {
        &[]
    }

    /// Starts the device. Called once between two resets.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the device: on return nothing of it touches guest memory any more. The queues are gone; the driver makes new ones.
    fn reset(&mut self);
}

//! The virtio-mmio transport (virtio 1.2, 4.2), modern interface only.
//!
//! One [`Transport`] stands between the registers of a slot and one device. It keeps the driver to the order of initialisation
//! (3.1.1): features before FEATURES_OK, queues between FEATURES_OK and DRIVER_OK, nothing after. At DRIVER_OK it checks each
//! queue against guest memory and hands them to the device; a driver that got it wrong sees DEVICE_NEEDS_RESET.
//!
//! What the driver reads is memory ([`SlotRegisters`]); only its writes come here. Queue notifications reach the device by ioeventfd and
//! pass by this code, as do acknowledgements of interrupts for used buffers: InterruptStatus keeps that bit.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use tracing::{debug, warn};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Activation, ActiveQueue, Interrupt, Memory, SlotRegisters, VirtioDevice};
use crate::layout;

/// MagicValue: "virt".
const MAGIC: u32 = 0x7472_6976;
/// Version of the modern interface.
const VERSION: u32 = 2;
/// VendorID: "BLKH".
const VENDOR: u32 = u32::from_le_bytes(*b"BLKH");
/// SHMLen of a region that does not exist (4.2.2), and what its base reads as.
const NO_SHARED_MEMORY: u32 = u32::MAX;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// Offset of the QueueNotify register, which ioeventfds watch.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;
/// Offset of the InterruptACK register, which an ioeventfd watches for [`USED_BUFFERS`].
pub const INTERRUPT_ACK: u64 = VIRTIO_MMIO_INTERRUPT_ACK as u64;
/// InterruptStatus and InterruptACK: the device has used buffers, and nothing else.
pub const USED_BUFFERS: u32 = VIRTIO_MMIO_INT_VRING;
/// Room for a device's configuration space.
pub const CONFIG_LEN: usize = layout::VIRTIO_MMIO_SIZE as usize - VIRTIO_MMIO_CONFIG as usize;

/// Why a device can't go on where a template's stood.
#[derive(Debug, thiserror::Error)]
pub enum CarryOnError {
    /// The template has another one in the slot.
    #[error("the template's device is not a {0} as this machine's")]
    WrongDevice(&'static str),
    /// It could not be started; the log says why.
    #[error("the {0} device did not start again")]
    NotStarted(&'static str),
}

/// How far driver and device have come with their rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rings {
    /// At the start, both.
    New,
    /// The device has used all buffers that it has taken.
    Used,
}

/// What the driver has said about one queue.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueConfig {
    max_size: u16,
    size: u32,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl QueueConfig {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size.into(),
            ready: false,
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
        }
    }
}

/// What the driver has said to the device.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DriverState {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    features: u64,
    queue_select: u32,
    queues: Vec<QueueConfig>,
}

impl DriverState {
    /// Nothing yet, to a device with queues of these sizes.
    fn new(queue_sizes: &[u16]) -> Self {
        Self {
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            features: 0,
            queue_select: 0,
            queues: queue_sizes.iter().copied().map(QueueConfig::new).collect(),
        }
    }
}

/// What the driver of a device in a template has said to it, and what it was told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    device_type: u32,
    driver: DriverState,
    interrupt_status: u32,
    config_generation: u32,
}

/// A slot with a device.
pub struct Transport {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    registers: SlotRegisters,
    kicks: Vec<EventFd>,
    driver: DriverState,
    /// Whether the device has been activated and not reset since.
    active: bool,
}

impl Transport {
    /// A transport for `device`, which interrupts the guest through `irqfd`. From now on the driver finds the device in the slot.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        irqfd: EventFd,
        registers: SlotRegisters,
    ) -> io::Result<Self> {
        let sizes = device.queue_sizes();
        let kicks = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<Result<_, _>>()?;
        let driver = DriverState::new(sizes);
        let transport = Self {
            device,
            memory,
            interrupt: Arc::new(Interrupt::new(irqfd, registers.clone())),
            registers,
            kicks,
            driver,
            active: false,
        };
        transport.show_device();
        transport.show_state();
        Ok(transport)
    }

    /// The device's name.
    pub fn name(&self) -> &'static str {
        self.device.name()
    }

    /// One eventfd for each queue, the same for the transport's whole life: KVM signals it when the driver notifies the queue.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Fills the registers that stay.
    fn show_device(&self) {
        show_empty(&self.registers);
        let registers = [
            (VIRTIO_MMIO_VENDOR_ID, VENDOR),
            (VIRTIO_MMIO_SHM_LEN_LOW, NO_SHARED_MEMORY),
            (VIRTIO_MMIO_SHM_LEN_HIGH, NO_SHARED_MEMORY),
            (VIRTIO_MMIO_SHM_BASE_LOW, NO_SHARED_MEMORY),
            (VIRTIO_MMIO_SHM_BASE_HIGH, NO_SHARED_MEMORY),
        ];
        for (offset, value) in registers {
            self.registers.set(offset, value);
        }
        for (bytes, offset) in self
            .device
            .config()
            .chunks(4)
            .zip((VIRTIO_MMIO_CONFIG..).step_by(4))
        {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            self.registers.set(offset, u32::from_le_bytes(word));
        }
        // Last: it tells the driver that the others are there.
        self.registers
            .set(VIRTIO_MMIO_DEVICE_ID, self.device.device_type());
    }

    /// Fills the registers that depend on what the driver has written.
    fn show_state(&self) {
        let queue = self.driver.queues.get(self.driver.queue_select as usize);
        let registers = [
            (
                VIRTIO_MMIO_DEVICE_FEATURES,
                word(self.offered_features(), self.driver.device_features_select),
            ),
            (
                VIRTIO_MMIO_QUEUE_NUM_MAX,
                queue.map_or(0, |queue| queue.max_size.into()),
            ),
            (
                VIRTIO_MMIO_QUEUE_READY,
                queue.map_or(0, |queue| queue.ready.into()),
            ),
            (VIRTIO_MMIO_STATUS, self.driver.status),
        ];
        for (offset, value) in registers {
            self.registers.set(offset, value);
        }
    }

    /// The driver writes at `offset` of the slot. 4.2.2.2: it uses aligned 32-bit accesses only, but for the configuration space, which
    /// none of the devices lets it change.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let (Ok(offset), Ok(word)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) else {
            return;
        };
        self.write_register(offset, u32::from_le_bytes(word));
        self.show_state();
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.driver.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.driver.queue_select = value,
            VIRTIO_MMIO_QUEUE_NUM => self.configure(|queue| queue.size = value),
            VIRTIO_MMIO_QUEUE_READY => self.configure(|queue| queue.ready = value == 1),
            VIRTIO_MMIO_QUEUE_DESC_LOW => self.configure(|queue| low(&mut queue.desc_table, value)),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                self.configure(|queue| high(&mut queue.desc_table, value));
            }
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                self.configure(|queue| low(&mut queue.avail_ring, value));
            }
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                self.configure(|queue| high(&mut queue.avail_ring, value));
            }
            VIRTIO_MMIO_QUEUE_USED_LOW => self.configure(|queue| low(&mut queue.used_ring, value)),
            VIRTIO_MMIO_QUEUE_USED_HIGH => {
                self.configure(|queue| high(&mut queue.used_ring, value));
            }
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                // Only what KVM's ioeventfds did not match comes here.
                if let Some(kick) = self.kicks.get(value as usize) {
                    // Fails only when the counter is full: then the kick is pending already.
                    let _ = kick.write(1);
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            _ => {}
        }
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | VERSION_1
    }

    /// DriverFeatures: only before FEATURES_OK (3.1.1, step 4), only what was offered (2.2.1; checked at FEATURES_OK).
    fn accept_features(&mut self, value: u32) {
        if self.driver.status != ACKNOWLEDGE | DRIVER {
            self.note("features written out of turn");
            return;
        }
        match self.driver.driver_features_select {
            0 => low(&mut self.driver.features, value),
            1 => high(&mut self.driver.features, value),
            _ if value == 0 => {}
            _ => self.note("feature bits beyond 63"),
        }
    }

    /// Changes the selected queue: only between FEATURES_OK and DRIVER_OK (3.1.1, step 7), and, but for disabling it again, only
    /// before the queue is ready (4.2.2.2).
    fn configure(&mut self, change: impl FnOnce(&mut QueueConfig)) {
        if self.driver.status != ACKNOWLEDGE | DRIVER | FEATURES_OK {
            self.note("queue configured out of turn");
            return;
        }
        let Some(queue) = self
            .driver
            .queues
            .get_mut(self.driver.queue_select as usize)
        else {
            self.note("a queue that does not exist configured");
            return;
        };
        let mut changed = *queue;
        change(&mut changed);
        if queue.ready && changed.ready {
            self.note("a ready queue configured");
            return;
        }
        *queue = changed;
    }

    /// Status (2.1): zero resets; else bits are only ever added, in their order.
    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
        // NEEDS_RESET is the device's to set: a driver may write back what it read.
        let added = value & known & !self.driver.status;
        if value & self.driver.status & known != self.driver.status & known {
            self.note("status bits taken back");
            return;
        }
        if self.driver.status & (FAILED | NEEDS_RESET) != 0 {
            self.note("status written to a failed device");
            return;
        }
        if added & FAILED != 0 {
            warn!("virtio {}: the driver gave the device up", self.name());
            self.driver.status |= FAILED;
            return;
        }
        let target = self.driver.status | added;
        let ordered = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK]
            .into_iter()
            .scan(0, |sum, bit| {
                *sum |= bit;
                Some(*sum)
            })
            .any(|prefix| prefix == target);
        if !ordered {
            self.note("status bits set out of order");
            return;
        }
        if added & FEATURES_OK != 0 && !self.features_are_acceptable() {
            // 2.2.2: the device leaves FEATURES_OK off, and the driver reads that.
            self.note("features refused");
            self.driver.status |= added & (ACKNOWLEDGE | DRIVER);
            return;
        }
        self.driver.status = target;
        if added & DRIVER_OK != 0 {
            self.activate(Rings::New);
        }
    }

    fn features_are_acceptable(&self) -> bool {
        // 6.1: a modern device may insist on VERSION_1.
        self.driver.features & VERSION_1 != 0
            && self.driver.features & !self.offered_features() == 0
    }

    /// Stops the device with all that it has been asked done: from now on nothing of it touches guest memory. The guest must stand still.
    /// [`Self::carry_on`] starts it again.
    pub fn stand_still(&mut self) -> TransportState {
        if self.active {
            self.device.reset();
            self.active = false;
        }
        TransportState {
            device_type: self.device.device_type(),
            driver: self.driver.clone(),
            interrupt_status: self.registers.get(VIRTIO_MMIO_INTERRUPT_STATUS),
            config_generation: self.registers.get(VIRTIO_MMIO_CONFIG_GENERATION),
        }
    }

    /// Starts the device again where [`Self::stand_still`] stopped it, or another one of its kind.
    pub fn carry_on(&mut self, state: &TransportState) -> Result<(), CarryOnError> {
        let sizes = state.driver.queues.iter().map(|queue| queue.max_size);
        if state.device_type != self.device.device_type()
            || !sizes.eq(self.device.queue_sizes().iter().copied())
        {
            return Err(CarryOnError::WrongDevice(self.name()));
        }
        self.driver.clone_from(&state.driver);
        self.registers
            .set(VIRTIO_MMIO_INTERRUPT_STATUS, state.interrupt_status);
        self.registers
            .set(VIRTIO_MMIO_CONFIG_GENERATION, state.config_generation);
        if self.driver.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK {
            self.activate(Rings::Used);
            if self.driver.status & NEEDS_RESET != 0 {
                return Err(CarryOnError::NotStarted(self.name()));
            }
            // An interrupt may have been on its way when the guest was stopped; one too many does no harm.
            self.interrupt.signal_used_buffers();
        }
        self.show_state();
        Ok(())
    }

    /// Starts the device with its queues as they are from now on.
    fn activate(&mut self, rings: Rings) {
        let queues = match self.frozen_queues(rings) {
            Ok(queues) => queues,
            Err(problem) => {
                warn!("virtio {}: {problem}", self.name());
                self.require_reset();
                return;
            }
        };
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.driver.features,
            queues,
            interrupt: Arc::clone(&self.interrupt),
        };
        self.active = true;
        if let Err(error) = self.device.activate(activation) {
            warn!("virtio {}: cannot start: {error}", self.name());
            self.require_reset();
        }
    }

    /// The queues as the device gets them, each one checked.
    fn frozen_queues(&self, rings: Rings) -> Result<Vec<ActiveQueue>, String> {
        self.driver
            .queues
            .iter()
            .zip(&self.kicks)
            .enumerate()
            .map(|(index, (config, kick))| {
                let queue = self
                    .frozen_queue(config, rings)
                    .map_err(|problem| format!("queue {index}: {problem}"))?;
                let kick = kick
                    .try_clone()
                    .map_err(|error| format!("queue {index}: {error}"))?;
                Ok(ActiveQueue { queue, kick })
            })
            .collect()
    }

    fn frozen_queue(&self, config: &QueueConfig, rings: Rings) -> Result<Queue, &'static str> {
        let mut queue = Queue::new(config.max_size).map_err(|_| "bad maximal size")?;
        if !config.ready {
            return Ok(queue);
        }
        // 2.7: the size is a power of two; 4.2.2.2: at most QueueNumMax.
        let size = u16::try_from(config.size).map_err(|_| "too large")?;
        queue.try_set_size(size).map_err(|_| "bad size")?;
        // 2.7: alignment 16, 2 and 4; sizes 16, 6 + 2 and 6 + 8 for each entry.
        let entries = usize::from(size);
        let areas = [
            (config.desc_table, 16 * entries),
            (config.avail_ring, 6 + 2 * entries),
            (config.used_ring, 6 + 8 * entries),
        ];
        let memory = self.memory.memory();
        for (address, length) in areas {
            if !memory.check_range(GuestAddress(address), length) {
                return Err("outside of guest memory");
            }
        }
        queue
            .try_set_desc_table_address(GuestAddress(config.desc_table))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(config.avail_ring)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(config.used_ring)))
            .map_err(|_| "misaligned")?;
        queue.set_event_idx(self.driver.features & EVENT_IDX != 0);
        queue.set_ready(true);
        if rings == Rings::Used {
            // Nothing is half done, so the device goes on after the last buffer that it has used.
            let done = queue
                .used_idx(&*memory, Ordering::Acquire)
                .map_err(|_| "outside of guest memory")?
                .0;
            queue.set_next_avail(done);
            queue.set_next_used(done);
        }
        Ok(queue)
    }

    /// 2.1.2: tells the driver that only a reset helps.
    fn require_reset(&mut self) {
        self.driver.status |= NEEDS_RESET;
        self.interrupt.signal_config_change();
    }

    fn reset(&mut self) {
        if self.active {
            self.device.reset();
            self.active = false;
        }
        self.interrupt.acknowledge(u32::MAX);
        self.driver = DriverState::new(self.device.queue_sizes());
    }

    /// A driver's mistake. At debug level: a hostile guest can make as many as it likes.
    fn note(&self, what: &str) {
        debug!(
            "virtio {}: {what} (status {:#x})",
            self.name(),
            self.driver.status
        );
    }
}

/// Shows a slot without a device: 4.2.2, a DeviceID of zero makes the driver leave it alone.
pub fn show_empty(registers: &SlotRegisters) {
    registers.set(VIRTIO_MMIO_MAGIC_VALUE, MAGIC);
    registers.set(VIRTIO_MMIO_VERSION, VERSION);
}

/// Word `index` of a 64-bit value; those beyond are zero.
fn word(value: u64, index: u32) -> u32 {
    match index {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn low(field: &mut u64, value: u32) {
    *field = *field & !0xffff_ffff | u64::from(value);
}

fn high(field: &mut u64, value: u32) {
    *field = *field & 0xffff_ffff | u64::from(value) << 32;
}

#[cfg(test)]
mod tests;

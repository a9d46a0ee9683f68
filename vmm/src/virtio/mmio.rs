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

/// What the driver of a device in a template has said to it, and what it was told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    device_type: u32,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueConfig>,
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
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueConfig>,
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
        let queues: Vec<_> = sizes.iter().copied().map(QueueConfig::new).collect();
        let kicks = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<Result<_, _>>()?;
        let transport = Self {
            device,
            memory,
            interrupt: Arc::new(Interrupt::new(irqfd, registers.clone())),
            registers,
            kicks,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
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
        let queue = self.queues.get(self.queue_select as usize);
        let registers = [
            (
                VIRTIO_MMIO_DEVICE_FEATURES,
                word(self.offered_features(), self.device_features_select),
            ),
            (
                VIRTIO_MMIO_QUEUE_NUM_MAX,
                queue.map_or(0, |queue| queue.max_size.into()),
            ),
            (
                VIRTIO_MMIO_QUEUE_READY,
                queue.map_or(0, |queue| queue.ready.into()),
            ),
            (VIRTIO_MMIO_STATUS, self.status),
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
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
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
        if self.status != ACKNOWLEDGE | DRIVER {
            self.note("features written out of turn");
            return;
        }
        match self.driver_features_select {
            0 => low(&mut self.driver_features, value),
            1 => high(&mut self.driver_features, value),
            _ if value == 0 => {}
            _ => self.note("feature bits beyond 63"),
        }
    }

    /// Changes the selected queue: only between FEATURES_OK and DRIVER_OK (3.1.1, step 7), and, but for disabling it again, only
    /// before the queue is ready (4.2.2.2).
    fn configure(&mut self, change: impl FnOnce(&mut QueueConfig)) {
        if self.status != ACKNOWLEDGE | DRIVER | FEATURES_OK {
            self.note("queue configured out of turn");
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else {
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
        let added = value & known & !self.status;
        if value & self.status & known != self.status & known {
            self.note("status bits taken back");
            return;
        }
        if self.status & (FAILED | NEEDS_RESET) != 0 {
            self.note("status written to a failed device");
            return;
        }
        if added & FAILED != 0 {
            warn!("virtio {}: the driver gave the device up", self.name());
            self.status |= FAILED;
            return;
        }
        let target = self.status | added;
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
            self.status |= added & (ACKNOWLEDGE | DRIVER);
            return;
        }
        self.status = target;
        if added & DRIVER_OK != 0 {
            self.activate(Rings::New);
        }
    }

    fn features_are_acceptable(&self) -> bool {
        // 6.1: a modern device may insist on VERSION_1.
        self.driver_features & VERSION_1 != 0
            && self.driver_features & !self.offered_features() == 0
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
            status: self.status,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            queues: self.queues.clone(),
            interrupt_status: self.registers.get(VIRTIO_MMIO_INTERRUPT_STATUS),
            config_generation: self.registers.get(VIRTIO_MMIO_CONFIG_GENERATION),
        }
    }

    /// Starts the device again where [`Self::stand_still`] stopped it, or another one of its kind.
    pub fn carry_on(&mut self, state: &TransportState) -> Result<(), CarryOnError> {
        let sizes = state.queues.iter().map(|queue| queue.max_size);
        if state.device_type != self.device.device_type()
            || !sizes.eq(self.device.queue_sizes().iter().copied())
        {
            return Err(CarryOnError::WrongDevice(self.name()));
        }
        self.status = state.status;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        self.queues.clone_from(&state.queues);
        self.registers
            .set(VIRTIO_MMIO_INTERRUPT_STATUS, state.interrupt_status);
        self.registers
            .set(VIRTIO_MMIO_CONFIG_GENERATION, state.config_generation);
        if state.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK {
            self.activate(Rings::Used);
            if self.status & NEEDS_RESET != 0 {
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
            features: self.driver_features,
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
        self.queues
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
        queue.set_event_idx(self.driver_features & EVENT_IDX != 0);
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
        self.status |= NEEDS_RESET;
        self.interrupt.signal_config_change();
    }

    fn reset(&mut self) {
        if self.active {
            self.device.reset();
            self.active = false;
        }
        self.interrupt.acknowledge(u32::MAX);
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueConfig::new(queue.max_size);
        }
    }

    /// A driver's mistake. At debug level: a hostile guest can make as many as it likes.
    fn note(&self, what: &str) {
        debug!("virtio {}: {what} (status {:#x})", self.name(), self.status);
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
mod tests {
    use std::sync::Mutex;

    use vm_memory::{Bytes, GuestMemoryAtomic, GuestMemoryMmap};

    use super::super::{ActivateError, RegisterMemory};
    use super::*;

    const FEATURE: u64 = 1 << 5;
    const MEMORY: usize = 0x10_0000;

    #[derive(Default)]
    struct Log {
        activations: Vec<Activation>,
        resets: usize,
        fail: bool,
    }

    struct Mock(Arc<Mutex<Log>>);

    impl VirtioDevice for Mock {
        fn device_type(&self) -> u32 {
            42
        }
        fn name(&self) -> &'static str {
            "mock"
        }
        fn queue_sizes(&self) -> &[u16] {
            &[64, 256]
        }
        fn features(&self) -> u64 {
            FEATURE
        }
        fn config(&self) -> &[u8] {
            &[0x10, 0x11, 0x12, 0x13, 0x14, 0x15]
        }
        fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
            let mut log = self.0.lock().unwrap();
            log.activations.push(activation);
            if log.fail {
                return Err(ActivateError::MissingQueues { got: 0, wanted: 2 });
            }
            Ok(())
        }
        fn reset(&mut self) {
            self.0.lock().unwrap().resets += 1;
        }
    }

    struct Driver {
        transport: Transport,
        log: Arc<Mutex<Log>>,
        irqfd: EventFd,
    }

    impl Driver {
        fn new() -> Self {
            let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
            let log = Arc::new(Mutex::new(Log::default()));
            let irqfd = EventFd::new(EFD_NONBLOCK).unwrap();
            let transport = Transport::new(
                Box::new(Mock(Arc::clone(&log))),
                GuestMemoryAtomic::new(memory),
                irqfd.try_clone().unwrap(),
                RegisterMemory::new(1).unwrap().slot(0),
            )
            .unwrap();
            Self {
                transport,
                log,
                irqfd,
            }
        }

        fn read(&self, offset: u32) -> u32 {
            self.transport.registers.get(offset)
        }

        fn write(&mut self, offset: u32, value: u32) {
            self.transport.write(offset.into(), &value.to_le_bytes());
        }

        fn status(&mut self, value: u32) -> u32 {
            self.write(VIRTIO_MMIO_STATUS, value);
            self.read(VIRTIO_MMIO_STATUS)
        }

        fn features(&mut self, features: u64) {
            for index in 0..2 {
                self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, index);
                self.write(VIRTIO_MMIO_DRIVER_FEATURES, word(features, index));
            }
        }

        fn negotiated() -> Self {
            let mut driver = Self::new();
            driver.status(ACKNOWLEDGE);
            driver.status(ACKNOWLEDGE | DRIVER);
            driver.features(VERSION_1 | FEATURE);
            assert_eq!(driver.status(0xb), 0xb);
            driver
        }

        fn queue(&mut self, index: u32, size: u32, areas: [u64; 3]) {
            self.write(VIRTIO_MMIO_QUEUE_SEL, index);
            self.write(VIRTIO_MMIO_QUEUE_NUM, size);
            for (register, address) in [0x80, 0x90, 0xa0].into_iter().zip(areas) {
                self.write(register, word(address, 0));
                self.write(register + 4, word(address, 1));
            }
            self.write(VIRTIO_MMIO_QUEUE_READY, 1);
        }

        fn running() -> Self {
            let mut driver = Self::negotiated();
            driver.queue(0, 64, [0x1000, 0x2000, 0x3000]);
            driver.queue(1, 128, [0x4000, 0x5000, 0x6000]);
            assert_eq!(driver.status(0xf), 0xf);
            driver
        }
    }

    #[test]
    fn identity_registers_read_as_the_spec_says() {
        let mut driver = Driver::new();
        assert_eq!(driver.read(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
        assert_eq!(driver.read(VIRTIO_MMIO_VERSION), 2);
        assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_ID), 42);
        assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_FEATURES), FEATURE as u32);
        driver.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_FEATURES), 1);
        driver.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
        assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
        driver.write(VIRTIO_MMIO_QUEUE_SEL, 2);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        for register in 0xb0..0xc0u32 {
            if register % 4 == 0 {
                assert_eq!(driver.read(register), u32::MAX, "no shared memory");
            }
        }
    }

    #[test]
    fn a_driver_that_keeps_the_order_starts_the_device() {
        let driver = Driver::running();
        let log = driver.log.lock().unwrap();
        let activation = &log.activations[0];
        assert_eq!(activation.features, VERSION_1 | FEATURE);
        assert_eq!(activation.queues[0].queue.size(), 64);
        assert_eq!(activation.queues[1].queue.size(), 128);
        assert_eq!(activation.queues[1].queue.avail_ring(), 0x5000);
        assert!(activation.queues.iter().all(|q| q.queue.ready()));
    }

    #[test]
    fn a_queue_left_disabled_is_handed_over_as_not_ready() {
        let mut driver = Driver::negotiated();
        driver.queue(0, 64, [0x1000, 0x2000, 0x3000]);
        driver.status(0xf);
        let log = driver.log.lock().unwrap();
        assert!(log.activations[0].queues[0].queue.ready());
        assert!(!log.activations[0].queues[1].queue.ready());
    }

    #[test]
    fn features_not_offered_or_legacy_drivers_are_refused() {
        for features in [FEATURE, VERSION_1 | 1 << 7, 0] {
            let mut driver = Driver::new();
            driver.status(1);
            driver.status(3);
            driver.features(features);
            assert_eq!(driver.status(0xb), 3, "{features:#x}");
        }
    }

    #[test]
    fn features_are_frozen_after_features_ok() {
        let mut driver = Driver::negotiated();
        driver.features(VERSION_1);
        driver.status(0xf);
        assert_eq!(
            driver.log.lock().unwrap().activations[0].features,
            VERSION_1 | FEATURE
        );
    }

    #[test]
    fn status_bits_out_of_order_or_taken_back_are_ignored() {
        let mut driver = Driver::new();
        for wrong in [2, 4, 8, 0xc, 5, 9, 0xd] {
            assert_eq!(driver.status(wrong), 0, "{wrong:#x}");
        }
        let mut driver = Driver::running();
        for wrong in [1, 3, 7, 0xb] {
            assert_eq!(driver.status(wrong), 0xf, "{wrong:#x}");
        }
        driver.status(0xf);
        assert_eq!(driver.log.lock().unwrap().activations.len(), 1);
    }

    #[test]
    fn queues_are_frozen_at_driver_ok() {
        let mut driver = Driver::running();
        driver.queue(0, 32, [0x7000, 0x8000, 0x9000]);
        driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 1);
        assert_eq!(driver.transport.queues[0].desc_table, 0x1000);
        assert_eq!(driver.transport.queues[0].size, 64);
    }

    #[test]
    fn a_ready_queue_can_be_disabled_but_not_changed() {
        let mut driver = Driver::negotiated();
        driver.queue(0, 64, [0x1000, 0x2000, 0x3000]);
        driver.write(VIRTIO_MMIO_QUEUE_NUM, 32);
        assert_eq!(driver.transport.queues[0].size, 64);
        driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
        driver.write(VIRTIO_MMIO_QUEUE_NUM, 32);
        assert_eq!(driver.transport.queues[0].size, 32);
    }

    #[test]
    fn queues_that_are_wrong_put_the_device_in_need_of_reset() {
        let end = MEMORY as u64;
        let good = [0x1000, 0x2000, 0x3000];
        let table = [
            ("size zero", 0, good),
            ("size no power of two", 48, good),
            ("size above the maximum", 128, good),
            ("size beyond 16 bits", 0x1_0040, good),
            ("descriptors misaligned", 64, [0x1008, 0x2000, 0x3000]),
            ("avail misaligned", 64, [0x1000, 0x2001, 0x3000]),
            ("used misaligned", 64, [0x1000, 0x2000, 0x3002]),
            ("descriptors outside", 64, [end, 0x2000, 0x3000]),
            ("avail straddles the end", 64, [0x1000, end - 16, 0x3000]),
            ("used wraps", 64, [0x1000, 0x2000, u64::MAX - 3]),
        ];
        for (name, size, areas) in table {
            let mut driver = Driver::negotiated();
            driver.queue(0, size, areas);
            assert_eq!(driver.status(0xf), 0xf | NEEDS_RESET, "{name}");
            assert!(driver.log.lock().unwrap().activations.is_empty(), "{name}");
            assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 2, "{name}");
            assert_eq!(driver.irqfd.read().unwrap(), 1, "{name}");
            assert_eq!(driver.status(0), 0, "{name}");
        }
    }

    #[test]
    fn queues_at_the_very_end_of_memory_are_fine() {
        let mut driver = Driver::negotiated();
        let end = MEMORY as u64;
        driver.queue(0, 64, [end - 1024, 0x2000, 0x3000]);
        assert_eq!(driver.status(0xf), 0xf);
    }

    #[test]
    fn a_device_that_cannot_start_needs_reset_and_starts_after_one() {
        let mut driver = Driver::negotiated();
        driver.log.lock().unwrap().fail = true;
        assert_eq!(driver.status(0xf), 0xf | NEEDS_RESET);
        assert_eq!(driver.status(0), 0);
        assert_eq!(driver.log.lock().unwrap().resets, 1);
        driver.log.lock().unwrap().fail = false;
        for status in [1, 3] {
            driver.status(status);
        }
        driver.features(VERSION_1);
        driver.status(0xb);
        assert_eq!(driver.status(0xf), 0xf);
    }

    #[test]
    fn reset_stops_the_device_once_and_forgets_everything() {
        let mut driver = Driver::running();
        assert_eq!(driver.status(0), 0);
        driver.status(0);
        assert_eq!(driver.log.lock().unwrap().resets, 1);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
        assert_eq!(driver.transport.driver_features, 0);
        assert_eq!(driver.transport.queues[1].size, 256);
    }

    #[test]
    fn a_device_goes_on_where_it_or_one_of_its_kind_stood() {
        let mut driver = Driver::running();
        // It has used three buffers of the second queue.
        let used_index = GuestAddress(0x6002);
        let memory = driver.transport.memory.memory();
        memory.write_obj(3u16, used_index).unwrap();
        driver.transport.interrupt.signal_config_change();
        driver.irqfd.read().unwrap();
        let state = driver.transport.stand_still();
        assert_eq!(driver.log.lock().unwrap().resets, 1);
        assert_eq!(
            driver.read(VIRTIO_MMIO_STATUS),
            0xf,
            "the driver sees none of it"
        );

        let text = serde_json::to_string(&state).unwrap();
        let state: TransportState = serde_json::from_str(&text).unwrap();
        let mut other = Driver::new();
        other
            .transport
            .memory
            .memory()
            .write_obj(3u16, used_index)
            .unwrap();
        for driver in [&mut driver, &mut other] {
            driver.transport.carry_on(&state).unwrap();
            assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0xf);
            assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
            assert_eq!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), 1);
            assert_eq!(driver.irqfd.read().unwrap(), 1, "it is told to look");
            let mut log = driver.log.lock().unwrap();
            let activation = log.activations.pop().unwrap();
            assert_eq!(activation.features, VERSION_1 | FEATURE);
            let [first, second] = &activation.queues[..] else {
                panic!("two queues");
            };
            assert_eq!((first.queue.next_avail(), first.queue.next_used()), (0, 0));
            assert_eq!(
                (second.queue.next_avail(), second.queue.next_used()),
                (3, 3)
            );
            assert_eq!(second.queue.avail_ring(), 0x5000);
        }
    }

    #[test]
    fn a_device_that_never_ran_stands_still_and_goes_on_without_being_started() {
        let mut driver = Driver::negotiated();
        let state = driver.transport.stand_still();
        driver.transport.carry_on(&state).unwrap();
        let log = driver.log.lock().unwrap();
        assert_eq!((log.activations.len(), log.resets), (0, 0));
        assert!(driver.irqfd.read().is_err());
    }

    #[test]
    fn a_state_that_does_not_fit_the_device_or_its_memory_is_refused() {
        let state = || Driver::running().transport.stand_still();
        let damages: [fn(&mut TransportState); 5] = [
            |state| state.device_type = 1,
            |state| state.queues.truncate(1),
            |state| state.queues[0].max_size = 128,
            |state| state.queues[0].used_ring = MEMORY as u64,
            |state| state.queues[1].size = 3,
        ];
        for (n, damage) in damages.into_iter().enumerate() {
            let mut state = state();
            damage(&mut state);
            let mut driver = Driver::new();
            assert!(driver.transport.carry_on(&state).is_err(), "damage {n}");
            assert!(driver.log.lock().unwrap().activations.is_empty());
        }
        let mut driver = Driver::new();
        driver.log.lock().unwrap().fail = true;
        assert!(driver.transport.carry_on(&state()).is_err());
    }

    #[test]
    fn a_driver_that_fails_must_reset() {
        let mut driver = Driver::running();
        assert_eq!(driver.status(0x8f), 0x8f);
        assert_eq!(driver.status(0x0f), 0x8f);
        assert_eq!(driver.status(0), 0);
    }

    #[test]
    fn interrupts_are_raised_and_acknowledged_bit_by_bit() {
        let mut driver = Driver::running();
        let interrupt = Arc::clone(&driver.transport.interrupt);
        interrupt.signal_used_buffers();
        interrupt.signal_config_change();
        assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
        assert_eq!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), 1);
        driver.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
        assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    }

    #[test]
    fn notifications_that_kvm_did_not_take_reach_the_queue() {
        let mut driver = Driver::running();
        driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
        driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, 2);
        driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, u32::MAX);
        assert!(driver.transport.kicks()[0].read().is_err());
        assert_eq!(driver.transport.kicks()[1].read().unwrap(), 1);
    }

    #[test]
    fn configuration_space_reads_zero_beyond_its_end_and_takes_no_writes() {
        let mut driver = Driver::running();
        for value in [0x1312_1110, 0x1514, 0] {
            let offset = VIRTIO_MMIO_CONFIG;
            driver.write(offset, value);
            assert_eq!(driver.read(offset), 0x1312_1110);
        }
        assert_eq!(driver.read(VIRTIO_MMIO_CONFIG + 4), 0x1514);
        assert_eq!(driver.read(VIRTIO_MMIO_CONFIG + 8), 0);
    }

    #[test]
    fn a_device_shows_in_its_slot_and_an_empty_slot_says_that_it_has_none() {
        let registers = RegisterMemory::new(1).unwrap().slot(0);
        show_empty(&registers);
        assert_eq!(registers.get(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
        assert_eq!(registers.get(VIRTIO_MMIO_VERSION), 2);
        assert_eq!(registers.get(VIRTIO_MMIO_DEVICE_ID), 0);
        assert_eq!(Driver::new().read(VIRTIO_MMIO_DEVICE_ID), 42);
    }

    #[test]
    fn a_driver_that_writes_at_random_finds_no_way_around_the_rules() {
        // A multiplicative generator (Knuth's MMIX): the same sequence each time.
        let mut state = 1u64;
        let mut random = move |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let mut driver = Driver::new();
        let sequence = [0, 1, 3, 0xb, 0xf, 0x8f, u32::MAX];
        let registers = [
            0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0,
            0xa4, 0x100,
        ];
        for _ in 0..200_000 {
            match random(8) {
                0..3 => {
                    driver.status(sequence[random(sequence.len() as u64) as usize]);
                }
                3 => driver.features(VERSION_1 | random(2) << 5),
                4 => {
                    let area = |random: &mut dyn FnMut(u64) -> u64| random(0x120) << 12;
                    let areas = [area(&mut random), area(&mut random), area(&mut random)];
                    driver.queue(random(3) as u32, 1 << random(10), areas);
                }
                _ => {
                    let register = registers[random(registers.len() as u64) as usize];
                    driver.write(register, random(1 << 32) as u32);
                    driver.read(random(0x200) as u32);
                }
            }
        }
        let log = driver.log.lock().unwrap();
        assert!(log.activations.len() > 100 && log.resets > 100);
        assert!(log.activations.len() - log.resets <= 1);
        let memory = driver.transport.memory.memory();
        for activation in &log.activations {
            assert_eq!(activation.features & !(VERSION_1 | FEATURE), 0);
            for ActiveQueue { queue, .. } in &activation.queues {
                let length = 16 * usize::from(queue.size());
                let inside = memory.check_range(GuestAddress(queue.desc_table()), length);
                assert!(!queue.ready() || inside && queue.size() <= queue.max_size());
            }
        }
    }

    #[test]
    fn registers_take_nothing_but_aligned_words() {
        let mut driver = Driver::running();
        for length in [1, 2, 8] {
            driver.transport.write(0x70, &vec![0; length]);
        }
        for register in 0..0x100u64 {
            if register % 4 != 0 {
                driver.transport.write(register, &[0; 4]);
            }
        }
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0xf);
    }
}

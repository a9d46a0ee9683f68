//! The transport as a driver sees it.

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
    assert_eq!(driver.transport.driver.queues[0].desc_table, 0x1000);
    assert_eq!(driver.transport.driver.queues[0].size, 64);
}

#[test]
fn a_ready_queue_can_be_disabled_but_not_changed() {
    let mut driver = Driver::negotiated();
    driver.queue(0, 64, [0x1000, 0x2000, 0x3000]);
    driver.write(VIRTIO_MMIO_QUEUE_NUM, 32);
    assert_eq!(driver.transport.driver.queues[0].size, 64);
    driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
    driver.write(VIRTIO_MMIO_QUEUE_NUM, 32);
    assert_eq!(driver.transport.driver.queues[0].size, 32);
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
    assert_eq!(driver.transport.driver.features, 0);
    assert_eq!(driver.transport.driver.queues[1].size, 256);
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
        |state| state.driver.queues.truncate(1),
        |state| state.driver.queues[0].max_size = 128,
        |state| state.driver.queues[0].used_ring = MEMORY as u64,
        |state| state.driver.queues[1].size = 3,
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
        0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4,
        0x100,
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

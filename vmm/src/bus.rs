//! What a vCPU finds behind I/O ports and MMIO addresses.
//!
//! Called on vCPU threads. What nobody answers reads as all ones and swallows writes, as on a real bus.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use tracing::{debug, info};

use crate::layout;
use crate::serial::SerialPort;
use crate::sync::lock;
use crate::timeline::Timeline;
use crate::virtio::mmio::{self, Transport};
use crate::virtio::{RegisterMemory, SlotRegisters};

/// Accesses to nowhere that are logged, at debug level: a probe or a mistake shows, a hostile guest cannot fill the log.
const MAX_UNKNOWN_LOGGED: u32 = 64;

/// What a write asks of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// Nothing: the guest goes on.
    Continue,
    /// The power button.
    PowerOff,
    /// The reset line.
    Reset,
    /// The agent is prepared: the place for a template.
    Prepared,
}

/// The machine's buses.
pub struct Bus {
    serial: Option<Mutex<SerialPort>>,
    registers: RegisterMemory,
    slots: Vec<Mutex<Option<Transport>>>,
    timeline: Arc<Timeline>,
    unknown_logged: AtomicU32,
}

impl Bus {
    /// Buses with `slots` empty virtio-mmio slots, whose registers the guest reads in `registers`.
    pub fn new(
        slots: usize,
        registers: RegisterMemory,
        serial: Option<SerialPort>,
        timeline: Arc<Timeline>,
    ) -> Self {
        for index in 0..slots {
            mmio::show_empty(&registers.slot(index));
        }
        Self {
            registers,
            serial: serial.map(Mutex::new),
            slots: (0..slots).map(|_| Mutex::new(None)).collect(),
            timeline,
            unknown_logged: AtomicU32::new(0),
        }
    }

    /// The slots.
    pub fn slots(&self) -> &[Mutex<Option<Transport>>] {
        &self.slots
    }

    /// The registers of a slot.
    pub fn registers(&self, slot: usize) -> SlotRegisters {
        self.registers.slot(slot)
    }

    /// Writes out what the serial port holds back.
    pub fn flush(&self) {
        if let Some(serial) = &self.serial {
            lock(serial).flush();
        }
    }

    /// The guest reads a port. A string instruction gives several elements at once.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        match (port, &self.serial) {
            (layout::SERIAL_PORT..=SERIAL_LAST, Some(serial)) => {
                let register = (port - layout::SERIAL_PORT) as u8;
                let mut serial = lock(serial);
                data.fill_with(|| serial.read(register));
            }
            // The status says "input buffer empty", which `reboot=k` waits for before its command. The clock's memory reads zero:
            // with all ones its "update in progress" bit would never fall.
            (
                layout::I8042_DATA_PORT
                | layout::I8042_COMMAND_PORT
                | layout::CMOS_INDEX_PORT
                | layout::CMOS_DATA_PORT,
                _,
            ) => data.fill(0),
            _ => {
                data.fill(0xff);
                self.unknown("read of port", port.into(), data.len());
            }
        }
    }

    /// The guest writes a port.
    pub fn write_port(&self, port: u16, data: &[u8]) -> Outcome {
        let Some(&value) = data.first() else {
            return Outcome::Continue;
        };
        match (port, &self.serial) {
            (layout::POWER_OFF_PORT, _) => return Outcome::PowerOff,
            (layout::I8042_COMMAND_PORT, _) if value == layout::I8042_RESET => {
                return Outcome::Reset;
            }
            (layout::BOOT_MARK_PORT, _) => {
                self.boot_mark(value);
                if value == layout::BOOT_MARK_PREPARED {
                    return Outcome::Prepared;
                }
            }
            (layout::SERIAL_PORT..=SERIAL_LAST, Some(serial)) => {
                let register = (port - layout::SERIAL_PORT) as u8;
                let mut serial = lock(serial);
                for byte in data {
                    serial.write(register, *byte);
                }
            }
            (layout::I8042_DATA_PORT | layout::I8042_COMMAND_PORT, _)
            | (layout::CMOS_INDEX_PORT | layout::CMOS_DATA_PORT, _) => {}
            _ => self.unknown("write to port", port.into(), data.len()),
        }
        Outcome::Continue
    }

    /// The guest reads an MMIO address. Not of a slot's registers: those are memory.
    pub fn read_mmio(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.unknown("read of address", address, data.len());
    }

    /// The guest writes an MMIO address.
    pub fn write_mmio(&self, address: u64, data: &[u8]) {
        let Some((slot, offset)) = self.slot(address) else {
            self.unknown("write to address", address, data.len());
            return;
        };
        if let Some(transport) = &mut *lock(slot) {
            transport.write(offset, data);
        }
    }

    fn slot(&self, address: u64) -> Option<(&Mutex<Option<Transport>>, u64)> {
        let offset = address.checked_sub(layout::VIRTIO_MMIO_BASE)?;
        let slot = self
            .slots
            .get(usize::try_from(offset / layout::VIRTIO_MMIO_SIZE).ok()?)?;
        Some((slot, offset % layout::VIRTIO_MMIO_SIZE))
    }

    fn boot_mark(&self, mark: u8) {
        match mark {
            layout::BOOT_MARK_INIT => self.timeline.mark("init started"),
            layout::BOOT_MARK_PREPARED => self.timeline.mark("agent prepared"),
            layout::BOOT_MARK_READY => {
                let first = self.timeline.mark("agent ready");
                if first {
                    info!("boot timeline: {}", self.timeline.summary());
                }
                first
            }
            other => self.timeline.mark(&format!("guest mark {other}")),
        };
    }

    fn unknown(&self, what: &str, address: u64, length: usize) {
        if self.unknown_logged.load(Ordering::Relaxed) < MAX_UNKNOWN_LOGGED {
            self.unknown_logged.fetch_add(1, Ordering::Relaxed);
            debug!("{what} {address:#x} ({length} bytes), where nothing is");
        }
    }
}

const SERIAL_LAST: u16 = layout::SERIAL_PORT + 7;

#[cfg(test)]
mod tests {
    use super::*;

    fn bus() -> Bus {
        let registers = RegisterMemory::new(2).unwrap();
        Bus::new(2, registers, None, Arc::new(Timeline::new()))
    }

    #[test]
    fn power_and_reset_ports_are_told_apart() {
        let bus = bus();
        assert_eq!(bus.write_port(0x600, &[0]), Outcome::PowerOff);
        assert_eq!(bus.write_port(0x64, &[0xfe]), Outcome::Reset);
        assert_eq!(bus.write_port(0x64, &[0xd1]), Outcome::Continue);
        assert_eq!(bus.write_port(0x600, &[]), Outcome::Continue);
        assert_eq!(bus.write_port(0x601, &[3]), Outcome::Prepared);
    }

    #[test]
    fn boot_marks_land_on_the_timeline_once() {
        let bus = bus();
        for mark in [1, 2, 1, 2, 7] {
            assert_eq!(bus.write_port(0x601, &[mark]), Outcome::Continue);
        }
        let names: Vec<_> = bus.timeline.entries().into_iter().map(|e| e.name).collect();
        assert_eq!(names, ["init started", "agent ready", "guest mark 7"]);
    }

    #[test]
    fn what_nobody_answers_reads_all_ones() {
        let bus = bus();
        let mut data = [0; 4];
        bus.read_port(0xcfc, &mut data);
        assert_eq!(data, [0xff; 4]);
        for address in [0, 0xcfff_ffff, layout::slot_base(2), u64::MAX] {
            let mut data = [0; 4];
            bus.read_mmio(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
            bus.write_mmio(address, &[0; 4]);
        }
    }

    #[test]
    fn the_keyboard_controller_is_ready_for_the_reset_command() {
        let mut status = [0xff];
        bus().read_port(0x64, &mut status);
        assert_eq!(status, [0]);
    }
}

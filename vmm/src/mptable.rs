//! The MP table (Intel MultiProcessor Specification 1.4): how a guest without ACPI learns of its processors, the IO-APIC
//! and which pin each interrupt line has.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout;

/// Version that KVM's local APIC reports.
const LOCAL_APIC_VERSION: u8 = 0x14;
/// Version that KVM's IO-APIC reports.
const IO_APIC_VERSION: u8 = 0x11;
const SPEC_REVISION_1_4: u8 = 4;

/// Entry types (4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// Interrupt types (4.3.4).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// Destination "every local APIC" (4.3.5).
const ALL_LOCAL_APICS: u8 = 0xff;

/// The bytes of floating pointer and table for `vcpus` processors, as they stand at [`layout::MP_TABLE`].
///
/// Interrupt lines that nothing uses are left out: Linux programs a pin for each one that is named, by four exits and more.
///
/// The IO-APIC's id is the first one after the processors'; `vcpus` is at most 32, so each fits its byte, as do the lines, which
/// are the pins of an IO-APIC.
pub fn build(vcpus: u8, lines: &[u32]) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries = Vec::new();
    for cpu in 0..vcpus {
        let flags = CPU_ENABLED | if cpu == 0 { CPU_BOOT } else { 0 };
        entries.extend([PROCESSOR, cpu, LOCAL_APIC_VERSION, flags]);
        // Signature and feature flags: Linux reads CPUID instead.
        entries.extend([0; 16]);
    }
    entries.extend([BUS, 0]);
    entries.extend(b"ISA   ");
    entries.extend([IO_APIC, io_apic_id, IO_APIC_VERSION, 1]);
    entries.extend(layout::IO_APIC.to_le_bytes());
    for line in lines.iter().map(|line| *line as u8) {
        // Flags 0: polarity and trigger as the bus has them, which for ISA is active high and edge, as irqfds pulse.
        entries.extend([IO_INTERRUPT, INT, 0, 0, 0, line, io_apic_id, line]);
    }
    entries.extend([LOCAL_INTERRUPT, EXT_INT, 0, 0, 0, 0, ALL_LOCAL_APICS, 0]);
    entries.extend([LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL_LOCAL_APICS, 1]);
    let count = u16::from(vcpus) + 2 + lines.len() as u16 + 2;

    let pointer_length = 16u32;
    let mut pointer = Vec::from(*b"_MP_");
    pointer.extend((layout::MP_TABLE as u32 + pointer_length).to_le_bytes());
    // Length in units of 16 bytes, revision, checksum, features.
    pointer.extend([1, SPEC_REVISION_1_4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);

    let mut table = Vec::from(*b"PCMP");
    table.extend((44 + entries.len() as u16).to_le_bytes());
    table.extend([SPEC_REVISION_1_4, 0]);
    table.extend(b"BULKHEADMICROVM     ");
    // OEM table pointer and size: none.
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(layout::LOCAL_APIC.to_le_bytes());
    // Extended table length and checksum, reserved.
    table.extend([0; 4]);
    table.extend(entries);
    table[7] = checksum(&table);

    pointer.extend(table);
    pointer
}

/// Writes the table for `vcpus` processors and the interrupt lines of `slots` virtio-mmio slots and, where there is one, the serial port.
pub fn write(
    memory: &GuestMemoryMmap,
    vcpus: u8,
    slots: usize,
    serial: bool,
) -> Result<(), GuestMemoryError> {
    let mut lines: Vec<_> = layout::VIRTIO_IRQS.into_iter().take(slots).collect();
    lines.extend(serial.then_some(layout::SERIAL_IRQ));
    memory.write_slice(&build(vcpus, &lines), GuestAddress(layout::MP_TABLE))
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn pointer_and_table_have_right_lengths_and_checksums_for_every_vcpu_count() {
        let most = [layout::VIRTIO_IRQS.as_slice(), &[layout::SERIAL_IRQ]].concat();
        for vcpus in 1..=32 {
            let bytes = build(vcpus, &most);
            assert!(bytes.len() <= layout::MP_TABLE_MAX, "{vcpus} vCPUs");
            let (pointer, table) = bytes.split_at(16);
            assert_eq!(&pointer[..4], b"_MP_");
            assert_eq!(sum(pointer), 0);
            let address = u32::from_le_bytes(pointer[4..8].try_into().unwrap());
            assert_eq!(u64::from(address), layout::MP_TABLE + 16);
            assert_eq!(&table[..4], b"PCMP");
            assert_eq!(
                usize::from(u16::from_le_bytes([table[4], table[5]])),
                table.len()
            );
            assert_eq!(sum(table), 0);
        }
    }

    #[test]
    fn every_entry_is_counted_and_parses() {
        let bytes = build(3, &[5, 23, 4]);
        let table = &bytes[16..];
        let count = u16::from_le_bytes([table[34], table[35]]);
        let mut rest = &table[44..];
        let mut cpus = Vec::new();
        let mut lines = Vec::new();
        let mut entries = 0;
        while let Some(&kind) = rest.first() {
            let length = if kind == PROCESSOR { 20 } else { 8 };
            match kind {
                PROCESSOR => cpus.push((rest[1], rest[3])),
                IO_INTERRUPT => lines.push((rest[5], rest[6], rest[7])),
                _ => {}
            }
            rest = &rest[length..];
            entries += 1;
        }
        assert_eq!(entries, count);
        assert_eq!(cpus, [(0, 3), (1, 1), (2, 1)]);
        assert_eq!(lines, [(5, 3, 5), (23, 3, 23), (4, 3, 4)]);
    }
}

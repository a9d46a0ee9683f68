//! The guest's physical address map, I/O ports and interrupt lines. Everything that must not overlap is named here.
//!
//! ```text
//! 0x0000_0500            GDT                     \
//! 0x0000_7000            boot_params              | below 640 KiB: what the 64-bit boot protocol needs;
//! 0x0000_9000..c000      page tables              | the kernel is done with it before it uses this memory
//! 0x0002_0000            command line            /
//! 0x0009_fc00..0xa_0000  MP table (hidden from the guest's memory map)
//! 0x0010_0000..          kernel
//! end of low memory      initramfs, just below it
//! 0xd000_0000..          virtio-mmio slots, half a KiB each
//! 0xfec0_0000, 0xfee0_0000  IO-APIC, local APIC (in KVM)
//! 0xfffb_c000..0xfffc_0000  KVM's identity map and TSS (VT-x without unrestricted guest)
//! 0x1_0000_0000..        the rest of memory
//! ```

/// Where the boot GDT lives.
pub const GDT: u64 = 0x500;
/// Where `struct boot_params` (the "zero page") lives.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Level 4 page table for the kernel's first instructions.
pub const PML4: u64 = 0x9000;
/// Level 3 page table.
pub const PDPT: u64 = 0xa000;
/// Level 2 page table: one GiB in pages of 2 MiB.
pub const PAGE_DIRECTORY: u64 = 0xb000;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line with its NUL: x86's `COMMAND_LINE_SIZE`.
pub const CMDLINE_MAX: usize = 2048;
/// End of the conventional memory that the guest may use.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The MP table's floating pointer: Linux looks into the last KiB of conventional memory.
pub const MP_TABLE: u64 = LOW_RAM_END;
/// Room for the MP table.
pub const MP_TABLE_MAX: usize = 0x400;
/// Start of extended memory: the lowest address of a kernel segment.
pub const HIGH_RAM_START: u64 = 0x10_0000;
/// Memory below 4 GiB ends here; the MMIO gap follows.
pub const MMIO_GAP_START: u64 = 0xd000_0000;
/// End of the MMIO gap: memory goes on here.
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;

/// First virtio-mmio slot.
pub const VIRTIO_MMIO_BASE: u64 = MMIO_GAP_START;
/// Size of a virtio-mmio slot: its registers and as much for the device's configuration space.
pub const VIRTIO_MMIO_SIZE: u64 = 0x200;
/// Most virtio-mmio slots: one for each interrupt line of [`VIRTIO_IRQS`].
pub const MAX_SLOTS: usize = VIRTIO_IRQS.len();
/// Interrupt lines of the slots. Left out: 0 (timer), 1 (keyboard), 2 (cascade), [`SERIAL_IRQ`]. Line 3 (the second serial
/// port's, which this machine lacks) comes last.
pub const VIRTIO_IRQS: [u32; 20] = [
    5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 3,
];

/// IO-APIC registers, where KVM puts them.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APIC registers, where KVM puts them.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages for the TSS that VT-x needs without unrestricted guest support.
pub const KVM_TSS: usize = 0xfffb_d000;

/// First port of the debugging serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt line.
pub const SERIAL_IRQ: u32 = 4;
/// Data port of the keyboard controller.
pub const I8042_DATA_PORT: u16 = 0x60;
/// Command and status port of the keyboard controller, by which Linux resets the machine (`reboot=k`).
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// The keyboard controller's command "pulse the reset line".
pub const I8042_RESET: u8 = 0xfe;
/// Index port of the real-time clock's memory.
pub const CMOS_INDEX_PORT: u16 = 0x70;
/// Data port of the real-time clock's memory.
pub const CMOS_DATA_PORT: u16 = 0x71;
/// The power button: a write ends the VM in order. Known to the guest's agent under the same number
/// (`POWER_OFF_PORT` of the `protocol` crate, which the VMM must not depend on).
pub const POWER_OFF_PORT: u16 = 0x600;
/// Boot marks: a written byte goes on the timeline (`BOOT_MARK_PORT` of the `protocol` crate).
pub const BOOT_MARK_PORT: u16 = 0x601;
/// Boot mark of the first instructions of PID 1.
pub const BOOT_MARK_INIT: u8 = 1;
/// Boot mark of an agent that is about to dial the host.
pub const BOOT_MARK_READY: u8 = 2;
/// Boot mark of an agent that has done everything that is the same in every guest: where a template is saved, and where
/// guests made from it begin.
pub const BOOT_MARK_PREPARED: u8 = 3;

/// Physical address of a virtio-mmio slot.
pub const fn slot_base(slot: usize) -> u64 {
    VIRTIO_MMIO_BASE + slot as u64 * VIRTIO_MMIO_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_below_one_mib_do_not_overlap() {
        let areas = [
            (GDT, GDT + 0x100),
            (BOOT_PARAMS, BOOT_PARAMS + 0x1000),
            (PML4, PML4 + 0x1000),
            (PDPT, PDPT + 0x1000),
            (PAGE_DIRECTORY, PAGE_DIRECTORY + 0x1000),
            (CMDLINE, CMDLINE + CMDLINE_MAX as u64),
            (MP_TABLE, MP_TABLE + MP_TABLE_MAX as u64),
            (HIGH_RAM_START, HIGH_RAM_START + 1),
        ];
        for pair in areas.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }

    #[test]
    fn slots_end_below_the_io_apic() {
        assert!(slot_base(MAX_SLOTS) <= u64::from(IO_APIC));
    }

    #[test]
    fn each_slot_has_a_line_of_its_own_on_the_io_apic() {
        let mut lines = VIRTIO_IRQS.to_vec();
        lines.sort_unstable();
        lines.dedup();
        assert_eq!(lines.len(), MAX_SLOTS);
        assert!(!lines.contains(&SERIAL_IRQ));
        assert!(lines.iter().all(|line| *line > 2 && *line < 24));
    }
}

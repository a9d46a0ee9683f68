//! The 64-bit boot protocol: boot parameters, memory map, page tables and descriptors for the kernel's first instructions.
//!
//! Documentation/x86/boot.rst, "64-bit Boot Protocol": long mode with paging on and the needed memory mapped one to one, the code
//! segment at selector 0x10, the data segment at 0x18, `rsi` pointing to `struct boot_params`.

use std::ffi::CStr;
use std::ops::Range;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout;
use crate::memory;

/// `boot_params.hdr.boot_flag`.
const BOOT_FLAG: u16 = 0xaa55;
/// `boot_params.hdr.header`: "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Boot protocol 2.15.
const PROTOCOL_VERSION: u16 = 0x20f;
/// `type_of_loader`: none of the registered ones.
const LOADER_UNDEFINED: u8 = 0xff;
/// E820 type of usable memory.
const E820_RAM: u32 = 1;

const PTE_PRESENT_WRITABLE: u64 = 0x3;
const PTE_HUGE: u64 = 0x80;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Writes the command line and `struct boot_params`.
///
/// `cmdline` is at most [`layout::CMDLINE_MAX`] bytes with its NUL (see [`crate::cmdline`]).
pub fn write_boot_params(
    memory: &GuestMemoryMmap,
    memory_bytes: u64,
    cmdline: &CStr,
    initramfs: &Range<u64>,
) -> Result<(), GuestMemoryError> {
    let cmdline = cmdline.to_bytes_with_nul();
    memory.write_slice(cmdline, GuestAddress(layout::CMDLINE))?;

    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.version = PROTOCOL_VERSION;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;
    // The initramfs lies in low memory: both values fit.
    params.hdr.ramdisk_image = initramfs.start as u32;
    params.hdr.ramdisk_size = (initramfs.end - initramfs.start) as u32;
    let map = memory_map(memory_bytes);
    params.e820_entries = map.len() as u8;
    params.e820_table[..map.len()].copy_from_slice(&map);
    memory.write_slice(params.as_slice(), GuestAddress(layout::BOOT_PARAMS))
}

/// The usable memory as the guest is told. What lies between [`layout::LOW_RAM_END`] and 1 MiB is left out: firmware's place.
fn memory_map(memory_bytes: u64) -> Vec<boot_e820_entry> {
    let ram = |start, end| boot_e820_entry {
        addr: start,
        size: end - start,
        type_: E820_RAM,
    };
    let pieces = memory::pieces(memory_bytes);
    let mut map = vec![
        ram(0, layout::LOW_RAM_END),
        ram(layout::HIGH_RAM_START, pieces[0].1),
    ];
    map.extend(
        pieces[1..]
            .iter()
            .map(|&(start, length)| ram(start, start + length)),
    );
    map
}

/// Writes page tables that map the first GiB one to one in pages of 2 MiB.
pub fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_obj(
        layout::PDPT | PTE_PRESENT_WRITABLE,
        GuestAddress(layout::PML4),
    )?;
    memory.write_obj(
        layout::PAGE_DIRECTORY | PTE_PRESENT_WRITABLE,
        GuestAddress(layout::PDPT),
    )?;
    let mut directory = [0u8; 4096];
    for (index, entry) in directory.chunks_exact_mut(8).enumerate() {
        let value = (index as u64) << 21 | PTE_PRESENT_WRITABLE | PTE_HUGE;
        entry.copy_from_slice(&value.to_le_bytes());
    }
    memory.write_slice(&directory, GuestAddress(layout::PAGE_DIRECTORY))
}

/// Writes the GDT that [`set_long_mode`] points to.
pub fn write_gdt(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let table: [u64; 4] = [
        0,
        0,
        descriptor(&code_segment()),
        descriptor(&data_segment()),
    ];
    for (index, entry) in table.iter().enumerate() {
        memory.write_obj(*entry, GuestAddress(layout::GDT + 8 * index as u64))?;
    }
    Ok(())
}

/// Puts the boot vCPU's system registers into 64-bit mode on the tables above.
pub fn set_long_mode(sregs: &mut kvm_sregs) {
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.cs = code_segment();
    let data = data_segment();
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    // VT-x refuses to enter 64-bit mode without a busy TSS.
    sregs.tr.type_ = 11;
    sregs.tr.limit = 0xffff;
    sregs.cr3 = layout::PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
}

/// General registers at the kernel's entry.
pub fn entry_registers(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsi: layout::BOOT_PARAMS,
        // Below the boot parameters; the kernel brings a stack of its own.
        rsp: layout::BOOT_PARAMS,
        // Bit 1 is always set; interrupts are off.
        rflags: 2,
        ..Default::default()
    }
}

fn code_segment() -> kvm_segment {
    kvm_segment {
        selector: CODE_SELECTOR,
        // Execute, read, accessed.
        type_: 11,
        l: 1,
        ..flat_segment()
    }
}

fn data_segment() -> kvm_segment {
    kvm_segment {
        selector: DATA_SELECTOR,
        // Read, write, accessed.
        type_: 3,
        db: 1,
        ..flat_segment()
    }
}

fn flat_segment() -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// The GDT entry (Intel SDM vol. 3, 3.4.5) of a segment with base 0.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(segment.limit >> 12);
    (limit & 0xffff)
        | u64::from(segment.type_) << 40
        | u64::from(segment.s) << 44
        | u64::from(segment.present) << 47
        | (limit >> 16 & 0xf) << 48
        | u64::from(segment.l) << 53
        | u64::from(segment.db) << 54
        | u64::from(segment.g) << 55
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_have_the_well_known_values() {
        assert_eq!(descriptor(&code_segment()), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data_segment()), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn the_memory_map_hides_firmware_and_mmio() {
        let map: Vec<_> = memory_map(5 << 30)
            .iter()
            .map(|e| ({ e.addr }, { e.size }))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00),
                (0x10_0000, 0xd000_0000 - 0x10_0000),
                (1 << 32, (5 << 30) - 0xd000_0000),
            ]
        );
    }

    #[test]
    fn boot_params_name_cmdline_and_initramfs() {
        let memory = memory::create(64).unwrap();
        write_boot_params(&memory, 64 << 20, c"quiet", &(0x3f0_0000..0x3f0_1000)).unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(layout::BOOT_PARAMS)).unwrap();
        assert_eq!({ params.hdr.ramdisk_image }, 0x3f0_0000);
        assert_eq!({ params.hdr.ramdisk_size }, 0x1000);
        assert_eq!(params.e820_entries, 2);
        let mut text = [0; 6];
        memory
            .read_slice(&mut text, GuestAddress(u64::from(params.hdr.cmd_line_ptr)))
            .unwrap();
        assert_eq!(&text, b"quiet\0");
    }

    #[test]
    fn page_tables_map_the_first_gib_one_to_one() {
        let memory = memory::create(64).unwrap();
        write_page_tables(&memory).unwrap();
        let last: u64 = memory
            .read_obj(GuestAddress(layout::PAGE_DIRECTORY + 511 * 8))
            .unwrap();
        assert_eq!(last, ((1 << 30) - (2 << 20)) | 0x83);
    }
}

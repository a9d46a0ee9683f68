//! Guests of a few instructions, without Linux: what both test programs need.
//!
//! They run on any /dev/kvm, even on one that interprets kernel code and can't boot Linux. Without /dev/kvm they fail.

#![allow(dead_code, clippy::unwrap_used)]

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use bulkhead_vmm::control::BootConfig;
use bulkhead_vmm::machine::BootFiles;
use tempfile::TempDir;

/// Where the guest's code is loaded.
pub const CODE: u32 = 16 << 20;
/// Writes a byte to the power button.
pub const POWER_OFF: [u8; 7] = [0x66, 0xba, 0x00, 0x06, 0xb0, 0x00, 0xee];
/// Pulses the reset line by the keyboard controller.
pub const RESET: [u8; 4] = [0xb0, 0xfe, 0xe6, 0x64];

/// `/dev/kvm`, opened.
pub fn kvm() -> OwnedFd {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .expect("this test needs /dev/kvm")
        .into()
}

/// An ELF kernel of this code, which runs in 64-bit mode at [`CODE`].
pub fn kernel(code: &[u8]) -> OwnedFd {
    let mut elf = Vec::from(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend(2u16.to_le_bytes()); // executable
    elf.extend(62u16.to_le_bytes()); // x86-64
    elf.extend(1u32.to_le_bytes());
    elf.extend(u64::from(CODE).to_le_bytes()); // entry
    elf.extend(64u64.to_le_bytes()); // program headers
    elf.extend([0; 12]); // section headers, flags
    elf.extend([64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]); // sizes and counts
    elf.extend(1u32.to_le_bytes()); // load
    elf.extend(7u32.to_le_bytes());
    elf.extend(120u64.to_le_bytes()); // offset
    elf.extend(u64::from(CODE).to_le_bytes());
    elf.extend(u64::from(CODE).to_le_bytes());
    elf.extend((code.len() as u64).to_le_bytes());
    elf.extend((code.len() as u64).to_le_bytes());
    elf.extend(4096u64.to_le_bytes());
    elf.extend(code);
    file(&elf)
}

/// A file with these bytes.
pub fn file(bytes: &[u8]) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.into()
}

/// Descriptors of a machine that runs this code.
pub fn files(code: &[u8]) -> BootFiles {
    BootFiles {
        kvm: kvm(),
        kernel: kernel(code),
        initramfs: file(b"initramfs"),
        serial: None,
        template: None,
    }
}

/// A small machine whose sockets are in `folder`.
pub fn config(folder: &TempDir) -> BootConfig {
    BootConfig {
        vcpus: 1,
        memory_mib: 64,
        cmdline: String::new(),
        vsock_path: folder.path().join("vsock"),
        share: None,
        spare_slots: 1,
        serial: false,
        save_template: false,
    }
}

/// Code that counts up the 32-bit word at `address` for ever.
pub fn count_at(address: u32) -> Vec<u8> {
    let mut code = vec![0xbf]; // mov edi, address
    code.extend(address.to_le_bytes());
    code.extend([0xff, 0x07, 0xeb, 0xfc]); // inc dword [rdi]; jmp -4
    code
}

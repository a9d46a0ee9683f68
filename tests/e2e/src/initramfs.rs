//! Initramfs images with a program of the tests as PID 1, for tests of the machine without agent or containers.

use std::io::Write;

/// Makes an uncompressed newc archive (kernel: Documentation/driver-api/early-userspace/buffer-format.rst) with the
/// given program as `/init` and the folders it needs.
///
/// # Panics
/// Never with programs below 4 GiB, the format's limit.
pub fn with_init(program: &[u8]) -> Vec<u8> {
    let mut archive = Vec::with_capacity(program.len() + 4096);
    for folder in ["dev", "proc", "sys"] {
        entry(&mut archive, folder, 0o040_755, &[], (0, 0));
    }
    // The kernel opens /dev/console for PID 1 before anything is mounted.
    entry(&mut archive, "dev/console", 0o020_600, &[], (5, 1));
    entry(&mut archive, "init", 0o100_755, program, (0, 0));
    entry(&mut archive, "TRAILER!!!", 0, &[], (0, 0));
    archive
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, data: &[u8], (major, minor): (u32, u32)) {
    let size = u32::try_from(data.len()).unwrap();
    let name_size = u32::try_from(name.len() + 1).unwrap();
    // magic, then ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    let fields = [0, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0];
    archive.extend_from_slice(b"070701");
    for field in fields {
        write!(archive, "{field:08x}").unwrap();
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(data);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

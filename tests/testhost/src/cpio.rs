//! Writes the initramfs: a cpio archive in "newc" form (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).

/// An archive under construction.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    next_inode: u32,
}

impl Archive {
    /// Adds a folder; its parents must have been added before.
    pub fn folder(&mut self, path: &str) {
        self.entry(path, libc::S_IFDIR | 0o755, (0, 0), &[]);
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.entry(path, libc::S_IFREG | mode, (0, 0), data);
    }

    /// Adds a character device.
    pub fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.entry(path, libc::S_IFCHR | mode, (major, minor), &[]);
    }

    /// Ends the archive and returns its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.next_inode += 1;
        let links = if mode & libc::S_IFMT == libc::S_IFDIR {
            2
        } else {
            1
        };
        let fields = [
            self.next_inode,
            mode,
            0, // uid
            0, // gid
            links,
            0, // mtime
            data.len() as u32,
            0, // device of the file system, major
            0, // and minor
            device.0,
            device.1,
            path.len() as u32 + 1,
            0, // checksum, unused in newc
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_data_are_aligned_to_four_bytes() {
        let mut archive = Archive::default();
        archive.folder("dev");
        archive.file("a", 0o755, b"12345");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(bytes.windows(6).filter(|w| w == b"070701").count(), 3);
        let data = bytes.windows(5).position(|w| w == b"12345").unwrap();
        assert_eq!(data % 4, 0);
    }
}

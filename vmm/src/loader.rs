//! Puts the kernel (an uncompressed ELF `vmlinux`) and the initramfs into guest memory.
//!
//! Every offset and address of the ELF file is checked here against the file's size and the guest's memory, before
//! `linux-loader` reads the segments straight from the file into guest memory. The kernel is entered by the 64-bit boot protocol
//! at its ELF entry point: next to PVH it saves the guest the way from 32-bit mode, and needs no note.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryMmap, ReadVolatile, VolatileMemoryError,
    VolatileSlice,
};

use crate::layout;
use crate::memory;

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const ELF_CLASS_64: u8 = 2;
const ELF_LITTLE_ENDIAN: u8 = 1;
const ELF_EXECUTABLE: u16 = 2;
const ELF_MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
/// Most program headers read. A kernel has five.
const MAX_SEGMENTS: u16 = 64;
const PAGE: u64 = 4096;

/// Why a kernel or an initramfs could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The kernel is not an ELF file for this machine.
    #[error("the kernel is not an uncompressed x86-64 ELF executable (vmlinux)")]
    NotElf,
    /// The kernel's headers contradict the file or themselves.
    #[error("the kernel's ELF headers are broken: {0}")]
    Broken(&'static str),
    /// The kernel does not fit into memory.
    #[error(
        "the kernel's segment at {start:#x}..{end:#x} does not fit into guest memory, which ends at {limit:#x}"
    )]
    KernelTooLarge {
        /// First address of the segment.
        start: u64,
        /// Address after its last one.
        end: u64,
        /// End of low memory.
        limit: u64,
    },
    /// Reading a file failed.
    #[error("cannot read the {0}")]
    Read(&'static str, #[source] io::Error),
    /// linux-loader failed.
    #[error("cannot load the kernel")]
    Load(#[source] linux_loader::loader::Error),
    /// The initramfs does not fit.
    #[error(
        "the initramfs of {size} bytes does not fit between the kernel's end at {kernel_end:#x} and the end of low memory at {limit:#x}"
    )]
    InitramfsTooLarge {
        /// Its size.
        size: u64,
        /// End of the kernel.
        kernel_end: u64,
        /// End of low memory.
        limit: u64,
    },
    /// Writing guest memory failed.
    #[error("cannot write the initramfs to guest memory")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// A loaded kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// Entry point (physical address) of the 64-bit boot protocol.
    pub entry: u64,
    /// Its lowest address.
    pub start: u64,
    /// First address after the kernel, its bss included.
    pub end: u64,
}

/// Loads the kernel. `memory_bytes` is the guest's whole memory.
pub fn load_kernel(
    file: &File,
    memory: &GuestMemoryMmap,
    memory_bytes: u64,
) -> Result<Kernel, LoadError> {
    let kernel = check_kernel(file, low_memory_end(memory_bytes))?;
    memory::prefer_huge_pages(memory, kernel.start..kernel.end);
    let start = Some(GuestAddress(layout::HIGH_RAM_START));
    Elf::load(memory, None, &mut Positioned::new(file), start).map_err(LoadError::Load)?;
    Ok(kernel)
}

/// Loads the initramfs at the end of low memory. Returns where it is.
pub fn load_initramfs(
    file: &File,
    memory: &GuestMemoryMmap,
    memory_bytes: u64,
    kernel_end: u64,
) -> Result<Range<u64>, LoadError> {
    let size = file_size(file, "initramfs")?;
    let limit = low_memory_end(memory_bytes);
    let too_large = || LoadError::InitramfsTooLarge {
        size,
        kernel_end,
        limit,
    };
    let start = limit.checked_sub(size).ok_or_else(too_large)? / PAGE * PAGE;
    if start < kernel_end {
        return Err(too_large());
    }
    memory
        .read_exact_volatile_from(
            GuestAddress(start),
            &mut Positioned::new(file),
            size as usize,
        )
        .map_err(LoadError::Write)?;
    Ok(start..start + size)
}

/// A file read at a position of its own. The descriptor's offset belongs to all who have the open file: a server that starts
/// several VMMs may give each of them the same one.
struct Positioned<'a> {
    file: &'a File,
    position: u64,
}

impl<'a> Positioned<'a> {
    fn new(file: &'a File) -> Self {
        Self { file, position: 0 }
    }
}

impl Read for Positioned<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for Positioned<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.file.metadata()?.len().checked_add_signed(by),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

impl ReadVolatile for Positioned<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let guard = buffer.ptr_guard_mut();
        let offset = libc::off_t::try_from(self.position)
            .map_err(|_| VolatileMemoryError::IOError(io::ErrorKind::InvalidInput.into()))?;
        // SAFETY: `guard` stands for `buffer.len()` writable bytes of guest memory, which nothing else holds a reference to.
        let count = unsafe {
            libc::pread(
                self.file.as_raw_fd(),
                guard.as_ptr().cast(),
                buffer.len(),
                offset,
            )
        };
        if count < 0 {
            return Err(VolatileMemoryError::IOError(io::Error::last_os_error()));
        }
        buffer.bitmap().mark_dirty(0, count as usize);
        self.position += count as u64;
        Ok(count as usize)
    }
}

/// Checks every header that loading relies on.
fn check_kernel(file: &File, limit: u64) -> Result<Kernel, LoadError> {
    let size = file_size(file, "kernel")?;
    let mut header = Elf64_Ehdr::default();
    if size < size_of::<Elf64_Ehdr>() as u64 {
        return Err(LoadError::NotElf);
    }
    file.read_exact_at(header.as_mut_slice(), 0)
        .map_err(|e| LoadError::Read("kernel", e))?;
    if header.e_ident[..4] != ELF_MAGIC
        || header.e_ident[4] != ELF_CLASS_64
        || header.e_ident[5] != ELF_LITTLE_ENDIAN
        || header.e_machine != ELF_MACHINE_X86_64
        || header.e_type != ELF_EXECUTABLE
    {
        return Err(LoadError::NotElf);
    }
    let phdr_size = size_of::<Elf64_Phdr>() as u64;
    if u64::from(header.e_phentsize) != phdr_size {
        return Err(LoadError::Broken("wrong size of a program header"));
    }
    if header.e_phnum == 0 || header.e_phnum > MAX_SEGMENTS {
        return Err(LoadError::Broken("no or too many program headers"));
    }
    if !within(header.e_phoff, u64::from(header.e_phnum) * phdr_size, size) {
        return Err(LoadError::Broken(
            "the program headers lie outside of the file",
        ));
    }

    let mut lowest = u64::MAX;
    let mut end = 0;
    let mut entry_is_loaded = false;
    for index in 0..u64::from(header.e_phnum) {
        let mut segment = Elf64_Phdr::default();
        file.read_exact_at(segment.as_mut_slice(), header.e_phoff + index * phdr_size)
            .map_err(|e| LoadError::Read("kernel", e))?;
        if !matches!(segment.p_type, SEGMENT_LOAD | SEGMENT_NOTE) {
            continue;
        }
        if !within(segment.p_offset, segment.p_filesz, size) {
            return Err(LoadError::Broken("a segment lies outside of the file"));
        }
        if segment.p_type == SEGMENT_NOTE {
            continue;
        }
        if segment.p_filesz > segment.p_memsz {
            return Err(LoadError::Broken(
                "a segment is larger in the file than in memory",
            ));
        }
        if segment.p_memsz == 0 {
            continue;
        }
        let start = segment.p_paddr;
        if start < layout::HIGH_RAM_START {
            return Err(LoadError::Broken("a segment starts below 1 MiB"));
        }
        if !within(start, segment.p_memsz, limit) {
            return Err(LoadError::KernelTooLarge {
                start,
                end: start.saturating_add(segment.p_memsz),
                limit,
            });
        }
        lowest = lowest.min(start);
        end = end.max(start + segment.p_memsz);
        entry_is_loaded |= (start..start + segment.p_filesz).contains(&header.e_entry);
    }
    if !entry_is_loaded {
        return Err(LoadError::Broken("the entry point is in no segment"));
    }
    Ok(Kernel {
        entry: header.e_entry,
        start: lowest,
        end,
    })
}

fn low_memory_end(memory_bytes: u64) -> u64 {
    memory::pieces(memory_bytes)[0].1
}

fn file_size(file: &File, what: &'static str) -> Result<u64, LoadError> {
    Ok(file.metadata().map_err(|e| LoadError::Read(what, e))?.len())
}

/// Whether `start..start + length` ends at `limit` or before.
fn within(start: u64, length: u64, limit: u64) -> bool {
    start.checked_add(length).is_some_and(|end| end <= limit)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const MEMORY: u64 = 64 << 20;
    const TEXT: u64 = 16 << 20;

    /// An ELF file with one segment of four bytes.
    fn elf(change: impl FnOnce(&mut Elf64_Ehdr, &mut Elf64_Phdr)) -> File {
        let mut header = Elf64_Ehdr {
            e_type: ELF_EXECUTABLE,
            e_machine: ELF_MACHINE_X86_64,
            e_entry: TEXT,
            e_phoff: 64,
            e_phentsize: 56,
            e_phnum: 1,
            ..Default::default()
        };
        header.e_ident[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let mut segment = Elf64_Phdr {
            p_type: SEGMENT_LOAD,
            p_offset: 120,
            p_paddr: TEXT,
            p_filesz: 4,
            p_memsz: 8192,
            ..Default::default()
        };
        change(&mut header, &mut segment);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(header.as_slice()).unwrap();
        file.write_all(segment.as_slice()).unwrap();
        file.write_all(b"text").unwrap();
        file
    }

    #[test]
    fn a_kernel_is_loaded_where_its_headers_say() {
        let memory = memory::create(64).unwrap();
        let kernel = load_kernel(&elf(|_, _| ()), &memory, MEMORY).unwrap();
        assert_eq!(
            kernel,
            Kernel {
                entry: TEXT,
                start: TEXT,
                end: TEXT + 8192
            }
        );
        let mut text = [0; 5];
        memory.read_slice(&mut text, GuestAddress(TEXT)).unwrap();
        assert_eq!(&text, b"text\0");
    }

    #[test]
    fn broken_headers_are_refused() {
        type Change = fn(&mut Elf64_Ehdr, &mut Elf64_Phdr);
        let table: [(&str, Change); 15] = [
            ("magic", |h, _| h.e_ident[0] = 0),
            ("32 bit", |h, _| h.e_ident[4] = 1),
            ("machine", |h, _| h.e_machine = 183),
            ("shared object", |h, _| h.e_type = 3),
            ("header size", |h, _| h.e_phentsize = 32),
            ("no headers", |h, _| h.e_phnum = 0),
            ("too many headers", |h, _| h.e_phnum = u16::MAX),
            ("headers beyond the file", |h, _| h.e_phoff = u64::MAX - 10),
            ("entry outside", |h, _| h.e_entry = TEXT + 4),
            ("segment beyond the file", |_, s| s.p_filesz = 5),
            ("offset wraps", |_, s| s.p_offset = u64::MAX),
            ("file size above memory size", |_, s| s.p_memsz = 3),
            ("segment below 1 MiB", |_, s| s.p_paddr = 0xf_f000),
            ("segment beyond memory", |_, s| s.p_paddr = MEMORY - 4096),
            ("segment wraps", |_, s| s.p_memsz = u64::MAX),
        ];
        let memory = memory::create(64).unwrap();
        for (name, change) in table {
            assert!(
                load_kernel(&elf(change), &memory, MEMORY).is_err(),
                "{name}"
            );
        }
    }

    #[test]
    fn a_note_outside_of_the_file_is_refused() {
        let file = elf(|_, s| {
            s.p_type = SEGMENT_NOTE;
            s.p_offset = u64::MAX - 2;
        });
        let memory = memory::create(64).unwrap();
        assert!(matches!(
            load_kernel(&file, &memory, MEMORY),
            Err(LoadError::Broken("a segment lies outside of the file"))
        ));
    }

    #[test]
    fn files_that_are_not_elf_are_refused() {
        let memory = memory::create(64).unwrap();
        for content in [&b""[..], b"\x7fELF", &[0; 4096]] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(content).unwrap();
            assert!(matches!(
                load_kernel(&file, &memory, MEMORY),
                Err(LoadError::NotElf)
            ));
        }
    }

    #[test]
    fn the_initramfs_lies_at_the_end_of_low_memory() {
        let memory = memory::create(64).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let range = load_initramfs(&file, &memory, MEMORY, TEXT).unwrap();
        assert_eq!(range, MEMORY - 8192..MEMORY - 8192 + 5000);
        let last: u8 = memory.read_obj(GuestAddress(range.end - 1)).unwrap();
        assert_eq!(last, 7);
    }

    #[test]
    fn an_initramfs_that_meets_the_kernel_is_refused() {
        let memory = memory::create(64).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(5000).unwrap();
        assert!(matches!(
            load_initramfs(&file, &memory, MEMORY, MEMORY - 4096),
            Err(LoadError::InitramfsTooLarge { .. })
        ));
        file.set_len(MEMORY + 1).unwrap();
        assert!(matches!(
            load_initramfs(&file, &memory, MEMORY, TEXT),
            Err(LoadError::InitramfsTooLarge { .. })
        ));
    }
}

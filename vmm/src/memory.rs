//! Guest memory: lazily touched, in one piece below the MMIO gap and a second one above 4 GiB; empty, or a private copy of a template's.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::layout;

/// Smallest guest memory, in MiB: kernel, initramfs and a little work.
pub const MIN_MIB: u64 = 64;
/// Largest guest memory, in MiB (4 TiB): keeps every address far below the smallest physical address width of 64-bit hosts.
pub const MAX_MIB: u64 = 4 << 20;

/// Size of a huge page. Guest and host addresses agree modulo this size, so that KVM can map what the host backs by a huge page
/// as one.
const HUGE_PAGE: usize = 2 << 20;

/// Why guest memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Size out of range.
    #[error("memory_mib is {0}, and must be between {MIN_MIB} and {MAX_MIB}")]
    Size(u64),
    /// mmap failed.
    #[error("cannot map {mib} MiB of guest memory")]
    Map {
        /// Size of the piece.
        mib: u64,
        /// Cause.
        #[source]
        source: MmapRegionError,
    },
    /// vm-memory refused the regions.
    #[error("guest memory regions do not fit together")]
    Regions(#[source] vm_memory::GuestRegionCollectionError),
    /// KVM refused a region.
    #[error("KVM refused the memory slot at {address:#x}")]
    Slot {
        /// Guest physical address.
        address: u64,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// The (address, length) pieces of a memory of `bytes`.
pub fn pieces(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(layout::MMIO_GAP_START);
    let mut pieces = vec![(0, low)];
    if bytes > low {
        pieces.push((layout::MMIO_GAP_END, bytes - low));
    }
    pieces
}

/// Maps the memory of a guest with `mib` MiB.
pub fn create(mib: u64) -> Result<GuestMemoryMmap, MemoryError> {
    map(mib, None)
}

/// Maps the memory of a guest with `mib` MiB that has, piece after piece, the contents of `file`, which is as long at least and stays
/// as it is. Its pages are the file's until they are written to; where the file has holes, memory is as in any guest.
pub fn restore(mib: u64, file: &File) -> Result<GuestMemoryMmap, MemoryError> {
    map(mib, Some(file))
}

fn map(mib: u64, file: Option<&File>) -> Result<GuestMemoryMmap, MemoryError> {
    if !(MIN_MIB..=MAX_MIB).contains(&mib) {
        return Err(MemoryError::Size(mib));
    }
    let mut regions = Vec::new();
    let mut offset = 0;
    for (address, length) in pieces(mib << 20) {
        let map_error = |source| MemoryError::Map {
            mib: length >> 20,
            source,
        };
        let backing = file.map(|file| (file, offset));
        let mapping = map_aligned(length as usize, backing).map_err(map_error)?;
        offset += length;
        // `new` refuses only a region that wraps around the address space; MAX_MIB rules that out.
        regions.extend(GuestRegionMmap::new(mapping, GuestAddress(address)));
    }
    GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Regions)
}

/// Maps private memory at a multiple of [`HUGE_PAGE`], for as long as the process lives: anonymous, or a file's from an offset on.
fn map_aligned(
    length: usize,
    backing: Option<(&File, u64)>,
) -> Result<MmapRegion, MmapRegionError> {
    let reserve = |length| {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            Err(MmapRegionError::Mmap(io::Error::last_os_error()))
        } else {
            Ok(start.cast::<u8>())
        }
    };
    let start = reserve(length + HUGE_PAGE)?;
    let before = start.align_offset(HUGE_PAGE);
    let aligned = start.wrapping_add(before);
    // SAFETY: both ranges are parts of the mapping made above that nothing uses.
    unsafe {
        libc::munmap(start.cast(), before);
        libc::munmap(aligned.wrapping_add(length).cast(), HUGE_PAGE - before);
    }
    if let Some((file, offset)) = backing {
        let range = offset..offset + length as u64;
        for data in data_of(file, range).map_err(MmapRegionError::Mmap)? {
            let start = aligned.wrapping_add((data.start - offset) as usize);
            let length = (data.end - data.start) as usize;
            let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let (fd, offset) = (file.as_raw_fd(), data.start as libc::off_t);
            // SAFETY: the range is a part of what remains of the mapping made above, which nothing uses yet.
            let mapped = unsafe { libc::mmap(start.cast(), length, protection, flags, fd, offset) };
            if mapped == libc::MAP_FAILED {
                return Err(MmapRegionError::Mmap(io::Error::last_os_error()));
            }
        }
    }
    // Guest memory is the guest's secret and no help in a core dump of the VMM. A kernel without the advice only dumps more.
    // SAFETY: the range is what remains of the mapping; the advice changes nothing of its contents.
    unsafe { libc::madvise(aligned.cast(), length, libc::MADV_DONTDUMP) };
    // SAFETY: the range is mapped, and never unmapped.
    unsafe { MmapRegionBuilder::new(length).with_raw_mmap_pointer(aligned) }
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .build()
}

/// Where a file has data within `range`, in whole huge pages: few mappings, and huge pages can back all between them.
fn data_of(file: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let huge = HUGE_PAGE as u64;
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let start = match lseek(file, at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            // No more data.
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        if start >= range.end {
            break;
        }
        // The end of the file is a hole too.
        let end = lseek(file, start as i64, Whence::SeekHole)? as u64;
        let start = start - (start - range.start) % huge;
        let end = range.end.min(end + range.start.wrapping_sub(end) % huge);
        match found.last_mut() {
            Some(last) if start <= last.end => last.end = end,
            _ => found.push(start..end),
        }
        at = end;
    }
    Ok(found)
}

/// Asks for huge pages for the whole ones within `range`, which the caller is about to fill anyway. Elsewhere the host's policy decides:
/// huge pages make a busy guest faster and an idle one larger.
pub fn prefer_huge_pages(memory: &GuestMemoryMmap, range: Range<u64>) {
    let page = HUGE_PAGE as u64;
    let start = range.start.next_multiple_of(page);
    let length = (range.end / page * page).saturating_sub(start) as usize;
    if let Ok(slice) = memory.get_slice(GuestAddress(start), length) {
        let guard = slice.ptr_guard_mut();
        // A kernel without huge pages refuses, and nothing is lost.
        // SAFETY: the slice is mapped memory; the advice changes nothing of its contents.
        unsafe { libc::madvise(guard.as_ptr().cast(), length, libc::MADV_HUGEPAGE) };
    }
}

/// Gives the memory to a VM, one slot a region.
pub fn register(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), MemoryError> {
    for (slot, region) in memory.iter().enumerate() {
        let address = region.start_addr().raw_value();
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: address,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped, and stays so as long as the machine, which owns both the VM and the memory.
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(|source| MemoryError::Slot { address, source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_leaves_the_mmio_gap_free() {
        assert_eq!(pieces(128 << 20), [(0, 128 << 20)]);
        assert_eq!(pieces(0xd000_0000), [(0, 0xd000_0000)]);
        assert_eq!(
            pieces(8 << 30),
            [(0, 0xd000_0000), (4 << 30, (8 << 30) - 0xd000_0000)]
        );
    }

    #[test]
    fn data_is_found_in_whole_huge_pages() {
        use std::os::unix::fs::FileExt;

        let mib = 1 << 20;
        let file = tempfile::tempfile().unwrap();
        file.set_len(20 * mib).unwrap();
        for offset in [5 * mib, 6 * mib - 1, 12 * mib + 4096, 17 * mib] {
            file.write_all_at(b"x", offset).unwrap();
        }
        let found = |start: u64, end: u64| {
            let found = data_of(&file, start..end).unwrap();
            found
                .iter()
                .map(|data| (data.start, data.end))
                .collect::<Vec<_>>()
        };
        let all = [(4, 6), (12, 14), (16, 18)].map(|(start, end)| (start * mib, end * mib));
        assert_eq!(found(0, 20 * mib), all);
        // Counted from the start of the piece.
        assert_eq!(found(5 * mib, 11 * mib), [(5 * mib, 7 * mib)]);
        let part = (16 * mib + 4096, 17 * mib + 1);
        assert_eq!(found(part.0, part.1), [part]);
        assert!(found(18 * mib, 20 * mib).is_empty());
    }

    #[test]
    fn a_private_copy_has_the_files_contents_and_does_not_change_them() {
        use std::os::unix::fs::FileExt;
        use vm_memory::Bytes;

        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"kernel", 16 << 20).unwrap();
        let read = |memory: &GuestMemoryMmap, address| {
            memory.read_obj::<[u8; 6]>(GuestAddress(address)).unwrap()
        };
        let memory = restore(64, &file).unwrap();
        assert_eq!(&read(&memory, 16 << 20), b"kernel");
        for (address, bytes) in [(16, b"guest1"), (40, b"guest2")] {
            let address = GuestAddress(address << 20);
            memory.write_slice(bytes, address).unwrap();
        }
        assert_eq!(&read(&memory, 16 << 20), b"guest1");
        assert_eq!(&read(&memory, 40 << 20), b"guest2");
        let other = restore(64, &file).unwrap();
        assert_eq!(&read(&other, 16 << 20), b"kernel");
        assert_eq!(read(&other, 40 << 20), [0; 6]);
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        assert!(matches!(create(63), Err(MemoryError::Size(63))));
        assert!(matches!(create(MAX_MIB + 1), Err(MemoryError::Size(_))));
        assert!(create(64).is_ok());
    }
}

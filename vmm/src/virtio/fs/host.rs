//! The host's files as the share reaches them: by descriptors, never by paths of more than one component.
//!
//! Mostly `nix`; here is what it lacks, and how a descriptor without access rights (`O_PATH`) is opened for good.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::Mutex;

use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use nix::fcntl::{OFlag, open, openat, readlinkat};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use nix::sys::stat::Mode;
use nix::sys::statfs::{
    BPF_FS_MAGIC, CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, DEBUGFS_MAGIC, FsType,
    OVERLAYFS_SUPER_MAGIC, PROC_SUPER_MAGIC, RDTGROUP_SUPER_MAGIC, SECURITYFS_MAGIC, SELINUX_MAGIC,
    SMACK_MAGIC, SYSFS_MAGIC, TRACEFS_MAGIC, fstatfs,
};
use nix::sys::statvfs::FsFlags;
use nix::time::{ClockId, clock_gettime};

use crate::sync::lock;

/// Largest extended attribute or list of names (`XATTR_SIZE_MAX`).
const XATTR_MAX: usize = 65536;

/// What the share wants to know of a file.
#[derive(Clone, Copy)]
pub struct Metadata {
    /// Its attributes.
    pub stat: libc::stat64,
    /// The mount it was reached by.
    pub mount: u64,
}

impl Metadata {
    /// File type bits of the mode.
    pub fn kind(&self) -> u32 {
        self.stat.st_mode & libc::S_IFMT
    }
}

/// The attributes of an open file.
pub fn metadata(fd: BorrowedFd<'_>) -> io::Result<Metadata> {
    // SAFETY: all-zero is a valid value of this plain structure.
    let mut buffer: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a constant C string, the buffer outlives the call.
    let done = unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW,
            libc::STATX_BASIC_STATS | libc::STATX_MNT_ID,
            &raw mut buffer,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let mut stat: libc::stat64 = unsafe { std::mem::zeroed() };
    stat.st_dev = libc::makedev(buffer.stx_dev_major, buffer.stx_dev_minor);
    stat.st_ino = buffer.stx_ino;
    stat.st_nlink = buffer.stx_nlink.into();
    stat.st_mode = buffer.stx_mode.into();
    stat.st_uid = buffer.stx_uid;
    stat.st_gid = buffer.stx_gid;
    stat.st_rdev = libc::makedev(buffer.stx_rdev_major, buffer.stx_rdev_minor);
    stat.st_size = buffer.stx_size as i64;
    stat.st_blksize = buffer.stx_blksize.into();
    stat.st_blocks = buffer.stx_blocks as i64;
    stat.st_atime = buffer.stx_atime.tv_sec;
    stat.st_atime_nsec = buffer.stx_atime.tv_nsec.into();
    stat.st_mtime = buffer.stx_mtime.tv_sec;
    stat.st_mtime_nsec = buffer.stx_mtime.tv_nsec.into();
    stat.st_ctime = buffer.stx_ctime.tv_sec;
    stat.st_ctime_nsec = buffer.stx_ctime.tv_nsec.into();
    Ok(Metadata {
        stat,
        mount: buffer.stx_mnt_id,
    })
}

/// A descriptor without access rights (`O_PATH`) of what a directory has under a name, and its attributes.
pub fn look_up(directory: BorrowedFd<'_>, name: &CStr) -> io::Result<(OwnedFd, Metadata)> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let fd = openat(directory, name, flags, Mode::empty())?;
    let metadata = metadata(fd.as_fd())?;
    Ok((fd, metadata))
}

/// The time by the clock that the kernel stamps files with.
pub fn now() -> (i64, i64) {
    // It can't fail; at the dawn of time nothing is old enough.
    clock_gettime(ClockId::CLOCK_REALTIME_COARSE)
        .map_or((i64::MIN, 0), |now| (now.tv_sec(), now.tv_nsec()))
}

/// What is true of all files on a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Place {
    /// They are overlayfs's: their numbers may be those of a file below it.
    pub overlay: bool,
    /// They can't be written to.
    pub readonly: bool,
    /// They are procfs's.
    pub procfs: bool,
    /// A kernel makes them up when they are read: their sizes say nothing, and no time tells that they have changed.
    pub made_up: bool,
}

/// File systems of files that a kernel makes up.
const MADE_UP: [FsType; 18] = [
    PROC_SUPER_MAGIC,
    SYSFS_MAGIC,
    CGROUP_SUPER_MAGIC,
    CGROUP2_SUPER_MAGIC,
    DEBUGFS_MAGIC,
    TRACEFS_MAGIC,
    SECURITYFS_MAGIC,
    SELINUX_MAGIC,
    SMACK_MAGIC,
    FsType(0x5a3c_69f0), // AAFS_MAGIC: AppArmor's part of securityfs
    BPF_FS_MAGIC,
    RDTGROUP_SUPER_MAGIC, // resctrl
    FsType(0x6265_6570),  // CONFIGFS_MAGIC
    FsType(0x4249_4e4d),  // BINFMTFS_MAGIC
    FsType(0x6e66_7364),  // NFSD_MAGIC
    FsType(0x6573_5543),  // FUSE_CTL_SUPER_MAGIC
    FsType(0x1980_0202),  // MQUEUE_MAGIC
    FsType(0xde5e_81e4),  // EFIVARFS_MAGIC
];

impl Place {
    /// The place of a file.
    pub fn of(fd: BorrowedFd<'_>) -> Self {
        fstatfs(fd).map_or_else(
            |_| Self::default(),
            |system| Self {
                overlay: system.filesystem_type() == OVERLAYFS_SUPER_MAGIC,
                readonly: system.flags().contains(FsFlags::ST_RDONLY),
                procfs: system.filesystem_type() == PROC_SUPER_MAGIC,
                made_up: MADE_UP.contains(&system.filesystem_type()),
            },
        )
    }
}

/// Whether two files are one to the host's kernel, whatever their numbers: then it has one watch for both. Takes a while (10 ms and
/// more), most of it for the end of the instance, of which a host has too few (128 for all of root's processes) for each VMM to keep one
/// or to have two at a time.
pub fn is_same_inode(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<bool> {
    static INSTANCE: Mutex<()> = Mutex::new(());
    // Dropped after the instance.
    let _only = lock(&INSTANCE);
    let watches = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let watch = |fd: BorrowedFd<'_>| -> io::Result<WatchDescriptor> {
        let flags = AddWatchFlags::IN_DELETE_SELF;
        // The working directory is `/proc/self/fd`; the kernel's own link is followed, and nothing behind it.
        Ok(watches.add_watch(name_of(fd)?.as_c_str(), flags)?)
    };
    Ok(watch(one)? == watch(other)?)
}

/// Files of a process in procfs that show its memory, or where what is in it. Linux opens them for whoever may trace the process, and for the
/// process itself always (ptrace(2), "Ptrace access mode checking").
const OF_MEMORY: [&[u8]; 11] = [
    b"mem",
    b"maps",
    b"map_files", // a directory, whose names are addresses
    b"smaps",
    b"smaps_rollup",
    b"numa_maps",
    b"pagemap",
    b"auxv",
    b"environ",
    b"stack",
    b"syscall",
];

/// Whether a file of procfs shows the memory of a process. The name by which the kernel knows it tells; without one it is taken to.
pub fn shows_memory(proc_self_fd: &ProcSelfFd, fd: BorrowedFd<'_>) -> io::Result<bool> {
    let path = readlinkat(proc_self_fd, name_of(fd)?.as_c_str());
    let Ok(path) = path.map(OsStringExt::into_vec) else {
        return Ok(true);
    };
    let name = path.rsplit(|byte| *byte == b'/').next();
    // What has been removed is shown as such.
    let name = name.and_then(|name| name.split(|byte| *byte == b' ').next());
    Ok(name.is_none_or(|name| OF_MEMORY.contains(&name)))
}

/// `/proc/self/fd`, by which descriptors are opened again.
#[derive(Debug)]
pub struct ProcSelfFd(OwnedFd);

impl ProcSelfFd {
    /// Opens it. It stays usable when the process loses sight of `/proc`.
    pub fn open() -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self(open("/proc/self/fd", flags, Mode::empty())?))
    }

    /// Opens the file of a descriptor again with other flags. The caller has made sure that its type may be opened.
    pub fn reopen(&self, fd: BorrowedFd<'_>, flags: OFlag) -> io::Result<OwnedFd> {
        // No O_NOFOLLOW: the name is the kernel's own link to the file.
        Ok(openat(
            &self.0,
            name_of(fd)?.as_c_str(),
            flags | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?)
    }
}

impl AsFd for ProcSelfFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The name of a descriptor in `/proc/self/fd`.
pub fn name_of(fd: BorrowedFd<'_>) -> io::Result<CString> {
    Ok(CString::new(fd.as_raw_fd().to_string())?)
}

/// Room for directory entries: for more than one with the longest name.
const LISTING: usize = 4096;

/// How far an open directory has been read, with the entries that were read ahead.
///
/// On some file systems (tmpfs before Linux 6.6) an offset counts entries: after a removal it leads past one that was never seen. Only the
/// kernel's own position is safe, so it is moved only if the reader really goes somewhere else.
#[derive(Debug)]
pub struct Listing {
    /// Entries read ahead; empty while there are none, so that an idle directory takes no memory.
    ahead: Vec<u8>,
    used: usize,
    /// Where the next entry begins. None after a failure, when the kernel's position may be another.
    offset: Option<u64>,
}

impl Default for Listing {
    /// That of a directory that has just been opened.
    fn default() -> Self {
        Self {
            ahead: Vec::new(),
            used: 0,
            offset: Some(0),
        }
    }
}

impl Listing {
    /// Hands over the entries from an offset on, until `add` has no more room for one (it returns zero) or fails. What fails once entries
    /// have been handed over is left to the next call: the reply has to be sent, since the guest holds its inodes from now on.
    pub fn read(
        &mut self,
        fd: BorrowedFd<'_>,
        offset: u64,
        add: &mut dyn FnMut(&RawEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        if Some(offset) != self.offset {
            self.lose_place();
            // SAFETY: takes plain numbers.
            let at = unsafe { libc::lseek64(fd.as_raw_fd(), offset as i64, libc::SEEK_SET) };
            if at < 0 {
                return Err(io::Error::last_os_error());
            }
            self.offset = Some(offset);
        }
        let mut first = true;
        loop {
            match self.hand_over_one(fd, add) {
                Ok(true) => first = false,
                Err(error) if first => return Err(error),
                Ok(false) | Err(_) => return Ok(()),
            }
        }
    }

    /// Hands over the next entry; returns whether there was one, and room for it.
    fn hand_over_one(
        &mut self,
        fd: BorrowedFd<'_>,
        add: &mut dyn FnMut(&RawEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<bool> {
        if self.used >= self.ahead.len() {
            self.used = 0;
            self.ahead = Vec::new();
            // If this fails the kernel has read nothing, and stays where it is.
            self.ahead = read_entries(fd)?;
            if self.ahead.is_empty() {
                return Ok(false);
            }
        }
        let Some((entry, len)) = first_entry(self.ahead.get(self.used..).unwrap_or_default())
        else {
            // Not what the kernel writes.
            self.lose_place();
            return Err(io::Error::from_raw_os_error(libc::EIO));
        };
        if add(&entry)? == 0 {
            return Ok(false);
        }
        self.offset = Some(entry.offset);
        self.used += len;
        Ok(true)
    }

    fn lose_place(&mut self) {
        self.ahead = Vec::new();
        self.used = 0;
        self.offset = None;
    }
}

/// Reads the next entries of a directory.
fn read_entries(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; LISTING];
    // SAFETY: the kernel writes at most as many bytes as the buffer, which outlives the call, has.
    let len = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            fd.as_raw_fd(),
            buffer.as_mut_ptr(),
            buffer.len(),
        )
    };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    buffer.truncate(len);
    Ok(buffer)
}

/// A directory entry as `getdents64` gives it.
#[derive(Debug, Clone, Copy)]
pub struct RawEntry<'a> {
    /// Inode number.
    pub ino: u64,
    /// Where the next entry begins.
    pub offset: u64,
    /// One of `DT_*`.
    pub kind: u8,
    /// The name.
    pub name: &'a CStr,
}

/// The first entry of what `getdents64` wrote, and its length.
fn first_entry(bytes: &[u8]) -> Option<(RawEntry<'_>, usize)> {
    // struct linux_dirent64: u64 d_ino, i64 d_off, u16 d_reclen, u8 d_type, char d_name[].
    const NAME: usize = 19;
    let ino = u64::from_ne_bytes(bytes.get(0..8)?.try_into().ok()?);
    let offset = u64::from_ne_bytes(bytes.get(8..16)?.try_into().ok()?);
    let len = usize::from(u16::from_ne_bytes(bytes.get(16..18)?.try_into().ok()?));
    let kind = *bytes.get(18)?;
    let name = CStr::from_bytes_until_nul(bytes.get(NAME..len)?).ok()?;
    let entry = RawEntry {
        ino,
        offset,
        kind,
        name,
    };
    Some((entry, len))
}

/// Extended attributes of a file, by its name in `/proc/self/fd`, which is the thread's working directory.
pub mod xattr {
    use super::*;

    /// Sets one.
    pub fn set(fd: BorrowedFd<'_>, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        let file = name_of(fd)?;
        // SAFETY: two C strings and a buffer with its length, which the kernel only reads.
        let done = unsafe {
            libc::setxattr(
                file.as_ptr(),
                name.as_ptr(),
                value.as_ptr().cast(),
                value.len(),
                flags as libc::c_int,
            )
        };
        check(done as isize).map(|_| ())
    }

    /// Reads one. `size` is the room for it; none asks for its length.
    pub fn get(fd: BorrowedFd<'_>, name: &CStr, size: usize) -> io::Result<(usize, Vec<u8>)> {
        let file = name_of(fd)?;
        let mut buffer = vec![0; size.min(XATTR_MAX)];
        // SAFETY: two C strings, and a buffer with its length.
        let len = unsafe {
            libc::getxattr(
                file.as_ptr(),
                name.as_ptr(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
            )
        };
        let len = check(len)?;
        buffer.truncate(len);
        Ok((len, buffer))
    }

    /// The names of all, each ended by a zero byte.
    pub fn list(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
        let file = name_of(fd)?;
        let mut buffer = vec![0; XATTR_MAX];
        // SAFETY: a C string, and a buffer with its length.
        let len =
            unsafe { libc::listxattr(file.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
        buffer.truncate(check(len)?);
        Ok(buffer)
    }

    /// Removes one.
    pub fn remove(fd: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        let file = name_of(fd)?;
        // SAFETY: two C strings.
        let done = unsafe { libc::removexattr(file.as_ptr(), name.as_ptr()) };
        check(done as isize).map(|_| ())
    }

    fn check(result: isize) -> io::Result<usize> {
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

/// An open file as source and target of guest memory.
#[derive(Debug)]
pub struct FileIo<'a> {
    /// The file.
    pub fd: BorrowedFd<'a>,
    /// Writes go to the file's end, wherever the guest believes it to be: a host program may append too.
    pub append: bool,
}

impl FileIo<'_> {
    fn read_at(&self, buffers: &[FileVolatileSlice<'_>], offset: u64) -> io::Result<usize> {
        let list = iovecs(buffers);
        // SAFETY: the list describes guest memory that stays mapped during the call, and to which there are no references.
        let count = unsafe {
            libc::preadv64(
                self.fd.as_raw_fd(),
                list.as_ptr(),
                list.len() as libc::c_int,
                offset as i64,
            )
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    fn write_at(&self, buffers: &[FileVolatileSlice<'_>], offset: u64) -> io::Result<usize> {
        let list = iovecs(buffers);
        let flags = if self.append { libc::RWF_APPEND } else { 0 };
        // SAFETY: as in `read_at`; the kernel only reads.
        let count = unsafe {
            libc::pwritev2(
                self.fd.as_raw_fd(),
                list.as_ptr(),
                list.len() as libc::c_int,
                offset as i64,
                flags,
            )
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }
}

fn iovecs(buffers: &[FileVolatileSlice<'_>]) -> Vec<libc::iovec> {
    buffers
        .iter()
        .map(|slice| libc::iovec {
            iov_base: slice.as_ptr().cast(),
            iov_len: slice.len(),
        })
        .collect()
}

/// FUSE reads and writes at offsets; there is no current position.
fn no_position() -> io::Error {
    io::Error::from_raw_os_error(libc::ESPIPE)
}

impl FileReadWriteVolatile for FileIo<'_> {
    fn read_volatile(&mut self, _slice: FileVolatileSlice) -> io::Result<usize> {
        Err(no_position())
    }

    fn write_volatile(&mut self, _slice: FileVolatileSlice) -> io::Result<usize> {
        Err(no_position())
    }

    fn read_at_volatile(&mut self, slice: FileVolatileSlice, offset: u64) -> io::Result<usize> {
        self.read_at(&[slice], offset)
    }

    fn write_at_volatile(&mut self, slice: FileVolatileSlice, offset: u64) -> io::Result<usize> {
        self.write_at(&[slice], offset)
    }

    fn read_vectored_at_volatile(
        &mut self,
        buffers: &[FileVolatileSlice],
        offset: u64,
    ) -> io::Result<usize> {
        self.read_at(buffers, offset)
    }

    fn write_vectored_at_volatile(
        &mut self,
        buffers: &[FileVolatileSlice],
        offset: u64,
    ) -> io::Result<usize> {
        self.write_at(buffers, offset)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    /// A directory of so many files that they are read in several steps, and itself, opened.
    fn crowded() -> (tempfile::TempDir, File) {
        let folder = tempfile::tempdir().unwrap();
        for i in 0..300 {
            File::create(folder.path().join(format!("file-{i}"))).unwrap();
        }
        let opened = File::open(folder.path()).unwrap();
        (folder, opened)
    }

    /// Reads up to `count` names from where they have been read to, which is moved.
    fn names(
        listing: &mut Listing,
        folder: &File,
        offset: &mut u64,
        count: usize,
    ) -> io::Result<Vec<CString>> {
        let from = *offset;
        let mut names = Vec::new();
        listing.read(folder.as_fd(), from, &mut |entry| {
            if names.len() == count {
                return Ok(0);
            }
            names.push(entry.name.to_owned());
            *offset = entry.offset;
            Ok(1)
        })?;
        Ok(names)
    }

    #[test]
    fn a_place_that_is_none_has_nobody_lose_entries() {
        let (_folder, opened) = crowded();
        let mut listing = Listing::default();
        let mut offset = 0;
        let mut seen = names(&mut listing, &opened, &mut offset, 5).unwrap();
        let failed = names(&mut listing, &opened, &mut u64::MAX.clone(), 5);
        assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::EINVAL));
        seen.extend(names(&mut listing, &opened, &mut offset, 1000).unwrap());
        assert_eq!(seen.len(), 302);
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 302);
    }

    #[test]
    fn entries_are_handed_over_once_where_the_next_cannot_be_read() {
        let (folder, opened) = crowded();
        let mut listing = Listing::default();
        let mut seen = 0;
        let mut offset = 0;
        // Of a directory that has been removed nothing can be read any more.
        listing
            .read(opened.as_fd(), 0, &mut |entry| {
                if seen == 0 {
                    fs::remove_dir_all(folder.path()).unwrap();
                }
                seen += 1;
                offset = entry.offset;
                Ok(1)
            })
            .unwrap();
        assert!(seen > 0 && seen < 302, "{seen}");
        for _ in 0..2 {
            let failed = names(&mut listing, &opened, &mut offset, 1000);
            assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::ENOENT));
        }
    }
}

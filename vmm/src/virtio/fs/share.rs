//! The shared directory tree as a FUSE file system.
//!
//! The guest is hostile. It names files by numbers that it was given and by single path components, which are checked here; nothing it
//! says makes the VMM walk a path, follow a symbolic link, or open anything but a regular file or a directory. Everything else (devices,
//! FIFOs, sockets, links) is held by descriptors without access rights, so it can be shown, renamed and removed, and has
//! no effect on the host. What the guest makes the VMM allocate is bounded, open files included.
//!
//! Mounts below the shared directory belong to the tree, those that come later too. Host programs may change files at any time: the
//! guest asks again after [`CACHE_TIME`], also for names that were not there, and keeps a file's pages over an open only if the file has
//! not changed meanwhile.
//!
//! Left to the guest's kernel: permission checks (access control lists too), locks (they hold among the guest's processes), and copying ranges.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use nix::fcntl::{
    AtFlags, FallocateFlags, OFlag, RenameFlags, fallocate, open, openat, readlinkat, renameat2,
};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{
    Gid, Uid, UnlinkatFlags, Whence, fchownat, fdatasync, fsync, ftruncate, linkat, lseek,
    symlinkat, syncfs, unlinkat,
};
use vmm_sys_util::eventfd::EventFd;

use super::host::{self, FileIo, Metadata, Place, ProcSelfFd, name_of, xattr};
use super::identity::{AsCaller, AsUser, WithoutFsetid};
use super::tables::{Budget, Handle, Handles, Inode, Inodes, Permit, Stamp};
use crate::sync::lock;

/// How long the guest may believe names and attributes without asking again.
pub const CACHE_TIME: Duration = Duration::from_secs(1);

/// Flags of an open that are passed on. Not among them: what would make files, follow links, give descriptors without
/// rights (`O_PATH`, `O_TMPFILE`), or bind the guest's buffers to the host's disk (`O_DIRECT`).
const OPEN_FLAGS: i32 =
    libc::O_ACCMODE | libc::O_TRUNC | libc::O_SYNC | libc::O_DSYNC | libc::O_NOATIME;

/// What the protocol offers and this file system wants. Not among it: locks (the guest's kernel keeps them), write-back caching (the
/// host's view would lag), lookups of `.` and `..`.
pub const WANTED: FsOptions = FsOptions::ASYNC_READ
    .union(FsOptions::ATOMIC_O_TRUNC)
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::DONT_MASK)
    .union(FsOptions::AUTO_INVAL_DATA)
    .union(FsOptions::DO_READDIRPLUS)
    .union(FsOptions::READDIRPLUS_AUTO)
    .union(FsOptions::ASYNC_DIO)
    .union(FsOptions::PARALLEL_DIROPS)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::CACHE_SYMLINKS)
    .union(FsOptions::POSIX_ACL)
    .union(FsOptions::HANDLE_KILLPRIV_V2);

/// A shared directory tree.
pub struct Share {
    proc_self_fd: ProcSelfFd,
    inodes: Inodes,
    handles: Handles,
    /// A small number for each device in the tree, see [`Share::shown_inode`].
    devices: Mutex<HashMap<u64, u64>>,
}

impl Share {
    /// Shares a directory, with at most `descriptors` of its files held or open.
    pub fn new(directory: &Path, descriptors: usize) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = open(directory, flags, Mode::empty())?;
        let metadata = host::metadata(root.as_fd())?;
        let budget = Budget::new(descriptors)?;
        Ok(Self {
            proc_self_fd: ProcSelfFd::open()?,
            devices: Mutex::new(HashMap::from([(metadata.stat.st_dev, 1)])),
            inodes: Inodes::new(root, &metadata, budget.clone())?,
            handles: Handles::new(budget),
        })
    }

    /// Where descriptors are opened again.
    pub fn proc_self_fd(&self) -> &ProcSelfFd {
        &self.proc_self_fd
    }

    /// Readable when the guest holds many files and should be asked to forget those that it does not use.
    pub fn many_files(&self) -> &EventFd {
        self.inodes.budget().many()
    }

    /// How long the guest may believe a name. Linux forgets a file of a virtio-fs at its last use if its name is not to be believed at
    /// all, so a guest that finds files faster than it can be asked to forget them goes on with those that it uses.
    fn name_time(&self) -> Duration {
        if self.inodes.budget().is_scarce() {
            Duration::ZERO
        } else {
            CACHE_TIME
        }
    }

    /// Forgets everything the guest knows and has opened.
    pub fn clear(&self) {
        self.handles.clear();
        self.inodes.clear();
    }

    #[cfg(test)]
    pub fn inode_count(&self) -> usize {
        self.inodes.len()
    }

    /// The inode number that the guest sees. To it the tree is one device, so the devices' numbers have to be told apart: programs
    /// take two files with equal numbers for one. Nothing is changed for the first device below the shared directory's own: where that
    /// is but a place for mounts, it is the root file system's, and programs without support for large files can't be told of longer numbers.
    fn shown_inode(&self, dev: u64, ino: u64) -> u64 {
        let mut devices = lock(&self.devices);
        let next = match devices.len() {
            1 => 0,
            known => known as u64,
        };
        let index = *devices.entry(dev).or_insert(next);
        ino ^ (index << 48)
    }

    fn shown(&self, metadata: &Metadata) -> libc::stat64 {
        let mut stat = metadata.stat;
        stat.st_ino = self.shown_inode(stat.st_dev, stat.st_ino);
        stat
    }

    /// What the guest is told of a file that `parent` names.
    fn entry(
        &self,
        fd: OwnedFd,
        parent: &Inode,
        name: &CStr,
        permit: Option<Permit>,
    ) -> io::Result<Entry> {
        let metadata = host::metadata(fd.as_fd())?;
        let inode = self.inodes.look_up(fd, &metadata, parent, name, permit)?;
        let entry_timeout = if inode.is_fleeting() {
            Duration::ZERO
        } else {
            self.name_time()
        };
        Ok(Entry {
            inode: inode.id,
            generation: 0,
            attr: self.shown(&metadata),
            attr_flags: 0,
            attr_timeout: CACHE_TIME,
            entry_timeout,
        })
    }

    /// Looks up a checked name.
    fn look_up(&self, parent: &Inode, name: &CStr) -> io::Result<Entry> {
        self.look_up_with(parent, name, None)
    }

    /// The same of a file that was just made, with the permit that was taken before.
    fn look_up_with(
        &self,
        parent: &Inode,
        name: &CStr,
        permit: Option<Permit>,
    ) -> io::Result<Entry> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(parent, name, flags, Mode::empty())?;
        self.entry(fd, parent, name, permit)
    }

    /// Refuses what shows a process's memory: to the kernel the VMM's threads are the VMM, whose own memory they may open.
    fn keep_memory_closed(&self, inode: &Inode, place: Place) -> io::Result<()> {
        if place.procfs && host::shows_memory(&self.proc_self_fd, inode.as_fd())? {
            return Err(error(libc::EACCES));
        }
        Ok(())
    }

    /// Opens a regular file for reading or writing.
    fn open_file(&self, inode: &Inode, flags: u32, kill_privileges: bool) -> io::Result<OwnedFd> {
        match inode.kind {
            libc::S_IFREG => {}
            libc::S_IFDIR => return Err(error(libc::EISDIR)),
            libc::S_IFLNK => return Err(error(libc::ELOOP)),
            // The guest's kernel serves devices, FIFOs and sockets itself and never asks for this.
            _ => return Err(error(libc::ENXIO)),
        }
        let flags = flags as i32 & OPEN_FLAGS;
        if flags & libc::O_ACCMODE == libc::O_ACCMODE {
            return Err(error(libc::EINVAL));
        }
        self.keep_memory_closed(inode, inode.place())?;
        let _privileges = WithoutFsetid::when(kill_privileges)?;
        self.proc_self_fd
            .reopen(inode.as_fd(), OFlag::from_bits_retain(flags))
    }

    /// Whether the guest may keep the pages that it has of a file which it opens, and whether it is to have any at all.
    fn open_options(&self, inode: &Inode, fd: &OwnedFd) -> OpenOptions {
        let now = host::now();
        let Ok(metadata) = host::metadata(fd.as_fd()) else {
            return OpenOptions::empty();
        };
        self.inodes.renumber(inode, &metadata);
        if inode.place().made_up {
            // A cache would end where the size says, and never change.
            OpenOptions::DIRECT_IO
        } else if inode.unchanged(Stamp::new(&metadata, now)) {
            OpenOptions::KEEP_CACHE
        } else {
            OpenOptions::empty()
        }
    }

    /// Writes back what the file systems that the guest knows of have in memory. All are tried; the first error is returned.
    pub fn sync(&self) -> io::Result<()> {
        let write_back = |inode: &Inode| -> io::Result<()> {
            let fd = if inode.kind == libc::S_IFDIR {
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
                self.proc_self_fd.reopen(inode.as_fd(), flags)?
            } else {
                self.open_file(inode, libc::O_RDONLY as u32, false)?
            };
            Ok(syncfs(fd)?)
        };
        let mut result = Ok(());
        for inode in self.inodes.file_systems() {
            result = result.and(write_back(&inode));
        }
        result
    }

    /// Sets an extended attribute of a file, and clears its set-group-ID bit if the guest asks for that: it alone knows all groups of
    /// the caller.
    pub fn set_attribute(
        &self,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> io::Result<()> {
        let inode = self.inodes.get(inode)?;
        xattr::set(inode.as_fd(), shared_attribute(name)?, value, flags)?;
        let metadata = host::metadata(inode.as_fd())?;
        self.inodes.renumber(&inode, &metadata);
        let mode = metadata.stat.st_mode;
        if kill_sgid && mode & libc::S_ISGID != 0 {
            fchmodat(
                &self.proc_self_fd,
                name_of(inode.as_fd())?.as_c_str(),
                Mode::from_bits_truncate(mode & 0o7777 & !libc::S_ISGID),
                FchmodatFlags::FollowSymlink,
            )?;
        }
        Ok(())
    }

    #[cfg(test)]
    pub fn file_systems(&self) -> Vec<Arc<Inode>> {
        self.inodes.file_systems()
    }

    fn directory(&self, inode: u64, handle: u64) -> io::Result<(Arc<Inode>, Arc<Handle>)> {
        let inode = self.inodes.get(inode)?;
        if inode.kind != libc::S_IFDIR {
            return Err(error(libc::ENOTDIR));
        }
        let handle = self.handles.get(handle, inode.id)?;
        Ok((inode, handle))
    }
}

fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// Checks that a name is one path component.
fn component(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(error(libc::EINVAL)),
        bytes if bytes.len() > 255 => Err(error(libc::ENAMETOOLONG)),
        _ => Ok(name),
    }
}

/// The extended attributes that the guest may see and set: users' own, file capabilities, access control lists. The others
/// belong to the host (`trusted.*`, labels of security modules).
fn attribute_is_shared(name: &[u8]) -> bool {
    name.starts_with(b"user.") || name == b"security.capability" || is_access_list(name)
}

fn is_access_list(name: &[u8]) -> bool {
    matches!(
        name,
        b"system.posix_acl_access" | b"system.posix_acl_default"
    )
}

fn shared_attribute(name: &CStr) -> io::Result<&CStr> {
    if attribute_is_shared(name.to_bytes()) {
        Ok(name)
    } else {
        Err(error(libc::EOPNOTSUPP))
    }
}

fn time(valid: SetattrValid, set: SetattrValid, now: SetattrValid, at: (i64, i64)) -> TimeSpec {
    if valid.contains(now) {
        TimeSpec::UTIME_NOW
    } else if valid.contains(set) {
        TimeSpec::new(at.0, at.1)
    } else {
        TimeSpec::UTIME_OMIT
    }
}

impl FileSystem for Share {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        Ok(WANTED)
    }

    fn destroy(&self) {
        self.clear();
    }

    fn lookup(&self, _context: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let parent = self.inodes.get(parent)?;
        match self.look_up(&parent, component(name)?) {
            // No inode: the guest may believe that too. Searches along a path ask for the same names again and again.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Entry {
                entry_timeout: CACHE_TIME,
                ..Entry::default()
            }),
            found => found,
        }
    }

    fn forget(&self, _context: &Context, inode: u64, count: u64) {
        self.inodes.forget(inode, count);
    }

    fn batch_forget(&self, _context: &Context, requests: Vec<(u64, u64)>) {
        for (inode, count) in requests {
            self.inodes.forget(inode, count);
        }
    }

    fn getattr(
        &self,
        _context: &Context,
        inode: u64,
        _handle: Option<u64>,
    ) -> io::Result<(libc::stat64, Duration)> {
        let inode = self.inodes.get(inode)?;
        let metadata = host::metadata(inode.as_fd())?;
        self.inodes.renumber(&inode, &metadata);
        Ok((self.shown(&metadata), CACHE_TIME))
    }

    fn setattr(
        &self,
        context: &Context,
        inode: u64,
        attr: libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(libc::stat64, Duration)> {
        let file = self.inodes.get(inode)?;
        let name = name_of(file.as_fd())?;
        if valid.contains(SetattrValid::MODE) {
            let mode = Mode::from_bits_truncate(attr.st_mode & 0o7777);
            fchmodat(
                &self.proc_self_fd,
                name.as_c_str(),
                mode,
                FchmodatFlags::FollowSymlink,
            )?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = valid
                .contains(SetattrValid::UID)
                .then(|| Uid::from_raw(attr.st_uid));
            let gid = valid
                .contains(SetattrValid::GID)
                .then(|| Gid::from_raw(attr.st_gid));
            fchownat(&*file, c"", uid, gid, AtFlags::AT_EMPTY_PATH)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let kill = valid.contains(SetattrValid::KILL_SUIDGID);
            if let Some(handle) = handle {
                let handle = self.handles.get(handle, inode)?;
                let _privileges = WithoutFsetid::when(kill)?;
                ftruncate(&*handle, attr.st_size)?;
            } else {
                let open = self.open_file(&file, libc::O_WRONLY as u32, false)?;
                let _privileges = WithoutFsetid::when(kill)?;
                ftruncate(&open, attr.st_size)?;
            }
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let access = time(
                valid,
                SetattrValid::ATIME,
                SetattrValid::ATIME_NOW,
                (attr.st_atime, attr.st_atime_nsec),
            );
            let modification = time(
                valid,
                SetattrValid::MTIME,
                SetattrValid::MTIME_NOW,
                (attr.st_mtime, attr.st_mtime_nsec),
            );
            // The kernel's own link is followed, and nothing behind it.
            utimensat(
                &self.proc_self_fd,
                name.as_c_str(),
                &access,
                &modification,
                UtimensatFlags::FollowSymlink,
            )?;
        }
        self.getattr(context, inode, None)
    }

    fn readlink(&self, _context: &Context, inode: u64) -> io::Result<Vec<u8>> {
        let inode = self.inodes.get(inode)?;
        Ok(readlinkat(&*inode, c"")?.into_vec())
    }

    fn symlink(
        &self,
        context: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        let parent = self.inodes.get(parent)?;
        let name = component(name)?;
        let permit = self.inodes.permit()?;
        {
            let _caller = AsCaller::new(context, 0)?;
            symlinkat(target, &*parent, name)?;
        }
        self.look_up_with(&parent, name, Some(permit))
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let parent = self.inodes.get(parent)?;
        let name = component(name)?;
        let permit = self.inodes.permit()?;
        {
            let _caller = AsCaller::new(context, umask)?;
            mknodat(
                &*parent,
                name,
                SFlag::from_bits_truncate(mode & libc::S_IFMT),
                Mode::from_bits_truncate(mode & 0o7777),
                rdev.into(),
            )?;
        }
        self.look_up_with(&parent, name, Some(permit))
    }

    fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let parent = self.inodes.get(parent)?;
        let name = component(name)?;
        let permit = self.inodes.permit()?;
        {
            let _caller = AsCaller::new(context, umask)?;
            mkdirat(&*parent, name, Mode::from_bits_truncate(mode & 0o7777))?;
        }
        self.look_up_with(&parent, name, Some(permit))
    }

    fn unlink(&self, _context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let parent = self.inodes.get(parent)?;
        Ok(unlinkat(
            &*parent,
            component(name)?,
            UnlinkatFlags::NoRemoveDir,
        )?)
    }

    fn rmdir(&self, _context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let parent = self.inodes.get(parent)?;
        Ok(unlinkat(
            &*parent,
            component(name)?,
            UnlinkatFlags::RemoveDir,
        )?)
    }

    fn rename(
        &self,
        _context: &Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let old_parent = self.inodes.get(old_parent)?;
        let new_parent = self.inodes.get(new_parent)?;
        let (old_name, new_name) = (component(old_name)?, component(new_name)?);
        let flags = RenameFlags::from_bits_truncate(flags);
        let mut moved = vec![self.inodes.about_to_move(&old_parent, old_name)];
        if flags.contains(RenameFlags::RENAME_EXCHANGE) {
            moved.push(self.inodes.about_to_move(&new_parent, new_name));
        }
        renameat2(&*old_parent, old_name, &*new_parent, new_name, flags)?;
        for inode in moved.into_iter().flatten() {
            if let Ok(metadata) = host::metadata(inode.as_fd()) {
                self.inodes.renumber(&inode, &metadata);
            }
        }
        Ok(())
    }

    fn link(
        &self,
        _context: &Context,
        inode: u64,
        new_parent: u64,
        new_name: &CStr,
    ) -> io::Result<Entry> {
        let inode = self.inodes.get(inode)?;
        let parent = self.inodes.get(new_parent)?;
        let new_name = component(new_name)?;
        let permit = self.inodes.permit()?;
        // A link stays within a mount: the file has to be reached by that of the directory.
        let there = inode.by_mount(parent.mount);
        let file = there.as_ref().map_or(inode.as_fd(), |fd| fd.as_fd());
        // By the kernel's own link: by an empty path it would take CAP_DAC_READ_SEARCH.
        linkat(
            &self.proc_self_fd,
            name_of(file)?.as_c_str(),
            &*parent,
            new_name,
            AtFlags::AT_SYMLINK_FOLLOW,
        )?;
        self.inodes
            .renumber(&inode, &host::metadata(inode.as_fd())?);
        self.look_up_with(&parent, new_name, Some(permit))
    }

    fn open(
        &self,
        _context: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let inode = self.inodes.get(inode)?;
        let permit = self.handles.permit()?;
        let fd = self.open_file(&inode, flags, fuse_flags & FOPEN_IN_KILL_SUIDGID != 0)?;
        let options = self.open_options(&inode, &fd);
        let handle = self.handles.insert(inode.id, fd, permit);
        Ok((Some(handle), options, None))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let parent = self.inodes.get(parent)?;
        let name = component(name)?;
        let permit = self.handles.permit()?;
        let permit_of_inode = self.inodes.permit()?;
        let flags = args.flags as i32;
        if flags & libc::O_ACCMODE == libc::O_ACCMODE {
            return Err(error(libc::EINVAL));
        }
        let new = {
            let _caller = AsCaller::new(context, args.umask)?;
            openat(
                &*parent,
                name,
                OFlag::from_bits_retain(flags & OPEN_FLAGS)
                    | OFlag::O_CREAT
                    | OFlag::O_EXCL
                    | OFlag::O_NOFOLLOW
                    | OFlag::O_CLOEXEC,
                Mode::from_bits_truncate(args.mode & 0o7777),
            )
        };
        let fd = new.map_err(|failed| match failed {
            // It was not there when the guest looked. What a creation opens Linux takes for new, and asks for no permissions; so it is to
            // look up again, which it does at this answer.
            nix::Error::EEXIST if flags & libc::O_EXCL == 0 => error(libc::ESTALE),
            failed => failed.into(),
        })?;
        // The name may be someone else's by now; the descriptor is not.
        let path = self.proc_self_fd.reopen(fd.as_fd(), OFlag::O_PATH)?;
        let entry = self.entry(path, &parent, name, Some(permit_of_inode))?;
        let handle = self.handles.insert(entry.inode, fd, permit);
        Ok((entry, Some(handle), OpenOptions::empty(), None))
    }

    fn read(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let handle = self.handles.get(handle, inode)?;
        let mut file = FileIo {
            fd: handle.as_fd(),
            append: false,
        };
        let size = (size as usize).min(writer.available_bytes());
        writer.write_from(&mut file, size, offset)
    }

    fn write(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let handle = self.handles.get(handle, inode)?;
        let mut file = FileIo {
            fd: handle.as_fd(),
            append: flags as i32 & libc::O_APPEND != 0,
        };
        // Hardly any file has such bits. One that gets them at this moment keeps them, as if the write had come before.
        let kill = fuse_flags & WRITE_KILL_PRIV != 0
            && host::metadata(handle.as_fd())?.stat.st_mode & (libc::S_ISUID | libc::S_ISGID) != 0;
        let _privileges = WithoutFsetid::when(kill)?;
        // Blocks that a file system keeps for root are not for others.
        let _user = AsUser::new(context)?;
        reader.read_to(&mut file, size as usize, offset)
    }

    fn fsync(&self, _context: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let handle = self.handles.get(handle, inode)?;
        if datasync {
            fdatasync(&*handle)?;
        } else {
            fsync(&*handle)?;
        }
        Ok(())
    }

    fn fallocate(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let handle = self.handles.get(handle, inode)?;
        let mode = FallocateFlags::from_bits(mode as i32).ok_or_else(|| error(libc::EOPNOTSUPP))?;
        // As for writes, but that the request does not say what the caller may; root is taken for one that may keep the bits.
        let _privileges = WithoutFsetid::when(context.uid != 0)?;
        let _user = AsUser::new(context)?;
        Ok(fallocate(&*handle, mode, offset as i64, length as i64)?)
    }

    fn release(
        &self,
        _context: &Context,
        inode: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.handles.remove(handle, inode)
    }

    fn statfs(&self, _context: &Context, inode: u64) -> io::Result<libc::statvfs64> {
        let inode = self.inodes.get(inode)?;
        // SAFETY: all-zero is a valid value of this plain structure.
        let mut buffer: libc::statvfs64 = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open and the buffer outlives the call.
        let done = unsafe { libc::fstatvfs64(inode.as_fd().as_raw_fd(), &raw mut buffer) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(buffer)
    }

    fn setxattr(
        &self,
        _context: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.set_attribute(inode, name, value, flags, false)
    }

    fn getxattr(
        &self,
        _context: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        let inode = self.inodes.get(inode)?;
        let found = xattr::get(inode.as_fd(), shared_attribute(name)?, size as usize);
        let (len, value) = found.map_err(|found| match found.raw_os_error() {
            // To Linux, a file that can't have a list would be one whose list can't be read, and nobody's to use.
            Some(libc::EOPNOTSUPP) if is_access_list(name.to_bytes()) => error(libc::ENODATA),
            _ => found,
        })?;
        Ok(if size == 0 {
            GetxattrReply::Count(len as u32)
        } else {
            GetxattrReply::Value(value)
        })
    }

    fn listxattr(&self, _context: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let inode = self.inodes.get(inode)?;
        let names: Vec<u8> = xattr::list(inode.as_fd())?
            .split_inclusive(|byte| *byte == 0)
            .filter(|name| attribute_is_shared(name.strip_suffix(b"\0").unwrap_or(name)))
            .flatten()
            .copied()
            .collect();
        if size == 0 {
            Ok(ListxattrReply::Count(names.len() as u32))
        } else if names.len() > size as usize {
            Err(error(libc::ERANGE))
        } else {
            Ok(ListxattrReply::Names(names))
        }
    }

    fn removexattr(&self, _context: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        let inode = self.inodes.get(inode)?;
        xattr::remove(inode.as_fd(), shared_attribute(name)?)?;
        self.inodes
            .renumber(&inode, &host::metadata(inode.as_fd())?);
        Ok(())
    }

    fn opendir(
        &self,
        _context: &Context,
        inode: u64,
        _flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let inode = self.inodes.get(inode)?;
        if inode.kind != libc::S_IFDIR {
            return Err(error(libc::ENOTDIR));
        }
        self.keep_memory_closed(&inode, inode.place_of_files())?;
        let permit = self.handles.permit_of_directory()?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let fd = self.proc_self_fd.reopen(inode.as_fd(), flags)?;
        let handle = self.handles.insert(inode.id, fd, permit);
        Ok((Some(handle), OpenOptions::empty()))
    }

    fn readdir(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (inode, handle) = self.directory(inode, handle)?;
        let dev = inode.device();
        lock(&handle.listing).read(handle.as_fd(), offset, &mut |entry| {
            add_entry(self.listed(dev, entry))
        })
    }

    fn readdirplus(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (inode, handle) = self.directory(inode, handle)?;
        let dev = inode.device();
        lock(&handle.listing).read(handle.as_fd(), offset, &mut |entry| {
            // Without an inode the guest gets the name alone, and looks it up if it wants more.
            let found = match component(entry.name) {
                Ok(name) => self.look_up(&inode, name).unwrap_or_default(),
                Err(_dots) => Entry::default(),
            };
            let mut listed = self.listed(dev, entry);
            if found.inode != 0 {
                // A mount point is listed as what is mounted there.
                listed.ino = found.attr.st_ino;
            }
            let added = add_entry(listed, found);
            if found.inode != 0 && !matches!(added, Ok(1..)) {
                self.inodes.forget(found.inode, 1);
            }
            added
        })
    }

    fn fsyncdir(
        &self,
        context: &Context,
        inode: u64,
        datasync: bool,
        handle: u64,
    ) -> io::Result<()> {
        self.fsync(context, inode, datasync, handle)
    }

    fn releasedir(
        &self,
        _context: &Context,
        inode: u64,
        _flags: u32,
        handle: u64,
    ) -> io::Result<()> {
        self.handles.remove(handle, inode)
    }

    fn lseek(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let handle = self.handles.get(handle, inode)?;
        let whence = match whence as i32 {
            libc::SEEK_DATA => Whence::SeekData,
            libc::SEEK_HOLE => Whence::SeekHole,
            // The guest's kernel keeps positions itself.
            _ => return Err(error(libc::EINVAL)),
        };
        // Directories have a position of their own.
        let _listing = lock(&handle.listing);
        Ok(lseek(&*handle, offset as i64, whence)? as u64)
    }
}

impl Share {
    fn listed<'a>(&self, dev: u64, entry: &host::RawEntry<'a>) -> DirEntry<'a> {
        DirEntry {
            ino: self.shown_inode(dev, entry.ino),
            offset: entry.offset,
            type_: entry.kind.into(),
            name: entry.name.to_bytes(),
        }
    }
}

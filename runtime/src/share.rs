//! The sandbox's mount namespace, and the directory tree in it that the guest sees over virtio-fs.
//!
//! The server lives in a mount namespace of its own, which its VMM inherits: when both are gone, so are all mounts, whatever
//! ended them. The share's own skeleton (`<part>/rootfs`, `<part>/mounts/<n>/<name>`) is a tmpfs that the VMM sees read-only, so a
//! guest can't put a symbolic link where the host is about to mount; the server makes the skeleton's entries through a
//! descriptor of the writable mount underneath. The read-only mount is shared, so that later mounts reach a VMM with a
//! mount namespace of its own.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, mkdirat};
use thiserror::Error;

use crate::adapt::{HostBind, MOUNTS, ReadOnly};

/// A container's part of the share, a directory by this number. No other container of the sandbox has had it: for a moment the guest still
/// believes what it has seen under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part(pub u64);

impl Part {
    /// Where it is, relative to the share.
    pub fn directory(self) -> PathBuf {
        self.0.to_string().into()
    }
}

/// What went wrong with the share.
#[derive(Debug, Error)]
#[error("cannot {what} {}: {cause}", path.display())]
pub struct ShareError {
    what: &'static str,
    path: PathBuf,
    cause: io::Error,
}

impl ShareError {
    fn new(what: &'static str, path: &Path, cause: impl Into<io::Error>) -> Self {
        Self {
            what,
            path: path.to_path_buf(),
            cause: cause.into(),
        }
    }
}

/// Gives the calling thread, and the processes it starts, a mount namespace that sees the host's mounts come and go, as far as those
/// propagate, but shows the host none of its own. Call it before there are other threads.
///
/// What is mounted on a mount that is private on the host (Podman keeps the root file systems of its containers on one) does not propagate:
/// what comes there later is not seen, and what is there stays here, with its file system, until the namespace goes, though the host unmounts
/// it before.
pub fn private_mount_namespace() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SLAVE,
        None::<&str>,
    )?;
    Ok(())
}

/// The shared directory tree of one sandbox.
#[derive(Debug)]
pub struct Share {
    root: PathBuf,
    /// The writable mount under the one that the guest sees.
    skeleton: OwnedFd,
    /// How many mounts there are at the root: the read-only one with the containers' mounts, on the tmpfs.
    mounts: AtomicU8,
}

impl Share {
    /// Makes the share at `root`, an existing directory. Needs [`private_mount_namespace`] first.
    pub fn new(root: &Path) -> Result<Self, ShareError> {
        let fail = |what| move |e: nix::Error| ShareError::new(what, root, e);
        mount(
            Some("bulkhead"),
            root,
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
            Some("mode=0755,size=4m"),
        )
        .map_err(fail("mount a tmpfs on"))?;
        let skeleton = open_dir(None, root).map_err(fail("open"))?;
        mount(
            Some(root),
            root,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .map_err(fail("bind the share on"))?;
        open_mount(root)
            .and_then(|mount| set_attributes(mount.as_fd(), libc::MOUNT_ATTR_RDONLY, false))
            .map_err(|e| ShareError::new("make read-only", root, e))?;
        mount(
            None::<&str>,
            root,
            None::<&str>,
            MsFlags::MS_SHARED,
            None::<&str>,
        )
        .map_err(fail("make shared"))?;
        Ok(Self {
            root: root.to_path_buf(),
            skeleton,
            mounts: AtomicU8::new(2),
        })
    }

    /// The directory that the VMM shares.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes a container's part of the share and binds into it what the guest is to see.
    pub fn add_container(&self, part: Part, binds: &[HostBind]) -> Result<(), ShareError> {
        let name = part.directory();
        let own = self.root.join(&name);
        let fail = |what, path: &Path| {
            let path = path.to_path_buf();
            move |e: nix::Error| ShareError::new(what, &path, e)
        };
        let mode = Mode::from_bits_truncate(0o755);
        mkdirat(&self.skeleton, &name, mode).map_err(fail("make the directory", &own))?;
        let dir = open_dir(Some(&self.skeleton), &name).map_err(fail("open", &own))?;
        if binds.iter().any(|bind| bind.name.starts_with(MOUNTS)) {
            mkdirat(&dir, MOUNTS, mode).map_err(fail("make the directory", &own.join(MOUNTS)))?;
        }
        for bind in binds {
            let target = own.join(&bind.name);
            match bind.name.parent() {
                Some(parent) if parent.starts_with(MOUNTS) => {
                    mkdirat(&dir, parent, mode)
                        .map_err(fail("make the directory", &own.join(parent)))?;
                }
                _ => {}
            }
            if bind.directory {
                mkdirat(&dir, &bind.name, mode).map_err(fail("make the directory", &target))?;
            } else {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
                openat(&dir, &bind.name, flags, Mode::from_bits_truncate(0o644))
                    .map_err(fail("make the file", &target))?;
            }
            // Restricted before it is anywhere: the guest runs already.
            let tree = clone_tree(&bind.source, bind.recursive)
                .map_err(|e| ShareError::new("bind for the guest", &bind.source, e))?;
            bind.restrict(tree.as_fd())
                .map_err(|e| ShareError::new("restrict the bind of", &bind.source, e))?;
            attach(tree.as_fd(), &target)
                .map_err(|e| ShareError::new("mount for the guest", &target, e))?;
        }
        Ok(())
    }

    /// Takes a container's part out of the share, or what there is of it.
    pub fn remove_container(&self, part: Part, binds: &[HostBind]) -> Result<(), ShareError> {
        let name = part.directory();
        let own = self.root.join(&name);
        for bind in binds.iter().rev() {
            let target = own.join(&bind.name);
            match detach(&target) {
                // Nothing is bound there, or nothing there.
                Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                Err(error) => return Err(ShareError::new("unmount", &target, error)),
            }
        }
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.skeleton.as_raw_fd())).join(name);
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(ShareError::new("remove", &own, error))
            }
            _ => Ok(()),
        }
    }

    /// Unmounts everything, so that the directory can be removed.
    pub fn unmount(&self) -> Result<(), ShareError> {
        while self.mounts.load(Ordering::Relaxed) > 0 {
            detach(&self.root).map_err(|e| ShareError::new("unmount", &self.root, e))?;
            self.mounts.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            tracing::warn!(%error, "the share stays mounted until this process ends");
        }
    }
}

fn open_dir(at: Option<&OwnedFd>, path: &Path) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match at {
        Some(dir) => openat(dir, path, flags, Mode::empty()),
        None => nix::fcntl::open(path, flags, Mode::empty()),
    }
}

fn detach(target: &Path) -> nix::Result<()> {
    umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
}

impl HostBind {
    /// Has the mount that the bind has made, whose root `mount` is, open no device node on the host, run no set-user-ID program, write no more
    /// than the bind allows, and show what the host mounts there later only if that is asked for: such mounts have the host's attributes and not
    /// these.
    pub(crate) fn restrict(&self, mount: BorrowedFd) -> io::Result<()> {
        set_attributes(mount, NO_PRIVILEGES, self.recursive)?;
        match self.read_only {
            ReadOnly::No => {}
            ReadOnly::Top => set_attributes(mount, libc::MOUNT_ATTR_RDONLY, false)?,
            ReadOnly::Recursive => set_attributes(mount, libc::MOUNT_ATTR_RDONLY, true)?,
        }
        set_propagation(mount, self.follows_host)
    }
}

/// An image's device nodes and set-user-ID programs are the guest's, and nobody's on the host.
pub(crate) const NO_PRIVILEGES: u64 = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;

fn open_mount(target: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::open(target, flags, Mode::empty())?)
}

/// A copy of the mount that `source` is on from there, or of it and what is mounted below, which is mounted nowhere yet (`open_tree(2)`, Linux 5.2).
fn clone_tree(source: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let source = CString::new(source.as_os_str().as_encoded_bytes())?;
    let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | recursive.cast_unsigned();
    // SAFETY: the path is a NUL-terminated string that outlives the call.
    let tree =
        unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source.as_ptr(), flags) };
    if tree < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, which nobody else knows.
    RawFd::try_from(tree)
        .map(|tree| unsafe { OwnedFd::from_raw_fd(tree) })
        .map_err(io::Error::other)
}

/// Mounts such a copy (`move_mount(2)`, Linux 5.2). A link at `target` is not followed.
fn attach(tree: BorrowedFd, target: &Path) -> io::Result<()> {
    let target = CString::new(target.as_os_str().as_encoded_bytes())?;
    // SAFETY: both paths are NUL-terminated strings that outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets attributes of the mount whose root a descriptor is, or of all mounts of its tree, and keeps the others (`mount_setattr(2)`, Linux 5.12).
pub(crate) fn set_attributes(
    mount: BorrowedFd,
    attributes: u64,
    recursive: bool,
) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    mount_setattr(mount, &attr, recursive)
}

/// Says whether what the host mounts later below the source of a bind mount, or unmounts there, is seen in its tree too.
pub(crate) fn set_propagation(mount: BorrowedFd, follows_host: bool) -> io::Result<()> {
    let propagation = if follows_host {
        libc::MS_SLAVE
    } else {
        libc::MS_PRIVATE
    };
    let attr = libc::mount_attr {
        attr_set: 0,
        attr_clr: 0,
        propagation,
        userns_fd: 0,
    };
    mount_setattr(mount, &attr, true)
}

fn mount_setattr(mount: BorrowedFd, attr: &libc::mount_attr, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated string and `attr` a structure of the given size; both outlive the call, which
    // writes to neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Runs `test` in a mount namespace of its own.
    pub(crate) fn in_namespace(test: impl FnOnce() + Send) {
        assert!(nix::unistd::geteuid().is_root(), "the test needs root");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                private_mount_namespace().unwrap();
                test();
            });
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        });
    }

    fn bind(source: &Path, name: &str, directory: bool, read_only: ReadOnly) -> HostBind {
        HostBind {
            source: source.to_path_buf(),
            name: name.into(),
            directory,
            recursive: false,
            read_only,
            follows_host: false,
        }
    }

    #[test]
    fn a_container_shows_its_binds_and_leaves_nothing() {
        in_namespace(|| {
            let state = tempfile::tempdir().unwrap();
            let rootfs = tempfile::tempdir().unwrap();
            fs::write(rootfs.path().join("file"), "hello").unwrap();
            let share = Share::new(state.path()).unwrap();
            let binds = [
                bind(rootfs.path(), "rootfs", true, ReadOnly::No),
                bind(rootfs.path(), "mounts/0/d", true, ReadOnly::Top),
                bind(
                    &rootfs.path().join("file"),
                    "mounts/1/f",
                    false,
                    ReadOnly::Recursive,
                ),
            ];
            share.add_container(Part(3), &binds).unwrap();
            let own = state.path().join("3");
            assert_eq!(
                fs::read_to_string(own.join("rootfs/file")).unwrap(),
                "hello"
            );
            assert_eq!(fs::read_to_string(own.join("mounts/1/f")).unwrap(), "hello");
            fs::write(own.join("rootfs/new"), "").unwrap();
            for read_only in ["mounts/0/d/x", "mounts/1/f"] {
                let error = fs::write(own.join(read_only), "").unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
            }
            share.remove_container(Part(3), &binds).unwrap();
            assert!(!own.exists());
            share.unmount().unwrap();
            assert_eq!(fs::read_dir(state.path()).unwrap().count(), 0);
            assert!(rootfs.path().join("new").exists());
        });
    }

    #[test]
    fn what_the_host_mounts_later_is_seen_only_where_that_is_asked_for() {
        in_namespace(|| {
            let host = tempfile::tempdir().unwrap();
            let none = None::<&str>;
            let tmpfs = |place: &Path| {
                fs::create_dir(place).unwrap();
                let flags = MsFlags::empty();
                mount(Some("x"), place, Some("tmpfs"), flags, none).unwrap();
            };
            let volume = host.path().join("volume");
            tmpfs(&volume);
            let shared = |place: &Path| {
                mount(none, place, none, MsFlags::MS_SHARED, none).unwrap();
            };
            shared(&volume);
            tmpfs(&volume.join("below"));
            shared(&volume.join("below"));
            let state = tempfile::tempdir().unwrap();
            let share = Share::new(state.path()).unwrap();
            let mut binds = [
                bind(&volume, "rootfs", true, ReadOnly::No),
                bind(&volume, "mounts/0/v", true, ReadOnly::Top),
                bind(&volume, "mounts/1/v", true, ReadOnly::Recursive),
            ];
            binds[0].recursive = true;
            binds[1].follows_host = true;
            binds[2].recursive = true;
            share.add_container(Part(3), &binds).unwrap();
            for later in ["later", "below/later"] {
                tmpfs(&volume.join(later));
                fs::write(volume.join(later).join("file"), "").unwrap();
            }
            let own = state.path().join("3");
            let seen = |path: &str| own.join(path).exists();
            assert!(seen("rootfs/below/later") && seen("rootfs/later"));
            assert!(!seen("rootfs/later/file") && !seen("rootfs/below/later/file"));
            assert!(!seen("mounts/1/v/later/file") && !seen("mounts/1/v/below/later/file"));
            assert!(seen("mounts/0/v/later/file"));
            // Its attributes are the host's.
            fs::write(own.join("mounts/0/v/later/file"), "x").unwrap();
            fs::write(own.join("mounts/0/v/file"), "x").unwrap_err();
            // The host does not see what is mounted in the share.
            let below = own.join("rootfs/below");
            mount(Some("x"), &below, Some("tmpfs"), MsFlags::empty(), none).unwrap();
            fs::write(below.join("unseen"), "").unwrap();
            assert!(!volume.join("below/unseen").exists());
            detach(&below).unwrap();
            share.remove_container(Part(3), &binds).unwrap();
            share.unmount().unwrap();
            detach(&volume).unwrap();
        });
    }

    #[test]
    fn the_guest_cannot_plant_a_link_where_the_host_mounts_next() {
        in_namespace(|| {
            let state = tempfile::tempdir().unwrap();
            let share = Share::new(state.path()).unwrap();
            let error = symlink("/etc", state.path().join("next")).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
            let error = fs::create_dir(state.path().join("next")).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
            share.unmount().unwrap();
        });
    }

    #[test]
    fn what_could_not_be_unmounted_is_not_taken_for_unmounted() {
        in_namespace(|| {
            // Of this thread alone, unlike the C library's.
            let become_user = |uid: libc::uid_t| {
                // SAFETY: a system call on values.
                let result = unsafe { libc::syscall(libc::SYS_setresuid, -1, uid, -1) };
                assert_eq!(result, 0);
            };
            let state = tempfile::tempdir().unwrap();
            let share = Share::new(state.path()).unwrap();
            become_user(65534);
            let refused = [share.unmount(), share.unmount()];
            become_user(0);
            assert!(refused.iter().all(Result::is_err), "{refused:?}");
            share.unmount().unwrap();
            share.unmount().unwrap();
            fs::remove_dir(state.path()).unwrap();
        });
    }

    #[test]
    fn device_nodes_cannot_be_opened_through_the_share() {
        in_namespace(|| {
            let state = tempfile::tempdir().unwrap();
            let rootfs = tempfile::tempdir().unwrap();
            let null = rootfs.path().join("null");
            nix::sys::stat::mknod(
                &null,
                nix::sys::stat::SFlag::S_IFCHR,
                Mode::from_bits_truncate(0o666),
                nix::sys::stat::makedev(1, 3),
            )
            .unwrap();
            let share = Share::new(state.path()).unwrap();
            let binds = [bind(rootfs.path(), "rootfs", true, ReadOnly::No)];
            share.add_container(Part(3), &binds).unwrap();
            let error = fs::File::open(state.path().join("3/rootfs/null")).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
            share.unmount().unwrap();
        });
    }
}

//! The sandbox's mount namespace, and the directory tree in it that the guest sees over virtio-fs.
//!
//! The server lives in a mount namespace of its own, which its VMM inherits: when both are gone, so are all mounts, whatever
//! ended them. The share's own skeleton (`<part>/rootfs`, `<part>/mounts/<n>/<name>`) is a tmpfs that the VMM sees read-only, so a
//! guest can't put a symbolic link where the host is about to mount; the server makes the skeleton's entries through a
//! descriptor of the writable mount underneath. The read-only mount is shared, so that later mounts reach a VMM with a
//! mount namespace of its own.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
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

/// Gives the calling thread, and the processes it starts, a mount namespace that sees the host's mounts come and go but
/// shows the host none of its own. Call it before there are other threads.
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
            let recursive = if bind.recursive {
                MsFlags::MS_REC
            } else {
                MsFlags::empty()
            };
            mount(
                Some(&bind.source),
                &target,
                None::<&str>,
                MsFlags::MS_BIND | recursive,
                None::<&str>,
            )
            .map_err(fail("bind for the guest", &bind.source))?;
            open_mount(&target)
                .and_then(|mount| bind.restrict(mount.as_fd()))
                .map_err(|e| ShareError::new("restrict the bind of", &bind.source, e))?;
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
    /// Has the mount that the bind has made, whose root `mount` is, open no device node on the host, run no set-user-ID program, and write no more
    /// than the bind allows.
    pub(crate) fn restrict(&self, mount: BorrowedFd) -> io::Result<()> {
        set_attributes(mount, NO_PRIVILEGES, self.recursive)?;
        match self.read_only {
            ReadOnly::No => Ok(()),
            ReadOnly::Top => set_attributes(mount, libc::MOUNT_ATTR_RDONLY, false),
            ReadOnly::Recursive => set_attributes(mount, libc::MOUNT_ATTR_RDONLY, true),
        }
    }
}

/// An image's device nodes and set-user-ID programs are the guest's, and nobody's on the host.
pub(crate) const NO_PRIVILEGES: u64 = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;

fn open_mount(target: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::open(target, flags, Mode::empty())?)
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
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated string and `attr` a structure of the given size; both outlive the call, which
    // writes to neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
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

//! What a client of the host sees in the mount namespace of a container's stand-in: the container's root file system and volumes, as
//! far as they are the host's, and nothing else of the host. Engines enter that namespace to copy files into and out of a container that runs, and
//! take its root for the container's.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, chroot, pivot_root};
use oci_spec::runtime::Mount;
use pathrs::flags::OpenFlags;
use pathrs::{Handle, Root};

use crate::adapt::{self, HostBind};
use crate::share::{NO_PRIVILEGES, set_attributes, set_propagation};
use crate::spec::Bundle;

/// What there is to see.
#[derive(Debug, Clone)]
pub struct View {
    rootfs: PathBuf,
    read_only: bool,
    follows_host: bool,
    volumes: Vec<Volume>,
}

/// A bind mount of the container's.
#[derive(Debug, Clone)]
struct Volume {
    bind: HostBind,
    destination: PathBuf,
    /// Whether its mount point is in the guest's memory, such as one below `/run` on a tmpfs: then it is not to be made on the host.
    in_guest: bool,
}

impl View {
    /// That of a bundle's container.
    pub fn of(bundle: &Bundle) -> Self {
        let mounts = bundle.spec.mounts().as_deref().unwrap_or_default();
        let mut of_guest: Vec<&Path> = Vec::new();
        let mut volumes = Vec::new();
        for (n, mount) in mounts.iter().enumerate() {
            let destination: &Path = mount.destination();
            if !adapt::is_bind(mount) {
                of_guest.push(destination);
            } else if let Some(bind) = bind(mount, n, bundle) {
                volumes.push(Volume {
                    bind,
                    destination: destination.to_path_buf(),
                    in_guest: of_guest.iter().any(|above| destination.starts_with(above)),
                });
            }
        }
        let root = bundle.spec.root().as_ref();
        Self {
            rootfs: bundle.rootfs.clone(),
            read_only: root.and_then(|root| root.readonly()) == Some(true),
            follows_host: adapt::root_follows_host(&bundle.spec),
            volumes,
        }
    }

    /// Makes it all that this process sees. It must have a mount namespace of its own, one thread, and `/proc`.
    ///
    /// Volumes that can't be shown are left out: of mounts that can't be made it is for the server to tell, which makes the same for the
    /// guest.
    pub fn enter(&self) -> io::Result<()> {
        bind_on(&self.rootfs, &self.rootfs, true)?;
        let root = Root::open(&self.rootfs).map_err(io::Error::other)?;
        set_attributes(root.as_fd(), NO_PRIVILEGES, true)?;
        set_propagation(root.as_fd(), self.follows_host)?;
        for volume in &self.volumes {
            let _ = volume.show(&root);
        }
        if self.read_only {
            set_attributes(root.as_fd(), libc::MOUNT_ATTR_RDONLY, false)?;
        }
        chdir(&self.rootfs)?;
        match pivot_root(".", ".") {
            // The old root is now on top of the new one.
            Ok(()) => umount2(".", MntFlags::MNT_DETACH)?,
            // The host runs from its initramfs, which can't be put away.
            Err(Errno::EINVAL) => {
                mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
                chroot(".")?;
            }
            Err(errno) => return Err(errno.into()),
        }
        Ok(chdir("/")?)
    }
}

impl Volume {
    /// Binds it where the container has it. Nothing in the image can lead out of its root.
    fn show(&self, root: &Root) -> io::Result<()> {
        let HostBind {
            source, recursive, ..
        } = &self.bind;
        bind_on(source, &path_of(&self.mount_point(root)?), *recursive)?;
        // Found again: what was there is now below it.
        let shown = root.resolve(&self.destination).map_err(io::Error::other)?;
        self.bind.restrict(shown.as_fd())
    }

    /// Where it goes, which is made if it is not there, as for the container itself.
    fn mount_point(&self, root: &Root) -> io::Result<Handle> {
        match root.resolve(&self.destination) {
            Ok(found) => return Ok(found),
            Err(error) if self.in_guest => return Err(io::Error::other(error)),
            Err(_) => {}
        }
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        let make = || {
            if self.bind.directory {
                return root.mkdir_all(&self.destination, &mode);
            }
            if let Some(parent) = self.destination.parent() {
                root.mkdir_all(parent, &mode)?;
            }
            root.create_file(&self.destination, OpenFlags::O_CREAT, &mode)?;
            root.resolve(&self.destination)
        };
        make().map_err(io::Error::other)
    }
}

fn bind(mount: &Mount, n: usize, bundle: &Bundle) -> Option<HostBind> {
    let (source, metadata) = adapt::source_of(mount, "", &bundle.dir).ok()?;
    adapt::host_bind(mount, n, &source, &metadata)
}

fn path_of(handle: &Handle) -> PathBuf {
    format!("/proc/self/fd/{}", handle.as_fd().as_raw_fd()).into()
}

fn bind_on(source: &Path, target: &Path, recursive: bool) -> io::Result<()> {
    let recursive = if recursive {
        MsFlags::MS_REC
    } else {
        MsFlags::empty()
    };
    let flags = MsFlags::MS_BIND | recursive;
    Ok(mount(
        Some(source),
        target,
        None::<&str>,
        flags,
        None::<&str>,
    )?)
}

//! What a container finds in /dev: the default devices, the spec's, and the links that programs expect
//! (runtime spec, config-linux.md, "Default Devices" and "Dev symbolic links").

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use bulkhead_protocol::DEFAULT_DEVICES;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat, makedev, mknodat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat};

use crate::error::{Context, Error, Kind, Result};
use crate::mounts::protect_device;
use crate::paths::{self, Make};
use crate::spec::Device;
use crate::sys;

const LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

/// The default devices that the spec does not define itself.
pub fn defaults(spec: &[Device]) -> impl Iterator<Item = Device> {
    DEFAULT_DEVICES
        .iter()
        .filter(|(path, ..)| !spec.iter().any(|device| device.path == Path::new(path)))
        .map(|&(path, major, minor)| Device {
            path: path.into(),
            kind: libc::S_IFCHR,
            major,
            minor,
            mode: 0o666,
            uid: 0,
            gid: 0,
        })
}

/// Where nodes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nodes {
    /// They are made.
    Made,
    /// Nobody in a user namespace may make one, or use one that a tenant made: they are bind mounts of the guest's.
    Bound,
}

/// Makes a node; where the file system below does not take nodes, a bind mount of the guest's own. One that exists
/// is left alone, as with runc.
pub fn make(root: BorrowedFd<'_>, device: &Device, nodes: Nodes) -> Result<()> {
    let field = || format!("linux.devices ({})", device.path.display());
    if nodes == Nodes::Bound && device.kind != libc::S_IFIFO {
        return bind_own(
            root,
            device,
            makedev(device.major.into(), device.minor.into()),
        );
    }
    let (parent, name) =
        paths::open_parent(root, device.path.as_os_str().as_bytes()).what(field)?;
    let kind = SFlag::from_bits_truncate(device.kind);
    let number = makedev(device.major.into(), device.minor.into());
    match mknodat(
        &parent,
        name,
        kind,
        Mode::from_bits_truncate(device.mode),
        number,
    ) {
        Ok(()) if device.uid == 0 && device.gid == 0 => Ok(()),
        Ok(()) => fchownat(
            &parent,
            name,
            Some(Uid::from_raw(device.uid)),
            Some(Gid::from_raw(device.gid)),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )
        .what(field),
        Err(Errno::EEXIST) => Ok(()),
        Err(Errno::EPERM | Errno::EOPNOTSUPP | Errno::EACCES) => bind_own(root, device, number),
        Err(errno) => Err(Error::system(field(), errno)),
    }
}

fn bind_own(root: BorrowedFd<'_>, device: &Device, number: libc::dev_t) -> Result<()> {
    let field = || format!("linux.devices ({})", device.path.display());
    let own = open(
        &device.path,
        OFlag::O_PATH | OFlag::O_CLOEXEC,
        Mode::empty(),
    );
    let own = own.ok().filter(|own| {
        fstat(own)
            .is_ok_and(|stat| stat.st_rdev == number && stat.st_mode & libc::S_IFMT == device.kind)
    });
    let own = own.ok_or_else(|| {
        Error::setup(
            Kind::PermissionDenied,
            format!(
                "{}: no node can be made here, and the guest's own /dev has no {}:{} at this path",
                field(),
                device.major,
                device.minor
            ),
        )
    })?;
    let node = sys::clone_tree_of(own.as_fd(), false).what(field)?;
    protect_device(node.as_fd()).what(field)?;
    let place =
        paths::open_or_make(root, device.path.as_os_str().as_bytes(), Make::File).what(field)?;
    sys::attach(node.as_fd(), place.as_fd()).what(field)
}

/// Makes the links of /dev. What has one of the names already stays, except for ptmx: the image's would be that of
/// another devpts.
pub fn make_links(root: BorrowedFd<'_>) -> Result<()> {
    let what = || "cannot make the links of /dev";
    let dev = paths::open_or_make(root, b"/dev", Make::Directory).what(what)?;
    match unlinkat(&dev, "ptmx", UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(errno) => return Err(Error::system(what(), errno)),
    }
    for &(target, name) in LINKS {
        match symlinkat(target, &dev, name) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(Error::system(what(), errno)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_of_the_spec_replaces_the_default_one() {
        let own = Device {
            path: "/dev/null".into(),
            kind: libc::S_IFCHR,
            major: 1,
            minor: 3,
            mode: 0o600,
            uid: 5,
            gid: 5,
        };
        let paths: Vec<_> = defaults(&[own]).map(|device| device.path).collect();
        assert_eq!(paths.len(), DEFAULT_DEVICES.len() - 1);
        assert!(!paths.contains(&"/dev/null".into()));
    }
}

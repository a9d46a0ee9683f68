//! Mounts that the agent makes ready before it forks, where the init could not make them itself.
//!
//! An init in a user namespace of its own has no privileges over the guest's files: it can neither pass through
//! directories that are closed to others, nor copy a mount without those below it, nor map ids. The agent copies the
//! root filesystem and the sources of bind mounts for it; the copies are attached nowhere until the init does.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;

use crate::error::{Context, Error, Kind, Result};
use crate::paths;
use crate::spec::{Mount, MountIds, Plan};
use crate::{sys, user_namespace};

/// Copies of mounts, attached nowhere.
#[derive(Debug)]
pub struct Trees {
    root: Option<OwnedFd>,
    /// For each of the spec's mounts.
    binds: Vec<Option<OwnedFd>>,
}

impl Trees {
    /// Copies what the init of this container can't. Numbers below `first_free` are the init's own.
    pub fn prepare(plan: &Plan, first_free: RawFd) -> Result<Self> {
        let unprivileged = plan.id_maps.is_some();
        let root = if unprivileged {
            Some(out_of_the_way(root(plan)?.1, first_free)?)
        } else {
            None
        };
        let bind = |mount: &Mount| {
            let wanted =
                mount.ids.is_some() || unprivileged && mount.options.bind && !mount.options.remount;
            if !wanted {
                return Ok(None);
            }
            let tree = bind(mount)?;
            // A copy is a peer of its source: what the container mounts below must not come back.
            sys::set_attributes(tree.as_fd(), 0, 0, libc::MS_SLAVE, true).what(|| &mount.field)?;
            if let Some(ids) = &mount.ids {
                map_ids(tree.as_fd(), ids, mount)?;
            }
            out_of_the_way(tree, first_free).map(Some)
        };
        Ok(Self {
            root,
            binds: plan.mounts.iter().map(bind).collect::<Result<_>>()?,
        })
    }

    /// What the init must not close.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let all = self.root.iter().chain(self.binds.iter().flatten());
        all.map(AsRawFd::as_raw_fd).collect()
    }

    pub(super) fn root(&self) -> Option<BorrowedFd<'_>> {
        self.root.as_ref().map(AsFd::as_fd)
    }

    pub(super) fn bind(&self, index: usize) -> Option<BorrowedFd<'_>> {
        self.binds.get(index)?.as_ref().map(AsFd::as_fd)
    }
}

fn out_of_the_way(tree: OwnedFd, first_free: RawFd) -> Result<OwnedFd> {
    if tree.as_raw_fd() >= first_free {
        return Ok(tree);
    }
    let moved = fcntl(&tree, FcntlArg::F_DUPFD_CLOEXEC(first_free))
        .what(|| "cannot arrange descriptors")?;
    // SAFETY: the call has just made this descriptor, and nobody else knows it.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(moved) })
}

/// The root filesystem: where it is, and a private copy of the mount with everything below.
pub(super) fn root(plan: &Plan) -> Result<(OwnedFd, OwnedFd)> {
    let field = || format!("root.path ({})", plan.root.display());
    let place = root_place(plan)?;
    let tree = sys::clone_tree_of(place.as_fd(), true).what(field)?;
    // As a copy it would be a peer of, or below, what it was copied from.
    sys::set_attributes(tree.as_fd(), 0, 0, libc::MS_PRIVATE, true).what(field)?;
    let options = &plan.root_options;
    sys::set_attributes(tree.as_fd(), options.set, options.clear, 0, false).what(field)?;
    Ok((place, tree))
}

/// Where the root filesystem is.
pub(super) fn root_place(plan: &Plan) -> Result<OwnedFd> {
    let field = || format!("root.path ({})", plan.root.display());
    let path = CString::new(plan.root.as_os_str().as_bytes())
        .map_err(|_| Error::spec("root.path", "must not hold a null byte"))?;
    let place = open(
        path.as_c_str(),
        OFlag::O_PATH | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .what(field)?;
    if !paths::is_directory(place.as_fd()).what(field)? {
        return Err(Error::spec(field(), "is not a directory"));
    }
    Ok(place)
}

/// A copy of a bind mount's source. Below it nothing that a container may have put there leads elsewhere.
pub(super) fn bind(mount: &Mount) -> Result<OwnedFd> {
    let path = mount.source.as_deref().unwrap_or(Path::new(""));
    let field = |path: &Path| format!("{}: source {}", mount.field, path.display());
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let mut source = open(path, flags, Mode::empty()).what(|| field(path))?;
    if let Some(below) = &mount.below {
        source = sys::open_below(source.as_fd(), below.as_os_str().as_bytes())
            .what(|| field(&path.join(below)))?;
    }
    sys::clone_tree_of(source.as_fd(), mount.options.bind_recursive).what(|| field(path))
}

fn map_ids(tree: BorrowedFd<'_>, ids: &MountIds, mount: &Mount) -> Result<()> {
    let namespace = user_namespace::make_for_mount(&ids.maps, &mount.field)?;
    sys::map_ids(tree, namespace.as_fd(), ids.recursive).map_err(|errno| match errno {
        Errno::EINVAL => Error::setup(
            Kind::InvalidArgument,
            format!(
                "{}: the file system of its source can't map ids in the guest's kernel; remove idmap, ridmap, \
                 uidMappings and gidMappings",
                mount.field
            ),
        ),
        errno => Error::system(format!("{}: cannot map ids", mount.field), errno),
    })
}

//! Mounts that the agent makes ready before it forks, where the init could not make them itself.
//!
//! An init in a user namespace of its own has no privileges over the guest's files: it can neither pass through
//! directories that are closed to others, nor copy a mount without those below it, nor map ids. A child of the agent copies the
//! root filesystem and the sources of bind mounts for it; the copies are attached nowhere until the init does. The agent itself opens
//! no path of the share: files of the host may be slow, and it has other containers to see to.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;

use crate::error::{Context, Error, Kind, Result};
use crate::handshake::{self, Report};
use crate::spec::{Mount, MountIds, Plan};
use crate::sys::{self, Fork};
use crate::{launch, paths, user_namespace};

/// Copies of mounts, attached nowhere.
#[derive(Debug)]
pub struct Trees {
    root: Option<OwnedFd>,
    /// For each of the spec's mounts.
    binds: Vec<Option<OwnedFd>>,
}

impl Trees {
    /// Copies what the init of this container can't. Numbers below `first_free` are the init's own.
    pub async fn prepare(plan: &Plan, first_free: RawFd) -> Result<Self> {
        let mut trees = Self {
            root: None,
            binds: plan.mounts.iter().map(|_| None).collect(),
        };
        let wanted = wanted(plan);
        if wanted.is_empty() {
            return Ok(trees);
        }
        let what = || "cannot copy the container's mounts";
        let (mine, theirs) = handshake::pair().what(what)?;
        let socket = handshake::Agent::new(mine).what(what)?;
        // SAFETY: the agent has one thread, and the child goes into a function that never returns.
        if let Fork::Child = unsafe { sys::fork_aside(0) }.what(what)? {
            copy_all(plan, &wanted, theirs)
        }
        drop(theirs);
        for wanted in wanted {
            let tree = match socket.report().await.what(what)? {
                Report::Tree(tree) => out_of_the_way(tree, first_free)?,
                Report::Failed(error) => return Err(error),
                _ => return Err(Error::setup(Kind::Internal, what())),
            };
            match wanted {
                Wanted::Root => trees.root = Some(tree),
                Wanted::Bind(index) => {
                    if let Some(bind) = trees.binds.get_mut(index) {
                        *bind = Some(tree);
                    }
                }
            }
        }
        Ok(trees)
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

/// Something to be copied.
#[derive(Debug, Clone, Copy)]
enum Wanted {
    Root,
    /// The source of the mount of this index.
    Bind(usize),
}

fn wanted(plan: &Plan) -> Vec<Wanted> {
    let unprivileged = plan.id_maps.is_some();
    let bind = |mount: &Mount| {
        mount.ids.is_some() || unprivileged && mount.options.bind && !mount.options.remount
    };
    let binds = plan.mounts.iter().enumerate();
    let binds = binds.filter(|(_, mount)| bind(mount));
    unprivileged
        .then_some(Wanted::Root)
        .into_iter()
        .chain(binds.map(|(index, _)| Wanted::Bind(index)))
        .collect()
}

/// The life of the child that copies.
fn copy_all(plan: &Plan, wanted: &[Wanted], socket: OwnedFd) -> ! {
    let _guard = launch::ExitOnUnwind;
    let copied = launch::close_all_but(&socket).and_then(|()| {
        wanted.iter().try_for_each(|wanted| {
            let tree = match wanted {
                Wanted::Root => root(plan)?.1,
                Wanted::Bind(index) => copy(plan, *index)?,
            };
            handshake::send_tree(socket.as_fd(), tree.as_fd()).what(|| "cannot report to the agent")
        })
    });
    match copied {
        Ok(()) => launch::end(0),
        Err(error) => {
            handshake::send_failure(socket.as_fd(), &error);
            launch::exit()
        }
    }
}

fn copy(plan: &Plan, index: usize) -> Result<OwnedFd> {
    let mount = plan
        .mounts
        .get(index)
        .ok_or_else(|| Error::setup(Kind::Internal, "no such mount"))?;
    let tree = bind(mount)?;
    // A copy is a peer of its source: what the container mounts below must not come back.
    sys::set_attributes(tree.as_fd(), 0, 0, libc::MS_SLAVE, true).what(|| &mount.field)?;
    if let Some(ids) = &mount.ids {
        map_ids(tree.as_fd(), ids, mount)?;
    }
    Ok(tree)
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

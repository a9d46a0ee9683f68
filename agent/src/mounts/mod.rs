//! The container's file-system tree, made by its init in its new mount namespace.
//!
//! Everything happens below a descriptor of the root filesystem and before the pivot: a place is resolved once, in
//! the root ([`crate::paths`]), and mounts are attached to what was resolved.

mod copy_up;
mod proc;
mod trees;

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use bulkhead_protocol::cleaned;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{chdir, fchdir, pivot_root};

use crate::error::{Context, Error, Kind, Result, errno_text};
use crate::mount_options::MountOptions;
use crate::paths::{self, Make};
use crate::spec::{Mount, Plan};
use crate::sys::{self, FsContext, attr};

pub use trees::Trees;

/// The container's root filesystem, not yet the root.
#[derive(Debug)]
pub struct Rootfs<'a> {
    root: OwnedFd,
    trees: &'a Trees,
    /// Mounts that become read-only at the end.
    read_only_later: Vec<OwnedFd>,
    /// Devices of file systems that are this container's alone.
    own: Vec<libc::dev_t>,
    /// Mounts with a propagation of their own, which the root's must not replace.
    propagating: Vec<(OwnedFd, &'a Mount)>,
    /// Whether the container is in the guest's own cgroup namespace.
    guests_cgroups: bool,
}

/// Each mount of these is a file system of its own. Others have one for the whole guest, or for a namespace.
const OWN: &[&str] = &["tmpfs", "ramfs", "devpts"];

impl<'a> Rootfs<'a> {
    /// Mounts the root filesystem onto itself: `pivot_root` wants a mount.
    pub fn mount(plan: &Plan, trees: &'a Trees) -> Result<Self> {
        let none: Option<&str> = None;
        // Nothing of what follows may reach the agent's namespace.
        mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)
            .what(|| "cannot detach the mount namespace")?;
        let field = || format!("root.path ({})", plan.root.display());
        let (place, root) = match trees.root() {
            Some(tree) => (
                trees::root_place(plan)?,
                tree.try_clone_to_owned().what(field)?,
            ),
            None => trees::root(plan)?,
        };
        sys::attach(root.as_fd(), place.as_fd()).what(field)?;
        Ok(Self {
            root,
            trees,
            read_only_later: Vec::new(),
            own: Vec::new(),
            propagating: Vec::new(),
            guests_cgroups: plan.namespaces & libc::CLONE_NEWCGROUP as u64 == 0,
        })
    }

    /// The root directory.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// One of the spec's mounts, the one with this index.
    pub fn add(&mut self, index: usize, mount: &'a Mount) -> Result<()> {
        let attached = if mount.options.remount {
            self.change(mount)?
        } else if mount.options.bind {
            self.add_bind(index, mount)?
        } else if mount.fs.is_empty() || mount.fs == "none" {
            self.open(mount)?
        } else {
            self.add_file_system(mount)?
        };
        set_propagation(attached.as_fd(), mount)?;
        if !mount.options.propagation.is_empty() {
            let attached = attached.try_clone().what(|| &mount.field)?;
            self.propagating.push((attached, mount));
        }
        if read_only_later(mount) {
            self.read_only_later.push(attached);
        }
        Ok(())
    }

    fn open(&self, mount: &Mount) -> Result<OwnedFd> {
        paths::open(self.root(), mount.destination.as_os_str().as_bytes()).what(|| &mount.field)
    }

    fn add_bind(&self, index: usize, mount: &Mount) -> Result<OwnedFd> {
        let tree = match self.trees.bind(index) {
            Some(tree) => tree.try_clone_to_owned().what(|| &mount.field)?,
            None => trees::bind(mount)?,
        };
        let make = if paths::is_directory(tree.as_fd()).what(|| &mount.field)? {
            Make::Directory
        } else {
            Make::File
        };
        set_attributes(tree.as_fd(), &mount.options).what(|| &mount.field)?;
        protect_device(tree.as_fd()).what(|| &mount.field)?;
        self.attach(&tree, mount, make)?;
        Ok(tree)
    }

    /// `remount`: of the mount alone with `bind`, else of its file system too, if that is the container's own: what a
    /// link of the image leads to must not become read-only for the whole guest. As with `mount(2)`, attributes that
    /// are not named are taken away, those of access times only if one is named.
    fn change(&self, mount: &Mount) -> Result<OwnedFd> {
        let options = &mount.options;
        let place = self.open(mount)?;
        let read_only = options.set & attr::RDONLY != 0;
        let device = fstat(&place).what(|| &mount.field)?.st_dev;
        if !options.bind && self.own.contains(&device) {
            let context = FsContext::pick(place.as_fd()).what(|| &mount.field)?;
            let failed = |errno| failed(&context, mount, "remount", errno);
            let state = if read_only { "ro" } else { "rw" };
            context.set(state, None).map_err(failed)?;
            for (key, value) in &options.data {
                let value = value.as_ref().map(String::as_bytes);
                context.set(key, value).map_err(failed)?;
            }
            context.reconfigure().map_err(failed)?;
        }
        let mut clear =
            attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC | attr::NOSYMFOLLOW;
        if (options.set | options.clear) & (attr::ATIME | attr::NODIRATIME) != 0 {
            clear |= attr::ATIME | attr::NODIRATIME;
        }
        sys::set_attributes(place.as_fd(), options.set, clear, 0, false)
            .what(|| format!("{}: cannot remount", mount.field))?;
        Ok(place)
    }

    fn add_file_system(&mut self, mount: &Mount) -> Result<OwnedFd> {
        let destination = mount.destination.as_os_str().as_bytes();
        let fs = if mount.fs == "cgroup" {
            "cgroup2"
        } else {
            &mount.fs
        };
        if matches!(fs, "proc" | "sysfs") {
            self.refuse_link(mount, fs)?;
        }
        if fs == "cgroup2" && self.guests_cgroups {
            // A new mount would reset what the agent's says of the whole hierarchy (`nsdelegate`).
            let tree = self.bind_cgroups(mount)?;
            self.attach(&tree, mount, Make::Directory)?;
            return Ok(tree);
        }
        let context = FsContext::open(fs).map_err(|errno| match errno {
            Errno::ENODEV => Error::setup(
                Kind::InvalidArgument,
                format!(
                    "{}: the guest's kernel has no file system {fs:?}",
                    mount.field
                ),
            ),
            errno => Error::system(&mount.field, errno),
        })?;
        let failed = |errno| failed(&context, mount, &format!("mount {fs}"), errno);
        let source = mount
            .source
            .as_deref()
            .map_or(fs.as_bytes(), |source| source.as_os_str().as_bytes());
        context.set("source", Some(source)).map_err(failed)?;
        if fs == "tmpfs" && !mount.options.data.iter().any(|(key, _)| key == "mode") {
            // A tmpfs takes the mode of the directory that it covers, as with runc.
            if let Ok(covered) = paths::open(self.root(), destination) {
                let mode = fstat(&covered).what(|| &mount.field)?.st_mode & 0o7777;
                context
                    .set("mode", Some(format!("{mode:o}").as_bytes()))
                    .map_err(failed)?;
            }
        }
        // The data of a cgroup mount are the names of v1's controllers.
        let data = match fs {
            "cgroup2" => &[][..],
            _ => &mount.options.data,
        };
        for (key, value) in data {
            context
                .set(key, value.as_ref().map(String::as_bytes))
                .map_err(failed)?;
        }
        let mut attributes = mount.options.set | mount.options.set_recursive;
        if read_only_later(mount) {
            attributes &= !attr::RDONLY;
        }
        let tree = match context.mount(attributes) {
            // In a cgroup namespace that another user namespace owns.
            Err(Errno::EPERM | Errno::EBUSY) if fs == "cgroup2" => self.bind_cgroups(mount)?,
            tree => tree.map_err(failed)?,
        };
        if mount.options.copy_up && fs == "tmpfs" {
            self.copy_up(mount, &tree)?;
        }
        self.attach(&tree, mount, Make::Directory)?;
        if OWN.contains(&fs) {
            self.own.push(fstat(&tree).what(|| &mount.field)?.st_dev);
        }
        Ok(tree)
    }

    /// A view of the guest's cgroups.
    fn bind_cgroups(&self, mount: &Mount) -> Result<OwnedFd> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").what(|| &mount.field)?;
        let guests = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|fields| fields.get(2) == Some(&"cgroup2"));
        let path = guests.as_ref().and_then(|fields| fields.get(1));
        let path = path
            .and_then(|path| CString::new(*path).ok())
            .unwrap_or_default();
        let tree = sys::clone_tree(&path, false).what(|| &mount.field)?;
        // As a copy it would be a peer of, or below, what it was copied from.
        sys::set_attributes(tree.as_fd(), 0, 0, libc::MS_PRIVATE, false).what(|| &mount.field)?;
        set_attributes(tree.as_fd(), &mount.options).what(|| &mount.field)?;
        Ok(tree)
    }

    fn copy_up(&self, mount: &Mount, tree: &OwnedFd) -> Result<()> {
        let what = || format!("{}: tmpcopyup", mount.field);
        let destination = mount.destination.as_os_str().as_bytes();
        let covered = paths::open_or_make(self.root(), destination, Make::Directory).what(what)?;
        copy_up::copy_directory(covered.as_fd(), tree.as_fd()).what(what)
    }

    /// A link at the place of /proc or /sys would put them where the masks don't look for them.
    fn refuse_link(&self, mount: &Mount, fs: &str) -> Result<()> {
        // However it is spelled: `/proc/` would be what a link leads to.
        let destination = cleaned(&mount.destination);
        let destination = destination.as_os_str().as_bytes();
        match sys::open_in_root(self.root(), destination, OFlag::O_PATH | OFlag::O_NOFOLLOW) {
            Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(Error::system(&mount.field, errno)),
            Ok(place) if paths::is_directory(place.as_fd()).what(|| &mount.field)? => Ok(()),
            Ok(_) => Err(Error::setup(
                Kind::InvalidArgument,
                format!(
                    "{}: {fs} must be mounted on ordinary directory",
                    mount.field
                ),
            )),
        }
    }

    fn attach(&self, tree: &OwnedFd, mount: &Mount, make: Make) -> Result<()> {
        let destination = mount.destination.as_os_str().as_bytes();
        let place = paths::open_or_make(self.root(), destination, make)
            .what(|| format!("{}: cannot make the destination", mount.field))?;
        proc::check(self.root(), place.as_fd(), tree.as_fd(), mount)?;
        sys::attach(tree.as_fd(), place.as_fd()).what(|| &mount.field)
    }

    /// Makes read-only what had to wait for it.
    pub fn finish(&self) -> Result<()> {
        for mount in &self.read_only_later {
            sys::set_attributes(mount.as_fd(), attr::RDONLY, 0, 0, false)
                .what(|| "cannot make a mount read-only")?;
        }
        Ok(())
    }

    /// `linux.readonlyPaths`: each a read-only mount of itself, and what is mounted below stays as it is, as under runc. What does not
    /// exist needs none.
    pub fn make_read_only(&self, path: &Path) -> Result<()> {
        let field = || format!("linux.readonlyPaths ({})", path.display());
        let place = match paths::open(self.root(), path.as_os_str().as_bytes()) {
            Err(Errno::ENOENT) => return Ok(()),
            place => place.what(field)?,
        };
        let tree = sys::clone_tree_of(place.as_fd(), true).what(field)?;
        sys::set_attributes(tree.as_fd(), attr::RDONLY, 0, 0, false).what(field)?;
        sys::attach(tree.as_fd(), place.as_fd()).what(field)
    }

    /// `linux.maskedPaths`: an empty read-only directory over a directory, the null device over the rest. `null` is
    /// the agent's own: the container's may be anything.
    pub fn mask(&self, path: &Path, null: BorrowedFd<'_>) -> Result<()> {
        let field = || format!("linux.maskedPaths ({})", path.display());
        let place = match paths::open(self.root(), path.as_os_str().as_bytes()) {
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
            place => place.what(field)?,
        };
        let mask = if paths::is_directory(place.as_fd()).what(field)? {
            let context = FsContext::open("tmpfs").what(field)?;
            context.set("source", Some(b"tmpfs")).what(field)?;
            context.mount(attr::RDONLY).what(field)?
        } else {
            let null = sys::clone_tree_of(null, false).what(field)?;
            protect_device(null.as_fd()).what(field)?;
            null
        };
        sys::attach(mask.as_fd(), place.as_fd()).what(field)
    }

    /// Makes the working directory, with runc's words for what can't be one.
    pub fn make_cwd(&self, cwd: &Path) -> Result<()> {
        let made = self.make_directory(cwd);
        match made {
            Ok(()) => Ok(()),
            // A directory that can't be made (say, on a read-only mount) is chdir's to complain of.
            Err(Errno::EROFS | Errno::EACCES | Errno::EPERM) => Ok(()),
            Err(errno) => {
                let mut prefixes: Vec<_> = cwd.ancestors().collect();
                prefixes.reverse();
                let not_a_directory = |prefix: &&&Path| {
                    paths::open(self.root(), prefix.as_os_str().as_bytes())
                        .and_then(|place| paths::is_directory(place.as_fd()))
                        == Ok(false)
                };
                let culprit = prefixes.iter().find(not_a_directory).copied();
                let culprit = culprit.unwrap_or(cwd).display();
                Err(Error::system(format!("mkdir {culprit}"), errno))
            }
        }
    }

    fn make_directory(&self, path: &Path) -> nix::Result<()> {
        let place = paths::open_or_make(self.root(), path.as_os_str().as_bytes(), Make::Directory)?;
        match paths::is_directory(place.as_fd())? {
            true => Ok(()),
            false => Err(Errno::ENOTDIR),
        }
    }

    /// Makes it the root of this process and lets go of everything else.
    pub fn pivot(self, read_only: bool, propagation: Option<(libc::c_ulong, bool)>) -> Result<()> {
        let what = || "cannot pivot into the root filesystem";
        if read_only {
            sys::set_attributes(self.root(), attr::RDONLY, 0, 0, false).what(|| "root.readonly")?;
        }
        let old = open("/", OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).what(what)?;
        fchdir(&self.root).what(what)?;
        // With both places the same, the old root ends up on top of the new one; no directory for it is needed.
        pivot_root(".", ".").what(what)?;
        fchdir(&old).what(what)?;
        umount2(".", MntFlags::MNT_DETACH).what(what)?;
        chdir("/").what(what)?;
        if let Some((kind, recursive)) = propagation {
            sys::set_attributes(self.root(), 0, 0, kind, recursive)
                .what(|| "linux.rootfsPropagation")?;
            // A shared root can't be pivoted into, so it comes last; what the mounts say of themselves holds all the same.
            for (attached, mount) in &self.propagating {
                set_propagation(attached.as_fd(), mount)?;
            }
        }
        Ok(())
    }
}

fn set_propagation(attached: BorrowedFd<'_>, mount: &Mount) -> Result<()> {
    for &(kind, recursive) in &mount.options.propagation {
        sys::set_attributes(attached, 0, 0, kind, recursive)
            .what(|| format!("{}: cannot set the propagation", mount.field))?;
    }
    Ok(())
}

/// Makes a mount read-only that is of a device. It is one of the guest's own, whose mode and owner are everybody's; the device itself
/// can be written.
pub fn protect_device(tree: BorrowedFd<'_>) -> nix::Result<()> {
    match fstat(tree)?.st_mode & libc::S_IFMT {
        libc::S_IFCHR | libc::S_IFBLK => sys::set_attributes(tree, attr::RDONLY, 0, 0, false),
        _ => Ok(()),
    }
}

fn failed(context: &FsContext, mount: &Mount, action: &str, errno: Errno) -> Error {
    let why = context.message().unwrap_or_else(|| errno_text(errno));
    Error::setup(
        Kind::of(errno),
        format!("{}: cannot {action}: {why}", mount.field),
    )
}

/// What makes a mount read-only waits for /dev, whose nodes are still to be made, and for every tmpfs, which starts
/// empty and may have to hold places for other mounts.
fn read_only_later(mount: &Mount) -> bool {
    let options = &mount.options;
    !options.bind
        && !options.remount
        && (mount.fs == "tmpfs" || is_dev(&mount.destination))
        && (options.set | options.set_recursive) & attr::RDONLY != 0
}

fn set_attributes(tree: BorrowedFd<'_>, options: &MountOptions) -> nix::Result<()> {
    // In runc's order: the recursive forms win.
    for (set, clear, recursive) in [
        (options.set, options.clear, false),
        (options.set_recursive, options.clear_recursive, true),
    ] {
        if set | clear != 0 {
            sys::set_attributes(tree, set, clear, 0, recursive)?;
        }
    }
    Ok(())
}

/// Whether a destination is /dev itself, however it is spelled.
pub fn is_dev(destination: &Path) -> bool {
    cleaned(destination) == Path::new("/dev")
}

/// Whether a device is the multiplexer of pseudo-terminals.
pub fn is_ptmx(device: &Path) -> bool {
    cleaned(device) == Path::new("/dev/ptmx")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dev_is_recognised_however_it_is_spelled() {
        for path in ["/dev", "/dev/", "dev", "//dev/.", "/./dev", "/../x/../dev"] {
            assert!(is_dev(Path::new(path)), "{path}");
        }
        for path in ["/", "/dev/shm", "/devices", "/x/dev"] {
            assert!(!is_dev(Path::new(path)), "{path}");
        }
    }
}

//! The emulated host's file systems: the machine's root under a tmpfs overlay, at the same paths as outside,
//! and what every host has mounted on top.

use super::{Result, step, timed};
use crate::frame::Configure;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// Large reads in one message: every message costs thousands of emulated instructions.
const NINE_P: &str = "trans=virtio,version=9p2000.L,msize=512000,access=any";

fn attach(source: &str, target: &str, kind: &str, flags: MsFlags, data: &str) -> Result<()> {
    let data = Some(data).filter(|d| !d.is_empty());
    mount(Some(source), target, Some(kind), flags, data)
        .map_err(step(format!("mounting {kind} on {target}")))
}

fn make(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(step(format!("making {}", path.display())))
}

const PLAIN: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// What is needed before the root is there.
pub fn first() -> Result<()> {
    attach("dev", "/dev", "devtmpfs", MsFlags::MS_NOSUID, "mode=0755")?;
    attach("proc", "/proc", "proc", PLAIN, "")?;
    attach("sys", "/sys", "sysfs", PLAIN, "")
}

/// Mounts everything and moves into it.
pub fn switch_root(configure: &Configure) -> Result<()> {
    for path in ["/lower", "/rw", "/new"] {
        make(Path::new(path))?;
    }
    attach(
        "host",
        "/lower",
        "9p",
        MsFlags::MS_RDONLY,
        &format!("{NINE_P},cache=loose"),
    )?;
    attach("rw", "/rw", "tmpfs", MsFlags::empty(), "mode=0755")?;
    make(Path::new("/rw/upper"))?;
    make(Path::new("/rw/work"))?;
    attach(
        "root",
        "/new",
        "overlay",
        MsFlags::empty(),
        "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work",
    )?;
    for name in ["dev", "proc", "sys"] {
        let from = format!("/{name}");
        let to = format!("/new/{name}");
        make(Path::new(&to))?;
        mount(
            Some(from.as_str()),
            to.as_str(),
            None::<&str>,
            MsFlags::MS_MOVE,
            None::<&str>,
        )
        .map_err(step(format!("moving {from}")))?;
    }
    // pivot_root(2) can't leave the initial root file system; this is how switch_root(8) does it.
    std::env::set_current_dir("/new").map_err(step("/new"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(step("moving the root"))?;
    nix::unistd::chroot(".").map_err(step("chroot"))?;
    std::env::set_current_dir("/").map_err(step("/"))?;
    // Propagation as systemd sets it: container engines count on it.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_SHARED | MsFlags::MS_REC,
        None::<&str>,
    )
    .map_err(step("propagation of the root"))?;
    ordinary()?;
    modules(Path::new(OsStr::from_bytes(&configure.modules_dir)))?;
    binds(configure)
}

/// What an ordinary host has.
fn ordinary() -> Result<()> {
    let tmpfs: &[(&str, &str)] = &[
        ("/dev/shm", "mode=1777"),
        ("/run", "mode=0755"),
        ("/tmp", "mode=1777"),
        // Container engines stack overlays of their own there, which takes a file system that is none itself.
        ("/var/lib/containerd", "mode=0711"),
        ("/var/lib/containers", "mode=0711"),
        ("/var/lib/docker", "mode=0711"),
    ];
    for (target, data) in tmpfs {
        make(Path::new(target))?;
        attach(
            "tmpfs",
            target,
            "tmpfs",
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            data,
        )?;
    }
    for target in ["/dev/pts", "/dev/mqueue", "/run/lock"] {
        make(Path::new(target))?;
    }
    attach(
        "devpts",
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        "gid=5,mode=620,ptmxmode=666",
    )?;
    attach("mqueue", "/dev/mqueue", "mqueue", PLAIN, "")?;
    attach("debugfs", "/sys/kernel/debug", "debugfs", PLAIN, "")?;
    attach("bpf", "/sys/fs/bpf", "bpf", PLAIN, "mode=0700")?;
    // devtmpfs leaves these to udev.
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let link = format!("/dev/{name}");
        symlink(target, &link).map_err(step(link))?;
    }
    for node in ["/dev/fuse", "/dev/net/tun"] {
        // They are there if their modules are.
        let _ = fs::set_permissions(node, Permissions::from_mode(0o666));
    }
    Ok(())
}

/// Makes the kernel's modules visible where modprobe looks.
fn modules(from: &Path) -> Result<()> {
    let Some(release) = from.file_name() else {
        return Ok(());
    };
    let target = Path::new("/lib/modules").join(release);
    make(&target)?;
    mount(
        Some(from),
        &target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .map_err(step("/lib/modules"))
}

/// Mounts the writable shares. Writes go straight through to the machine.
fn binds(configure: &Configure) -> Result<()> {
    for bind in &configure.binds {
        let target = PathBuf::from(OsStr::from_bytes(&bind.path));
        make(&target)?;
        mount(
            Some(OsStr::from_bytes(&bind.tag)),
            &target,
            Some("9p"),
            MsFlags::empty(),
            Some(format!("{NINE_P},cache=mmap").as_str()),
        )
        .map_err(step(format!("mounting the share {}", target.display())))?;
    }
    Ok(())
}

/// Writes back what is mapped shared, and lets go.
pub fn unmount_binds(configure: &Configure) {
    for bind in configure.binds.iter().rev() {
        let target = OsStr::from_bytes(&bind.path);
        if umount2(target, MntFlags::empty()).is_err() {
            // A process left behind holds it; what is dirty must go out all the same.
            nix::unistd::sync();
            let _ = umount2(target, MntFlags::MNT_DETACH);
        }
    }
}

/// Copies a file or folder to the overlay's tmpfs, at its own path.
pub fn copy_up(path: &[u8]) -> Result<()> {
    let path = Path::new(OsStr::from_bytes(path));
    timed(&format!("copying {}", path.display()), || copy_tree(path))
}

fn copy_tree(path: &Path) -> Result<()> {
    let what = || format!("copying {}", path.display());
    let kind = fs::symlink_metadata(path)
        .map_err(step(what()))?
        .file_type();
    if kind.is_dir() {
        for entry in fs::read_dir(path).map_err(step(what()))? {
            copy_tree(&entry.map_err(step(what()))?.path())?;
        }
    } else if kind.is_file() {
        // Opening it for writing makes overlayfs copy it up, with all of its attributes.
        fs::File::options()
            .append(true)
            .open(path)
            .map_err(step(what()))?;
    }
    Ok(())
}

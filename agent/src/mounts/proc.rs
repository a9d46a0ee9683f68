//! What may be mounted over /proc: nothing but a procfs on it, and below it the few files that lxcfs stands in for.
//!
//! The masks of `maskedPaths` and the tests of other programs trust what is there. The rule and its words are runc's.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};

use crate::error::{Context, Error, Kind, Result};
use crate::spec::Mount;

/// Below /proc.
const ALLOWED: &[&str] = &[
    "cpuinfo",
    "diskstats",
    "meminfo",
    "stat",
    "swaps",
    "uptime",
    "loadavg",
    "slabinfo",
    "net/dev",
    "sys/kernel/ns_last_pid",
    "sys/crypto/fips_enabled",
];

/// Checks the place of a mount, whose links are resolved, and what is to be mounted there.
pub fn check(
    root: BorrowedFd<'_>,
    place: BorrowedFd<'_>,
    tree: BorrowedFd<'_>,
    mount: &Mount,
) -> Result<()> {
    let path = path_in(root, place).what(|| &mount.field)?;
    let Ok(below) = path.strip_prefix("/proc") else {
        return Ok(());
    };
    let refuse = |why: &str| {
        Err(Error::setup(
            Kind::InvalidArgument,
            format!(
                "{}: {path:?} cannot be mounted because it is {why}",
                mount.field
            ),
        ))
    };
    if below.as_os_str().is_empty() {
        let fs = fstatfs(tree).what(|| &mount.field)?;
        if fs.filesystem_type() != PROC_SUPER_MAGIC {
            return refuse("not of type proc");
        }
    } else if !ALLOWED.iter().any(|allowed| below == Path::new(allowed)) {
        return refuse("inside /proc");
    }
    Ok(())
}

/// The path of an open file as seen from an open directory above it.
fn path_in(root: BorrowedFd<'_>, file: BorrowedFd<'_>) -> std::io::Result<PathBuf> {
    let path = |fd: BorrowedFd<'_>| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let (root, file) = (path(root)?, path(file)?);
    let below = file.strip_prefix(&root).unwrap_or(&file);
    Ok(Path::new("/").join(below))
}

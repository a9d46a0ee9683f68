//! Cgroups as directories: making one, entering it, ending what is in it, removing it (the kernel's
//! Documentation/admin-guide/cgroup-v2.rst).

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::path::Path;

use bulkhead_protocol::limits::write_file;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long the processes of a cgroup may take to be gone once they are killed, in milliseconds.
const KILL_TIMEOUT_MS: u16 = 10_000;

/// Makes the cgroup at `below` the hierarchy's `root`, with those above it, and with as many controllers as there are. What of
/// them can't be had is told by the limit that needs it.
pub fn make(root: &Path, below: &Path) -> io::Result<()> {
    let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
    let mut current = root.to_owned();
    for part in below.strip_prefix("/").unwrap_or(below) {
        for controller in controllers.split_ascii_whitespace() {
            // One by one: together they are refused for the sake of one.
            let _ = write_file(
                &current.join("cgroup.subtree_control"),
                &format!("+{controller}"),
            );
        }
        current.push(part);
        match fs::create_dir(&current) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Puts a process into the cgroup.
pub fn enter(directory: &Path, pid: u32) -> io::Result<()> {
    write_file(&directory.join("cgroup.procs"), &pid.to_string())
}

/// Whether there is a process in it or below it.
pub fn is_populated(directory: &Path) -> io::Result<bool> {
    let events = match fs::read_to_string(directory.join("cgroup.events")) {
        Err(error) if is_gone(&error) => return Ok(false),
        events => events?,
    };
    Ok(events.lines().any(|line| line == "populated 1"))
}

/// Whether it is a cgroup that is no more that can't be read, as one of systemd's may be at any time.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// Kills every process of a cgroup and waits until the last one is gone.
pub fn end_processes(directory: &Path) -> io::Result<()> {
    match kill(directory) {
        Err(error) if is_gone(&error) => Ok(()),
        killed => killed,
    }
}

/// The kernel marks `cgroup.events` with POLLPRI when it changes.
fn kill(directory: &Path) -> io::Result<()> {
    let mut events = File::open(directory.join("cgroup.events"))?;
    // The first read arms the notification of the open file.
    events.read_to_string(&mut String::new())?;
    if is_populated(directory)? {
        write_file(&directory.join("cgroup.kill"), "1")?;
    }
    while is_populated(directory)? {
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        if poll(&mut fds, PollTimeout::from(KILL_TIMEOUT_MS))? == 0 {
            let mut left = OsString::from("processes of it do not end: ");
            left.push(fs::read_to_string(directory.join("cgroup.procs"))?.replace('\n', " "));
            return Err(io::Error::other(left.to_string_lossy().into_owned()));
        }
        events.rewind()?;
        events.read_to_string(&mut String::new())?;
    }
    Ok(())
}

/// Removes a cgroup, those in it first. They have files that can't be removed and need not be.
pub fn remove(directory: &Path) -> io::Result<()> {
    match remove_all(directory) {
        Err(error) if is_gone(&error) => Ok(()),
        removed => removed,
    }
}

fn remove_all(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

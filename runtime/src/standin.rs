//! The processes of the host that stand for a container's: the server joins their network namespace and follows their end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use nix::sched::{CloneFlags, setns, unshare};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Takes this thread, and the processes that it starts, into the network namespace of the container's stand-in, or, without
/// one, into a new one.
pub fn enter_network(pid: Option<u32>) -> io::Result<()> {
    match pid {
        Some(pid) => {
            let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
        }
        None => unshare(CloneFlags::CLONE_NEWNET)?,
    }
    Ok(())
}

/// Sees the end of a process that need not be a child.
#[derive(Debug)]
pub struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    /// Watches `pid`, which must be alive.
    pub fn new(pid: u32) -> io::Result<Self> {
        let pidfd = pidfd(pid)?;
        // SAFETY: the owned descriptor stays the same open file until the `AsyncFd` is dropped.
        let watched = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
        Ok(Self(watched.map_err(io::Error::from)?))
    }

    /// Returns when the process has ended.
    pub async fn wait(&self) {
        // A descriptor that can't be watched any more says nothing else either.
        let _ = self.0.readable().await;
    }
}

/// A descriptor that becomes readable when the process ends (`pidfd_open(2)`).
pub fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: a system call on values.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for this process, close-on-exec, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

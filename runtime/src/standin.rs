//! The processes of the host that stand for a container's: the server joins their network namespace and follows their end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
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

/// Whether a process is there, and not only waited for.
pub fn is_alive(pid: u32) -> bool {
    let Ok(process) = pidfd(pid) else {
        return false;
    };
    let mut ended = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut ended, PollTimeout::ZERO), Ok(0))
}

/// Kills a process (`pidfd_send_signal(2)`).
pub fn kill(process: BorrowedFd<'_>) -> io::Result<()> {
    let (fd, info) = (process.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: the descriptor is open, and without information the call reads no memory.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, info, 0) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

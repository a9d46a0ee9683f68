//! The processes of the host that stand for a container's: the server joins their network namespace and follows their end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Takes this thread, and the processes that it starts, into the network namespace of the container's stand-in, or, without
/// one, into a new one.
pub fn enter_network(stand_in: Option<&StandIn>) -> io::Result<()> {
    match stand_in {
        // By its descriptor (setns(2), Linux 5.8).
        Some(stand_in) => setns(stand_in.process.as_fd(), CloneFlags::CLONE_NEWNET)?,
        None => unshare(CloneFlags::CLONE_NEWNET)?,
    }
    Ok(())
}

/// A process that stands for a container's. Once it has ended its number may become another process's, which this does not.
#[derive(Debug, Clone)]
pub struct StandIn {
    pid: u32,
    process: Arc<OwnedFd>,
}

impl StandIn {
    /// Finds `pid`, which must be alive.
    pub fn find(pid: u32) -> io::Result<Self> {
        let process = Arc::new(pidfd(pid)?);
        Ok(Self { pid, process })
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has not ended. What was done by its number before was done to it if it still lives after.
    pub fn is_alive(&self) -> bool {
        lives(self.process.as_fd())
    }
}

/// Sees the end of a process that need not be a child.
#[derive(Debug)]
pub struct Watch(AsyncFd<Arc<OwnedFd>>);

impl Watch {
    /// Watches a stand-in.
    pub fn new(stand_in: &StandIn) -> io::Result<Self> {
        let process = stand_in.process.clone();
        // SAFETY: the owned descriptor stays the same open file until the `AsyncFd` is dropped.
        let watched = unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) };
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
    pidfd(pid).is_ok_and(|process| lives(process.as_fd()))
}

fn lives(process: BorrowedFd<'_>) -> bool {
    let mut ended = [PollFd::new(process, PollFlags::POLLIN)];
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::share::tests::in_namespace;
    use std::process::Command;

    /// A stand-in that has ended, and a process that has its number.
    pub(crate) struct Reused(pub(crate) StandIn);

    impl Reused {
        pub(crate) fn new() -> Self {
            let mut first = Command::new("sleep").arg("1000").spawn().unwrap();
            let stand_in = StandIn::find(first.id()).unwrap();
            assert!(stand_in.is_alive());
            first.kill().unwrap();
            first.wait().unwrap();
            let numbers = [stand_in.pid];
            let args = libc::clone_args {
                flags: 0,
                pidfd: 0,
                child_tid: 0,
                parent_tid: 0,
                exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
                stack: 0,
                stack_size: 0,
                tls: 0,
                set_tid: numbers.as_ptr() as u64,
                set_tid_size: 1,
                cgroup: 0,
            };
            // SAFETY: as fork(2) does it; `args` and what it points to outlive the call. The child does nothing but system calls.
            let pid =
                unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
            if pid == 0 {
                loop {
                    // SAFETY: a system call without arguments.
                    unsafe { libc::pause() };
                }
            }
            assert_eq!(pid, i64::from(stand_in.pid));
            Self(stand_in)
        }
    }

    impl Drop for Reused {
        fn drop(&mut self) {
            let pid = nix::unistd::Pid::from_raw(self.0.pid.cast_signed());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
            nix::sys::wait::waitpid(pid, None).unwrap();
        }
    }

    #[test]
    fn what_has_a_stand_ins_number_after_it_is_not_taken_for_it() {
        in_namespace(|| {
            let reused = Reused::new();
            assert!(is_alive(reused.0.pid()));
            assert!(!reused.0.is_alive());
            let error = enter_network(Some(&reused.0)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
            let alive = || reused.0.is_alive();
            let path = format!("/proc/{}/oom_score_adj", reused.0.pid());
            let before = std::fs::read_to_string(&path).unwrap();
            crate::oom::set(reused.0.pid(), Some(321), alive).unwrap_err();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), before);
        });
    }
}

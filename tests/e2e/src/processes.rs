//! Finding the processes of the build under test, and waiting for their end without polling.

use std::fs;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::dist;

/// How long an ordered end may take at most, on an emulated CPU.
const DEADLINE_MS: u16 = 60_000;

/// Pids of the processes whose executable belongs to the build under test.
pub fn of_the_build_under_test() -> Vec<u32> {
    let programs = dist().join("bin");
    all(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.starts_with(&programs)))
}

/// Pids of the processes of the build under test with this program.
pub fn named(program: &str) -> Vec<u32> {
    let program = dist().join("bin").join(program);
    all(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program))
}

fn all(pick: impl Fn(u32) -> bool) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| pick(pid)).collect()
}

/// A descriptor that is readable once a process has ended; none if it is gone already.
pub fn open(pid: u32) -> Option<OwnedFd> {
    // SAFETY: the call takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Waits until all these processes have ended.
///
/// # Panics
/// When one is still there at the deadline.
#[track_caller]
pub fn wait_for_end(pids: &[u32]) {
    for &pid in pids {
        let Some(pidfd) = open(pid) else {
            continue;
        };
        let mut polled = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        let ended = poll(&mut polled, PollTimeout::from(DEADLINE_MS)).unwrap();
        assert_eq!(ended, 1, "process {pid} has not ended");
    }
}

//! Finding the processes of the build under test, and waiting for their end without polling.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::kill;
use nix::unistd::Pid;

use crate::dist;

/// How long an ordered end may take at most, on an emulated CPU.
const DEADLINE_MS: u16 = 60_000;

/// Whether there is a process of this pid.
pub fn exists(pid: Pid) -> bool {
    kill(pid, None).is_ok()
}

/// How many descriptors a process has open.
///
/// # Panics
/// When it has gone.
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

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

/// How often each thread of these processes has gone to sleep so far, and so how often it has been woken; by "process: thread", those
/// of one name together. A vCPU sleeps when its guest halts.
///
/// # Errors
/// When a process has gone.
pub fn sleeps(pids: &[u32]) -> io::Result<BTreeMap<String, u64>> {
    let mut sleeps = BTreeMap::new();
    for pid in pids {
        let process = comm(&format!("/proc/{pid}"))?;
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let folder = task?.path().display().to_string();
            let count = voluntary_switches(&fs::read_to_string(format!("{folder}/status"))?);
            let count = count.ok_or_else(|| io::Error::other("a status without switches"))?;
            *sleeps
                .entry(format!("{process}: {}", comm(&folder)?))
                .or_default() += count;
        }
    }
    Ok(sleeps)
}

fn voluntary_switches(status: &str) -> Option<u64> {
    status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?
        .trim()
        .parse()
        .ok()
}

/// The name of a process or thread, by its folder in /proc.
///
/// # Errors
/// When it has gone.
pub fn comm(folder: &str) -> io::Result<String> {
    Ok(fs::read_to_string(format!("{folder}/comm"))?
        .trim()
        .to_owned())
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

#[cfg(test)]
mod tests {
    use super::voluntary_switches;

    #[test]
    fn a_sleep_is_a_voluntary_switch_and_a_preemption_is_none() {
        let status =
            "Name:\tvcpu-0\nvoluntary_ctxt_switches:\t17\nnonvoluntary_ctxt_switches:\t4\n";
        assert_eq!(voluntary_switches(status), Some(17));
        assert_eq!(voluntary_switches("nonvoluntary_ctxt_switches:\t4\n"), None);
    }
}

//! What every process of a container does on its way from the agent's image to its program. Runs in children only.
//!
//! A child is the agent's own image: nothing here may touch the agent's runtime, log (its stderr is the
//! container's), or return.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::stat::Mode;

use crate::error::{Context, Error, Result};
use crate::{process, sys};

/// Exit status of a child that did not get to the exec; the agent has the reason by then.
const FAILED: i32 = 1;

/// Number of the first descriptor after the standard streams.
const FIRST: RawFd = 3;

/// Ends this process on the spot.
pub fn exit() -> ! {
    end(FAILED)
}

/// Ends this process on the spot with a status.
pub fn end(status: i32) -> ! {
    // SAFETY: `_exit` runs no handlers and touches no memory.
    unsafe { libc::_exit(status) }
}

/// A panic in the child must not unwind into the agent's runtime.
#[derive(Debug)]
pub struct ExitOnUnwind;

impl Drop for ExitOnUnwind {
    fn drop(&mut self) {
        exit();
    }
}

/// Puts the standard streams in their places (none is the null device) and `keep` behind them, and closes
/// everything else but for `leave`, which are not of the first few: a connection of the agent that a waiting child held open would never end.
pub fn arrange_descriptors<const N: usize>(
    stdio: [Option<BorrowedFd<'_>>; 3],
    keep: [BorrowedFd<'_>; N],
    leave: &[RawFd],
) -> Result<[OwnedFd; N]> {
    let what = || "cannot arrange the container's descriptors";
    let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).what(what)?;
    for (number, stream) in stdio.iter().enumerate() {
        process::replace_stdio(stream.unwrap_or(null.as_fd()), number).what(what)?;
    }
    // Closed below, or replaced: this owner must not close what takes its number.
    let _ = null.into_raw_fd();
    let first_free = FIRST + RawFd::try_from(N).unwrap_or(0);
    // First out of the way of all places, then each to its own.
    let mut places = [FIRST; N];
    for (place, fd) in places.iter_mut().zip(keep) {
        *place = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(first_free)).what(what)?;
    }
    for (number, place) in (FIRST..).zip(&mut places) {
        // SAFETY: `number` is none of the standard streams; whatever the agent had there belongs to objects that
        // this process never drops.
        Errno::result(unsafe { libc::dup3(*place, number, libc::O_CLOEXEC) }).what(what)?;
        *place = number;
    }
    // SAFETY: as above: the owners of these descriptors are never dropped in this process.
    unsafe { sys::close_from(first_free, leave) }.what(what)?;
    // SAFETY: these are the duplicates just made, and nothing else here owns them.
    Ok(places.map(|place| unsafe { OwnedFd::from_raw_fd(place) }))
}

/// Undoes what the agent did to its signals.
pub fn reset_signals() -> Result<()> {
    let what = || "cannot reset the signals";
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).what(what)?;
    // The one that the agent ignores; an exec resets handlers, not this.
    // SAFETY: the default action is no handler.
    unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigDfl) }.what(what)?;
    Ok(())
}

/// Joins the container's session keyring; its first process makes it.
pub fn join_keyring(id: &str) -> Result<()> {
    match sys::new_session_keyring(&format!("_ses.{id}")) {
        Ok(()) | Err(Errno::ENOSYS) => Ok(()),
        Err(errno) => Err(Error::system("cannot join a session keyring", errno)),
    }
}

/// `process.oomScoreAdj`. Through the guest's procfs: the container may have none.
pub fn set_oom_score(value: Option<i32>) -> Result<()> {
    match value {
        Some(value) => process::write_proc("/proc/self/oom_score_adj", &value.to_string())
            .what(|| "process.oomScoreAdj"),
        None => Ok(()),
    }
}

/// `linux.personality`.
pub fn set_personality(domain: Option<libc::c_ulong>) -> Result<()> {
    match domain {
        // SAFETY: touches no memory.
        Some(domain) => Errno::result(unsafe { libc::personality(domain) })
            .map(drop)
            .what(|| "linux.personality"),
        None => Ok(()),
    }
}

/// Puts a terminal in the place of the standard streams.
pub fn replace_streams(terminal: BorrowedFd<'_>) -> Result<()> {
    for number in 0..3 {
        process::replace_stdio(terminal, number)
            .what(|| "process.terminal: cannot take the place of the streams")?;
    }
    Ok(())
}

/// Makes the terminal at the standard input the controlling one of this session.
pub fn take_terminal() -> Result<()> {
    let stdin = std::io::stdin();
    sys::set_controlling_terminal(stdin.as_fd())
        .what(|| "process.terminal: cannot become the controlling terminal")
}

/// Puts the container's null device in the place of streams that nobody asked for.
pub fn use_containers_null(stdio: [Option<BorrowedFd<'_>>; 3]) -> Result<()> {
    let Some(null) = process::container_null() else {
        return Ok(());
    };
    let absent = stdio
        .iter()
        .enumerate()
        .filter(|(_, stream)| stream.is_none());
    for (number, _) in absent {
        process::replace_stdio(null.as_fd(), number)
            .what(|| "cannot open the container's /dev/null")?;
    }
    Ok(())
}

//! What every process of a container does on its way from the agent's image to its program. Runs in children only.
//!
//! A child is the agent's own image: nothing here may touch the agent's runtime, log (its stderr is the
//! container's), or return.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask,
};
use nix::sys::stat::Mode;

use crate::error::{Context, Error, Result};
use crate::streams::BorrowedEnds;
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

/// The first number that neither the process's streams nor `kept` descriptors take.
pub fn first_free(ends: &BorrowedEnds<'_>, kept: usize) -> RawFd {
    FIRST.saturating_add(RawFd::try_from(ends.further.len() + kept).unwrap_or(RawFd::MAX))
}

/// Puts the streams in their places and `keep` behind them, which an exec closes, and closes everything else but for `leave`,
/// which are from [`first_free`] on: a connection of the agent that a waiting child held open would never end.
pub fn arrange_descriptors<const N: usize>(
    ends: &BorrowedEnds<'_>,
    keep: [BorrowedFd<'_>; N],
    leave: &[RawFd],
) -> Result<[OwnedFd; N]> {
    let what = || "cannot arrange the container's descriptors";
    let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).what(what)?;
    for (number, end) in ends.standard.iter().enumerate() {
        process::replace_stdio(end.unwrap_or(null.as_fd()), number).what(what)?;
    }
    let further = ends.further.iter().map(|end| end.unwrap_or(null.as_fd()));
    let first_kept = first_free(ends, 0);
    let first_free = first_free(ends, N);
    // First out of the way of all places, then each to its own.
    let mut aside = Vec::with_capacity(ends.further.len() + N);
    for fd in further.chain(keep) {
        aside.push(fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(first_free)).what(what)?);
    }
    // Closed below, or replaced: this owner must not close what takes its number.
    let _ = null.into_raw_fd();
    for (number, fd) in (FIRST..).zip(aside) {
        let flags = if number < first_kept {
            0
        } else {
            libc::O_CLOEXEC
        };
        // SAFETY: `number` is none of the standard streams; whatever the agent had there belongs to objects that
        // this process never drops.
        Errno::result(unsafe { libc::dup3(fd, number, flags) }).what(what)?;
    }
    // SAFETY: as above: the owners of these descriptors are never dropped in this process.
    unsafe { sys::close_from(first_free, &mut leave.to_vec()) }.what(what)?;
    let mut numbers = first_kept..;
    Ok(keep.map(|_| {
        let number = numbers.next().unwrap_or(first_kept);
        // SAFETY: these are the duplicates just made, one for each of `keep`, and nothing else here owns them.
        unsafe { OwnedFd::from_raw_fd(number) }
    }))
}

/// Closes every descriptor but one and the standard ones: a connection of the agent that a child held open would never end.
pub fn close_all_but(keep: &OwnedFd) -> Result<()> {
    // SAFETY: the owners of these descriptors are never dropped in this process.
    unsafe { sys::close_from(FIRST, &mut [keep.as_raw_fd()]) }
        .what(|| "cannot close the agent's descriptors")
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

/// Lets the usual requests to end do so until the exec, as they end runc's waiting init: PID 1 of a namespace takes no signal that it has
/// no handler for.
pub fn end_on_request() -> Result<()> {
    extern "C" fn end(signal: libc::c_int) {
        // SAFETY: may be called in a handler, and never returns.
        unsafe { libc::_exit(128 + signal) }
    }
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM] {
        let action = SigAction::new(SigHandler::Handler(end), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler calls nothing but `_exit`.
        unsafe { sigaction(signal, &action) }.what(|| "cannot listen to signals")?;
    }
    Ok(())
}

/// Makes the container's session keyring, which keeps the agent's from it, and lets the processes that join the container find it. Its
/// owner is the container's root, who they are at that moment too.
pub fn make_keyring(id: &str) -> Result<()> {
    match join_keyring(id)? {
        Some(serial) => sys::let_owner_find_keyring(serial)
            .what(|| "cannot set the permissions of a session keyring"),
        None => Ok(()),
    }
}

/// Joins the container's session keyring; its serial number, if the kernel has keyrings.
pub fn join_keyring(id: &str) -> Result<Option<i32>> {
    match sys::join_session_keyring(&format!("_ses.{id}")) {
        Ok(serial) => Ok(Some(serial)),
        Err(Errno::ENOSYS) => Ok(None),
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
pub fn use_containers_null(ends: &BorrowedEnds<'_>) -> Result<()> {
    let Some(null) = process::container_null() else {
        return Ok(());
    };
    for (number, _) in (0..).zip(ends.all()).filter(|(_, end)| end.is_none()) {
        // SAFETY: at `number` is the null device that `arrange_descriptors` has put there, and nobody owns it.
        Errno::result(unsafe { libc::dup2(null.as_raw_fd(), number) })
            .what(|| "cannot open the container's /dev/null")?;
    }
    Ok(())
}

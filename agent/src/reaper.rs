//! Reaping: every child that ends, the containers' inits as well as orphans that PID 1 inherits.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::time::ClockId;
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::sync::watch;

use crate::sys;
use crate::timeline::nanoseconds;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + N when ended by signal N.
    pub code: u32,
    /// Wall clock at the end, nanoseconds since the epoch.
    pub at_ns: u64,
}

/// Tells of one process's end.
pub type ExitWatch = watch::Receiver<Option<Exit>>;

/// The processes that somebody waits for.
#[derive(Debug, Clone, Default)]
pub struct Reaper(Arc<Mutex<HashMap<Pid, watch::Sender<Option<Exit>>>>>);

impl Reaper {
    /// Watches a child. To be called before anything awaits after the fork, so that its end can't be missed.
    pub fn watch(&self, pid: Pid) -> ExitWatch {
        let (sender, receiver) = watch::channel(None);
        self.table().insert(pid, sender);
        receiver
    }

    /// Watches a child that another child has forked, and that may have ended since. `None` if it has been reaped.
    pub fn watch_adopted(&self, pid: Pid, pidfd: BorrowedFd<'_>) -> Option<ExitWatch> {
        // The pid of one that is reaped may be another's by now.
        (!sys::is_reaped(pidfd)).then(|| self.watch(pid))
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Pid, watch::Sender<Option<Exit>>>> {
        // Nothing panics while it is held, and a table is whole between any two operations.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reaps what has ended.
    fn reap(&self) {
        loop {
            match sys::reap_one() {
                Ok(Some((pid, code))) => {
                    if let Some(sender) = self.table().remove(&pid) {
                        sender.send_replace(Some(Exit {
                            code,
                            at_ns: nanoseconds(ClockId::CLOCK_REALTIME),
                        }));
                    }
                }
                Ok(None) | Err(Errno::ECHILD) => return,
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "cannot reap children");
                    return;
                }
            }
        }
    }

    /// Reaps for ever.
    pub async fn run(self) -> std::io::Result<()> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), None)?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let signals = sys::watch_fd(signals, Interest::READABLE)?;
        loop {
            // Also once before the first signal: a child may have ended before the signal was blocked.
            self.reap();
            let mut guard = signals.readable().await?;
            while matches!(signals.get_ref().read_signal(), Ok(Some(_))) {}
            guard.clear_ready();
        }
    }
}

/// The end of a watched process, when it comes.
pub async fn exited(watch: &mut ExitWatch) -> Option<Exit> {
    match watch.wait_for(Option::is_some).await {
        Ok(exit) => *exit,
        // The sender goes only after it has sent.
        Err(_) => None,
    }
}

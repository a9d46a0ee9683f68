//! One process of a container that the host knows by name: its init, or one of `ExecProcess`.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::error::{Context, Error, Kind, Result};
use crate::reaper::{Exit, ExitWatch, exited};
use crate::spec::Scheduler;
use crate::streams::Streams;
use crate::sys;

/// A child of the agent.
#[derive(Debug)]
pub struct Child {
    /// Pid in the agent's pid namespace.
    pub pid: Pid,
    /// The same process, whatever becomes of its pid.
    pub pidfd: OwnedFd,
    /// Tells of its end.
    pub exit: ExitWatch,
}

impl Child {
    /// With its streams.
    pub fn into_task(self, streams: Streams) -> Task {
        Task {
            pid: self.pid,
            pidfd: self.pidfd,
            exit: self.exit,
            streams,
        }
    }
}

/// A child of the agent with its streams.
#[derive(Debug)]
pub struct Task {
    /// Pid in the agent's pid namespace.
    pub pid: Pid,
    /// The same process, whatever becomes of its pid.
    pub pidfd: OwnedFd,
    /// Tells of its end.
    pub exit: ExitWatch,
    /// Its streams.
    pub streams: Streams,
}

impl Task {
    /// Whether it has ended, as far as the reaper has seen.
    pub fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Its pid as the API has it.
    pub fn api_pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Sends a signal; `gone` is what to say when it has ended.
    pub fn signal(&self, number: i32, gone: &str) -> Result<()> {
        let gone = || Err(Error::NoProcess(gone.to_owned()));
        if self.has_ended() {
            return gone();
        }
        match sys::signal_process(self.pidfd.as_fd(), number) {
            Err(Errno::ESRCH) => gone(),
            result => result.what(|| "cannot signal the process"),
        }
    }

    /// Gives it its scheduling. From outside: it may have no capability for that any more, and what it forks may not inherit it.
    pub fn schedule(&self, scheduler: Option<&Scheduler>) -> Result<()> {
        match scheduler {
            // Its pid is its own as long as the reaper has not seen its end.
            Some(scheduler) if !self.has_ended() => {
                sys::set_scheduler(self.pid, scheduler).what(|| "process.scheduler")
            }
            _ => Ok(()),
        }
    }

    /// Kills it, if it lives.
    pub fn kill(&self) {
        let _ = sys::signal_process(self.pidfd.as_fd(), Signal::SIGKILL as i32);
    }

    /// Waits for its end, and for its output to be handed over.
    pub async fn wait(&self) -> Result<Exit> {
        let exit = exited(&mut self.exit.clone()).await;
        self.streams.drained().await;
        exit.ok_or_else(|| Error::setup(Kind::Internal, "the exit status was lost"))
    }
}

//! One process of a container, its init or an exec'd one: where in its life it is, and its exit.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::standin::StandIn;
use crate::stdio::Stdio;

/// Life-cycle states (runtime-spec, runtime.md, "State"; `paused` is runc's).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The guest boots or the container is being made.
    Creating,
    /// Made; the program has not been executed.
    Created,
    /// The program runs.
    Running,
    /// It stands still until it is resumed: a container's status alone ([`super::container::Container::status`]).
    Paused,
    /// It has ended.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + N when ended by signal N.
    pub code: u32,
    /// When, by the host's clock.
    pub at: SystemTime,
}

/// One process.
#[derive(Debug)]
pub struct Process {
    /// Who attaches its streams.
    pub stdio: Stdio,
    /// The process of the host that stands for it, if there is one of its own.
    pub proxy: Option<StandIn>,
    /// The command of the host in whose foreground it runs, which stands for it as long as that lives.
    pub client: Option<StandIn>,
    status: Mutex<Status>,
    orphaned: AtomicBool,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    /// A process that is being made.
    pub fn new(stdio: Stdio, proxy: Option<StandIn>, client: Option<StandIn>) -> Self {
        Self {
            stdio,
            proxy,
            client,
            status: Mutex::new(Status::Creating),
            orphaned: AtomicBool::new(false),
            exit: watch::Sender::new(None),
        }
    }

    /// Where in its life it is.
    pub fn status(&self) -> Status {
        *self.lock()
    }

    /// Who stands for it, or did.
    pub fn own_stand_in(&self) -> Option<&StandIn> {
        self.proxy.as_ref().or(self.client.as_ref())
    }

    /// The process whose pid is told as its own, if not the VMM's.
    pub fn stand_in(&self) -> Option<&StandIn> {
        let client = self.client.as_ref().filter(|client| client.is_alive());
        self.proxy.as_ref().or(client)
    }

    /// It has been made.
    pub fn created(&self) {
        self.advance(Status::Creating, Status::Created);
    }

    /// Its program has been executed. It may even have ended since.
    pub fn started(&self) {
        self.advance(Status::Created, Status::Running);
    }

    /// Its stand-in, or the command in whose foreground it runs, has gone.
    pub fn orphan(&self) {
        self.orphaned.store(true, Ordering::Relaxed);
    }

    /// Whether that has gone. Of one that comes to be after it nobody would take the output, nor the end.
    pub fn is_orphan(&self) -> bool {
        self.orphaned.load(Ordering::Relaxed)
    }

    /// It has ended; only the first end counts.
    pub fn ended(&self, code: u32) {
        let mut status = self.lock();
        if *status == Status::Stopped {
            return;
        }
        *status = Status::Stopped;
        let at = SystemTime::now();
        self.exit.send_replace(Some(Exit { code, at }));
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        loop {
            if let Some(exit) = *exit.borrow_and_update() {
                return exit;
            }
            // The sender lives as long as `self`.
            let _ = exit.changed().await;
        }
    }

    fn advance(&self, from: Status, to: Status) {
        let mut status = self.lock();
        if *status == from {
            *status = to;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Status> {
        self.status
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> Process {
        Process::new(Stdio::TERMINAL, None, None)
    }

    #[test]
    fn a_process_goes_through_its_states_in_order() {
        let process = process();
        assert_eq!(process.status(), Status::Creating);
        process.started();
        assert_eq!(process.status(), Status::Creating);
        process.created();
        assert_eq!(process.status(), Status::Created);
        process.started();
        assert_eq!(process.status(), Status::Running);
        process.ended(3);
        assert_eq!(process.status(), Status::Stopped);
    }

    #[test]
    fn an_end_that_overtakes_the_answer_to_start_stays_the_end() {
        let process = process();
        process.created();
        process.ended(0);
        process.started();
        assert_eq!(process.status(), Status::Stopped);
    }

    #[test]
    fn only_the_first_end_counts_and_waiting_after_it_returns_at_once() {
        let process = process();
        process.ended(3);
        process.ended(255);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        assert_eq!(runtime.block_on(process.wait()).code, 3);
    }
}

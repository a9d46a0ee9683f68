//! One container's life-cycle state and its exit.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};
use std::time::SystemTime;

use tokio::sync::watch;

use crate::adapt::HostBind;
use crate::id::ContainerId;
use crate::stdio::Stdio;

/// Life-cycle states (runtime-spec, runtime.md, "State").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The guest boots or the container is being made.
    Creating,
    /// Made; the program has not been executed.
    Created,
    /// The program runs.
    Running,
    /// It has ended.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
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

/// One container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: ContainerId,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// What is bound for it into the share.
    pub binds: Vec<HostBind>,
    /// Who attaches its streams.
    pub stdio: Stdio,
    status: Mutex<Status>,
    exit: watch::Sender<Option<Exit>>,
}

impl Container {
    /// A container that is being made.
    pub fn new(id: ContainerId, bundle: PathBuf, binds: Vec<HostBind>, stdio: Stdio) -> Self {
        Self {
            id,
            bundle,
            binds,
            stdio,
            status: Mutex::new(Status::Creating),
            exit: watch::Sender::new(None),
        }
    }

    /// Where in its life it is.
    pub fn status(&self) -> Status {
        *self.lock()
    }

    /// It has been made.
    pub fn created(&self) {
        self.advance(Status::Creating, Status::Created);
    }

    /// Its program has been executed. It may even have ended since.
    pub fn started(&self) {
        self.advance(Status::Created, Status::Running);
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
    use crate::stdio::Attach;

    fn container() -> Container {
        let stdio = Stdio {
            stdin: Attach::Nobody,
            stdout: Attach::Nobody,
            stderr: Attach::Nobody,
        };
        Container::new(ContainerId::new("c").unwrap(), "/b".into(), vec![], stdio)
    }

    #[test]
    fn a_container_goes_through_its_states_in_order() {
        let container = container();
        assert_eq!(container.status(), Status::Creating);
        container.started();
        assert_eq!(container.status(), Status::Creating);
        container.created();
        container.started();
        assert_eq!(container.status(), Status::Running);
        container.ended(3);
        assert_eq!(container.status(), Status::Stopped);
    }

    #[test]
    fn an_end_that_overtakes_the_answer_to_start_stays_the_end() {
        let container = container();
        container.created();
        container.ended(0);
        container.started();
        assert_eq!(container.status(), Status::Stopped);
    }

    #[test]
    fn only_the_first_end_counts_and_waiting_after_it_returns_at_once() {
        let container = container();
        container.ended(3);
        container.ended(255);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        assert_eq!(runtime.block_on(container.wait()).code, 3);
    }
}

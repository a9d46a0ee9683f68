//! A container that exists: its state directory, and its server if that still lives.

use std::future::Future;
use std::io;
use std::os::unix::net::UnixStream;

use anyhow::{Context, anyhow};
use bulkhead_runtime::id::ContainerId;
use bulkhead_runtime::sandbox::Status;
use bulkhead_runtime::sock;
use bulkhead_runtime::state::{Record, StateDir};
use thiserror::Error;

use super::Invocation;
use super::client::{ProcessState, Server, ServerError};

/// No such container; in the words that clients look for.
#[derive(Debug, Error)]
#[error("container {0:?} does not exist")]
pub struct Unknown(pub String);

/// A container of this host.
pub struct Known {
    /// Its id.
    pub id: ContainerId,
    /// Its state directory.
    pub state: StateDir,
}

impl Known {
    /// Finds the container `id`.
    pub fn find(invocation: &Invocation, id: &str) -> anyhow::Result<Self> {
        let id = ContainerId::new(id)?;
        let state = StateDir::of(&invocation.root, &id);
        if state.path().symlink_metadata().is_err() {
            return Err(Unknown(id.as_str().to_owned()).into());
        }
        Ok(Self { id, state })
    }

    /// What is on record of it. One that is just being made has no record yet.
    pub fn record(&self) -> anyhow::Result<Record> {
        self.state.load().map_err(|error| {
            if self.state.path().symlink_metadata().is_err() {
                return Unknown(self.id.as_str().to_owned()).into();
            }
            anyhow::Error::from(error)
                .context("the container is being made, or what was on record of it is lost")
        })
    }

    /// A connection to its server; `None` when that has gone.
    pub fn connect(&self) -> anyhow::Result<Option<UnixStream>> {
        match sock::connect(&self.state.task_socket()) {
            Ok(connection) => Ok(Some(connection)),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error).context("cannot connect to the sandbox server"),
        }
    }

    /// Where in its life it is. Without a server nothing of it can run.
    pub fn process_state(&self) -> anyhow::Result<ProcessState> {
        const STOPPED: ProcessState = ProcessState {
            status: Status::Stopped,
            pid: 0,
        };
        let Some(connection) = self.connect()? else {
            return Ok(STOPPED);
        };
        block_on(async {
            let server = Server::new(connection, self.id.as_str(), "")?;
            match server.state().await {
                // A server that has not got so far as to know it, or forgets it now, is about to say so otherwise.
                Err(ServerError::Gone) => Ok(STOPPED),
                Err(error) if error.is_not_found() => Ok(STOPPED),
                answer => Ok(answer?),
            }
        })
    }

    /// Calls its server; that there is none is an error in the words for a stopped container.
    pub fn call<T>(
        &self,
        call: impl AsyncFnOnce(Server<'_>) -> Result<T, ServerError>,
    ) -> anyhow::Result<T> {
        let connection = self
            .connect()?
            .ok_or_else(|| anyhow!("container not running: its sandbox has ended"))?;
        block_on(async {
            let server = Server::new(connection, self.id.as_str(), "")?;
            Ok(call(server).await?)
        })
    }
}

/// Runs a command's calls.
pub fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

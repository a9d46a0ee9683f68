//! The sandbox server as the command line calls it.

use std::os::unix::net::UnixStream;

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, KillRequest, ShutdownRequest, StartRequest, WaitRequest,
};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use thiserror::Error;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

use bulkhead_runtime::stdio::Stdio;

/// Why a call failed.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The server refused; its sentence.
    #[error("{0}")]
    Refused(String),
    /// The server is gone.
    #[error("the sandbox server ended unexpectedly; its last words, if any, are above")]
    Gone,
}

impl From<ttrpc::Error> for ServerError {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => Self::Refused(status.message().to_owned()),
            _ => Self::Gone,
        }
    }
}

/// A connection to the server of one sandbox.
pub struct Server<'a> {
    tasks: TaskClient,
    id: &'a str,
}

impl<'a> Server<'a> {
    /// A client for the container `id` over `connection`.
    pub fn new(connection: UnixStream, id: &'a str) -> std::io::Result<Self> {
        let client = Client::new(Socket::try_from(connection)?);
        Ok(Self {
            tasks: TaskClient::new(client),
            id,
        })
    }

    /// Makes the container.
    pub async fn create(&self, bundle: &str, stdio: Stdio) -> Result<u32, ServerError> {
        let request = CreateTaskRequest {
            id: self.id.to_owned(),
            bundle: bundle.to_owned(),
            stdin: stdio.stdin.as_field().to_owned(),
            stdout: stdio.stdout.as_field().to_owned(),
            stderr: stdio.stderr.as_field().to_owned(),
            ..Default::default()
        };
        Ok(self.tasks.create(Context::default(), &request).await?.pid)
    }

    /// Starts its program.
    pub async fn start(&self) -> Result<(), ServerError> {
        let request = StartRequest {
            id: self.id.to_owned(),
            ..Default::default()
        };
        self.tasks.start(Context::default(), &request).await?;
        Ok(())
    }

    /// Waits for its end and returns the exit code.
    pub async fn wait(&self) -> Result<u32, ServerError> {
        let request = WaitRequest {
            id: self.id.to_owned(),
            ..Default::default()
        };
        let response = self.tasks.wait(Context::default(), &request).await?;
        Ok(response.exit_status)
    }

    /// Signals its init.
    pub async fn kill(&self, signal: u32) -> Result<(), ServerError> {
        let request = KillRequest {
            id: self.id.to_owned(),
            signal,
            ..Default::default()
        };
        self.tasks.kill(Context::default(), &request).await?;
        Ok(())
    }

    /// Forgets the container.
    pub async fn delete(&self) -> Result<(), ServerError> {
        let request = DeleteRequest {
            id: self.id.to_owned(),
            ..Default::default()
        };
        self.tasks.delete(Context::default(), &request).await?;
        Ok(())
    }

    /// Ends the sandbox, whatever is in it. The server goes after its answer, or before it has got through.
    pub async fn shutdown(&self) {
        let request = ShutdownRequest {
            id: self.id.to_owned(),
            now: true,
            ..Default::default()
        };
        let _ = self.tasks.shutdown(Context::default(), &request).await;
    }
}

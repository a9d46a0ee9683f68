//! The Task API of one sandbox.
//!
//! A client that goes away cancels its calls' handlers, so whatever changes the sandbox runs in a task of its own.

use std::sync::Arc;

use async_trait::async_trait;
use bulkhead_runtime::sandbox::{Create, Sandbox, SandboxError};
use bulkhead_runtime::stdio::Stdio;
use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
    DeleteResponse, Empty, KillRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::Task;
use tokio::sync::Notify;
use ttrpc::asynchronous::TtrpcContext;
use ttrpc::{Code, get_status};

use crate::exits::{rpc_error, status, timestamp};

/// Answers the Task API.
pub struct TaskService {
    sandbox: Arc<Sandbox>,
    shutdown: Arc<Notify>,
}

impl TaskService {
    /// A service over `sandbox`; `shutdown` is notified when a client asks for the end.
    pub fn new(sandbox: Arc<Sandbox>, shutdown: Arc<Notify>) -> Self {
        Self { sandbox, shutdown }
    }

    /// Runs `operation` to its end even if the client does not wait for it.
    async fn complete<T, F>(&self, operation: impl FnOnce(Arc<Sandbox>) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, SandboxError>> + Send + 'static,
    {
        match tokio::spawn(operation(self.sandbox.clone())).await {
            Ok(result) => result.map_err(|error| rpc_error(&error)),
            Err(error) => Err(refuse(Code::INTERNAL, &error.to_string())),
        }
    }
}

fn refuse(code: Code, message: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, message))
}

/// There are no exec'd processes yet.
fn no_exec(exec_id: &str) -> ttrpc::Result<()> {
    if exec_id.is_empty() {
        return Ok(());
    }
    Err(refuse(
        Code::NOT_FOUND,
        &format!("process {exec_id:?} does not exist"),
    ))
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _ctx: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        for (field, there) in [
            ("rootfs", !request.rootfs.is_empty()),
            ("terminal", request.terminal),
            ("checkpoint", !request.checkpoint.is_empty()),
        ] {
            if there {
                let message = format!("`{field}` of a create request is not supported");
                return Err(refuse(Code::UNIMPLEMENTED, &message));
            }
        }
        let stdio = Stdio::parse(&request.stdin, &request.stdout, &request.stderr)
            .map_err(|error| rpc_error(&error.into()))?;
        let create = Create {
            id: request.id,
            bundle: request.bundle.into(),
            stdio,
        };
        let pid = self
            .complete(|sandbox| async move { sandbox.create(create).await })
            .await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(
        &self,
        _ctx: &TtrpcContext,
        request: StartRequest,
    ) -> ttrpc::Result<StartResponse> {
        no_exec(&request.exec_id)?;
        let pid = self
            .complete(|sandbox| async move { sandbox.start(&request.id).await })
            .await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn wait(&self, _ctx: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        no_exec(&request.exec_id)?;
        let exit = self.sandbox.wait(&request.id).await;
        let exit = exit.map_err(|error| rpc_error(&error))?;
        Ok(WaitResponse {
            exit_status: exit.code,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn kill(&self, _ctx: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        no_exec(&request.exec_id)?;
        self.complete(|sandbox| async move {
            sandbox.kill(&request.id, request.signal, request.all).await
        })
        .await?;
        Ok(Empty::default())
    }

    async fn delete(
        &self,
        _ctx: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        no_exec(&request.exec_id)?;
        let exit = self
            .complete(|sandbox| async move { sandbox.delete(&request.id).await })
            .await?;
        let mut response = DeleteResponse::default();
        if let Some(exit) = exit {
            response.exit_status = exit.code;
            response.exited_at = timestamp(exit.at);
        }
        Ok(response)
    }

    async fn state(
        &self,
        _ctx: &TtrpcContext,
        request: StateRequest,
    ) -> ttrpc::Result<StateResponse> {
        no_exec(&request.exec_id)?;
        let description = self
            .sandbox
            .describe(&request.id)
            .map_err(|error| rpc_error(&error))?;
        let mut response = StateResponse {
            id: request.id,
            bundle: description.bundle.to_string_lossy().into_owned(),
            pid: description.pid,
            status: status(description.status).into(),
            stdin: description.stdio.stdin.as_field().to_owned(),
            stdout: description.stdio.stdout.as_field().to_owned(),
            stderr: description.stdio.stderr.as_field().to_owned(),
            ..Default::default()
        };
        if let Some(exit) = description.exit {
            response.exit_status = exit.code;
            response.exited_at = timestamp(exit.at);
        }
        Ok(response)
    }

    async fn connect(
        &self,
        _ctx: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let description = self
            .sandbox
            .describe(&request.id)
            .map_err(|error| rpc_error(&error))?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: description.pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(
        &self,
        _ctx: &TtrpcContext,
        request: ShutdownRequest,
    ) -> ttrpc::Result<Empty> {
        // containerd calls this after each delete, and means it only when nothing is left.
        if request.now || self.sandbox.is_empty() {
            self.shutdown.notify_one();
        }
        Ok(Empty::default())
    }
}

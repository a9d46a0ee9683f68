//! The Task API of one sandbox.
//!
//! A client that goes away cancels its calls' handlers, so whatever changes the sandbox runs in a task of its own.

use std::sync::Arc;

use async_trait::async_trait;
use bulkhead_protocol::agent::{
    ContainerStatsRequest, ContainerStatsResponse, WaitOomRequest, WaitOomResponse,
};
use bulkhead_protocol::agent_ttrpc::Agent;
use bulkhead_runtime::sandbox::{Create, CreateOptions, Exec, Sandbox, SandboxError};
use bulkhead_runtime::stdio::{Stdio, TerminalSize};
use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
    DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest,
    PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse,
    StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest,
    WaitResponse,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::types::task::ProcessInfo;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField, MessageFull};
use tokio::sync::Notify;
use ttrpc::asynchronous::TtrpcContext;
use ttrpc::{Code, get_status};

use crate::exits::{rpc_error, status, timestamp};
use crate::metrics::metrics;

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

/// What the command line says beside the request; other clients' options mean nothing here.
fn create_options(options: Option<&Any>) -> ttrpc::Result<CreateOptions> {
    match options.filter(|options| options.type_url == CreateOptions::TYPE_URL) {
        Some(options) => {
            serde_json::from_slice(&options.value).map_err(|error| invalid(&error.to_string()))
        }
        None => Ok(CreateOptions::default()),
    }
}

/// Refuses a message in which something is missing or wrong.
fn invalid(message: &str) -> ttrpc::Error {
    refuse(Code::INVALID_ARGUMENT, message)
}

fn empty() -> ttrpc::Result<Empty> {
    Ok(Empty::default())
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
            ("checkpoint", !request.checkpoint.is_empty()),
        ] {
            if there {
                let message = format!("`{field}` of a create request is not supported");
                return Err(refuse(Code::UNIMPLEMENTED, &message));
            }
        }
        let stdio = Stdio::parse(
            &request.stdin,
            &request.stdout,
            &request.stderr,
            request.terminal,
        )
        .map_err(|error| rpc_error(&error.into()))?;
        let create = Create {
            id: request.id,
            bundle: request.bundle.into(),
            stdio,
            options: create_options(request.options.as_ref())?,
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
        let StartRequest { id, exec_id, .. } = request;
        let pid = self
            .complete(|sandbox| async move {
                if exec_id.is_empty() {
                    sandbox.start(&id).await
                } else {
                    sandbox.start_exec(&id, &exec_id).await
                }
            })
            .await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn exec(&self, _ctx: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let spec = request.spec.into_option();
        let spec = spec.ok_or_else(|| invalid("`spec` of an exec request is missing"))?;
        let stdio = Stdio::parse(
            &request.stdin,
            &request.stdout,
            &request.stderr,
            request.terminal,
        )
        .map_err(|error| rpc_error(&error.into()))?;
        let exec = Exec {
            id: request.id,
            exec_id: request.exec_id,
            process_json: spec.value,
            stdio,
        };
        self.sandbox.exec(exec).map_err(|error| rpc_error(&error))?;
        empty()
    }

    async fn wait(&self, _ctx: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.sandbox.wait(&request.id, &request.exec_id).await;
        let exit = exit.map_err(|error| rpc_error(&error))?;
        Ok(WaitResponse {
            exit_status: exit.code,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn kill(&self, _ctx: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let KillRequest {
            id,
            exec_id,
            signal,
            all,
            ..
        } = request;
        self.complete(|sandbox| async move { sandbox.signal(&id, &exec_id, signal, all).await })
            .await?;
        empty()
    }

    async fn pause(&self, _ctx: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.complete(|sandbox| async move { sandbox.pause(&request.id).await })
            .await?;
        empty()
    }

    async fn resume(&self, _ctx: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.complete(|sandbox| async move { sandbox.resume(&request.id).await })
            .await?;
        empty()
    }

    async fn resize_pty(
        &self,
        _ctx: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let size = TerminalSize {
            width: request.width,
            height: request.height,
        };
        self.sandbox
            .resize(&request.id, &request.exec_id, size)
            .await
            .map_err(|error| rpc_error(&error))?;
        empty()
    }

    async fn update(
        &self,
        _ctx: &TtrpcContext,
        request: UpdateTaskRequest,
    ) -> ttrpc::Result<Empty> {
        let resources = request.resources.into_option();
        let resources = resources.ok_or_else(|| invalid("`resources` of an update are missing"))?;
        let id = request.id;
        self.complete(|sandbox| async move { sandbox.update(&id, &resources.value).await })
            .await?;
        empty()
    }

    async fn stats(
        &self,
        _ctx: &TtrpcContext,
        request: StatsRequest,
    ) -> ttrpc::Result<StatsResponse> {
        let stats = self.sandbox.stats(&request.id).await;
        let metrics = metrics(&stats.map_err(|error| rpc_error(&error))?);
        let value = metrics
            .write_to_bytes()
            .map_err(|error| refuse(Code::INTERNAL, &error.to_string()))?;
        Ok(StatsResponse {
            stats: MessageField::some(Any {
                type_url: Metrics::descriptor().full_name().to_owned(),
                value,
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    async fn pids(&self, _ctx: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.sandbox.pids(&request.id);
        let pids = pids.map_err(|error| rpc_error(&error))?;
        let processes = pids.into_iter().map(|pid| ProcessInfo {
            pid,
            ..Default::default()
        });
        Ok(PidsResponse {
            processes: processes.collect(),
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _ctx: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let DeleteRequest { id, exec_id, .. } = request;
        let exit = self
            .complete(|sandbox| async move {
                if exec_id.is_empty() {
                    sandbox.delete(&id).await
                } else {
                    sandbox.delete_exec(&id, &exec_id).await
                }
            })
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
        let description = self
            .sandbox
            .describe(&request.id, &request.exec_id)
            .map_err(|error| rpc_error(&error))?;
        let mut response = StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: description.bundle.to_string_lossy().into_owned(),
            pid: description.pid,
            status: status(description.status).into(),
            stdin: description.stdio.stdin.as_field().to_owned(),
            stdout: description.stdio.stdout.as_field().to_owned(),
            stderr: description.stdio.stderr.as_field().to_owned(),
            terminal: description.stdio.terminal,
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
            .describe(&request.id, "")
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
        if request.now {
            self.sandbox.kill_with_hooks();
        }
        // containerd calls this after each delete, and means it only when nothing is left.
        if request.now || self.sandbox.is_empty() {
            self.shutdown.notify_one();
        }
        Ok(Empty::default())
    }
}

/// The calls of the agent's API that the Task API has nothing for, or less, passed on.
#[async_trait]
impl Agent for TaskService {
    async fn wait_oom(
        &self,
        _ctx: &TtrpcContext,
        request: WaitOomRequest,
    ) -> ttrpc::Result<WaitOomResponse> {
        let kills = self.sandbox.wait_oom(&request.container_id, request.seen);
        Ok(WaitOomResponse {
            kills: kills.await.map_err(|error| rpc_error(&error))?,
            ..Default::default()
        })
    }

    async fn container_stats(
        &self,
        _ctx: &TtrpcContext,
        request: ContainerStatsRequest,
    ) -> ttrpc::Result<ContainerStatsResponse> {
        let stats = self.sandbox.stats(&request.container_id).await;
        stats.map_err(|error| rpc_error(&error))
    }
}

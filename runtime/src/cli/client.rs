//! The sandbox server as the command line calls it.

use std::os::unix::net::UnixStream;

use bulkhead_protocol::agent::{ContainerStatsRequest, ContainerStatsResponse, WaitOomRequest};
use bulkhead_protocol::agent_ttrpc::AgentClient;
use bulkhead_runtime::sandbox::{CreateOptions, Status};
use bulkhead_runtime::stdio::{Stdio, TerminalSize};
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest,
    ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StateRequest,
    UpdateTaskRequest, WaitRequest,
};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::types::task;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use thiserror::Error;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

/// How a `process` or `linux.resources` object of the spec is named in an `Any`; the server looks at its content only.
const SPEC_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1";

/// Why a call failed.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The server refused; its sentence.
    #[error("{message}")]
    Refused {
        /// Its kind.
        code: ttrpc::Code,
        /// One sentence.
        message: String,
    },
    /// The server is gone.
    #[error("the sandbox server ended unexpectedly")]
    Gone,
}

impl ServerError {
    /// Whether what was named is not there, or not any more.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if *code == ttrpc::Code::NOT_FOUND)
    }
}

impl From<ttrpc::Error> for ServerError {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => Self::Refused {
                code: status.code(),
                message: status.message().to_owned(),
            },
            _ => Self::Gone,
        }
    }
}

/// A process of a container as the server knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessState {
    /// Where in its life it is.
    pub status: Status,
    /// Its stand-in; 0 once it has ended.
    pub pid: u32,
}

/// A connection to the server of one sandbox, and a process in it: an empty `exec_id` is the container's init.
pub struct Server<'a> {
    tasks: TaskClient,
    agent: AgentClient,
    id: &'a str,
    exec_id: &'a str,
}

impl<'a> Server<'a> {
    /// A client for a process of the container `id` over `connection`. Needs a runtime.
    pub fn new(connection: UnixStream, id: &'a str, exec_id: &'a str) -> std::io::Result<Self> {
        let client = Client::new(Socket::try_from(connection)?);
        Ok(Self {
            tasks: TaskClient::new(client.clone()),
            agent: AgentClient::new(client),
            id,
            exec_id,
        })
    }

    /// Makes the container.
    pub async fn create(
        &self,
        bundle: &str,
        stdio: Stdio,
        options: &CreateOptions,
    ) -> Result<u32, ServerError> {
        let request = CreateTaskRequest {
            id: self.id.to_owned(),
            bundle: bundle.to_owned(),
            stdin: stdio.stdin.as_field().to_owned(),
            stdout: stdio.stdout.as_field().to_owned(),
            stderr: stdio.stderr.as_field().to_owned(),
            terminal: stdio.terminal,
            options: any(
                CreateOptions::TYPE_URL,
                serde_json::to_vec(options).unwrap_or_default(),
            ),
            ..Default::default()
        };
        Ok(self.tasks.create(Context::default(), &request).await?.pid)
    }

    /// Describes a process to execute: the spec's `process` as JSON.
    pub async fn exec(&self, process_json: Vec<u8>, stdio: Stdio) -> Result<(), ServerError> {
        let request = ExecProcessRequest {
            id: self.id.to_owned(),
            exec_id: self.exec_id.to_owned(),
            stdin: stdio.stdin.as_field().to_owned(),
            stdout: stdio.stdout.as_field().to_owned(),
            stderr: stdio.stderr.as_field().to_owned(),
            terminal: stdio.terminal,
            spec: any(&format!("{SPEC_TYPE_URL}/Process"), process_json),
            ..Default::default()
        };
        self.tasks.exec(Context::default(), &request).await?;
        Ok(())
    }

    /// Starts its program; returns its stand-in's pid.
    pub async fn start(&self) -> Result<u32, ServerError> {
        let request = StartRequest {
            id: self.id.to_owned(),
            exec_id: self.exec_id.to_owned(),
            ..Default::default()
        };
        Ok(self.tasks.start(Context::default(), &request).await?.pid)
    }

    /// Waits for its end and returns the exit code.
    pub async fn wait(&self) -> Result<u32, ServerError> {
        let request = WaitRequest {
            id: self.id.to_owned(),
            exec_id: self.exec_id.to_owned(),
            ..Default::default()
        };
        let response = self.tasks.wait(Context::default(), &request).await?;
        Ok(response.exit_status)
    }

    /// Signals it, or every process of the container.
    pub async fn kill(&self, signal: u32, all: bool) -> Result<(), ServerError> {
        let request = KillRequest {
            id: self.id.to_owned(),
            exec_id: self.exec_id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.tasks.kill(Context::default(), &request).await?;
        Ok(())
    }

    /// Sets the size of its terminal.
    pub async fn resize(&self, size: TerminalSize) -> Result<(), ServerError> {
        let request = ResizePtyRequest {
            id: self.id.to_owned(),
            exec_id: self.exec_id.to_owned(),
            width: size.width,
            height: size.height,
            ..Default::default()
        };
        self.tasks.resize_pty(Context::default(), &request).await?;
        Ok(())
    }

    /// What the server knows of it.
    pub async fn state(&self) -> Result<ProcessState, ServerError> {
        let request = StateRequest {
            id: self.id.to_owned(),
            exec_id: self.exec_id.to_owned(),
            ..Default::default()
        };
        let response = self.tasks.state(Context::default(), &request).await?;
        let status = match response.status.enum_value_or_default() {
            task::Status::UNKNOWN => Status::Creating,
            task::Status::CREATED => Status::Created,
            task::Status::RUNNING => Status::Running,
            task::Status::PAUSED | task::Status::PAUSING => Status::Paused,
            task::Status::STOPPED => Status::Stopped,
        };
        Ok(ProcessState {
            status,
            pid: response.pid,
        })
    }

    /// Stops the container's processes where they are.
    pub async fn pause(&self) -> Result<(), ServerError> {
        let request = PauseRequest {
            id: self.id.to_owned(),
            ..Default::default()
        };
        self.tasks.pause(Context::default(), &request).await?;
        Ok(())
    }

    /// Lets them go on.
    pub async fn resume(&self) -> Result<(), ServerError> {
        let request = ResumeRequest {
            id: self.id.to_owned(),
            ..Default::default()
        };
        self.tasks.resume(Context::default(), &request).await?;
        Ok(())
    }

    /// Changes the container's limits: the spec's `linux.resources` as JSON.
    pub async fn update(&self, resources_json: Vec<u8>) -> Result<(), ServerError> {
        let request = UpdateTaskRequest {
            id: self.id.to_owned(),
            resources: any(&format!("{SPEC_TYPE_URL}/LinuxResources"), resources_json),
            ..Default::default()
        };
        self.tasks.update(Context::default(), &request).await?;
        Ok(())
    }

    /// What the container has used: every figure of the guest's kernel, of which the Task API's metrics have some.
    pub async fn stats(&self) -> Result<ContainerStatsResponse, ServerError> {
        let request = ContainerStatsRequest {
            container_id: self.id.to_owned(),
            ..Default::default()
        };
        Ok(self
            .agent
            .container_stats(Context::default(), &request)
            .await?)
    }

    /// Waits for a kill for want of memory beyond the first `seen`, or for none without that; returns how many there were. Of a
    /// container that stands still the answer comes when it goes on.
    pub async fn wait_oom(&self, seen: Option<u64>) -> Result<u64, ServerError> {
        let request = WaitOomRequest {
            container_id: self.id.to_owned(),
            seen,
            ..Default::default()
        };
        let response = self.agent.wait_oom(Context::default(), &request).await?;
        Ok(response.kills)
    }

    /// The processes of the host that stand for the container's.
    pub async fn pids(&self) -> Result<Vec<u32>, ServerError> {
        let request = PidsRequest {
            id: self.id.to_owned(),
            ..Default::default()
        };
        let response = self.tasks.pids(Context::default(), &request).await?;
        let processes = response.processes.into_iter();
        Ok(processes.map(|process| process.pid).collect())
    }

    /// Forgets it.
    pub async fn delete(&self) -> Result<(), ServerError> {
        let request = DeleteRequest {
            id: self.id.to_owned(),
            exec_id: self.exec_id.to_owned(),
            ..Default::default()
        };
        self.tasks.delete(Context::default(), &request).await?;
        Ok(())
    }

    /// Ends the sandbox; with `now` whatever is in it and at once, without it only if that is nothing. The server goes after its
    /// answer, or before it has got through.
    pub async fn shutdown(&self, now: bool) {
        let request = ShutdownRequest {
            id: self.id.to_owned(),
            now,
            ..Default::default()
        };
        let _ = self.tasks.shutdown(Context::default(), &request).await;
    }
}

fn any(type_url: &str, value: Vec<u8>) -> MessageField<Any> {
    MessageField::some(Any {
        type_url: type_url.to_owned(),
        value,
        ..Default::default()
    })
}

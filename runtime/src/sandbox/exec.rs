//! Processes that are executed in a running container.

use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use super::container::{self, Deferred, Signal};
use super::process::{Exit, Process, Status};
use super::{
    KILL_TIMEOUT, LOST_EXIT_CODE, Sandbox, SandboxError, deliver, find, forget, is_default, watch,
};
use crate::spec::is_default_profile;
use crate::standin::StandIn;
use crate::stdio::{Flow, Stdio, TerminalSize};
use crate::streams::{self, Stream};

/// A process to execute.
#[derive(Debug)]
pub struct Exec {
    /// The container.
    pub id: String,
    /// The process's name in it.
    pub exec_id: String,
    /// The spec's `process`, as JSON.
    pub process_json: Vec<u8>,
    /// Who attaches its streams.
    pub stdio: Stdio,
}

/// What the command line adds to a process's JSON, whose properties are the spec's alone: beside it, under this name.
pub const OPTIONS: &str = "io.bulkhead";

/// What the Task API's exec request has no field for. What says nothing is left out, as of [`super::CreateOptions`].
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExecOptions {
    /// The process of the host that stands for this one. Its end by SIGKILL is the process's.
    #[serde(skip_serializing_if = "is_default")]
    pub proxy: Option<u32>,
    /// The command of the host in whose foreground it runs: once that has gone the process, when it ends, is nobody's to forget but the server's.
    #[serde(skip_serializing_if = "is_default")]
    pub client: Option<u32>,
    /// Whether the process is killed when that command is: whoever has been told its pid means the process.
    #[serde(skip_serializing_if = "is_default")]
    pub ends_with_client: bool,
    /// Size of the terminal at the start.
    #[serde(skip_serializing_if = "is_default")]
    pub terminal_size: Option<TerminalSize>,
    /// What the process has from descriptor 3 on.
    #[serde(skip_serializing_if = "is_default")]
    pub descriptors: Vec<Flow>,
    /// The cgroup below the container's that it is to be in, by its path from there; empty for the container's own.
    #[serde(skip_serializing_if = "is_default")]
    pub cgroup: String,
    /// Whether it may be described while the container is paused; it then starts when that goes on.
    #[serde(skip_serializing_if = "is_default")]
    pub ignore_paused: bool,
}

impl Sandbox {
    /// Describes a process that [`Sandbox::start_exec`] is to execute.
    pub fn exec(self: &Arc<Self>, exec: Exec) -> Result<(), SandboxError> {
        let container = self.container(&exec.id)?;
        let wrong = |problem: String| SandboxError::Request {
            what: "process",
            problem,
        };
        let mut json: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&exec.process_json).map_err(|e| wrong(e.to_string()))?;
        let options: ExecOptions = match json.remove(OPTIONS) {
            Some(options) => serde_json::from_value(options).map_err(|e| wrong(e.to_string()))?,
            None => ExecOptions::default(),
        };
        running(&container, options.ignore_paused)?;
        let profile = json.get("apparmorProfile").and_then(|name| name.as_str());
        if profile.is_some_and(is_default_profile) {
            // As at the container's creation: the guest has no AppArmor.
            json.remove("apparmorProfile");
        }
        let spec = serde_json::to_vec(&json).map_err(|e| wrong(e.to_string()))?;
        let proxy = options.proxy.map(find).transpose()?;
        let client = options.client.map(find).transpose()?;
        let process = Arc::new(Process::new(exec.stdio, proxy.clone(), client.clone()));
        process.created();
        let added = container::Exec {
            spec,
            size: options.terminal_size,
            ignore_paused: options.ignore_paused,
            descriptors: options.descriptors,
            cgroup: options.cgroup,
            ends_with_stand_in: proxy.is_some() || options.ends_with_client,
            process,
            started: OnceLock::new(),
        };
        if !container.add_exec(&exec.exec_id, added) {
            return Err(SandboxError::ExecExists(exec.exec_id));
        }
        self.timeline.mark("server: process described");
        let watched = self
            .watch_stand_in(container.clone(), &exec.exec_id, proxy.as_ref())
            .and_then(|()| self.watch_client(container.clone(), &exec.exec_id, client.as_ref()));
        if watched.is_err() {
            container.remove_exec(&exec.exec_id);
        }
        watched
    }

    /// Follows the command in whose foreground a process runs to its end. The process lives on without it, as under runc, unless that
    /// command has told its own pid as the process's.
    fn watch_client(
        self: &Arc<Self>,
        container: Arc<container::Container>,
        exec_id: &str,
        client: Option<&StandIn>,
    ) -> Result<(), SandboxError> {
        let Some(client) = client else {
            return Ok(());
        };
        let ended = watch(client)?;
        let (sandbox, exec_id) = (self.clone(), exec_id.to_owned());
        tokio::spawn(async move {
            ended.wait().await;
            // An orderly client has seen to that itself.
            let Some(exec) = container.exec(&exec_id) else {
                return;
            };
            if exec.started.set(()).is_ok() {
                // Nobody will.
                exec.process.ended(LOST_EXIT_CODE);
                container.remove_exec(&exec_id);
                return;
            }
            exec.process.orphan();
            if exec.process.status() == Status::Running {
                sandbox.close_streams(&container, &exec_id, &exec);
            }
            if exec.ends_with_stand_in {
                sandbox.orphaned(&container, &exec_id, &exec.process).await;
            }
            exec.process.wait().await;
            let _ = sandbox.delete_exec(container.id.as_str(), &exec_id).await;
        });
        Ok(())
    }

    /// Takes the streams that the client of a process has not taken, and closes them: nobody would hear of the end of a process
    /// whose output nobody takes.
    fn close_streams(
        &self,
        container: &container::Container,
        exec_id: &str,
        exec: &container::Exec,
    ) {
        let vsock = self.params.state.vsock();
        let (container_id, exec_id) = (container.id.clone(), exec_id.to_owned());
        let streams = exec.process.stdio.of_client(&exec.descriptors);
        tokio::task::spawn_blocking(move || {
            for (kind, descriptor) in streams {
                let stream = Stream {
                    container_id: container_id.as_str(),
                    exec_id: &exec_id,
                    kind,
                    descriptor,
                };
                if let Err(error) = streams::attach(&vsock, &stream) {
                    tracing::debug!(%error, ?kind, "a stream is not closed");
                }
            }
        });
    }

    /// Executes it; returns its stand-in's pid.
    pub async fn start_exec(
        self: &Arc<Self>,
        id: &str,
        exec_id: &str,
    ) -> Result<u32, SandboxError> {
        let container = self.container(id)?;
        let exec = container
            .exec(exec_id)
            .ok_or_else(|| SandboxError::NoProcess(exec_id.to_owned()))?;
        running(&container, exec.ignore_paused)?;
        // Of two who start it at once, one must not take it from the other.
        if exec.process.status() != Status::Created || exec.started.set(()).is_err() {
            return Err(SandboxError::Status {
                what: "cannot start a process twice",
                status: exec.process.status(),
            });
        }
        let started = self.execute(&container, exec_id, &exec).await;
        if started.is_err() {
            let is_guests = exec.process.status() != Status::Created;
            exec.process.ended(LOST_EXIT_CODE);
            if is_guests {
                let _ = self.delete_exec(id, exec_id).await;
            }
            container.remove_exec(exec_id);
            self.may_be_idle();
        }
        started
    }

    async fn execute(
        self: &Arc<Self>,
        container: &Arc<container::Container>,
        exec_id: &str,
        exec: &container::Exec,
    ) -> Result<u32, SandboxError> {
        if exec.ignore_paused {
            container.goes_on().await;
        }
        running(container, false)?;
        let machine = self.running_machine()?;
        if let Some(proxy) = &exec.process.proxy {
            self.cgroup.add(proxy).await?;
        }
        let agent = machine.agent().await?;
        let stdio = exec.process.stdio.for_agent(exec.size, &exec.descriptors);
        let answer = agent
            .exec(
                container.id.as_str(),
                exec_id,
                exec.spec.clone(),
                stdio,
                exec.cgroup.clone(),
            )
            .await;
        machine.explain(answer).await?;
        exec.process.started();
        self.timeline.mark("server: process executed");
        tokio::spawn(self.clone().watch_process(
            container.clone(),
            exec_id.to_owned(),
            exec.process.clone(),
            agent,
        ));
        if exec.process.is_orphan() && !exec.ends_with_stand_in {
            self.close_streams(container, exec_id, exec);
        } else if exec.process.is_orphan() {
            let kill = Signal {
                exec_id: exec_id.to_owned(),
                number: libc::SIGKILL.unsigned_abs(),
                all: false,
            };
            deliver(machine, container.id.as_str(), &kill).await?;
            // Its end is told when its output is taken, which nobody does.
            let _ = tokio::time::timeout(KILL_TIMEOUT, exec.process.wait()).await;
            return Err(SandboxError::Orphan);
        }
        Ok(self.stand_in(&exec.process))
    }

    /// Forgets a process that does not run.
    pub async fn delete_exec(
        self: &Arc<Self>,
        id: &str,
        exec_id: &str,
    ) -> Result<Option<Exit>, SandboxError> {
        let container = self.container(id)?;
        let process = self.process(id, exec_id)?;
        let status = process.status();
        if !matches!(status, Status::Created | Status::Stopped) {
            return Err(SandboxError::Status {
                what: "cannot delete the process",
                status,
            });
        }
        if !container.remove_exec(exec_id) {
            return Err(SandboxError::NoProcess(exec_id.to_owned()));
        }
        self.timeline.mark("server: process deleted");
        if status == Status::Stopped
            && let Ok(machine) = self.running_machine()
        {
            match container.status() {
                _ if container.stands_still() => {
                    container.defer(Deferred::Deletion(exec_id.to_owned()));
                }
                // With the container's init the guest has forgotten, or will forget, all of it.
                Status::Stopped => self.may_be_idle(),
                _ => forget(machine, id, exec_id).await?,
            }
        }
        Ok(process.exit())
    }
}

fn running(container: &container::Container, ignore_paused: bool) -> Result<(), SandboxError> {
    let what = match container.status() {
        // As under runc, the namespaces of one that is only created can be entered.
        Status::Created | Status::Running => return Ok(()),
        Status::Paused if ignore_paused => return Ok(()),
        Status::Paused => "cannot exec in a paused container (resume it first)",
        Status::Stopped => "container not running: cannot exec in it",
        Status::Creating => "cannot exec in a container that is not running",
    };
    Err(SandboxError::Status {
        what,
        status: container.status(),
    })
}

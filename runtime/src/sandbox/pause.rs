//! Pause and resume: a container alone in its guest stands still with that, another one's cgroup in the guest is frozen. What is asked of a
//! container whose guest stands still is kept for when that goes on.

use bulkhead_protocol::agent::ContainerStatsResponse;
use bulkhead_vmm::control::Request;

use super::boot::Machine;
use super::container::{Container, Deferred, Pause};
use super::limits::limit;
use super::process::Status;
use super::{KILL_TIMEOUT, Sandbox, SandboxError, deliver, forget, resize};
use crate::agent::AgentError;

impl Sandbox {
    /// Keeps every process of a container from running: by stopping the guest's vCPUs, or by freezing its cgroup if other containers are in
    /// the guest.
    pub async fn pause(&self, id: &str) -> Result<(), SandboxError> {
        let container = self.container(id)?;
        let pausable = || match container.status() {
            Status::Created | Status::Running => Ok(()),
            status => Err(SandboxError::Status {
                what: "container not running",
                status,
            }),
        };
        pausable()?;
        let machine = self.running_machine()?;
        if !self.shares_guest(&container) {
            container.keep_figures(last_figures(machine, id).await);
            // It may have ended meanwhile, or somebody else have paused it.
            pausable()?;
        }
        if self.stand_still(machine, &container) {
            if let Err(error) = machine.vmm().order(Request::Pause, vec![]).await {
                self.go_on(machine, &container).await?;
                return Err(error.into());
            }
        } else {
            let agent = machine.agent().await?;
            machine.explain(agent.pause(id).await).await?;
            container.set_pause(Some(Pause::Cgroup));
        }
        self.note(&container);
        if container.status() == Status::Stopped {
            if container.stands_still() {
                self.let_go(machine, &container).await;
            }
            return Err(SandboxError::Status {
                what: "container not running",
                status: Status::Stopped,
            });
        }
        Ok(())
    }

    /// Has a container that is alone in its guest stand still with it; from then on none is made beside it.
    fn stand_still(&self, machine: &Machine, container: &Container) -> bool {
        let containers = self.containers();
        let alone = containers.values().all(|other| other.id == container.id);
        if alone {
            container.set_pause(Some(Pause::Guest));
            machine.set_still(true);
        }
        alone
    }

    /// Lets them run again, and sees to what came for the container's processes meanwhile.
    pub async fn resume(&self, id: &str) -> Result<(), SandboxError> {
        let container = self.container(id)?;
        let (Status::Paused, Some(pause)) = (container.status(), container.pause()) else {
            return Err(SandboxError::Status {
                what: "container not paused",
                status: container.status(),
            });
        };
        let machine = self.running_machine()?;
        match pause {
            Pause::Guest => machine.vmm().order(Request::Resume, vec![]).await?,
            Pause::Cgroup => {
                let agent = machine.agent().await?;
                machine.explain(agent.resume(id).await).await?;
            }
        }
        self.go_on(machine, &container).await
    }

    /// Sees to what came for a container's processes while it was paused.
    async fn go_on(&self, machine: &Machine, container: &Container) -> Result<(), SandboxError> {
        machine.set_still(false);
        container.set_pause(None);
        self.note(container);
        let id = container.id.as_str();
        let mut updated = Ok(());
        for deferred in container.take_deferred() {
            let done = match deferred {
                Deferred::Signal(signal) => deliver(machine, id, &signal).await,
                Deferred::Update(json) => {
                    // Who asked for it is gone, so whoever resumes hears of it, once all else is done.
                    if let Err(error) = limit(machine, id, json).await {
                        updated = Err(SandboxError::LateUpdate(Box::new(error)));
                    }
                    continue;
                }
                Deferred::Deletion(exec_id) => forget(machine, id, &exec_id).await,
                Deferred::Resize(exec_id, size) => resize(machine, id, &exec_id, size).await,
            };
            match done {
                // It may have ended before it stood still, or by the signal before this one.
                Ok(()) | Err(SandboxError::Agent(AgentError::Refused { .. })) => {}
                Err(error) => return Err(error),
            }
        }
        updated
    }

    /// Resumes a guest whose container has ended as it was brought to a stand: it still has output to hand over and files to
    /// write back.
    pub(super) async fn let_go(&self, machine: &Machine, container: &Container) {
        if let Err(error) = machine.vmm().order(Request::Resume, vec![]).await {
            tracing::debug!(%error, "the guest does not go on");
        }
        machine.set_still(false);
        container.set_pause(None);
    }
}

/// What a container has used, for whoever asks while its guest stands still. That comes to a stand too if it does not tell.
async fn last_figures(machine: &Machine, id: &str) -> Option<ContainerStatsResponse> {
    let asked = async { machine.agent().await.ok()?.stats(id).await.ok() };
    let told = tokio::time::timeout(KILL_TIMEOUT, asked)
        .await
        .ok()
        .flatten();
    if told.is_none() {
        tracing::debug!("the guest is brought to a stand without having told what was used");
    }
    told
}

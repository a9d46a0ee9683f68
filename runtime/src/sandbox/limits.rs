//! A container's limits and what it has used.

use bulkhead_protocol::agent::ContainerStatsResponse;
use oci_spec::runtime::LinuxResources;

use super::boot::Machine;
use super::container::{Container, Deferred};
use super::process::Status;
use super::{Sandbox, SandboxError};
use crate::agent::AgentError;
use crate::host_cgroup;
use crate::sizing::BASE_MEMORY_MIB;

impl Sandbox {
    /// Changes the limits of a container to what `resources_json` (the spec's `linux.resources`) names; those that hold in a guest that
    /// stands still when it goes on.
    pub async fn update(&self, id: &str, resources_json: &[u8]) -> Result<(), SandboxError> {
        let resources: LinuxResources =
            serde_json::from_slice(resources_json).map_err(|e| SandboxError::Request {
                what: "resources",
                problem: e.to_string(),
            })?;
        host_cgroup::check(&resources)?;
        let container = self.container(id)?;
        let machine = self.live_machine(&container, "container not running")?;
        let guest_mib = self.guest_memory_mib(&resources)?;
        let of_guest = crate::adapt::guest_resources(resources.clone());
        let json = serde_json::to_vec(&of_guest).map_err(|e| SandboxError::Request {
            what: "resources",
            problem: e.to_string(),
        })?;
        if container.stands_still() {
            container.defer(Deferred::Update(json));
        } else {
            limit(machine, id, json).await?;
        }
        if self.is_first(&container) {
            self.cgroup.apply(resources, guest_mib).await?;
        }
        Ok(())
    }

    /// The guest's memory, which a limit must fit into.
    pub(super) fn guest_memory_mib(&self, resources: &LinuxResources) -> Result<u64, SandboxError> {
        let guest_mib = self
            .machine
            .get()
            .map_or(0, |machine| machine.size().memory_mib);
        let limit = resources
            .memory()
            .as_ref()
            .and_then(|memory| memory.limit());
        let limit_mib = limit
            .and_then(|bytes| u64::try_from(bytes).ok())
            .unwrap_or(0)
            >> 20;
        let most = guest_mib.saturating_sub(BASE_MEMORY_MIB);
        if limit_mib > most {
            return Err(SandboxError::Request {
                what: "memory.limit",
                problem: format!(
                    "{limit_mib} MiB do not fit into this container's VM, which was made for at most {most} MiB: \
                     create the container with the larger limit"
                ),
            });
        }
        Ok(guest_mib)
    }

    /// What a container has used; if its guest stands still, by the time that it was brought to.
    pub async fn stats(&self, id: &str) -> Result<ContainerStatsResponse, SandboxError> {
        const WHAT: &str = "cannot read the container's statistics";
        let container = self.container(id)?;
        let machine = self.live_machine(&container, WHAT)?;
        if container.stands_still() {
            return container.figures().ok_or(SandboxError::Status {
                what: WHAT,
                status: Status::Paused,
            });
        }
        let agent = machine.agent().await?;
        machine.explain(agent.stats(id).await).await
    }

    /// Waits for a kill for want of memory beyond the first `seen`, or for none without that; returns how many there were. A
    /// container that stands still is asked when it goes on.
    pub async fn wait_oom(&self, id: &str, seen: Option<u64>) -> Result<u64, SandboxError> {
        let container = self.container(id)?;
        container.guest_goes_on().await;
        let machine = self.live_machine(&container, "cannot watch the container")?;
        let agent = machine.agent().await?;
        let told = match seen {
            None => agent.wait_oom(id, None).await,
            Some(seen) => {
                let mut ooms = container.ooms(agent);
                let more = |told: &Result<u64, AgentError>| {
                    told.as_ref().map_or(true, |&kills| kills > seen)
                };
                let told = ooms.wait_for(more).await;
                told.map_or(Err(AgentError::Silent), |told| told.clone())
            }
        };
        machine.explain(told).await
    }

    fn live_machine(
        &self,
        container: &Container,
        what: &'static str,
    ) -> Result<&Machine, SandboxError> {
        match container.status() {
            Status::Created | Status::Running | Status::Paused => self.running_machine(),
            status => Err(SandboxError::Status { what, status }),
        }
    }
}

/// Has the guest change the limits of a container.
pub(super) async fn limit(machine: &Machine, id: &str, json: Vec<u8>) -> Result<(), SandboxError> {
    let agent = machine.agent().await?;
    machine.explain(agent.update(id, json).await).await
}

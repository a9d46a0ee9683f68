//! What is done to a container while it exists: paused, resumed, limited anew, looked at.

use std::collections::HashMap;

use bulkhead_protocol::agent::{ContainerStatsResponse, ProcessEntry};

use crate::cgroup::Limits;
use crate::container::Container;
use crate::error::{Context, Error, Result};
use crate::spec::parse_resources;

impl Container {
    /// Freezes every process.
    pub async fn pause(&self) -> Result<()> {
        let _alone = self.freezer.lock().await;
        self.expect_running()?;
        if self.cgroup.is_freezing()? {
            return Err(Error::State(
                "container not running: it is paused".to_owned(),
            ));
        }
        self.cgroup.freeze().await
    }

    /// Thaws them.
    pub async fn resume(&self) -> Result<()> {
        let _alone = self.freezer.lock().await;
        self.expect_running()?;
        if !self.cgroup.is_frozen()? {
            return Err(Error::State("container not paused".to_owned()));
        }
        self.cgroup.thaw().await
    }

    /// Changes what `linux.resources` names.
    pub async fn update(&self, resources_json: &[u8]) -> Result<()> {
        let limits = Limits::for_update(&parse_resources(resources_json)?)?;
        self.expect_running()?;
        self.cgroup.change(&limits).await
    }

    /// What it has used.
    pub fn stats(&self) -> Result<ContainerStatsResponse> {
        self.cgroup.stats()
    }

    /// Its processes.
    pub fn processes(&self) -> Result<Vec<ProcessEntry>> {
        let execs: HashMap<u32, String> = self
            .execs
            .all()
            .into_iter()
            // The pid of one that has ended may be another's.
            .filter(|(_, task)| !task.has_ended())
            .map(|(id, task)| (task.api_pid(), id))
            .collect();
        let entry = |pid: i32| {
            let pid = pid.unsigned_abs();
            ProcessEntry {
                pid,
                exec_id: execs.get(&pid).cloned().unwrap_or_default(),
                ..Default::default()
            }
        };
        Ok(self.cgroup.processes()?.into_iter().map(entry).collect())
    }

    /// Waits until the kernel has killed more than `seen` of its processes for want of memory; how many by then. Without
    /// `seen` nothing is waited for.
    pub async fn oom_kills(&self, seen: Option<u64>) -> Result<u64> {
        let mut deleted = self.deleted.subscribe();
        let gone = || Error::NoContainer(self.id.clone());
        let Some(events) = self.cgroup.memory_events()? else {
            // Without a memory controller nothing is ever counted.
            if seen.is_none() {
                return Ok(0);
            }
            let _ = deleted.wait_for(|&deleted| deleted).await;
            return Err(gone());
        };
        let what = || "cannot watch the container's memory";
        loop {
            let kills = events.read().what(what)?.remove("oom_kill").unwrap_or(0);
            if seen.is_none_or(|seen| kills > seen) {
                return Ok(kills);
            }
            tokio::select! {
                changed = events.changed() => changed.what(what)?,
                _ = deleted.wait_for(|&deleted| deleted) => return Err(gone()),
            }
        }
    }

    fn expect_running(&self) -> Result<()> {
        if *self.deleted.borrow() || self.init_is_gone() {
            return Err(Error::State("container not running".to_owned()));
        }
        Ok(())
    }
}

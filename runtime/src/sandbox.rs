//! The life of one sandbox: a machine that boots with its first container, the containers in it, and its end.
//!
//! The machine is started as soon as the first bundle has been found good; the host's mounts are made while the guest
//! boots. No lock is held across a call to the guest or the VMM. Whatever ends a sandbox, [`Sandbox::shutdown`] leaves
//! nothing of it.

mod boot;
mod container;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::OnceCell;

use crate::adapt::adapt;
use crate::agent::{Agent, AgentError};
use crate::config::Config;
use crate::id::{ContainerId, IdError};
use crate::preflight::PreflightError;
use crate::share::ShareError;
use crate::sizing::Size;
use crate::spec::{Bundle, SpecError};
use crate::state::{self, StateDir, StateError};
use crate::stdio::{Stdio, StdioError};
use crate::timeline::{self, Timeline};
use crate::vmm::{Ended, VmmError};

pub use boot::BootError;
use boot::Machine;
use container::Container;
pub use container::{Exit, Status};

/// How long a guest may take to write back its dirty pages and power off before it is killed.
const POWER_OFF_TIMEOUT: Duration = Duration::from_secs(30);

/// Exit code of a process whose VM ended under it.
const LOST_EXIT_CODE: u32 = 255;

/// Why a sandbox did not do as told.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// The id is no id.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The bundle is refused.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The streams can't be attached as asked.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// This host can't start a guest.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// A mount failed.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The state directory failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// The VMM failed.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The guest did not come up.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The agent refused or is gone.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The VM ended under its containers.
    #[error("{0}")]
    Failed(String),
    /// No such container.
    #[error("container {0:?} does not exist")]
    NotFound(String),
    /// The id is taken.
    #[error("container with id {0} already exists: choose another id or delete that container")]
    Exists(ContainerId),
    /// The container is in another state.
    #[error("{what}: it is {status}")]
    Status {
        /// What can't be done.
        what: &'static str,
        /// What the container is.
        status: Status,
    },
}

/// What a sandbox is made with. The current directory of the process must be the state directory.
#[derive(Debug)]
pub struct Params {
    /// The sandbox's id.
    pub id: ContainerId,
    /// Its state directory, already claimed.
    pub state: StateDir,
    /// The configuration in force.
    pub config: Config,
}

/// A container to create.
#[derive(Debug)]
pub struct Create {
    /// Its id.
    pub id: String,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// Who attaches its streams.
    pub stdio: Stdio,
}

/// What is known of a container.
#[derive(Debug, Clone)]
pub struct Description {
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// Its init's stand-in on the host: the VMM.
    pub pid: u32,
    /// Life-cycle state.
    pub status: Status,
    /// Who attaches its streams.
    pub stdio: Stdio,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
}

/// One sandbox.
#[derive(Debug)]
pub struct Sandbox {
    params: Params,
    timeline: Timeline,
    machine: OnceCell<Machine>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// Why the sandbox ended, if not by shutdown.
    failure: OnceLock<String>,
    closing: OnceLock<()>,
}

impl Sandbox {
    /// A sandbox in which nothing runs yet.
    pub fn new(params: Params, timeline: Timeline) -> Arc<Self> {
        Arc::new(Self {
            params,
            timeline,
            machine: OnceCell::new(),
            containers: Mutex::default(),
            failure: OnceLock::new(),
            closing: OnceLock::new(),
        })
    }

    /// The boot timeline of this process and of what it has asked the VMM and the guest.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Makes a container as far as `runc create` does; the first one boots the guest. Returns the VMM's pid.
    pub async fn create(self: &Arc<Self>, create: Create) -> Result<u32, SandboxError> {
        let id = ContainerId::new(create.id)?;
        let bundle = Bundle::load(&create.bundle)?;
        let adapted = adapt(&bundle, &id)?;
        self.timeline.mark("server: spec validated");
        let size = Size::of(&bundle.spec, &self.params.config);
        let container = Arc::new(Container::new(
            id.clone(),
            bundle.dir,
            adapted.binds,
            create.stdio,
        ));
        self.reserve(&container)?;
        let made = self.make(&container, size, &adapted.spec).await;
        if made.is_err() {
            self.containers().remove(id.as_str());
        }
        made
    }

    fn reserve(&self, container: &Arc<Container>) -> Result<(), SandboxError> {
        let mut containers = self.containers();
        if containers.contains_key(container.id.as_str()) {
            return Err(SandboxError::Exists(container.id.clone()));
        }
        containers.insert(container.id.as_str().to_owned(), container.clone());
        Ok(())
    }

    async fn make(
        self: &Arc<Self>,
        container: &Arc<Container>,
        size: Size,
        spec: &oci_spec::runtime::Spec,
    ) -> Result<u32, SandboxError> {
        let id = &container.id;
        let machine = self
            .machine
            .get_or_try_init(|| async {
                if self.closing.get().is_some() {
                    return Err(SandboxError::Failed(
                        "the sandbox is being shut down".into(),
                    ));
                }
                Machine::power_on(self, size)
            })
            .await?;
        machine.share().add_container(id, &container.binds)?;
        self.timeline.mark("server: mounts made");
        let spec_json = serde_json::to_vec(spec)
            .map_err(|e| SandboxError::Failed(format!("cannot write the guest's spec: {e}")))?;
        let pid = machine.vmm().pid();
        self.params.state.save(&state::Record {
            id: id.as_str().to_owned(),
            bundle: container.bundle.clone(),
            pid,
            failure: None,
        })?;
        let agent = machine.agent().await?;
        let stdio = container.stdio.for_agent();
        let answer = agent.create(id.as_str(), spec_json, stdio).await;
        machine.explain(answer).await?;
        container.created();
        self.timeline.mark("server: container created");
        tokio::spawn(self.clone().watch_container(container.clone(), agent));
        Ok(pid)
    }

    /// Executes a created container's program.
    pub async fn start(&self, id: &str) -> Result<u32, SandboxError> {
        let container = self.container(id)?;
        let machine = self.running_machine()?;
        if container.status() != Status::Created {
            return Err(SandboxError::Status {
                what: "cannot start the container",
                status: container.status(),
            });
        }
        let agent = machine.agent().await?;
        machine.explain(agent.start(id).await).await?;
        container.started();
        self.timeline.mark("server: container started");
        Ok(machine.vmm().pid())
    }

    /// Waits for a container's end.
    pub async fn wait(&self, id: &str) -> Result<Exit, SandboxError> {
        let container = self.container(id)?;
        Ok(container.wait().await)
    }

    /// Signals a container's init, or all its processes.
    pub async fn kill(&self, id: &str, signal: u32, all: bool) -> Result<(), SandboxError> {
        let container = self.container(id)?;
        let machine = self.running_machine()?;
        let status = container.status();
        if !matches!(status, Status::Created | Status::Running) {
            return Err(SandboxError::Status {
                what: "container not running",
                status,
            });
        }
        let agent = machine.agent().await?;
        let answer = agent.signal(id, "", signal, all).await;
        machine.explain(answer).await
    }

    /// Forgets a container that does not run.
    pub async fn delete(&self, id: &str) -> Result<Option<Exit>, SandboxError> {
        let container = self.container(id)?;
        let status = container.status();
        if matches!(status, Status::Creating | Status::Running) {
            return Err(SandboxError::Status {
                what: "cannot delete the container",
                status,
            });
        }
        self.containers().remove(id);
        // With the last container the guest goes too, and it is not worth tidying up.
        if !self.is_empty() && self.failure.get().is_none() {
            let machine = self.running_machine()?;
            let agent = machine.agent().await?;
            machine.explain(agent.delete(id).await).await?;
            machine
                .share()
                .remove_container(&container.id, &container.binds)?;
        }
        Ok(container.exit())
    }

    /// What is known of a container.
    pub fn describe(&self, id: &str) -> Result<Description, SandboxError> {
        let container = self.container(id)?;
        let status = container.status();
        let pid = match status {
            Status::Stopped => 0,
            _ => self.machine.get().map_or(0, |machine| machine.vmm().pid()),
        };
        Ok(Description {
            bundle: container.bundle.clone(),
            pid,
            status,
            stdio: container.stdio,
            exit: container.exit(),
        })
    }

    /// Whether there is no container.
    pub fn is_empty(&self) -> bool {
        self.containers().is_empty()
    }

    /// Ends the sandbox and removes everything that there is of it. The guest gets the time to write back what is dirty.
    pub async fn shutdown(&self) {
        if self.closing.set(()).is_err() {
            return;
        }
        if let Some(machine) = self.machine.get() {
            if let Some(agent) = machine.agent_if_ready() {
                let vmm = machine.vmm();
                let in_order = async {
                    tokio::select! {
                        // The VM's end is what counts; the answer may be lost with it.
                        _ = vmm.ended() => {}
                        () = async { let _ = agent.shutdown().await; vmm.ended().await; } => {}
                    }
                };
                if tokio::time::timeout(POWER_OFF_TIMEOUT, in_order)
                    .await
                    .is_err()
                {
                    tracing::warn!("the guest did not power off in time and is killed");
                }
            }
            let ended = machine.vmm().kill().await;
            tracing::debug!(reason = ended.reason, "the VM has ended");
            self.timeline.mark("server: VM ended");
            self.timeline.merge(timeline::Record {
                entries: ended.timeline,
                guest: vec![],
            });
            if let Err(error) = machine.share().unmount() {
                tracing::warn!(%error, "the share stays mounted until this process ends");
            }
        }
        for container in self.all_containers() {
            container.ended(LOST_EXIT_CODE);
        }
        if let Err(error) = self.params.state.remove() {
            tracing::error!(%error, "the state directory stays");
        }
        self.timeline.mark("server: cleaned");
    }

    /// Follows a container to its end.
    async fn watch_container(self: Arc<Self>, container: Arc<Container>, agent: Agent) {
        let Some(machine) = self.machine.get() else {
            return;
        };
        let answer = agent.wait(container.id.as_str(), "").await;
        match machine.explain(answer).await {
            Ok(exit) => {
                self.timeline.mark("server: container exited");
                container.ended(exit.exit_code.min(255));
            }
            Err(error) => {
                self.fail(&error.to_string());
                machine.vmm().kill().await;
            }
        }
    }

    /// Notes the VM's end; what ran in it has ended with it.
    fn vm_ended(&self, ended: &Ended) {
        if self.closing.get().is_none() {
            self.fail(&ended.to_string());
        }
    }

    fn fail(&self, reason: &str) {
        if self.failure.set(reason.to_owned()).is_err() {
            return;
        }
        if self.closing.get().is_none() {
            tracing::debug!(reason, "the sandbox has failed");
            if let Ok(mut record) = self.params.state.load() {
                record.failure = Some(reason.to_owned());
                if let Err(error) = self.params.state.save(&record) {
                    tracing::warn!(%error, "cannot note why the sandbox ended");
                }
            }
        }
        for container in self.all_containers() {
            container.ended(LOST_EXIT_CODE);
        }
    }

    fn running_machine(&self) -> Result<&Machine, SandboxError> {
        if let Some(reason) = self.failure.get() {
            return Err(SandboxError::Failed(reason.clone()));
        }
        self.machine
            .get()
            .ok_or_else(|| SandboxError::NotFound(self.params.id.as_str().to_owned()))
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, SandboxError> {
        self.containers()
            .get(id)
            .cloned()
            .ok_or_else(|| SandboxError::NotFound(id.to_owned()))
    }

    fn all_containers(&self) -> Vec<Arc<Container>> {
        self.containers().values().cloned().collect()
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn state_dir(&self) -> &StateDir {
        &self.params.state
    }

    fn config(&self) -> &Config {
        &self.params.config
    }

    /// The file of that suffix for a debug log, if there is a directory for them.
    fn debug_file(&self, suffix: &str) -> Option<PathBuf> {
        let directory: &Path = self.params.config.debug_directory.as_deref()?;
        Some(directory.join(format!("{}-{suffix}.log", self.params.id)))
    }
}

//! The life of one sandbox: a machine that boots with its first container, the containers in it, and its end.
//!
//! The machine is started as soon as the first bundle has been found good; the host's mounts are made while the guest
//! boots. No lock is held across a call to the guest or the VMM. Whatever ends a sandbox, [`Sandbox::shutdown`] leaves
//! nothing of it.

mod boot;
mod cgroup;
mod container;
mod end;
mod error;
mod exec;
mod files;
mod limits;
mod pause;
mod process;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use oci_spec::runtime::Spec;
use tokio::sync::{OnceCell, watch};

use crate::adapt::{Adapted, adapt};
use crate::agent::AgentError;
use crate::annotations::Overrides;
use crate::config::Config;
use crate::hooks::{HookState, Occasion, Runs, RuntimePlace};
use crate::host_cgroup::HostCgroup;
use crate::id::ContainerId;
use crate::mounts_below::Inherited;
use crate::oom;
use crate::share::Part;
use crate::sizing::Size;
use crate::spec::Bundle;
use crate::standin::{self, StandIn};
use crate::state::{self, StateDir};
use crate::stdio::{Flow, Stdio, TerminalSize};
use crate::timeline::Timeline;

pub use boot::BootError;
use boot::Machine;
use cgroup::Cgroup;
use container::{Container, Deferred, Signal};
use end::KILL_TIMEOUT;
pub use error::SandboxError;
pub use exec::{Exec, ExecOptions, OPTIONS};
use process::Process;
pub use process::{Exit, Status};

/// Exit code of a process whose VM ended under it.
const LOST_EXIT_CODE: u32 = 255;

/// Exit code of a process that SIGKILL has ended.
const KILLED_EXIT_CODE: u32 = 128 + libc::SIGKILL.unsigned_abs();

/// Why nothing is begun any more.
const CLOSING: &str = "the sandbox is being shut down";

/// What a sandbox is made with. The current directory of the process must be the state directory.
#[derive(Debug)]
pub struct Params {
    /// The sandbox's id.
    pub id: ContainerId,
    /// Its state directory, already claimed.
    pub state: StateDir,
    /// The configuration in force.
    pub config: Config,
    /// Where the process was before it had namespaces of its own.
    pub host: RuntimePlace,
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
    /// What the command line knows beside.
    pub options: CreateOptions,
}

/// What the Task API's create request has no field for. The command line and a server may be of different versions: what says nothing is
/// left out, so that a server is refused only what it would have to know.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CreateOptions {
    /// The process of the host that stands for the container's init. Its end by SIGKILL is the init's.
    #[serde(skip_serializing_if = "is_default")]
    pub proxy: Option<u32>,
    /// The command of the host in whose foreground the container runs. When it has gone after the container's end, the guest goes too.
    #[serde(skip_serializing_if = "is_default")]
    pub client: Option<u32>,
    /// Size of the terminal at the start.
    #[serde(skip_serializing_if = "is_default")]
    pub terminal_size: Option<TerminalSize>,
    /// Whether systemd makes the host's cgroup.
    #[serde(skip_serializing_if = "is_default")]
    pub systemd_cgroup: bool,
    /// What the init has from descriptor 3 on.
    #[serde(skip_serializing_if = "is_default")]
    pub descriptors: Vec<Flow>,
    /// How many of them, the first, are those of the `LISTEN_FDS` protocol (`sd_listen_fds(3)`).
    #[serde(skip_serializing_if = "is_default")]
    pub listen_fds: usize,
}

impl CreateOptions {
    /// Names these options, as JSON, in the Task API's `options`.
    pub const TYPE_URL: &str = "io.bulkhead.CreateOptions";
}

/// What is known of a process.
#[derive(Debug, Clone)]
pub struct Description {
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// Its stand-in on the host: its proxy, the command in whose foreground it runs, or the VMM.
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
    /// How many parts of the share there have been.
    parts: AtomicU64,
    /// Why the sandbox ended, if not by shutdown.
    failure: OnceLock<String>,
    closing: OnceLock<()>,
    /// Set when the container on record has been stopped and is to be deleted by whoever made it.
    stopped: OnceLock<()>,
    cgroup: Cgroup,
    /// How many stand-ins there are.
    stand_ins: watch::Sender<usize>,
    hook_runs: Runs,
    /// How many commands there are in whose foreground a container runs.
    commands: watch::Sender<usize>,
}

impl Sandbox {
    /// A sandbox in which nothing runs yet.
    pub fn new(params: Params, timeline: Timeline) -> Arc<Self> {
        Arc::new(Self {
            params,
            timeline,
            machine: OnceCell::new(),
            containers: Mutex::default(),
            parts: AtomicU64::new(0),
            failure: OnceLock::new(),
            closing: OnceLock::new(),
            stopped: OnceLock::new(),
            cgroup: Cgroup::new(),
            stand_ins: watch::Sender::new(0),
            hook_runs: Runs::default(),
            commands: watch::Sender::new(0),
        })
    }

    /// The boot timeline of this process and of what it has asked the VMM and the guest.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Makes a container as far as `runc create` does; the first one boots the guest. Returns its stand-in's pid.
    pub async fn create(self: &Arc<Self>, create: Create) -> Result<u32, SandboxError> {
        let id = ContainerId::new(create.id)?;
        let bundle = Bundle::load_beside(&create.bundle, |pid| self.container_of(pid))?;
        let part = Part(self.parts.fetch_add(1, Ordering::Relaxed));
        let Adapted {
            mut spec,
            binds,
            inherited,
        } = adapt(&bundle, part)?;
        tell_of_listen_fds(&mut spec, create.options.listen_fds);
        self.timeline.mark("server: spec validated");
        let proxy = create.options.proxy.map(find).transpose()?;
        let client = create.options.client.map(find).transpose()?;
        let size = Size::of(&bundle.spec, &self.params.config)?;
        if id != self.params.id {
            self.require_fit(&bundle.spec)?;
        }
        let hook_state = HookState {
            oci_version: bundle.spec.version().clone(),
            id: id.as_str().to_owned(),
            bundle: bundle.dir.clone(),
            annotations: bundle.spec.annotations().clone(),
        };
        let container = Arc::new(Container::new(
            id.clone(),
            bundle.dir.clone(),
            part,
            binds,
            bundle.spec.hooks().clone(),
            hook_state,
            Process::new(create.stdio, proxy, client),
        ));
        self.reserve(&container)?;
        let made = self
            .make(&container, &bundle, size, &spec, inherited, &create.options)
            .await;
        if made.is_err() {
            container.lost(LOST_EXIT_CODE);
            self.run_poststop_hooks(&container).await;
            self.undo(&container).await;
            self.containers().remove(id.as_str());
        }
        made
    }

    /// Refuses a further container whose spec would have another machine than the first has.
    fn require_fit(&self, spec: &Spec) -> Result<(), SandboxError> {
        if self.machine.get().is_none() {
            return Err(SandboxError::Failed(format!(
                "the sandbox has no container yet, and its first must be {:?}",
                self.params.id.as_str()
            )));
        }
        if Overrides::of(spec)? != Overrides::default() {
            return Err(SandboxError::Request {
                what: "annotations",
                problem: "those of io.bulkhead are of the sandbox's first container, whose guest this one shares: remove them".to_owned(),
            });
        }
        let resources = spec.linux().as_ref().and_then(|l| l.resources().clone());
        self.guest_memory_mib(&resources.unwrap_or_default())?;
        Ok(())
    }

    /// Removes what there is in the guest and in the share of a container that could not be made, for the sake of those that live on.
    async fn undo(&self, container: &Container) {
        if !self.shares_guest(container) {
            return;
        }
        let Ok(machine) = self.running_machine() else {
            return;
        };
        if let Some(agent) = machine.agent_if_ready() {
            // Mostly there is none.
            let _ = agent.delete(container.id.as_str()).await;
            machine.forget_files().await;
        }
        let removed = machine
            .share()
            .remove_container(container.part, &container.binds);
        if let Err(error) = removed {
            tracing::warn!(%error, "a part of the share stays until the sandbox ends");
        }
    }

    fn reserve(&self, container: &Arc<Container>) -> Result<(), SandboxError> {
        let mut containers = self.containers();
        if containers.contains_key(container.id.as_str()) {
            return Err(SandboxError::Exists(container.id.clone()));
        }
        if containers.values().any(|other| other.stands_still()) {
            return Err(SandboxError::Status {
                what: "cannot create a container beside one that is paused (resume it first)",
                status: Status::Paused,
            });
        }
        containers.insert(container.id.as_str().to_owned(), container.clone());
        Ok(())
    }

    async fn make(
        self: &Arc<Self>,
        container: &Arc<Container>,
        bundle: &Bundle,
        size: Size,
        spec: &Spec,
        inherited: Inherited,
        options: &CreateOptions,
    ) -> Result<u32, SandboxError> {
        let id = &container.id;
        let cgroup = HostCgroup::of(&bundle.spec, id, options.systemd_cgroup)?;
        let mut record = state::Record {
            oci_version: bundle.spec.version().clone(),
            id: id.as_str().to_owned(),
            bundle: container.bundle.clone(),
            rootfs: bundle.rootfs.clone(),
            created: SystemTime::now(),
            annotations: bundle.spec.annotations().clone().unwrap_or_default(),
            pid: container.init.own_stand_in().map_or(0, StandIn::pid),
            status: Status::Creating,
            cgroup: cgroup.clone(),
            poststop: container
                .hooks
                .as_ref()
                .and_then(|hooks| hooks.poststop().clone())
                .unwrap_or_default(),
            failure: None,
        };
        let machine = self
            .machine
            .get_or_try_init(|| async {
                if self.closing.get().is_some() {
                    return Err(SandboxError::Failed(CLOSING.into()));
                }
                if let Some(cgroup) = &cgroup {
                    self.cgroup.require_free(cgroup.clone()).await?;
                    // It may take long, and what is not begun need not be undone.
                    if self.closing.get().is_some() {
                        return Err(SandboxError::Failed(CLOSING.into()));
                    }
                }
                // On record before it is made: whoever cleans up after this process has to find it.
                self.params.state.save(&record)?;
                self.settle(cgroup, &container.init).await?;
                if self.closing.get().is_some() {
                    return Err(SandboxError::Failed(CLOSING.into()));
                }
                let cmdline = Overrides::of(&bundle.spec)?.kernel_arguments;
                Machine::power_on(self, size, cmdline, !has_io_limits(&bundle.spec))
            })
            .await?;
        let oom_score = bundle.spec.process().as_ref();
        let oom_score = oom_score.and_then(|process| process.oom_score_adj());
        let set = |pid, is_alive: &dyn Fn() -> bool| {
            oom::set(pid, oom_score, is_alive).map_err(|cause| SandboxError::OomScore(pid, cause))
        };
        if let Some(proxy) = &container.init.proxy {
            set(proxy.pid(), &|| proxy.is_alive())?;
        }
        let stand_in = container.init.own_stand_in();
        let pid = stand_in.map_or_else(|| machine.vmm().pid(), StandIn::pid);
        if self.is_first(container) {
            // A child's number is its own until this process asks for its end.
            set(machine.vmm().pid(), &|| true)?;
            record.pid = pid;
            self.params.state.save(&record)?;
        } else if let Some(proxy) = &container.init.proxy {
            self.cgroup.add(proxy).await?;
        }
        machine
            .share()
            .add_container(container.part, &container.binds)?;
        self.timeline.mark("server: mounts made");
        let spec_json = serde_json::to_vec(spec)
            .map_err(|e| SandboxError::Failed(format!("cannot write the guest's spec: {e}")))?;
        self.watch_stand_in(container.clone(), "", container.init.proxy.as_ref())?;
        self.watch_foreground(container.init.client.as_ref())?;
        self.run_create_hooks(container, pid).await?;
        let agent = machine.agent().await?;
        let stdio = container
            .init
            .stdio
            .for_agent(options.terminal_size, &options.descriptors);
        let answer = agent
            .create(
                id.as_str(),
                &container.bundle,
                spec_json,
                stdio,
                inherited,
                &bundle.joins,
            )
            .await;
        machine.explain(answer).await?;
        if self.is_first(container) {
            // Not before: a guest that may use a hundredth of a processor would boot for minutes.
            let linux = bundle.spec.linux().as_ref();
            let resources = linux.and_then(|linux| linux.resources().clone());
            self.cgroup
                .apply(resources.unwrap_or_default(), size.memory_mib)
                .await?;
        }
        if container.init.is_orphan() {
            return Err(SandboxError::Orphan);
        }
        container.init.created();
        self.note(container);
        self.timeline.mark("server: container created");
        tokio::spawn(self.clone().watch_process(
            container.clone(),
            "",
            container.init.clone(),
            agent,
        ));
        Ok(pid)
    }

    /// Moves this process to where the sandbox's processes belong: their cgroup and their network namespace.
    async fn settle(&self, cgroup: Option<HostCgroup>, init: &Process) -> Result<(), SandboxError> {
        let stand_in = init.own_stand_in();
        standin::enter_network(stand_in)
            .map_err(|cause| SandboxError::StandIn(stand_in.map_or(0, StandIn::pid), cause))?;
        let Some(cgroup) = cgroup else {
            tracing::debug!("this host has no cgroup v2, so no cgroup is made");
            return Ok(());
        };
        self.cgroup.enter(cgroup).await?;
        if let Some(proxy) = &init.proxy {
            self.cgroup.add(proxy).await?;
        }
        self.timeline.mark("server: cgroup made");
        Ok(())
    }

    async fn run_create_hooks(&self, container: &Container, pid: u32) -> Result<(), SandboxError> {
        let Some(hooks) = &container.hooks else {
            return Ok(());
        };
        #[allow(deprecated)] // by the spec; Docker's networks still come this way
        let prestart = hooks.prestart().as_ref();
        let host = Some(&self.params.host);
        for (kind, list, place) in [
            ("prestart", prestart, host),
            ("createRuntime", hooks.create_runtime().as_ref(), host),
            ("createContainer", hooks.create_container().as_ref(), None),
        ] {
            let occasion = Occasion {
                kind,
                state: &container.hook_state,
                status: Status::Creating,
                pid: Some(pid),
                place,
            };
            self.hook_runs.run(list, &occasion).await?;
        }
        Ok(())
    }

    async fn run_poststop_hooks(&self, container: &Container) {
        if let Some(hooks) = &container.hooks
            && container.claim_poststop()
        {
            let occasion = Occasion {
                kind: "poststop",
                state: &container.hook_state,
                status: Status::Stopped,
                pid: None,
                place: Some(&self.params.host),
            };
            let list = hooks.poststop().as_ref();
            self.hook_runs.run_all(list, &occasion).await;
        }
    }

    /// Executes a created container's program.
    pub async fn start(self: &Arc<Self>, id: &str) -> Result<u32, SandboxError> {
        let container = self.container(id)?;
        match container.status() {
            Status::Created => {}
            Status::Running => {
                return Err(SandboxError::Status {
                    what: "cannot start an already running container",
                    status: container.status(),
                });
            }
            Status::Paused => {
                return Err(SandboxError::Status {
                    what: "cannot start a container in the paused state",
                    status: container.status(),
                });
            }
            status => {
                return Err(SandboxError::Status {
                    what: "cannot start a container that has stopped",
                    status,
                });
            }
        }
        let machine = self.running_machine()?;
        let agent = machine.agent().await?;
        machine.explain(agent.start(id).await).await?;
        container.init.started();
        self.note(&container);
        self.timeline.mark("server: container started");
        let pid = self.stand_in(&container.init);
        if let Some(hooks) = &container.hooks
            && self.closing.get().is_none()
        {
            // Their failures are logged and nothing more (runtime-spec, "Lifecycle").
            let occasion = Occasion {
                kind: "poststart",
                state: &container.hook_state,
                status: Status::Running,
                pid: Some(pid),
                place: Some(&self.params.host),
            };
            let list = hooks.poststart().as_ref();
            self.hook_runs.run_all(list, &occasion).await;
        }
        Ok(pid)
    }

    /// Waits for a process's end; an empty `exec_id` is the container's init.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, SandboxError> {
        let process = self.process(id, exec_id)?;
        Ok(process.wait().await)
    }

    /// Signals a process, or all of the container. To one that stands still SIGKILL comes at once and everything else when
    /// it is resumed; a guest that does not take a SIGKILL of a container's is killed itself, with all that is in it.
    pub async fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), SandboxError> {
        let container = self.container(id)?;
        let process = self.process(id, exec_id)?;
        let status = process.status();
        if !matches!(status, Status::Created | Status::Running | Status::Paused) {
            // Clients look for these words, and for those below, which are runc's.
            return Err(SandboxError::Status {
                what: "container not running",
                status,
            });
        }
        let machine = self.running_machine()?;
        let signal = Signal {
            exec_id: exec_id.to_owned(),
            number: signal,
            all,
        };
        if container.stands_still() {
            if signal.number != libc::SIGKILL.unsigned_abs() {
                container.defer(Deferred::Signal(signal));
                return Ok(());
            }
            let resumed = self.resume(id).await;
            // Somebody else may have resumed it at the same time.
            if container.stands_still() {
                resumed?;
            }
        }
        let delivery = deliver(machine, id, &signal);
        if signal.number == libc::SIGKILL.unsigned_abs() {
            match tokio::time::timeout(KILL_TIMEOUT, delivery).await {
                Ok(delivered) => delivered?,
                // One process is not worth its container.
                Err(_) if !exec_id.is_empty() => return Err(AgentError::Silent.into()),
                Err(_) => {
                    // What is to die dies, whatever its guest is doing.
                    tracing::warn!("the guest does not answer and is killed with its container");
                    container.lost(KILLED_EXIT_CODE);
                    self.note(&container);
                    machine.vmm().kill();
                }
            }
        } else {
            delivery.await?;
        }
        self.timeline.mark("server: signal delivered");
        Ok(())
    }

    /// Sets the size of a process's terminal; of one that stands still when it is resumed.
    pub async fn resize(
        &self,
        id: &str,
        exec_id: &str,
        size: TerminalSize,
    ) -> Result<(), SandboxError> {
        let process = self.process(id, exec_id)?;
        if !process.stdio.terminal {
            return Ok(());
        }
        let container = self.container(id)?;
        if container.stands_still() {
            container.defer(Deferred::Resize(exec_id.to_owned(), size));
            return Ok(());
        }
        resize(self.running_machine()?, id, exec_id, size).await
    }

    /// Forgets a container that does not run; one that was never started is killed first, as runc does.
    pub async fn delete(self: &Arc<Self>, id: &str) -> Result<Option<Exit>, SandboxError> {
        self.timeline.mark("server: deletion asked");
        let container = self.container(id)?;
        let status = container.status();
        if !matches!(status, Status::Created | Status::Stopped) {
            return Err(SandboxError::Status {
                what: "cannot delete the container",
                status,
            });
        }
        if self.is_first(&container) && self.shares_guest(&container) {
            return Err(SandboxError::Status {
                what: "cannot delete the first container of a sandbox before the others",
                status,
            });
        }
        if status == Status::Created && self.failure.get().is_none() {
            self.signal(id, "", libc::SIGKILL.unsigned_abs(), true)
                .await?;
            let ended = tokio::time::timeout(KILL_TIMEOUT, container.init.wait()).await;
            if ended.is_err() {
                // A guest that does not tell is of no more use.
                container.lost(KILLED_EXIT_CODE);
            }
        }
        // With the last container the guest goes too, and it is not worth tidying up.
        if self.shares_guest(&container) && self.failure.get().is_none() {
            let machine = self.running_machine()?;
            let agent = machine.agent().await?;
            machine.explain(agent.delete(id).await).await?;
            // The host's file systems that it was on may be wanted for something else.
            machine.forget_files().await;
            machine
                .share()
                .remove_container(container.part, &container.binds)?;
        }
        let removed = {
            let mut containers = self.containers();
            let stays = self.is_first(&container) && self.stopped.get().is_some();
            (!stays).then(|| containers.remove(id))
        };
        match removed {
            // It is on record, and can be deleted without this server: whoever asks learns that by its end.
            None => return std::future::pending().await,
            // Somebody else has deleted it at the same time.
            Some(None) => return Err(SandboxError::NotFound(id.to_owned())),
            Some(Some(_)) => {}
        }
        self.timeline.mark("server: container forgotten");
        self.run_poststop_hooks(&container).await;
        Ok(container.init.exit())
    }

    /// What is known of a process.
    pub fn describe(&self, id: &str, exec_id: &str) -> Result<Description, SandboxError> {
        let container = self.container(id)?;
        let process = self.process(id, exec_id)?;
        let status = match process.status() {
            Status::Created | Status::Running if container.status() == Status::Paused => {
                Status::Paused
            }
            status => status,
        };
        let pid = match status {
            Status::Stopped => 0,
            _ => self.stand_in(&process),
        };
        Ok(Description {
            bundle: container.bundle.clone(),
            pid,
            status,
            stdio: process.stdio,
            exit: process.exit(),
        })
    }

    /// The processes of the host that stand for the container's.
    pub fn pids(&self, id: &str) -> Result<Vec<u32>, SandboxError> {
        let container = self.container(id)?;
        let alive = |process: &Arc<Process>| {
            !matches!(process.status(), Status::Creating | Status::Stopped)
        };
        let processes = container.processes().into_iter().filter(alive);
        let mut pids: Vec<u32> = processes.map(|process| self.stand_in(&process)).collect();
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// The container that a process of the host stands for: a stand-in for its own, the VMM for the sandbox's first.
    fn container_of(&self, pid: u32) -> Option<ContainerId> {
        let containers = self.containers();
        let stands_for = |container: &Container| match container.init.own_stand_in() {
            Some(stand_in) => stand_in.pid() == pid && stand_in.is_alive(),
            None => self.is_first(container) && self.stand_in(&container.init) == pid && pid != 0,
        };
        let found = containers.values().find(|container| stands_for(container));
        found.map(|container| container.id.clone())
    }

    /// Whether a container is the one that the sandbox is named after, which is on record, and whose limits are the sandbox's on the host.
    fn is_first(&self, container: &Container) -> bool {
        container.id == self.params.id
    }

    /// Whether other containers are in a container's guest, running or not.
    fn shares_guest(&self, container: &Container) -> bool {
        let containers = self.containers();
        containers.values().any(|other| other.id != container.id)
    }

    fn stand_in(&self, process: &Process) -> u32 {
        let vmm = || self.machine.get().map_or(0, |machine| machine.vmm().pid());
        process.stand_in().map_or_else(vmm, StandIn::pid)
    }

    /// Whether there is no container.
    pub fn is_empty(&self) -> bool {
        self.containers().is_empty()
    }

    /// Puts on record where in its life a container is.
    fn note(&self, container: &Container) {
        if !self.is_first(container) {
            return;
        }
        let saved = self.params.state.load().and_then(|mut record| {
            record.status = container.status();
            self.params.state.save(&record)
        });
        if let Err(error) = saved {
            tracing::warn!(%error, "the record of the container is out of date");
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

    /// A process of a container; an empty `exec_id` is its init.
    fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>, SandboxError> {
        let container = self.container(id)?;
        if exec_id.is_empty() {
            return Ok(container.init.clone());
        }
        match container.exec(exec_id) {
            Some(exec) => Ok(exec.process.clone()),
            None => Err(SandboxError::NoProcess(exec_id.to_owned())),
        }
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

/// Whether an option says nothing.
fn is_default<T: Default + PartialEq>(option: &T) -> bool {
    *option == T::default()
}

/// Finds the process that a client says is to stand for a container's.
fn find(pid: u32) -> Result<StandIn, SandboxError> {
    StandIn::find(pid).map_err(|cause| SandboxError::StandIn(pid, cause))
}

/// Something to wait for its end by.
fn watch(stand_in: &StandIn) -> Result<standin::Watch, SandboxError> {
    standin::Watch::new(stand_in).map_err(|cause| SandboxError::StandIn(stand_in.pid(), cause))
}

/// Whether the container's limits slow down what its sandbox writes to the host's disks.
fn has_io_limits(spec: &Spec) -> bool {
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    resources.is_some_and(|resources| resources.block_io().is_some())
}

/// Tells the container's init, as runc does, of the descriptors that a service manager has passed.
fn tell_of_listen_fds(spec: &mut Spec, count: usize) {
    if let Some(process) = spec.process_mut()
        && count > 0
    {
        let mut env = process.env().clone().unwrap_or_default();
        env.extend([format!("LISTEN_FDS={count}"), "LISTEN_PID=1".to_owned()]);
        process.set_env(Some(env));
    }
}

async fn deliver(machine: &Machine, id: &str, signal: &Signal) -> Result<(), SandboxError> {
    let agent = machine.agent().await?;
    let answer = agent
        .signal(id, &signal.exec_id, signal.number, signal.all)
        .await;
    machine.explain(answer).await
}

async fn resize(
    machine: &Machine,
    id: &str,
    exec_id: &str,
    size: TerminalSize,
) -> Result<(), SandboxError> {
    let agent = machine.agent().await?;
    let answer = agent.resize(id, exec_id, size.width, size.height).await;
    machine.explain(answer).await
}

async fn forget(machine: &Machine, id: &str, exec_id: &str) -> Result<(), SandboxError> {
    let agent = machine.agent().await?;
    machine
        .explain(agent.delete_process(id, exec_id).await)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Debug;

    use serde::de::DeserializeOwned;

    fn crosses_versions<T>(name: &str, some: &T)
    where
        T: Default + Debug + PartialEq + Serialize + DeserializeOwned,
    {
        let text = |options: &T| serde_json::to_string(options).unwrap();
        let parsed = |text: &str| serde_json::from_str::<T>(text);
        assert_eq!(text(&T::default()), "{}", "{name}");
        assert_eq!(parsed("{}").unwrap(), T::default(), "{name}");
        assert_eq!(parsed(&text(some)).unwrap(), *some, "{name}");
        let error = parsed(r#"{"newer": true}"#).unwrap_err().to_string();
        assert!(error.contains("newer"), "{name}: {error}");
    }

    #[test]
    fn options_that_say_nothing_are_understood_by_every_version() {
        let some = CreateOptions {
            proxy: Some(7),
            listen_fds: 1,
            ..Default::default()
        };
        crosses_versions("create", &some);
        let some = ExecOptions {
            client: Some(7),
            cgroup: "a".into(),
            ..Default::default()
        };
        crosses_versions("exec", &some);
    }
}

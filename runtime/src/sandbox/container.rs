//! One container: its init, its exec'd processes, and what the host holds for it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use bulkhead_protocol::agent::ContainerStatsResponse;
use oci_spec::runtime::Hooks;
use tokio::sync::watch;

use super::process::{Process, Status};
use crate::adapt::HostBind;
use crate::agent::{Agent, AgentError};
use crate::hooks::HookState;
use crate::id::ContainerId;
use crate::share::Part;
use crate::stdio::TerminalSize;

/// One container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: ContainerId,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// Its part of the share.
    pub part: Part,
    /// What is bound for it there.
    pub binds: Vec<HostBind>,
    /// The hooks that run on the host.
    pub hooks: Option<Hooks>,
    /// What hooks are told beside status and pid.
    pub hook_state: HookState,
    /// Its first process, whose life is the container's.
    pub init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    paused: watch::Sender<Option<Pause>>,
    figures: Mutex<Option<ContainerStatsResponse>>,
    deferred: Mutex<Vec<Deferred>>,
    poststop: OnceLock<()>,
    ooms: OnceLock<Ooms>,
}

/// What keeps a paused container from running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// The guest stands still, its agent with it.
    Guest,
    /// Its cgroup in the guest is frozen. Other containers run on.
    Cgroup,
}

/// How many processes the guest's kernel has killed for want of memory, or why that is not known.
pub type Ooms = watch::Receiver<Result<u64, AgentError>>;

/// An exec'd process, from the call that describes it.
#[derive(Debug)]
pub struct Exec {
    /// The spec's `process`, as JSON, until it is started.
    pub spec: Vec<u8>,
    /// Size of its terminal at the start.
    pub size: Option<TerminalSize>,
    /// Whether it may be described while its container is paused. It starts when that goes on.
    pub ignore_paused: bool,
    /// What it has from descriptor 3 on.
    pub descriptors: Vec<crate::stdio::Flow>,
    /// The cgroup below the container's that it is to be in, by its path from there; empty for the container's own.
    pub cgroup: String,
    /// Whether it is killed when who stands for it has gone; otherwise it lives on.
    pub ends_with_stand_in: bool,
    /// Its life.
    pub process: Arc<Process>,
    /// Set by who starts it, or sees that it will never be.
    pub started: OnceLock<()>,
}

/// A signal on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signal {
    /// The process; empty for the init.
    pub exec_id: String,
    /// Its number.
    pub number: u32,
    /// Whether it is for every process.
    pub all: bool,
}

/// What a guest that stands still is asked when it goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deferred {
    /// To deliver a signal.
    Signal(Signal),
    /// To change the limits to what this JSON of `linux.resources` names.
    Update(Vec<u8>),
    /// To forget an exec'd process.
    Deletion(String),
    /// To set the size of a process's terminal; an empty id is the init's.
    Resize(String, TerminalSize),
}

impl Container {
    /// A container that is being made.
    pub fn new(
        id: ContainerId,
        bundle: PathBuf,
        part: Part,
        binds: Vec<HostBind>,
        hooks: Option<Hooks>,
        hook_state: HookState,
        init: Process,
    ) -> Self {
        Self {
            id,
            bundle,
            part,
            binds,
            hooks,
            hook_state,
            init: Arc::new(init),
            execs: Mutex::default(),
            paused: watch::Sender::new(None),
            figures: Mutex::default(),
            deferred: Mutex::default(),
            poststop: OnceLock::new(),
            ooms: OnceLock::new(),
        }
    }

    /// Where in its life it is.
    pub fn status(&self) -> Status {
        match self.init.status() {
            Status::Created | Status::Running if self.pause().is_some() => Status::Paused,
            status => status,
        }
    }

    /// What it was paused by, even if it has ended by now.
    pub fn pause(&self) -> Option<Pause> {
        *self.paused.borrow()
    }

    /// Whether it was paused with its guest, which can't be asked anything then.
    pub fn stands_still(&self) -> bool {
        self.pause() == Some(Pause::Guest)
    }

    /// Waits until its guest does not stand still.
    pub async fn guest_goes_on(&self) {
        self.wait_for_pause(|pause| pause != Some(Pause::Guest))
            .await;
    }

    /// Waits until it is not paused.
    pub async fn goes_on(&self) {
        self.wait_for_pause(|pause| pause.is_none()).await;
    }

    async fn wait_for_pause(&self, is_it: impl Fn(Option<Pause>) -> bool) {
        let mut paused = self.paused.subscribe();
        tokio::select! {
            // Fails only without a sender, and `self` is one.
            _ = paused.wait_for(|&pause| is_it(pause)) => {}
            // What has ended with its guest is not resumed any more.
            _ = self.init.wait() => {}
        }
    }

    /// It is paused, or goes on.
    pub fn set_pause(&self, pause: Option<Pause>) {
        self.paused.send_replace(pause);
    }

    /// What it had used by then is told while its guest stands still.
    pub fn keep_figures(&self, figures: Option<ContainerStatsResponse>) {
        *lock(&self.figures) = figures;
    }

    /// What it had used when its guest was brought to a stand, if the guest has told.
    pub fn figures(&self) -> Option<ContainerStatsResponse> {
        lock(&self.figures).clone()
    }

    /// Remembers an exec'd process; `false` when the id is taken.
    pub fn add_exec(&self, exec_id: &str, exec: Exec) -> bool {
        let mut execs = self.execs();
        let free = !execs.contains_key(exec_id);
        if free {
            execs.insert(exec_id.to_owned(), Arc::new(exec));
        }
        free
    }

    /// An exec'd process.
    pub fn exec(&self, exec_id: &str) -> Option<Arc<Exec>> {
        self.execs().get(exec_id).cloned()
    }

    /// Forgets an exec'd process; `false` when somebody has before.
    pub fn remove_exec(&self, exec_id: &str) -> bool {
        self.execs().remove(exec_id).is_some()
    }

    /// Whether there is an exec'd process that has been started and not been forgotten.
    pub fn executes(&self) -> bool {
        let execs = self.execs();
        execs.values().any(|exec| exec.started.get().is_some())
    }

    /// The init and every exec'd process.
    pub fn processes(&self) -> Vec<Arc<Process>> {
        let execs = self.execs();
        let execs = execs.values().map(|exec| exec.process.clone());
        std::iter::once(self.init.clone()).chain(execs).collect()
    }

    /// The machine under it has ended, and with it every process.
    pub fn lost(&self, code: u32) {
        for process in self.processes() {
            process.ended(code);
        }
    }

    /// Keeps something for later.
    pub fn defer(&self, deferred: Deferred) {
        keep(&mut self.deferred(), deferred);
    }

    /// What was kept, in order.
    pub fn take_deferred(&self) -> Vec<Deferred> {
        std::mem::take(&mut *self.deferred())
    }

    /// Whether the caller is the one to run the poststop hooks.
    pub fn claim_poststop(&self) -> bool {
        self.poststop.set(()).is_ok()
    }

    /// Kills for want of memory. The guest is asked once for all who want to know, as it can't be told that one does not any more.
    pub fn ooms(&self, agent: Agent) -> Ooms {
        let watch = || {
            let (sender, ooms) = watch::channel(Ok(0));
            let id = self.id.clone();
            tokio::spawn(async move {
                let mut kills = 0;
                loop {
                    let told = agent.wait_oom(id.as_str(), Some(kills)).await;
                    let ended = told.is_err();
                    kills = told.as_ref().map_or(kills, |&told| told);
                    let _ = sender.send_replace(told);
                    if ended {
                        break;
                    }
                }
            });
            ooms
        };
        self.ooms.get_or_init(watch).clone()
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Exec>>> {
        lock(&self.execs)
    }

    fn deferred(&self) -> MutexGuard<'_, Vec<Deferred>> {
        lock(&self.deferred)
    }
}

/// Keeps one thing more. A terminal has the size that it was given last.
fn keep(all: &mut Vec<Deferred>, deferred: Deferred) {
    if let Deferred::Resize(exec_id, _) = &deferred {
        all.retain(|other| !matches!(other, Deferred::Resize(id, _) if id == exec_id));
    }
    all.push(deferred);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_terminals_sizes_the_last_is_kept() {
        let resize = |exec_id: &str, width| {
            let size = TerminalSize { width, height: 1 };
            Deferred::Resize(exec_id.into(), size)
        };
        let mut kept = Vec::new();
        for deferred in [
            resize("", 1),
            resize("x", 2),
            Deferred::Deletion("y".into()),
            resize("", 3),
        ] {
            keep(&mut kept, deferred);
        }
        let expected = [
            resize("x", 2),
            Deferred::Deletion("y".into()),
            resize("", 3),
        ];
        assert_eq!(kept, expected);
    }
}

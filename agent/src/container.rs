//! Containers: made, started, signalled, waited for, deleted.
//!
//! The table maps ids to containers; no lock is held while anything is awaited. A container's life:
//! created (its init waits before the exec) → running → ended, and deleted from any of them.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock, PoisonError};

use bulkhead_protocol::agent::{
    CreateContainerRequest, ExecProcessRequest, NamespaceOf, StreamHeader,
};
use bulkhead_protocol::{GUEST_SHARE, MAX_CONTAINER_ID, SHARE_TAG, is_container_id};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use tokio::sync::watch;

use crate::cgroup::{Cgroup, Hierarchy};
use crate::error::{Context, Error, Kind, Result};
use crate::fault;
use crate::forget;
use crate::handshake::{self, Report};
use crate::init::{self, Job, Join};
use crate::kept::Kept;
use crate::mounts::Trees;
use crate::network::SpareNetwork;
use crate::reaper::{Exit, Reaper, exited};
use crate::registry::Registry;
use crate::spec::{Joins, Plan, namespace_flag};
use crate::streams::{ProcessEnds, Streams};
use crate::sys::{self, Fork};
use crate::task::{Child, Task};
use crate::terminal::Size;
use crate::transport::Connection;
use crate::user_namespace;

/// What containers stand on.
#[derive(Debug)]
pub struct Ground {
    /// Their cgroups.
    pub hierarchy: Hierarchy,
    /// Whether the host's share is mounted.
    pub share: bool,
    /// For the first that wants one of its own.
    pub network: SpareNetwork,
}

/// All containers of the guest.
#[derive(Debug)]
pub struct Containers {
    registry: Registry<Container>,
    reaper: Reaper,
    ground: Ground,
    loopback: Once,
}

/// One container.
#[derive(Debug)]
pub struct Container {
    pub(crate) id: String,
    pub(crate) plan: Plan,
    pub(crate) init: Task,
    pub(crate) cgroup: Cgroup,
    /// Processes that joined it, by their exec ids.
    pub(crate) execs: Registry<Task>,
    /// Set when its deletion begins.
    pub(crate) deleted: watch::Sender<bool>,
    /// Set once its init is ready.
    kept: OnceLock<Kept>,
    /// Held by who freezes or thaws it, and by who must find it as it is to be.
    pub(crate) freezer: tokio::sync::Mutex<()>,
    phase: Mutex<Phase>,
}

/// What an init is forked with.
struct Given {
    ends: ProcessEnds,
    /// Size of the terminal to make in place of the standard streams.
    terminal: Option<Size>,
    trees: Trees,
}

#[derive(Debug)]
enum Phase {
    /// The init waits for its start.
    Created(handshake::Agent),
    /// It has been told to start, or has started.
    Started,
}

impl Containers {
    /// None yet.
    pub fn new(reaper: Reaper, ground: Ground) -> Self {
        Self {
            registry: Registry::default(),
            reaper,
            ground,
            loopback: Once::new(),
        }
    }

    /// The container of this id.
    pub fn find(&self, id: &str) -> Result<Arc<Container>> {
        self.registry
            .get(id)
            .ok_or_else(|| Error::NoContainer(id.to_owned()))
    }

    /// Makes a container up to the exec; returns its init's pid.
    pub async fn create(&self, request: &CreateContainerRequest) -> Result<u32> {
        fault::point("create-asked");
        let id = &request.container_id;
        check_id(id)?;
        let owners = self.owners(&request.join)?;
        let mut plan = Plan::from_json(&request.spec_json, &joins_of(&owners))?;
        plan.hooks.bundle.clone_from(&request.bundle);
        plan.inherit(&request.root_options, &request.mounts_below)?;
        let terminal = &request.stdio.terminal;
        if plan.process.terminal != *terminal {
            return Err(Error::spec(
                "process.terminal",
                format!("the request's stdio says {terminal}"),
            ));
        }
        if !self.ground.share && plan.root.starts_with(GUEST_SHARE) {
            return Err(Error::State(format!(
                "root.path ({}): the guest could not mount the virtio-fs share {SHARE_TAG:?}",
                plan.root.display()
            )));
        }
        let reservation = self
            .registry
            .reserve(id)
            .ok_or_else(|| Error::ContainerExists(id.clone()))?;
        if plan.namespaces & libc::CLONE_NEWNET as u64 == 0 {
            self.loopback.call_once(guest_loopback_up);
        }
        let cgroup = self.ground.hierarchy.make(id, &plan.limits)?;
        if let Some(owner) = plan.cgroup_owner() {
            cgroup.give_to(owner)?;
        }
        let (streams, ends) = Streams::open(&request.stdio)?;
        let stdio = &request.stdio;
        let terminal = stdio.terminal.then(|| {
            Size::bounded(stdio.terminal_width, stdio.terminal_height).or(plan.process.console_size)
        });
        let given = Given {
            trees: Trees::prepare(&plan, init::first_free(&ends.borrow())).await?,
            ends,
            terminal,
        };
        let (child, socket) = self.fork(id, &plan, &cgroup, &owners, given)?;
        fault::point("create-forked");
        drop(owners);
        let child = if plan.joined == 0 {
            child
        } else {
            self.adopt(child, &socket).await?
        };
        let init = child.into_task(streams);
        let container = Arc::new(Container {
            id: id.clone(),
            plan,
            init,
            cgroup,
            execs: Registry::default(),
            deleted: watch::Sender::new(false),
            kept: OnceLock::new(),
            freezer: tokio::sync::Mutex::default(),
            phase: Mutex::new(Phase::Started),
        });
        let admitted = match &container.plan.id_maps {
            None => Ok(()),
            Some(maps) => user_namespace::admit(container.init.pid, &container.plan, maps)
                .and_then(|()| {
                    socket
                        .admit()
                        .what(|| "cannot talk to the container's init")
                }),
        };
        let set_up = match admitted {
            Ok(()) => container.set_up(&socket).await,
            refused => refused,
        };
        if let Err(error) = set_up {
            container.end().await;
            return Err(error);
        }
        // An init that was killed meanwhile may have been reaped.
        if !container.init_is_gone() {
            let _ = container
                .kept
                .set(Kept::of(container.init.pid, container.plan.made()));
        }
        fault::point("create-set-up");
        *container.phase() = Phase::Created(socket);
        let pid = container.init.api_pid();
        tokio::spawn(Arc::clone(&container).supervise());
        reservation.fill(container);
        tracing::debug!(id, pid, "created");
        Ok(pid)
    }

    /// The containers whose namespaces are to be joined, with `CLONE_NEW*` of each.
    fn owners(&self, join: &[NamespaceOf]) -> Result<Vec<(u64, Arc<Container>)>> {
        let mut owners: Vec<(u64, Arc<Container>)> = Vec::with_capacity(join.len());
        for (index, namespace) in join.iter().enumerate() {
            let kind = oci_spec::runtime::LinuxNamespaceType::try_from(namespace.type_.as_str())
                .map_err(|_| {
                    let kind = &namespace.type_;
                    Error::Request(format!(
                        "join[{index}].type: {kind:?} is no type of namespace"
                    ))
                })?;
            let flag = namespace_flag(kind);
            if owners.iter().any(|(known, _)| *known == flag) {
                return Err(Error::Request(format!(
                    "join[{index}].type: a second {kind} namespace"
                )));
            }
            let owner = self.find(&namespace.container_id)?;
            if *owner.deleted.borrow() || owner.init_is_gone() {
                return Err(Error::State(format!(
                    "join[{index}].container_id: container {} is not running",
                    owner.id
                )));
            }
            owners.push((flag, owner));
        }
        Ok(owners)
    }

    /// Forks the init, or the child that joins namespaces first, and begins to watch it. Nothing is awaited in
    /// between.
    fn fork(
        &self,
        id: &str,
        plan: &Plan,
        cgroup: &Cgroup,
        owners: &[(u64, Arc<Container>)],
        given: Given,
    ) -> Result<(Child, handshake::Agent)> {
        let what = || "cannot make the container's init";
        let (mine, theirs) = handshake::pair().what(what)?;
        let socket = handshake::Agent::new(mine).what(what)?;
        let ends = given.ends.borrow();
        if let Some(maps) = &plan.id_maps {
            user_namespace::give_streams(&ends, maps)?;
        }
        let joins: Vec<_> = owners
            .iter()
            .filter(|(flag, _)| plan.joined & flag != 0)
            .map(|(flag, owner)| Join {
                container: &owner.id,
                init: owner.init.pidfd.as_fd(),
                namespace: *flag,
            })
            .collect();
        let mut namespaces = if joins.is_empty() {
            plan.made() & !init::MADE_BY_INIT
        } else {
            0
        };
        let mut network = None;
        // What the agent has made belongs to the guest's user namespace.
        if namespaces & libc::CLONE_NEWNET as u64 != 0 && plan.id_maps.is_none() {
            network = self.ground.network.take();
        }
        if network.is_some() {
            namespaces &= !(libc::CLONE_NEWNET as u64);
        }
        let job = Job {
            id,
            plan,
            trees: &given.trees,
            network: network.as_ref().map(AsFd::as_fd),
            ends,
            terminal: given.terminal,
            socket: theirs.as_fd(),
        };
        // SAFETY: the agent has one thread, and the child goes into functions that never return.
        match unsafe { sys::fork_into(namespaces, cgroup.dir()) }.what(what)? {
            Fork::Child if joins.is_empty() => init::run(&job),
            Fork::Child => init::join_and_run(&job, &joins),
            Fork::Parent { pid, pidfd } => Ok((
                Child {
                    pid,
                    pidfd,
                    exit: self.reaper.watch(pid),
                },
                socket,
            )),
        }
    }

    /// Takes over the init that a child has forked. If there is none, nothing of the child is left.
    async fn adopt(&self, mut child: Child, socket: &handshake::Agent) -> Result<Child> {
        let adopted = match socket
            .report()
            .await
            .what(|| "cannot hear of the container's init")
        {
            Ok(Report::Forked { pid, pidfd, .. }) => {
                match self.reaper.watch_adopted(pid, pidfd.as_fd()) {
                    Some(exit) => Ok(Child { pid, pidfd, exit }),
                    // It has come and gone; perhaps with a word.
                    None => Err(match socket.report().await {
                        Ok(Report::Failed(error)) => error,
                        _ => {
                            let problem = "the container's init ended during its set-up";
                            Error::setup(Kind::Internal, problem)
                        }
                    }),
                }
            }
            Ok(Report::Failed(error)) | Err(error) => Err(error),
            Ok(_) => Err(out_of_step()),
        };
        if adopted.is_err() {
            let _ = sys::signal_process(child.pidfd.as_fd(), libc::SIGKILL);
        }
        // It ends by itself else. While it is there the cgroup can't be removed.
        exited(&mut child.exit).await;
        adopted
    }

    /// Executes the user's program of a created container.
    pub async fn start(&self, id: &str) -> Result<()> {
        fault::point("start-asked");
        let container = self.find(id)?;
        let socket = {
            let mut phase = container.phase();
            if container.init.has_ended() {
                return Err(Error::State(
                    "cannot start a container that has stopped".to_owned(),
                ));
            }
            match std::mem::replace(&mut *phase, Phase::Started) {
                Phase::Created(socket) => socket,
                Phase::Started => {
                    return Err(Error::State(
                        "cannot start an already running container".to_owned(),
                    ));
                }
            }
        };
        let what = || "cannot start the container's init";
        socket.start().what(what)?;
        let mut report = socket.report().await.what(what)?;
        if matches!(report, Report::Hooked) && container.plan.is_scheduled_late() {
            // Without the second word it ends.
            container.schedule()?;
            socket.start().what(what)?;
            report = socket.report().await.what(what)?;
        }
        match report {
            Report::End => {
                fault::point("start-executed");
                tracing::debug!(id, "started");
                Ok(())
            }
            Report::Failed(error) => Err(error),
            _ => Err(out_of_step()),
        }
    }

    /// Executes another process in a container; returns its pid.
    pub async fn exec(&self, request: &ExecProcessRequest) -> Result<u32> {
        let container = self.find(&request.container_id)?;
        container.exec(request, &self.reaper).await
    }

    /// Forgets a process of [`Containers::exec`] that has ended.
    pub fn delete_process(&self, id: &str, exec_id: &str) -> Result<()> {
        if exec_id.is_empty() {
            return Err(Error::Request("exec_id: must not be empty".to_owned()));
        }
        self.find(id)?.delete_exec(exec_id)
    }

    /// Sends a signal; 0 sends none and only asks whether there is anybody to take one (kill(2)).
    pub async fn signal(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        fault::point("signal-asked");
        let container = self.find(id)?;
        let number = i32::try_from(signal)
            .ok()
            .filter(|number| (0..=64).contains(number))
            .ok_or_else(|| Error::Request(format!("signal: {signal} is not from 0 to 64")))?;
        if all {
            container.signal_all(number).await
        } else if exec_id.is_empty() {
            container.init.signal(number, "container not running")
        } else {
            let gone = "process already finished";
            container.exec_task(exec_id)?.signal(number, gone)
        }
    }

    /// Waits for a process's end, and for its output to be handed over.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit> {
        let container = self.find(id)?;
        if exec_id.is_empty() {
            container.init.wait().await
        } else {
            container.exec_task(exec_id)?.wait().await
        }
    }

    /// Sets the size of a process's terminal.
    pub fn resize(&self, id: &str, exec_id: &str, size: Size) -> Result<()> {
        let container = self.find(id)?;
        if exec_id.is_empty() {
            container.init.streams.resize(size)
        } else {
            container.exec_task(exec_id)?.streams.resize(size)
        }
    }

    /// Kills what is left of a container and forgets it.
    pub async fn delete(&self, id: &str) -> Result<()> {
        let container = self.find(id)?;
        if container.deleted.send_replace(true) {
            return Err(Error::State(format!(
                "container {id} is being deleted already"
            )));
        }
        container.end_all().await;
        if let Some(kept) = container.kept.get() {
            kept.release().await;
        }
        if let Err(error) = container.cgroup.remove() {
            // Another try may do better.
            container.deleted.send_replace(false);
            return Err(error);
        }
        self.registry.remove(id, &container);
        tracing::debug!(id, "deleted");
        Ok(())
    }

    /// Has the kernel forget the files that nothing uses.
    pub async fn forget_unused_files(&self) -> Result<()> {
        forget::unused_files(&self.reaper).await
    }

    /// Ends every process of every container. The rest of them goes with the guest.
    pub async fn end_all(&self) {
        for (_, container) in self.registry.all() {
            container.end_all().await;
        }
    }

    /// Gives a stream connection its place.
    pub fn attach(&self, header: &StreamHeader, connection: Connection) -> Result<()> {
        let container = self.find(&header.container_id)?;
        if header.exec_id.is_empty() {
            container.init.streams.attach(header, connection)
        } else {
            let exec = container.exec_task(&header.exec_id)?;
            exec.streams.attach(header, connection)
        }
    }
}

impl Container {
    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether its first process has ended.
    pub(crate) fn init_is_gone(&self) -> bool {
        // The reaper may not have come to it yet.
        self.init.has_ended() || sys::has_ended(self.init.pidfd.as_fd())
    }

    async fn signal_all(&self, number: i32) -> Result<()> {
        if number == Signal::SIGKILL as i32 {
            self.cgroup.kill()?;
            // It may have left the cgroup.
            self.init.kill();
            return Ok(());
        }
        // Those who are frozen fork nobody whom the list would not have.
        let _alone = self.freezer.lock().await;
        let freeze = number != 0 && !self.cgroup.is_freezing()?;
        if freeze && let Err(error) = self.cgroup.freeze().await {
            tracing::warn!(%error, "a signal for all may miss processes that are being forked");
        }
        let signalled = self.signal_each(number);
        if freeze {
            self.cgroup.thaw().await?;
        }
        signalled
    }

    fn signal_each(&self, number: i32) -> Result<()> {
        for pid in self.cgroup.processes()? {
            // By now the pid may be another container's process. What it is once it is pinned, it stays.
            let signalled = match sys::open_process(pid.unsigned_abs()) {
                Ok(process) if self.cgroup.has(pid) => sys::signal_process(process.as_fd(), number),
                Ok(_) => Ok(()),
                Err(errno) => Err(errno),
            };
            match signalled {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => {
                    return Err(Error::system(
                        "cannot signal the container's processes",
                        errno,
                    ));
                }
            }
        }
        Ok(())
    }

    fn schedule(&self) -> Result<()> {
        self.init.schedule(self.plan.process.scheduler.as_ref())
    }

    /// Follows the init to its end.
    async fn supervise(self: Arc<Self>) {
        let exit = exited(&mut self.init.exit.clone()).await;
        fault::point("init-ended");
        // With its pid namespace the kernel has killed everything; without one, what is left would hold the output
        // open, and nobody could be sure of its end.
        if self.plan.made() & libc::CLONE_NEWPID as u64 == 0
            && let Err(error) = self.cgroup.kill()
        {
            tracing::warn!(%error, "cannot kill what a container left");
        }
        self.init.streams.process_ended();
        tracing::debug!(pid = %self.init.pid, code = exit.map(|exit| exit.code), "ended");
    }

    /// Awaits the init's reports until it is ready.
    async fn set_up(&self, socket: &handshake::Agent) -> Result<()> {
        let what = || "cannot hear of the container's init";
        loop {
            return match socket.report().await.what(what)? {
                Report::Terminal(master) => {
                    self.init.streams.add_terminal(master)?;
                    continue;
                }
                Report::Ready if self.plan.is_scheduled_late() => Ok(()),
                Report::Ready => self.schedule(),
                Report::Failed(error) => Err(error),
                Report::Hooked | Report::Tree(_) | Report::Forked { .. } => Err(out_of_step()),
                Report::End => {
                    let exit = exited(&mut self.init.exit.clone()).await;
                    let code = exit.map_or(255, |exit| exit.code);
                    let problem =
                        format!("the container's init ended during its set-up (status {code})");
                    Err(Error::setup(Kind::Internal, problem))
                }
            };
        }
    }

    /// Ends every process of the container, also what has left it, and every stream.
    async fn end_all(&self) {
        self.end().await;
        self.init.streams.close();
        for (exec_id, exec) in self.execs.all() {
            // Dead already, unless it has left the cgroup, as one without a cgroup namespace may.
            exec.kill();
            exited(&mut exec.exit.clone()).await;
            exec.streams.close();
            self.execs.remove(&exec_id, &exec);
        }
    }

    /// Kills every process of the container and waits until they are gone.
    async fn end(&self) {
        if let Err(error) = self.cgroup.kill() {
            tracing::warn!(%error, "cannot kill a container's cgroup");
        }
        // Dead already, unless it has left the cgroup.
        self.init.kill();
        exited(&mut self.init.exit.clone()).await;
        if let Err(error) = self.cgroup.emptied().await {
            tracing::warn!(%error, "cannot watch a container's cgroup");
        }
    }
}

fn out_of_step() -> Error {
    Error::setup(Kind::Internal, "the container's init is out of step")
}

/// What a plan has to know of the containers whose namespaces are joined.
fn joins_of(owners: &[(u64, Arc<Container>)]) -> Joins {
    let mut joins = Joins::default();
    for (flag, owner) in owners {
        joins.asked |= flag;
        joins.guests |= flag & !owner.plan.namespaces;
        if *flag == libc::CLONE_NEWUSER as u64 {
            joins.id_maps.clone_from(&owner.plan.id_maps);
        }
    }
    joins
}

/// The guest's own network namespace needs a loopback interface once a container shares it, and not at boot.
fn guest_loopback_up() {
    if let Err(errno) = sys::loopback_up() {
        tracing::warn!(%errno, "cannot bring up the loopback interface");
    }
}

/// The ids that runc takes: they name a cgroup.
fn check_id(id: &str) -> Result<()> {
    if !is_container_id(id) {
        return Err(Error::Request(format!(
            "container_id: {id:?} must be 1 to {MAX_CONTAINER_ID} letters, digits, or any of _ + , - ."
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_that_runc_takes() {
        for id in ["a", "my-container_1.2+3,4", "0", "..."] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in [
            "",
            ".",
            "..",
            "a/b",
            "../x",
            "a b",
            "ä",
            "a\0",
            &"x".repeat(256),
        ] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }
}

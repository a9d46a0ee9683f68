//! Containers: made, started, signalled, waited for, deleted.
//!
//! The table maps ids to containers; no lock is held while anything is awaited. A container's life:
//! created (its init waits before the exec) → running → ended, and deleted from any of them.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use bulkhead_protocol::agent::{CreateContainerRequest, StreamHeader};
use bulkhead_protocol::{GUEST_SHARE, SHARE_TAG};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::cgroup::{Cgroup, Hierarchy};
use crate::error::{Context, Error, Kind, Result};
use crate::handshake::{self, Report};
use crate::init::{self, Job};
use crate::mounts::Trees;
use crate::reaper::{Exit, ExitWatch, Reaper, exited};
use crate::spec::Plan;
use crate::streams::{ProcessEnds, Streams};
use crate::sys::{self, Fork};
use crate::transport::Connection;
use crate::user_namespace;

/// What containers stand on.
#[derive(Debug)]
pub struct Ground {
    /// Their cgroups.
    pub hierarchy: Hierarchy,
    /// Whether the host's share is mounted.
    pub share: bool,
}

/// All containers of the guest.
#[derive(Debug)]
pub struct Containers {
    table: Mutex<HashMap<String, Entry>>,
    reaper: Reaper,
    ground: Ground,
    loopback: Once,
}

#[derive(Debug)]
enum Entry {
    /// The id is taken by a creation under way.
    Reserved,
    Made(Arc<Container>),
}

/// One container.
#[derive(Debug)]
struct Container {
    init: Init,
    own_pid_namespace: bool,
    phase: Mutex<Phase>,
}

/// The first process of a container, with what belongs to it.
#[derive(Debug)]
struct Init {
    pid: Pid,
    pidfd: OwnedFd,
    exit: ExitWatch,
    cgroup: Cgroup,
    streams: Streams,
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
            table: Mutex::default(),
            reaper,
            ground,
            loopback: Once::new(),
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        // Nothing panics while it is held, and a table is whole between any two operations.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, id: &str) -> Result<Arc<Container>> {
        match self.table().get(id) {
            Some(Entry::Made(container)) => Ok(Arc::clone(container)),
            _ => Err(Error::NoContainer(id.to_owned())),
        }
    }

    /// Makes a container up to the exec; returns its init's pid.
    pub async fn create(&self, request: &CreateContainerRequest) -> Result<u32> {
        let id = &request.container_id;
        check_id(id)?;
        let plan = Plan::from_json(&request.spec_json)?;
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
        let reservation = Reservation::take(self, id)?;
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
            let bounded = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
            (
                bounded(stdio.terminal_width),
                bounded(stdio.terminal_height),
            )
        });
        let (mut init, socket) = self.fork(id, &plan, cgroup, streams, ends, terminal)?;
        let admitted = match &plan.id_maps {
            None => Ok(()),
            Some(maps) => user_namespace::admit(init.pid, &plan, maps).and_then(|()| {
                socket
                    .admit()
                    .what(|| "cannot talk to the container's init")
            }),
        };
        let set_up = match admitted {
            Ok(()) => init.set_up(&socket).await,
            refused => refused,
        };
        if let Err(error) = set_up {
            init.destroy().await;
            return Err(error);
        }
        let pid = init.pid;
        let container = Arc::new(Container {
            init,
            own_pid_namespace: plan.namespaces & libc::CLONE_NEWPID as u64 != 0,
            phase: Mutex::new(Phase::Created(socket)),
        });
        tokio::spawn(Arc::clone(&container).supervise());
        reservation.fill(container);
        tracing::debug!(id, %pid, "created");
        Ok(pid.as_raw().unsigned_abs())
    }

    /// Forks the init and begins to watch it. Nothing is awaited in between.
    fn fork(
        &self,
        id: &str,
        plan: &Plan,
        cgroup: Cgroup,
        streams: Streams,
        ends: ProcessEnds,
        terminal: Option<(u16, u16)>,
    ) -> Result<(Init, handshake::Agent)> {
        let what = || "cannot make the container's init";
        let (mine, theirs) = handshake::pair().what(what)?;
        let socket = handshake::Agent::new(mine).what(what)?;
        let trees = Trees::prepare(plan)?;
        if let Some(maps) = &plan.id_maps {
            user_namespace::give_stdio(&ends.borrow(), maps)?;
        }
        let job = Job {
            id,
            plan,
            trees: &trees,
            stdio: ends.borrow(),
            terminal,
            socket: theirs.as_fd(),
        };
        let namespaces = plan.namespaces & !init::MADE_BY_INIT;
        // SAFETY: the agent has one thread, and the child goes into `init::run`, which never returns.
        match unsafe { sys::fork_into(namespaces, cgroup.dir()) }.what(what)? {
            Fork::Child => init::run(&job),
            Fork::Parent { pid, pidfd } => Ok((
                Init {
                    pid,
                    pidfd,
                    exit: self.reaper.watch(pid),
                    cgroup,
                    streams,
                },
                socket,
            )),
        }
    }

    /// Executes the user's program of a created container.
    pub async fn start(&self, id: &str) -> Result<()> {
        let container = self.find(id)?;
        let socket = {
            let mut phase = container.phase();
            if container.init.exit.borrow().is_some() {
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
        match socket.report().await.what(what)? {
            Report::End => {
                tracing::debug!(id, "started");
                Ok(())
            }
            Report::Failed(error) => Err(error),
            Report::Ready(_) => Err(Error::setup(
                Kind::Internal,
                "the container's init is out of step",
            )),
        }
    }

    /// Sends a signal.
    pub fn signal(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let container = self.find_process(id, exec_id)?;
        let number = i32::try_from(signal)
            .ok()
            .filter(|number| (1..=64).contains(number))
            .ok_or_else(|| Error::Request(format!("signal: {signal} is not from 1 to 64")))?;
        if all {
            return container.signal_all(number);
        }
        if container.init.exit.borrow().is_some() {
            return Err(Error::NoProcess("container not running".to_owned()));
        }
        match sys::signal_process(container.init.pidfd.as_fd(), number) {
            Err(Errno::ESRCH) => Err(Error::NoProcess("container not running".to_owned())),
            result => result.what(|| "cannot signal the container's init"),
        }
    }

    /// Waits for a process's end, and for its output to be handed over.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit> {
        let container = self.find_process(id, exec_id)?;
        let exit = exited(&mut container.init.exit.clone()).await;
        container.init.streams.drained().await;
        exit.ok_or_else(|| Error::setup(Kind::Internal, "the exit status was lost"))
    }

    fn find_process(&self, id: &str, exec_id: &str) -> Result<Arc<Container>> {
        let container = self.find(id)?;
        if exec_id.is_empty() {
            Ok(container)
        } else {
            Err(Error::NoProcess(format!(
                "container {id} has no process {exec_id}"
            )))
        }
    }

    /// Kills what is left of a container and forgets it.
    pub async fn delete(&self, id: &str) -> Result<()> {
        let container = self.find(id)?;
        container.init.end().await;
        container.init.streams.close();
        container.init.cgroup.remove()?;
        self.table().remove(id);
        tracing::debug!(id, "deleted");
        Ok(())
    }

    /// Deletes every container.
    pub async fn delete_all(&self) {
        let ids: Vec<String> = self.table().keys().cloned().collect();
        for id in ids {
            match self.delete(&id).await {
                Ok(()) | Err(Error::NoContainer(_)) => {}
                Err(error) => tracing::warn!(id, %error, "cannot delete"),
            }
        }
    }

    /// Gives a stream connection its place.
    pub fn attach(&self, header: &StreamHeader, connection: Connection) -> Result<()> {
        let container = self.find_process(&header.container_id, &header.exec_id)?;
        container
            .init
            .streams
            .attach(header.kind.enum_value_or_default(), connection)
    }
}

impl Container {
    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal_all(&self, number: i32) -> Result<()> {
        if number == Signal::SIGKILL as i32 {
            return self.init.cgroup.kill();
        }
        for pid in self.init.cgroup.processes()? {
            // SAFETY: touches no memory. A pid of this list can have ended and been reused only by a process of
            // this guest, and PID 1 reaps only in its own loop, not now.
            match Errno::result(unsafe { libc::kill(pid, number) }) {
                Ok(_) | Err(Errno::ESRCH) => {}
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

    /// Follows the init to its end.
    async fn supervise(self: Arc<Self>) {
        let exit = exited(&mut self.init.exit.clone()).await;
        // With its pid namespace the kernel has killed everything; without one, what is left would hold the output
        // open, and nobody could be sure of its end.
        if !self.own_pid_namespace
            && let Err(error) = self.init.cgroup.kill()
        {
            tracing::warn!(%error, "cannot kill what a container left");
        }
        self.init.streams.process_ended();
        tracing::debug!(pid = %self.init.pid, code = exit.map(|exit| exit.code), "ended");
    }
}

impl Init {
    /// Awaits the init's report.
    async fn set_up(&mut self, socket: &handshake::Agent) -> Result<()> {
        match socket
            .report()
            .await
            .what(|| "cannot hear of the container's init")?
        {
            Report::Ready(Some(master)) => self.streams.add_terminal(master),
            Report::Ready(None) => Ok(()),
            Report::Failed(error) => Err(error),
            Report::End => {
                let code = exited(&mut self.exit).await.map_or(255, |exit| exit.code);
                let problem =
                    format!("the container's init ended during its set-up (status {code})");
                Err(Error::setup(Kind::Internal, problem))
            }
        }
    }

    /// Kills every process of the container and waits until they are gone.
    async fn end(&self) {
        if let Err(error) = self.cgroup.kill() {
            tracing::warn!(%error, "cannot kill a container's cgroup");
            let _ = sys::signal_process(self.pidfd.as_fd(), Signal::SIGKILL as i32);
        }
        exited(&mut self.exit.clone()).await;
        if let Err(error) = self.cgroup.emptied().await {
            tracing::warn!(%error, "cannot watch a container's cgroup");
        }
    }

    /// Undoes a creation that failed.
    async fn destroy(self) {
        self.end().await;
    }
}

/// An id taken in the table, given back unless it is filled.
struct Reservation<'a> {
    containers: &'a Containers,
    id: &'a str,
}

impl<'a> Reservation<'a> {
    fn take(containers: &'a Containers, id: &'a str) -> Result<Self> {
        let mut table = containers.table();
        if table.contains_key(id) {
            return Err(Error::ContainerExists(id.to_owned()));
        }
        table.insert(id.to_owned(), Entry::Reserved);
        Ok(Self { containers, id })
    }

    fn fill(self, container: Arc<Container>) {
        self.containers
            .table()
            .insert(self.id.to_owned(), Entry::Made(container));
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut table = self.containers.table();
        if matches!(table.get(self.id), Some(Entry::Reserved)) {
            table.remove(self.id);
        }
    }
}

/// The guest's own network namespace needs a loopback interface once a container shares it, and not at boot.
fn guest_loopback_up() {
    if let Err(errno) = sys::loopback_up() {
        tracing::warn!(%errno, "cannot bring up the loopback interface");
    }
}

/// The ids that runc takes: they name a cgroup.
fn check_id(id: &str) -> Result<()> {
    let allowed = |character: char| character.is_ascii_alphanumeric() || "_+-.".contains(character);
    if id.is_empty() || id.len() > 255 || id == "." || id == ".." || !id.chars().all(allowed) {
        return Err(Error::Request(format!(
            "container_id: {id:?} must be 1 to 255 letters, digits, or any of _ + - ."
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_that_runc_takes() {
        for id in ["a", "my-container_1.2+3", "0", "..."] {
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

//! `ExecProcess`: another process in a container that runs; the agent's side. [`crate::joiner`] has the child's.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bulkhead_protocol::agent::ExecProcessRequest;
use nix::errno::Errno;

use crate::container::Container;
use crate::error::{Context, Error, Kind, Result};
use crate::fault;
use crate::handshake::{self, Report};
use crate::joiner::{self, Job};
use crate::reaper::{ExitWatch, Reaper, exited};
use crate::spec::Process;
use crate::streams::{ProcessEnds, Streams};
use crate::sys::{self, Fork};
use crate::task::Task;
use crate::terminal::Size;
use crate::user_namespace;

/// Longest exec id; it is nothing but a key.
const MAX_EXEC_ID: usize = 255;

impl Container {
    /// Executes another process; returns its pid.
    pub async fn exec(&self, request: &ExecProcessRequest, reaper: &Reaper) -> Result<u32> {
        fault::point("exec-asked");
        let id = &request.exec_id;
        if id.is_empty() || id.len() > MAX_EXEC_ID {
            return Err(Error::Request(format!(
                "exec_id: must be 1 to {MAX_EXEC_ID} bytes long"
            )));
        }
        let process = Process::for_exec(&request.process_json, &self.plan.process)?;
        if let Some(maps) = &self.plan.id_maps {
            process.check_mapped(maps)?;
        }
        let stdio = &request.stdio;
        if process.terminal != stdio.terminal {
            return Err(Error::spec(
                "process.terminal",
                format!("the request's stdio says {}", stdio.terminal),
            ));
        }
        let reservation = self
            .execs
            .reserve(id)
            .ok_or_else(|| Error::ProcessExists(id.clone()))?;
        let size = stdio.terminal.then(|| {
            Size::bounded(stdio.terminal_width, stdio.terminal_height).or(process.console_size)
        });
        let (streams, ends) = Streams::open(stdio)?;
        let joiner = {
            // Frozen for a signal's sake it is not paused.
            let _alone = self.freezer.lock().await;
            self.fork_joiner(&process, &request.cgroup, ends, size, reaper)?
        };
        fault::point("exec-forked");
        let executed = joiner.execute(&process, streams, reaper).await;
        if executed.is_err() {
            joiner.end().await;
        }
        let task = match executed {
            Ok(task) => Arc::new(task),
            Err(_) if self.init_is_gone() => return Err(stopped()),
            Err(error) => return Err(error),
        };
        fault::point("exec-executed");
        let pid = task.api_pid();
        tokio::spawn(supervise(Arc::clone(&task)));
        reservation.fill(Arc::clone(&task));
        if *self.deleted.borrow() {
            // Killed with the rest, and nobody will ask for it.
            self.execs.remove(id, &task);
        }
        tracing::debug!(container = self.id, exec = id, pid, "executed");
        Ok(pid)
    }

    /// Forgets a process that has ended.
    pub fn delete_exec(&self, id: &str) -> Result<()> {
        let task = self.exec_task(id)?;
        if !task.has_ended() {
            return Err(Error::State(format!("process {id} is running")));
        }
        task.streams.close();
        self.execs.remove(id, &task);
        Ok(())
    }

    /// A process of [`Container::exec`].
    pub fn exec_task(&self, id: &str) -> Result<Arc<Task>> {
        self.execs
            .get(id)
            .ok_or_else(|| Error::NoProcess(format!("container {} has no process {id}", self.id)))
    }

    /// Checks that processes may join, and forks the one that does. Nothing is awaited in between, so that a deletion
    /// either prevents it or kills it.
    fn fork_joiner(
        &self,
        process: &Process,
        cgroup: &str,
        ends: ProcessEnds,
        terminal: Option<Size>,
        reaper: &Reaper,
    ) -> Result<Joiner> {
        if *self.deleted.borrow() || self.init_is_gone() {
            return Err(stopped());
        }
        if self.cgroup.is_freezing()? {
            return Err(Error::State("cannot exec in a paused container".to_owned()));
        }
        let what = || "cannot make a process for the container";
        let (mine, theirs) = handshake::pair().what(what)?;
        let socket = handshake::Agent::new(mine).what(what)?;
        let ends = ends.borrow();
        if let Some(maps) = &self.plan.id_maps {
            user_namespace::give_streams(&ends, maps)?;
        }
        let below = (!cgroup.is_empty())
            .then(|| self.cgroup.below(cgroup))
            .transpose()?;
        let job = Job {
            id: &self.id,
            process,
            personality: self.plan.personality,
            seccomp: self.plan.seccomp.as_deref(),
            namespaces: self.plan.namespaces,
            init: self.init.pidfd.as_fd(),
            ends,
            terminal,
            socket: theirs.as_fd(),
        };
        let into = below
            .as_ref()
            .map_or_else(|| self.cgroup.dir(), |below| below.as_fd());
        // SAFETY: the agent has one thread, and the child goes into `joiner::run`, which never returns.
        let forked = match unsafe { sys::fork_into(0, into) } {
            // A container that has divided its cgroup among others can have no processes in it; its init is in one of
            // them, as systemd's is.
            Err(errno @ (Errno::EBUSY | Errno::EOPNOTSUPP)) if below.is_none() => {
                match self.cgroup.below_of(self.init.pid.as_raw())? {
                    // SAFETY: as above.
                    Some(below) => unsafe { sys::fork_into(0, below.as_fd()) },
                    None => Err(errno),
                }
            }
            forked => forked,
        };
        match forked.what(what)? {
            Fork::Child => joiner::run(&job),
            Fork::Parent { pid, pidfd } => Ok(Joiner {
                exit: reaper.watch(pid),
                pidfd,
                socket,
            }),
        }
    }
}

fn stopped() -> Error {
    Error::State("cannot exec in a stopped container".to_owned())
}

/// The child that joins the container.
struct Joiner {
    pidfd: OwnedFd,
    exit: ExitWatch,
    socket: handshake::Agent,
}

impl Joiner {
    /// Kills it, where it lives, and waits for its end.
    async fn end(mut self) {
        let _ = sys::signal_process(self.pidfd.as_fd(), libc::SIGKILL);
        exited(&mut self.exit).await;
    }

    /// Follows the process to its exec.
    async fn execute(&self, process: &Process, streams: Streams, reaper: &Reaper) -> Result<Task> {
        let what = || "cannot hear of the container's new process";
        let (pid, pidfd, terminal) = match self.socket.report().await.what(what)? {
            Report::Forked {
                pid,
                pidfd,
                terminal,
            } => (pid, pidfd, terminal),
            Report::Failed(error) => return Err(error),
            Report::End => return Err(killed()),
            _ => return Err(out_of_step()),
        };
        let Some(exit) = reaper.watch_adopted(pid, pidfd.as_fd()) else {
            // It has come and gone; perhaps with a word.
            return Err(match self.socket.report().await.what(what)? {
                Report::Failed(error) => error,
                _ => killed(),
            });
        };
        fault::point("exec-joined");
        let mut task = Task {
            pid,
            pidfd,
            exit,
            streams,
        };
        let executed = async {
            if let Some(master) = terminal {
                task.streams.add_terminal(master)?;
            }
            task.schedule(process.scheduler.as_ref())?;
            // Where it has failed already it is not there to hear, and has said why.
            let started = self.socket.start();
            match (self.socket.report().await.what(what)?, started) {
                (Report::End, Ok(())) => Ok(()),
                (Report::End, Err(_)) => Err(killed()),
                (Report::Failed(error), _) => Err(error),
                _ => Err(out_of_step()),
            }
        };
        if let Err(error) = executed.await {
            task.kill();
            exited(&mut task.exit).await;
            return Err(error);
        }
        Ok(task)
    }
}

fn out_of_step() -> Error {
    Error::setup(Kind::Internal, "the container's new process is out of step")
}

fn killed() -> Error {
    Error::setup(
        Kind::Internal,
        "the container's new process was killed during its set-up",
    )
}

/// Follows a process to its end.
async fn supervise(task: Arc<Task>) {
    let exit = exited(&mut task.exit.clone()).await;
    task.streams.process_ended();
    tracing::debug!(pid = %task.pid, code = exit.map(|exit| exit.code), "ended");
}

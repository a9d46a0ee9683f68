//! The ends: of a process, of a stand-in, of the VM, of the sandbox.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_vmm::control::Request;
use tokio::task::{JoinHandle, JoinSet};

use super::boot::Machine;
use super::container::Container;
use super::process::{Process, Status};
use super::{KILLED_EXIT_CODE, LOST_EXIT_CODE, Sandbox, SandboxError, watch};
use crate::agent::{Agent, AgentError};
use crate::standin::StandIn;
use crate::timeline;
use crate::vmm::Ended;

/// How long a guest may take to write back its dirty pages and power off before it is killed. Those of processes that have ended
/// are on the host already, and a hostile guest may take all of it.
const POWER_OFF_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a process that was killed may take until its end is taken for granted.
pub(super) const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long hooks that run when a sandbox is ended by force may go on.
const HOOK_TIMEOUT: Duration = Duration::from_secs(5);

impl Sandbox {
    /// Kills every process, as SIGKILL would, and the machine with them: a guest is asked for nothing. A sandbox that is so far gone
    /// can only be shut down.
    pub fn kill(&self) {
        self.close();
        for container in self.all_containers() {
            container.lost(KILLED_EXIT_CODE);
        }
        if let Some(machine) = self.machine.get() {
            machine.vmm().kill();
        }
    }

    /// [`Sandbox::kill`] for who is not to wait for hooks: those that run get a moment to end and are killed then. Such as come after
    /// them, and undo what they have done, get the time that they take.
    pub fn kill_with_hooks(self: &Arc<Self>) {
        self.kill();
        self.hurry_hooks();
    }

    /// Has the hooks that run killed in a moment, if they have not ended then.
    pub fn hurry_hooks(self: &Arc<Self>) {
        let sandbox = self.clone();
        tokio::spawn(async move { sandbox.hook_runs.hurry(HOOK_TIMEOUT).await });
    }

    /// Has every container end, as SIGTERM to the host's cgroup would: a stand-in there passes on its own, the others' inits get it from
    /// here. Returns when they have ended, and whoever stands for them, unless those take long over the last output.
    /// From then on a shutdown leaves the container on record, as runc does until it is deleted.
    pub async fn stop(self: &Arc<Self>) {
        // Others may be made meanwhile.
        loop {
            let mut lives = self.all_containers();
            lives.retain(|container| container.status() != Status::Stopped);
            if lives.is_empty() {
                break;
            }
            if lives
                .iter()
                .any(|container| container.status() == Status::Creating)
            {
                // Who makes it learns from the shutdown.
                return;
            }
            let mut ends = JoinSet::new();
            for container in lives {
                ends.spawn(self.clone().stop_container(container));
            }
            ends.join_all().await;
        }
        // The guest's end would be that of output on its way.
        let (mut stand_ins, mut commands) = (self.stand_ins.subscribe(), self.commands.subscribe());
        let gone = async {
            // Neither fails: both senders are `self`'s.
            let _ = stand_ins.wait_for(|&count| count == 0).await;
            let _ = commands.wait_for(|&count| count == 0).await;
        };
        if tokio::time::timeout(KILL_TIMEOUT, gone).await.is_err() {
            tracing::debug!("nobody takes the last output");
        }
        // One that is deleted by now is not to stay.
        let containers = self.containers();
        if containers
            .values()
            .any(|container| self.is_first(container) && container.status() == Status::Stopped)
        {
            let _ = self.stopped.set(());
        }
    }

    async fn stop_container(self: Arc<Self>, container: Arc<Container>) {
        let signal = match container.status() {
            // There is no program yet that could make anything of a SIGTERM.
            Status::Created => Some(libc::SIGKILL),
            _ if container.init.proxy.is_some() => None,
            _ => Some(libc::SIGTERM),
        };
        if let Some(signal) = signal {
            let id = container.id.as_str();
            if let Err(error) = self.signal(id, "", signal.unsigned_abs(), false).await {
                tracing::debug!(%error, "a container is not told to end");
            }
        }
        container.init.wait().await;
    }

    /// Nothing is begun any more.
    fn close(&self) {
        let _ = self.closing.set(());
        self.hook_runs.close();
    }

    /// Ends the sandbox and removes everything that there is of it, but for the record of a container that has been stopped. The guest gets
    /// the time to write back what is dirty, and hooks that run get theirs: what undoes their work comes after it.
    pub async fn shutdown(&self) {
        self.close();
        self.timeline.mark("server: sandbox ends");
        // The kernel takes a grace period of RCU for it: while the guest ends.
        let left = tokio::spawn(self.cgroup.clone().leave());
        if let Some(machine) = self.machine.get() {
            let ended = self.power_off(machine).await;
            self.timeline.mark("server: VM ended");
            self.timeline.merge(timeline::Record {
                entries: ended.timeline,
                guest: vec![],
            });
            if let Err(error) = machine.share().unmount() {
                tracing::warn!(%error, "the share stays mounted until this process ends");
            }
        }
        self.hook_runs.ended().await;
        let stays = self.stopped.get().is_some();
        for container in self.all_containers() {
            container.lost(LOST_EXIT_CODE);
            // They are of the deletion.
            if !(stays && self.is_first(&container)) {
                self.run_poststop_hooks(&container).await;
            }
        }
        // Those that somebody else runs, who has forgotten the container: they would end with this process.
        self.hook_runs.ended().await;
        self.await_stand_ins().await;
        let removed = match self.remove_cgroup(left).await {
            Ok(()) if stays => self.leave_stopped(),
            Ok(()) => self.params.state.remove().map_err(|e| e.to_string()),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::error!(error, "the container stays on record, to be deleted again");
            self.leave_record();
        }
        self.timeline.mark("server: cleaned");
    }

    /// Ends the VM in order if that is possible, and in any case.
    async fn power_off(&self, machine: &Machine) -> Ended {
        if let Some(agent) = machine.agent_if_ready() {
            let vmm = machine.vmm();
            let paused = self
                .all_containers()
                .iter()
                .any(|container| container.stands_still());
            let in_order = async {
                if paused {
                    // What is dirty in a guest that stands still is worth no less.
                    let _ = vmm.order(Request::Resume, vec![]).await;
                    machine.set_still(false);
                }
                tokio::select! {
                    // The VM's end is what counts; the answer may be lost with it.
                    _ = vmm.ended() => {}
                    () = async {
                        if agent.shutdown().await.is_ok() {
                            // Everything is written back: the guest has nothing left to do, its farewell included.
                            let _ = vmm.order(Request::Shutdown, vec![]).await;
                        }
                        vmm.ended().await;
                    } => {}
                }
            };
            if tokio::time::timeout(POWER_OFF_TIMEOUT, in_order)
                .await
                .is_err()
            {
                tracing::warn!("the guest did not power off in time and is killed");
            }
        }
        machine.vmm().kill();
        let ended = tokio::time::timeout(KILL_TIMEOUT, machine.vmm().ended()).await;
        let ended = ended.unwrap_or_else(|_| {
            // It is in the kernel's hands. Its cgroup can't be removed then, so that the container stays on record.
            tracing::error!("the VMM was killed and does not end");
            Ended::unseen()
        });
        tracing::debug!(reason = ended.reason, "the VM has ended");
        ended
    }

    /// Lets the stand-ins, whose streams have ended, write their last bytes and tell their processes' exit codes: the removal of the
    /// cgroup would kill them.
    async fn await_stand_ins(&self) {
        let mut count = self.stand_ins.subscribe();
        let gone = count.wait_for(|&count| count == 0);
        if tokio::time::timeout(KILL_TIMEOUT, gone).await.is_err() {
            tracing::warn!("a stand-in whose output nobody takes is killed");
        }
    }

    async fn remove_cgroup(&self, left: JoinHandle<Result<(), String>>) -> Result<(), String> {
        left.await.map_err(|error| error.to_string())??;
        self.cgroup
            .remove()
            .await
            .map_err(|error| error.to_string())
    }

    /// Notes that of a stopped container there is no cgroup any more. The rest is as its end has been noted.
    fn leave_stopped(&self) -> Result<(), String> {
        let noted = self.params.state.load().and_then(|mut record| {
            record.cgroup = None;
            self.params.state.save(&record)
        });
        noted.map_err(|error| error.to_string())
    }

    /// Notes, for whoever removes what this server could not, that nothing runs any more and no hook that has run is to.
    fn leave_record(&self) {
        let noted = self.params.state.load().and_then(|mut record| {
            record.status = Status::Stopped;
            if self.stopped.get().is_none() {
                record.poststop.clear();
            }
            self.params.state.save(&record)
        });
        if let Err(error) = noted {
            tracing::warn!(%error, "the record of the container is out of date");
        }
    }

    /// Follows a process to its end.
    pub(super) async fn watch_process(
        self: Arc<Self>,
        container: Arc<Container>,
        exec_id: impl AsRef<str> + Send,
        process: Arc<Process>,
        agent: Agent,
    ) {
        let Some(machine) = self.machine.get() else {
            return;
        };
        let answer = agent.wait(container.id.as_str(), exec_id.as_ref()).await;
        match machine.explain(answer).await {
            Ok(exit) => {
                self.timeline.mark(if exec_id.as_ref().is_empty() {
                    "server: container exited"
                } else {
                    "server: process exited"
                });
                process.ended(exit.exit_code.min(255));
                if exec_id.as_ref().is_empty() {
                    self.note(&container);
                }
                if container.stands_still() && container.status() == Status::Stopped {
                    self.let_go(machine, &container).await;
                }
            }
            // Only the init's end is the container's.
            Err(SandboxError::Agent(AgentError::Refused { message, .. }))
                if !exec_id.as_ref().is_empty() =>
            {
                tracing::warn!(message, "the end of a process is not told");
                process.ended(LOST_EXIT_CODE);
            }
            Err(error) => {
                self.fail(&error.to_string());
                machine.vmm().kill();
            }
        }
    }

    /// Follows a process's stand-in to its end: one that was killed takes the process with it, and when a container's goes
    /// after it, having written its output, the guest is of no more use.
    pub(super) fn watch_stand_in(
        self: &Arc<Self>,
        container: Arc<Container>,
        exec_id: &str,
        proxy: Option<&StandIn>,
    ) -> Result<(), SandboxError> {
        let Some(proxy) = proxy else {
            return Ok(());
        };
        let ended = watch(proxy)?;
        let (sandbox, exec_id) = (self.clone(), exec_id.to_owned());
        self.stand_ins.send_modify(|count| *count += 1);
        tokio::spawn(async move {
            ended.wait().await;
            sandbox.stand_ins.send_modify(|count| *count -= 1);
            if exec_id.is_empty() {
                sandbox
                    .orphaned(&container, &exec_id, &container.init)
                    .await;
                sandbox.idle().await;
            } else if let Some(exec) = container.exec(&exec_id) {
                if exec.started.set(()).is_ok() {
                    // Nobody will.
                    exec.process.ended(LOST_EXIT_CODE);
                    container.remove_exec(&exec_id);
                    return;
                }
                sandbox.orphaned(&container, &exec_id, &exec.process).await;
                // An orderly stand-in has seen to that itself.
                let _ = sandbox.delete_exec(container.id.as_str(), &exec_id).await;
            }
        });
        Ok(())
    }

    /// Follows the command in whose foreground a container runs to its end. Whether the container ends with it that command has told by
    /// its lifeline; if it has ended before, the guest is of no more use.
    pub(super) fn watch_foreground(
        self: &Arc<Self>,
        client: Option<&StandIn>,
    ) -> Result<(), SandboxError> {
        let Some(client) = client else {
            return Ok(());
        };
        let ended = watch(client)?;
        let sandbox = self.clone();
        self.commands.send_modify(|count| *count += 1);
        tokio::spawn(async move {
            ended.wait().await;
            sandbox.commands.send_modify(|count| *count -= 1);
            sandbox.idle().await;
        });
        Ok(())
    }

    /// Sees to the end of a process whose stand-in has gone.
    pub(super) async fn orphaned(&self, container: &Container, exec_id: &str, process: &Process) {
        process.orphan();
        let in_the_making = match process.status() {
            Status::Creating => true,
            Status::Created => !exec_id.is_empty(),
            _ => false,
        };
        if in_the_making {
            // Who makes it sees to its end.
            process.wait().await;
            return;
        }
        let number = libc::SIGKILL.unsigned_abs();
        let killed = self
            .signal(container.id.as_str(), exec_id, number, false)
            .await;
        if killed.is_ok() {
            tracing::debug!("a stand-in has gone before its process");
        }
        // Its end is told when its output is taken, and nobody may be left who would.
        if tokio::time::timeout(KILL_TIMEOUT, process.wait())
            .await
            .is_err()
        {
            process.ended(KILLED_EXIT_CODE);
            self.note(container);
        }
    }

    /// A process has been forgotten that may have been the last; its client need not wait for the guest's end.
    pub(super) fn may_be_idle(self: &Arc<Self>) {
        let sandbox = self.clone();
        tokio::spawn(async move { sandbox.idle().await });
    }

    /// Powers the guest off when every container has stopped and whoever took the output of its processes has done so, which their
    /// stand-ins' ends and the executed processes' deletions say. The containers stay known until they are deleted.
    async fn idle(&self) {
        let done = |container: &Arc<Container>| {
            let stand_in = container.init.own_stand_in();
            container.status() == Status::Stopped
                && stand_in.is_some_and(|stand_in| !stand_in.is_alive())
                && !container.executes()
        };
        if self.closing.get().is_none()
            && self.all_containers().iter().all(done)
            && let Some(machine) = self.machine.get()
        {
            tracing::debug!("nothing runs any more");
            self.power_off(machine).await;
        }
    }

    /// Notes the VM's end; what ran in it has ended with it.
    pub(super) fn vm_ended(&self, ended: &Ended) {
        if self.closing.get().is_none() {
            self.fail(&ended.to_string());
        }
    }

    fn fail(&self, reason: &str) {
        if self.failure.set(reason.to_owned()).is_err() {
            return;
        }
        let containers = self.all_containers();
        // What is on record is the first.
        let running = containers
            .iter()
            .any(|container| self.is_first(container) && container.status() != Status::Stopped);
        if running && self.closing.get().is_none() {
            tracing::debug!(reason, "the sandbox has failed");
            if let Ok(mut record) = self.params.state.load() {
                record.failure = Some(reason.to_owned());
                record.status = Status::Stopped;
                if let Err(error) = self.params.state.save(&record) {
                    tracing::warn!(%error, "cannot note why the sandbox ended");
                }
            }
        }
        for container in containers {
            container.lost(LOST_EXIT_CODE);
        }
    }
}

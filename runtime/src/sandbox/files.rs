//! The files of the share that the guest has cached. Each takes a descriptor of the VMM, memory of the host, and its place on the host's disk
//! if it was removed there; and the guest lets go of none as long as it has memory of its own. So it is asked to.

use std::convert::Infallible;
use std::future::pending;

use tokio::sync::watch;
use tokio::time::timeout;

use super::boot::Machine;
use super::{KILL_TIMEOUT, Sandbox};
use crate::agent::Agent;
use crate::vmm::Vmm;

/// How often the guest was to be asked for more than its VMM says, and how many of these wishes it has been asked for. It is asked once at a
/// time, for all who wish so by then.
#[derive(Debug)]
pub struct Forgetting {
    wanted: watch::Sender<u64>,
    done: watch::Sender<u64>,
}

impl Forgetting {
    /// Nobody has wished so yet.
    pub fn new() -> Self {
        Self {
            wanted: watch::Sender::new(0),
            done: watch::Sender::new(0),
        }
    }

    /// Waits until the guest has been asked since.
    async fn wish(&self) {
        let mut wish = 0;
        self.wanted.send_modify(|wanted| {
            *wanted += 1;
            wish = *wanted;
        });
        // Fails only without a sender, and `self` has it.
        let _ = self.done.subscribe().wait_for(|&done| done >= wish).await;
    }

    /// Asks the guest whenever its VMM says that it has many files cached, or somebody wishes so; if the guest stands still, when it goes on.
    /// To be dropped when the VM has ended.
    pub async fn serve(&self, sandbox: &Sandbox, vmm: &Vmm, agent: Option<Agent>) -> Infallible {
        let Some(agent) = agent else {
            return pending().await;
        };
        let (mut many, mut wanted) = (vmm.many_files(), self.wanted.subscribe());
        loop {
            let done = *self.done.borrow();
            let wished = async { wanted.wait_for(|&wanted| wanted > done).await.is_ok() };
            let goes_on = tokio::select! {
                changed = many.changed() => changed.is_ok(),
                wished = wished => wished,
            };
            if !goes_on {
                // The VM has ended.
                return pending().await;
            }
            for container in sandbox.all_containers() {
                container.guest_goes_on().await;
            }
            // All that has come by now is one reason.
            many.mark_unchanged();
            let wish = *wanted.borrow();
            match agent.forget_files().await {
                Ok(()) => tracing::debug!("the guest has forgotten the files that it does not use"),
                // At worst it finds no more files.
                Err(error) => tracing::warn!(%error, "the guest does not forget files"),
            }
            self.done.send_replace(wish);
        }
    }
}

impl Machine {
    /// Has the guest forget the files that nothing in it uses. One that does not is not waited for, and keeps them.
    pub async fn forget_files(&self) {
        let forgotten = timeout(KILL_TIMEOUT, self.forgetting().wish());
        tokio::select! {
            result = forgotten => if result.is_err() {
                tracing::warn!("the guest does not forget files in time");
            },
            _ = self.vmm().ended() => {}
        }
    }
}

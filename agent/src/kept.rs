//! A container's namespaces, kept beyond its last process.
//!
//! With its last process the kernel takes a mount namespace down before anybody hears of that process's end, and a network namespace
//! beside whoever passes on the news: both wait for grace periods of RCU. A container that is kept ends as fast as its process, and if
//! the guest ends with it, nothing is taken down at all.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::unistd::Pid;
use tokio::time::timeout;

use crate::last_close::Elsewhere;

/// Those that take long, by their names in `/proc/<pid>/ns`.
const KEPT: [(u64, &str); 2] = [
    (libc::CLONE_NEWNS as u64, "mnt"),
    (libc::CLONE_NEWNET as u64, "net"),
];

/// How long a deletion waits for them to be taken down. A file system whose server is gone may take for ever.
const CLOSE_TIME: Duration = Duration::from_secs(2);

/// The kept namespaces.
#[derive(Debug, Default)]
pub struct Kept(Mutex<Vec<OwnedFd>>);

impl Kept {
    /// Keeps the namespaces of a process that `made` (`CLONE_NEW*`) has made. It must not have been reaped.
    pub fn of(pid: Pid, made: u64) -> Self {
        let kept = KEPT
            .iter()
            .filter(|(flag, _)| made & flag != 0)
            .filter_map(|(_, name)| {
                // One that is not kept ends earlier, and no other way.
                File::open(format!("/proc/{pid}/ns/{name}")).ok()
            })
            .map(OwnedFd::from)
            .collect();
        Self(Mutex::new(kept))
    }

    /// Lets them go, and waits a while until they are taken down: what was mounted is in nobody's way then.
    pub async fn release(&self) {
        let kept = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let descriptors: Vec<_> = kept.iter().map(AsFd::as_fd).collect();
        let elsewhere = Elsewhere::hold(&descriptors);
        drop(descriptors);
        drop(kept);
        let closed = async { elsewhere?.closed().await };
        match timeout(CLOSE_TIME, closed).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "a container's namespaces were taken down by the agent itself");
            }
            Err(_) => tracing::warn!("a container's namespaces are still being taken down"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_made_is_kept_until_it_is_released() {
        let count = |kept: &Kept| kept.0.lock().unwrap().len();
        let both = Kept::of(
            Pid::this(),
            (libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWPID) as u64,
        );
        assert_eq!(count(&both), 2);
        both.release().await;
        assert_eq!(count(&both), 0);
        assert_eq!(count(&Kept::of(Pid::this(), libc::CLONE_NEWNET as u64)), 1);
        assert_eq!(count(&Kept::of(Pid::this(), 0)), 0);
    }
}

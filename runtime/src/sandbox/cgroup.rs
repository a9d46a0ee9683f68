//! The host's cgroup of a sandbox, worked on where waiting does no harm: moves take a grace period of the kernel, removal the end of
//! processes, systemd's answers as long as D-Bus, and the server has one thread.

use std::path::PathBuf;
use std::sync::Arc;

use oci_spec::runtime::LinuxResources;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use super::{CLOSING, SandboxError};
use crate::host_cgroup::{self, HostCgroup, HostCgroupError};
use crate::standin::StandIn;

/// The cgroup, if there is one, and no more than one at work on it.
#[derive(Debug, Clone)]
pub struct Cgroup {
    /// Where this process was before.
    origin: PathBuf,
    current: Arc<Mutex<Current>>,
}

/// What there is of it.
#[derive(Debug, Default)]
struct Current {
    cgroup: Option<HostCgroup>,
    /// This process has left it, or would have, and must not be in it any more: who is in it when it is removed is killed.
    left: bool,
}

impl Cgroup {
    /// None yet.
    pub fn new() -> Self {
        Self {
            origin: host_cgroup::own(),
            current: Arc::default(),
        }
    }

    /// Refuses a cgroup in which somebody is, or that can't be made.
    pub async fn require_free(&self, cgroup: HostCgroup) -> Result<(), HostCgroupError> {
        self.work(move |_| cgroup.require_free()).await
    }

    /// Moves this process into `cgroup`, which is the sandbox's from then on, also if that fails: part of it may be made by then. Refused once
    /// this process has been told to leave.
    pub async fn enter(&self, cgroup: HostCgroup) -> Result<(), SandboxError> {
        self.work(|current| {
            if current.left {
                return Err(SandboxError::Failed(CLOSING.into()));
            }
            let made = cgroup.make(std::process::id());
            // Another's is another's to remove.
            if !matches!(made, Err(HostCgroupError::Taken(_))) {
                current.cgroup = Some(cgroup);
            }
            Ok(made?)
        })
        .await
    }

    /// Moves a stand-in into it.
    pub async fn add(&self, stand_in: &StandIn) -> Result<(), SandboxError> {
        let (origin, stand_in) = (self.origin.clone(), stand_in.clone());
        self.work(move |current| {
            let Some(cgroup) = &current.cgroup else {
                return Ok(());
            };
            cgroup.add(stand_in.pid())?;
            if stand_in.is_alive() {
                return Ok(());
            }
            // Its number may be another process's by now, which must not end with this sandbox.
            let _ = host_cgroup::move_to(&origin, stand_in.pid());
            Err(SandboxError::Orphan)
        })
        .await
    }

    /// Applies the host's part of a container's resources, for a guest of that size.
    pub async fn apply(
        &self,
        resources: LinuxResources,
        guest_mib: u64,
    ) -> Result<(), HostCgroupError> {
        self.work(move |current| match &current.cgroup {
            Some(cgroup) => cgroup.apply(&resources, guest_mib),
            None => Ok(()),
        })
        .await
    }

    /// Moves this process back to where it was before, for good.
    pub async fn leave(self) -> Result<(), String> {
        let origin = self.origin.clone();
        self.work(move |current| {
            current.left = true;
            match current.cgroup {
                Some(_) => {
                    host_cgroup::move_to(&origin, std::process::id()).map_err(|e| e.to_string())
                }
                None => Ok(()),
            }
        })
        .await
    }

    /// Kills what is in it, and removes it. This process must have left.
    pub async fn remove(&self) -> Result<(), HostCgroupError> {
        self.work(|current| match current.cgroup.take() {
            Some(cgroup) => cgroup.remove(),
            None => Ok(()),
        })
        .await
    }

    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Current) -> T + Send + 'static,
    ) -> T {
        let mut current = self.current.clone().lock_owned().await;
        match spawn_blocking(move || work(&mut current)).await {
            Ok(done) => done,
            // Nobody cancels it.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_cgroup::tests::{at, with_cgroups};
    use crate::standin::tests::Reused;
    use std::fs;
    use std::path::Path;
    use std::sync::mpsc;

    fn block_on(work: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(work);
    }

    #[test]
    fn others_go_on_while_the_cgroup_is_waited_for() {
        let (sender, receiver) = mpsc::channel();
        block_on(async {
            let cgroup = Cgroup::new();
            let work = cgroup.work(move |_| receiver.recv());
            let other = async { sender.send(7) };
            let (received, sent) = tokio::join!(work, other);
            sent.unwrap();
            assert_eq!(received, Ok(7));
        });
    }

    #[test]
    fn a_cgroup_that_takes_no_process_is_removed_like_any_other() {
        with_cgroups(|| {
            let parent = format!("bulkhead-threads-{}", std::process::id());
            let directory = Path::new("/sys/fs/cgroup").join(&parent);
            // Beside one of threads there is none of processes (Documentation/admin-guide/cgroup-v2.rst, "Threads").
            fs::create_dir_all(directory.join("threads")).unwrap();
            fs::write(directory.join("threads/cgroup.type"), "threaded").unwrap();
            let host = at(&format!("/{parent}/c"), false);
            let cgroup = Cgroup::new();
            let mut made = false;
            let mut entered = Ok(());
            block_on(async {
                entered = cgroup.enter(host).await;
                made = directory.join("c").exists();
                cgroup.clone().leave().await.unwrap();
                cgroup.remove().await.unwrap();
            });
            let left = directory.join("c").exists();
            for directory in [directory.join("threads"), directory.join("c"), directory] {
                let _ = fs::remove_dir(directory);
            }
            assert!(
                entered.is_err() && made && !left,
                "{entered:?} {made} {left}"
            );
        });
    }

    #[test]
    fn who_has_left_does_not_enter_again() {
        with_cgroups(|| {
            let name = format!("bulkhead-left-{}", std::process::id());
            let host = at(&format!("/{name}"), false);
            let directory = Path::new("/sys/fs/cgroup").join(name);
            block_on(async {
                let cgroup = Cgroup::new();
                // In the order in which they are asked for, as when a sandbox's end comes while its cgroup is looked at.
                let free = cgroup.require_free(host.clone());
                let (free, left) = tokio::join!(free, cgroup.clone().leave());
                free.unwrap();
                left.unwrap();
                let entered = cgroup.enter(host).await;
                assert!(matches!(entered, Err(SandboxError::Failed(_))));
                cgroup.remove().await.unwrap();
            });
            assert!(!directory.exists());
        });
    }

    #[test]
    fn what_has_a_stand_ins_number_after_it_does_not_end_with_the_sandbox() {
        with_cgroups(|| {
            let name = format!("bulkhead-stand-in-{}", std::process::id());
            let host = at(&format!("/{name}"), false);
            let directory = Path::new("/sys/fs/cgroup").join(name);
            fs::create_dir(&directory).unwrap();
            let reused = Reused::new();
            let cgroup = Cgroup::new();
            block_on(async {
                cgroup.current.lock().await.cgroup = Some(host);
                let added = cgroup.add(&reused.0).await;
                let path = format!("/proc/{}/cgroup", reused.0.pid());
                let where_it_is = fs::read_to_string(path).unwrap();
                cgroup.remove().await.unwrap();
                assert!(matches!(added, Err(SandboxError::Orphan)), "{added:?}");
                assert!(!where_it_is.contains("bulkhead-stand-in"), "{where_it_is}");
            });
            assert!(!directory.exists());
        });
    }
}

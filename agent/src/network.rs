//! A network namespace made before a container asks for one: the kernel sets up every protocol of its own for each.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use nix::sched::{CloneFlags, setns, unshare};

use crate::error::{Context, Result};
use crate::sys;

/// At most one, for whoever comes first.
#[derive(Debug, Default)]
pub struct SpareNetwork(Mutex<Option<OwnedFd>>);

impl SpareNetwork {
    /// Makes one, its loopback interface up. The calling thread is in its own again afterwards.
    pub fn make() -> Result<Self> {
        let what = || "cannot make a network namespace";
        let open = || File::open("/proc/thread-self/ns/net").map(OwnedFd::from);
        let own = open().what(what)?;
        unshare(CloneFlags::CLONE_NEWNET).what(what)?;
        let made = sys::loopback_up()
            .what(what)
            .and_then(|()| open().what(what));
        setns(&own, CloneFlags::CLONE_NEWNET).what(|| "cannot return to the network namespace")?;
        Ok(Self(Mutex::new(Some(made?))))
    }

    /// Takes it, if it is there.
    pub fn take(&self) -> Option<OwnedFd> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

//! How a VM ends: the first reason given wins, and the event loop is woken to act on it.

use std::io;
use std::sync::Mutex;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::sync::lock;

/// Why and how the VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// One of [`crate::control::exit_code`].
    pub exit_code: i32,
    /// One line: what ended it and where.
    pub reason: String,
}

/// Where vCPU threads report the end, and the event loop learns of it.
#[derive(Debug)]
pub struct EndSignal {
    first: Mutex<Option<End>>,
    event: EventFd,
}

impl EndSignal {
    /// A signal not yet given.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            first: Mutex::new(None),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Reports the end. Later reports are dropped: what follows a crash is its consequence.
    pub fn report(&self, exit_code: i32, reason: String) {
        let mut first = lock(&self.first);
        if first.is_none() {
            *first = Some(End { exit_code, reason });
            // Fails only when the counter is full: then the event is pending already.
            let _ = self.event.write(1);
        }
    }

    /// The end, if it was reported.
    pub fn get(&self) -> Option<End> {
        lock(&self.first).clone()
    }

    /// Readable once the end was reported.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_wins_and_wakes() {
        let signal = EndSignal::new().unwrap();
        assert!(signal.event().read().is_err());
        signal.report(11, "vcpu 0: triple fault".into());
        signal.report(0, "power off".into());
        assert_eq!(signal.get().unwrap().exit_code, 11);
        assert_eq!(signal.event().read().unwrap(), 1);
    }
}

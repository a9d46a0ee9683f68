//! The VMM's threads: each has a kind, a name and a small stack.
//!
//! All threads start here, so what a thread may do can be narrowed here too, by its kind.

use std::io;
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};

/// Stack of every thread. The default of 2 MiB is what a huge page covers: where the host gives huge pages to all, the first touch of
/// such a stack would clear 2 MiB and keep them.
pub const STACK_SIZE: usize = 256 << 10;

/// What a thread is for. Each kind makes system calls of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Loads kernel and initramfs, and ends before the guest runs.
    Loader,
    /// Runs one vCPU; makes the transports' calls into devices.
    Vcpu(u8),
    /// Moves the socket device's packets.
    Vsock,
    /// Serves the file-system device's requests, one of several.
    Fs(u8),
    /// Tries `/dev/kvm`; never in a VMM.
    Probe,
}

impl Kind {
    /// The thread's name, as `ps` and `/proc` show it.
    pub fn name(self) -> String {
        match self {
            Self::Loader => "loader".into(),
            Self::Vcpu(id) => format!("vcpu-{id}"),
            Self::Vsock => "vsock".into(),
            Self::Fs(index) => format!("fs-{index}"),
            Self::Probe => "probe".into(),
        }
    }

    fn builder(self) -> Builder {
        Builder::new().name(self.name()).stack_size(STACK_SIZE)
    }
}

/// Starts a thread.
pub fn spawn<T: Send + 'static>(
    kind: Kind,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    kind.builder().spawn(body)
}

/// Starts a thread that ends within `scope`.
pub fn spawn_scoped<'scope, 'env, T: Send + 'scope>(
    kind: Kind,
    scope: &'scope Scope<'scope, 'env>,
    body: impl FnOnce() -> T + Send + 'scope,
) -> io::Result<ScopedJoinHandle<'scope, T>> {
    kind.builder().spawn_scoped(scope, body)
}

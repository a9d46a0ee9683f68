//! This command as the one in whose foreground a process of a container runs: its streams, its terminal, its signals.

use std::os::fd::OwnedFd;

use bulkhead_runtime::stdio::{Stdio, TerminalSize};
use tokio::runtime::{Builder, Runtime};

use super::attach::own_stdio;
use super::signals::Signals;
use super::terminal::{self, Raw};

/// What the process has of us.
#[derive(Debug)]
pub struct Foreground {
    /// Which of our streams it is to have.
    pub stdio: Stdio,
    /// The size of our terminal, if it is to have one.
    pub size: Option<TerminalSize>,
    // From here on in the order in which they go: a signal that ends us would leave a terminal as it is.
    raw: Option<Raw>,
    signals: Signals,
    runtime: Runtime,
}

impl Foreground {
    /// Takes our signals and, if the process is to have a terminal, switches ours to raw mode, until the session's end.
    pub fn enter(terminal: bool) -> anyhow::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let terminal = terminal.then(terminal::own).transpose()?;
        let watched = terminal.as_ref().map(OwnedFd::try_clone).transpose()?;
        let signals = {
            let _context = runtime.enter();
            Signals::of_command(watched)?
        };
        let raw = terminal.map(Raw::enter).transpose()?;
        Ok(Self {
            stdio: own_stdio(raw.is_some()),
            size: raw.as_ref().and_then(Raw::size),
            raw,
            signals,
            runtime,
        })
    }

    /// Runs a session to its end; our signals are its to look after.
    pub fn run<T>(
        self,
        session: impl AsyncFnOnce(&mut Signals) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let Self {
            raw,
            mut signals,
            runtime,
            ..
        } = self;
        let result = runtime.block_on(session(&mut signals));
        drop(raw);
        drop(signals);
        // A pump may still wait for our standard input; the process's end is its end.
        runtime.shutdown_background();
        result
    }
}

//! This command as the one in whose foreground a process of a container runs: its streams, its terminal, its signals.

use std::io;
use std::os::fd::AsFd;

use bulkhead_runtime::stdio::{Stdio, TerminalSize};

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
    _raw: Option<Raw>,
}

impl Foreground {
    /// Switches our terminal to raw mode, if the process is to have one, until the session's end.
    pub fn enter(terminal: bool) -> anyhow::Result<Self> {
        let raw = terminal.then(Raw::enter).transpose()?;
        let size = raw
            .as_ref()
            .and_then(|_| terminal::size(io::stdin().as_fd()));
        Ok(Self {
            stdio: own_stdio(terminal),
            size,
            _raw: raw,
        })
    }

    /// Runs a session to its end; our signals are its to look after.
    pub fn run<T>(
        self,
        session: impl AsyncFnOnce(&mut Signals) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let result = runtime.block_on(async {
            let mut signals = Signals::catch()?;
            session(&mut signals).await
        });
        // A pump may still wait for our standard input; the process's end is its end.
        runtime.shutdown_background();
        result
    }
}

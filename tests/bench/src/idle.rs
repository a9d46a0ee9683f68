//! An idle sandbox to look at: a container that sleeps, in a guest of a known size.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, ensure};
use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{bulkhead, run_command, start};
use bulkhead_e2e::processes;

/// Guest memory of the sandbox, in MiB.
pub const GUEST_MIB: u64 = 128;

/// A running sandbox, ended when it goes.
pub struct IdleSandbox {
    client: Child,
    _bundle: Bundle,
    config: PathBuf,
    /// Its processes: client, server and VMM.
    pub pids: Vec<u32>,
}

impl IdleSandbox {
    /// Starts one; returns when its container sleeps.
    pub fn start() -> anyhow::Result<Self> {
        let config =
            std::env::temp_dir().join(format!("bulkhead-bench-{}.toml", std::process::id()));
        fs::write(&config, format!("memory_mib = {GUEST_MIB}\n"))?;
        let bundle = Bundle::shell("echo ready; exec sleep 100000");
        let mut command = Command::new(bulkhead());
        command.arg("--config").arg(&config);
        let mut sandbox = Self {
            client: start(run_command(command, &bundle).stdin(Stdio::null())),
            _bundle: bundle,
            config,
            pids: Vec::new(),
        };
        let mut line = String::new();
        let stdout = sandbox.client.stdout.take().context("no stdout")?;
        BufReader::new(stdout).read_line(&mut line)?;
        sandbox.pids = processes::of_the_build_under_test();
        ensure!(line == "ready\n", "the container said {line:?}");
        Ok(sandbox)
    }
}

impl Drop for IdleSandbox {
    fn drop(&mut self) {
        // A client that is gone already is what this wants.
        let _ = self.client.kill();
        let _ = self.client.wait();
        processes::wait_for_end(&self.pids);
        let _ = fs::remove_file(&self.config);
    }
}

//! Where the server's log goes: standard error, which is its client's, or a file when debug logs have a directory.

use std::fs::File;

use anyhow::Context;
use bulkhead_runtime::config::Config;
use bulkhead_runtime::id::ContainerId;
use tracing_subscriber::EnvFilter;

/// Starts logging: warnings, or everything of this project when debugging.
pub fn start(config: &Config, id: &ContainerId) -> anyhow::Result<()> {
    let level = if config.debug { "debug" } else { "warn" };
    let ours = [
        "bulkhead_runtime",
        "bulkhead_vmm",
        "containerd_shim_bulkhead_v2",
    ];
    // What is strange about a bundle the client has told already.
    let filter =
        ours.map(|name| format!("{name}={level}")).join(",") + ",bulkhead_runtime::spec=error";
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_ansi(false);
    match config.debug_directory.as_ref().filter(|_| config.debug) {
        Some(directory) => {
            let path = directory.join(format!("{id}-server.log"));
            let file = File::create(&path)
                .with_context(|| format!("cannot make the log file {}", path.display()))?;
            builder.with_writer(file).init();
        }
        None => builder.with_writer(std::io::stderr).init(),
    }
    Ok(())
}

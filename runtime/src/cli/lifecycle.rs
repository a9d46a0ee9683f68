//! `bulkhead start`, `kill`, `pause`, `resume` and `delete`.

use clap::Args;

use super::Invocation;
use super::known::{Known, Unknown, clean_up};
use super::signals;
use bulkhead_runtime::sandbox::Status;

/// A command about one container.
#[derive(Debug, Args)]
pub struct IdArgs {
    /// Name of the container
    pub id: String,
}

/// A container, and words for a program: behind the container's name nothing is a flag of ours.
#[derive(Debug, Args)]
pub struct IdAndWords {
    /// Name of the container, and what is for the program
    #[arg(value_names = ["ID", "ARGS"], num_args = 1.., required = true, trailing_var_arg = true)]
    all: Vec<String>,
}

impl IdAndWords {
    /// Name of the container.
    pub fn id(&self) -> &str {
        self.all.first().map_or("", String::as_str)
    }

    /// What is for the program.
    pub fn words(&self) -> &[String] {
        self.all.get(1..).unwrap_or_default()
    }
}

#[derive(Debug, Args)]
pub struct KillArgs {
    /// Send the signal to every process of the container
    #[arg(short, long)]
    pub all: bool,
    /// Name of the container
    id: String,
    /// Signal: a number, or a name with or without SIG; 0 only asks whether the container is there
    #[arg(default_value = "SIGTERM")]
    signal: String,
}

#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// Kill the container if it runs; it is no error when there is none
    #[arg(short, long)]
    force: bool,
    /// Name of the container
    id: String,
}

/// Runs `bulkhead start`.
pub fn start(invocation: &Invocation, args: &IdArgs) -> anyhow::Result<i32> {
    Known::find(invocation, &args.id)?.call(async |server| server.start().await)?;
    Ok(0)
}

/// Runs `bulkhead pause`.
pub fn pause(invocation: &Invocation, args: &IdArgs) -> anyhow::Result<i32> {
    Known::find(invocation, &args.id)?.call(async |server| server.pause().await)?;
    Ok(0)
}

/// Runs `bulkhead resume`.
pub fn resume(invocation: &Invocation, args: &IdArgs) -> anyhow::Result<i32> {
    Known::find(invocation, &args.id)?.call(async |server| server.resume().await)?;
    Ok(0)
}

/// Runs `bulkhead kill`.
pub fn kill(invocation: &Invocation, args: &KillArgs) -> anyhow::Result<i32> {
    let signal = signals::parse(&args.signal)?;
    let known = Known::find(invocation, &args.id)?;
    let killed = known.call(async |server| server.kill(signal, args.all).await);
    // As under runc: what is left of a stopped container is nothing, and all of nothing is signalled easily. Asked afterwards,
    // since it may end at any time before.
    if killed.is_err() && args.all && known.process_state()?.status == Status::Stopped {
        return Ok(0);
    }
    killed?;
    Ok(0)
}

/// Runs `bulkhead delete`.
pub fn delete(invocation: &Invocation, args: &DeleteArgs) -> anyhow::Result<i32> {
    let known = match Known::find(invocation, &args.id) {
        Err(error) if args.force && error.is::<Unknown>() => return Ok(0),
        known => known?,
    };
    if args.force {
        known.end()?;
    } else {
        known.delete()?;
    }
    clean_up(&known.state)?;
    Ok(0)
}

//! The command line: arguments, dispatch, and how errors are told.

mod check;
mod client;
mod log;
mod run;
mod signals;

use std::path::{Path, PathBuf};

use anyhow::Context;
use bulkhead_runtime::config::Config;
use clap::{Args, Parser, Subcommand};

use log::{Format, Log};

/// runc's exit code for whatever goes wrong before there is a container's.
const FAILURE: i32 = 1;

/// Runs OCI containers, each in its own small KVM guest.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version)]
struct Arguments {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

/// Flags before the command; runc's, and `--config`.
#[derive(Debug, Args)]
struct Globals {
    /// Directory of the containers' state [default: /run/bulkhead]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// File to which errors are written too
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Format of that file
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Text)]
    log_format: Format,
    /// Log everything, and show the guest's console
    #[arg(long)]
    debug: bool,
    /// Let systemd make the host's cgroups: accepted, and without effect yet
    #[arg(long, hide = true)]
    systemd_cgroup: bool,
    /// Configuration file [default: /etc/bulkhead/config.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create and run a container, and wait for its end
    Run(run::RunArgs),
    /// Tell whether this machine can run guests
    Check,
}

impl Command {
    fn name(&self) -> &'static str {
        match self {
            Self::Run(_) => "run",
            Self::Check => "check",
        }
    }
}

/// Configuration and flags in force.
struct Invocation {
    config: Config,
    config_file: Option<PathBuf>,
    root: PathBuf,
    debug: bool,
}

impl Globals {
    fn resolve(&self) -> anyhow::Result<Invocation> {
        let config_file = self.config.as_deref().map(absolute).transpose()?;
        let config = Config::load(config_file.as_deref())?;
        let root = absolute(self.root.as_deref().unwrap_or(&config.runtime_root))?;
        let debug = self.debug || config.debug;
        Ok(Invocation {
            config,
            config_file,
            root,
            debug,
        })
    }
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("{path:?} is no path"))
}

/// Runs the program and returns its exit code.
pub fn main() -> i32 {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version come this way too.
            let code = if error.use_stderr() { FAILURE } else { 0 };
            let _ = error.print();
            return code;
        }
    };
    let name = arguments.command.name();
    let log = match Log::open(
        arguments.globals.log.as_deref(),
        arguments.globals.log_format,
    ) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("bulkhead {name} failed: {error:#}");
            return FAILURE;
        }
    };
    let result = arguments
        .globals
        .resolve()
        .and_then(|context| match &arguments.command {
            Command::Run(args) => run::run(&context, args),
            Command::Check => Ok(check::check(&context.config)),
        });
    result.unwrap_or_else(|error| {
        log.error(&format!("bulkhead {name} failed: {error:#}"));
        error
            .downcast_ref::<run::Lost>()
            .map_or(FAILURE, |lost| lost.exit_code)
    })
}

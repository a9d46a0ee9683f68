//! The command line.

use clap::{Args, Parser, Subcommand};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;
use testhost::frame::Start;
use testhost::machine::Hardware;
use testhost::supervisor::Patience;

/// An emulated host with a working /dev/kvm: runs programs in it as root, over this machine's own files.
///
/// Exit codes: the command's own (128+N if signal N ended it); 123 the host could not be set up, 124 time limit,
/// 125 the emulated host itself failed twice, 126 and 127 the command can't be run or does not exist.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a host, run one command in it, switch it off
    Run {
        #[command(flatten)]
        host: Host,
        #[command(flatten)]
        command: RunOptions,
    },
    /// Boot a host that stays up for many commands
    Up {
        /// The host's name: several can be up side by side
        #[arg(long, default_value = "default")]
        name: String,
        #[command(flatten)]
        host: Host,
    },
    /// Run one command in a host that is up
    Exec {
        /// The host's name
        #[arg(long, default_value = "default")]
        name: String,
        /// See files that were changed outside since the host booted (drops its caches)
        #[arg(long)]
        fresh: bool,
        /// Leave processes running that outlive the command
        #[arg(long)]
        keep: bool,
        #[command(flatten)]
        command: RunOptions,
    },
    /// Run a command very often, several at a time, and count what fails: the commands or the host
    Stress {
        #[command(flatten)]
        host: Host,
        #[command(flatten)]
        stress: StressOptions,
    },
    /// Say how a host is
    Status {
        /// The host's name
        #[arg(long, default_value = "default")]
        name: String,
    },
    /// Switch a host off
    Down {
        /// The host's name
        #[arg(long, default_value = "default")]
        name: String,
    },
    /// Fetch kernel and QEMU into the cache, if they are not there
    Prepare {
        /// Look for newer ones
        #[arg(long)]
        refresh: bool,
    },
    /// What `up` starts in the background
    #[command(hide = true)]
    Supervise {
        #[arg(long, default_value = "default")]
        name: String,
        #[command(flatten)]
        host: Host,
    },
}

/// The host that is booted.
#[derive(Debug, Args)]
pub struct Host {
    /// MiB of memory
    #[arg(long, value_name = "MIB", default_value_t = 6144)]
    pub memory: u32,
    /// A folder of this machine that is writable inside, as DIR or OUTSIDE:INSIDE; the rest is discarded at the end
    #[arg(long, value_name = "DIR", value_parser = bind)]
    pub bind: Vec<(PathBuf, PathBuf)>,
    /// A file or folder copied to memory at boot, at the same path: programs run from 9p start slowly
    #[arg(long, value_name = "PATH")]
    pub tmpfs_copy: Vec<PathBuf>,
    /// Mount the hierarchies of cgroup version 1
    #[arg(long)]
    pub cgroup_v1: bool,
    /// Seconds without a sign of life from inside after which the host counts as failed
    #[arg(long, value_name = "SECS", default_value_t = 60)]
    pub heartbeat: u64,
    /// Virtual CPUs; more than one is known to fail under load
    #[arg(long, default_value_t = 1, hide = true)]
    pub cpus: u32,
    /// QEMU's accelerator
    #[arg(long, default_value = "tcg,thread=multi,tb-size=1024", hide = true)]
    pub accel: String,
    /// QEMU's CPU model
    #[arg(long, default_value = "EPYC-Milan,-pcid", hide = true)]
    pub cpu: String,
    /// Added to the kernel's command line
    #[arg(long, default_value = "", hide = true, allow_hyphen_values = true)]
    pub append: String,
    /// One more argument for QEMU
    #[arg(long, hide = true, allow_hyphen_values = true)]
    pub qemu_arg: Vec<OsString>,
}

impl Host {
    pub fn hardware(&self) -> Hardware {
        Hardware {
            memory: self.memory,
            cpus: self.cpus,
            accel: self.accel.clone(),
            cpu: self.cpu.clone(),
            append: self.append.clone(),
            qemu_args: self.qemu_arg.clone(),
            binds: self.bind.clone(),
        }
    }

    pub fn patience(&self) -> Patience {
        Patience {
            heartbeat: Duration::from_secs(self.heartbeat.max(5)),
            ..Patience::default()
        }
    }
}

/// The command that is run.
#[derive(Debug, Args)]
pub struct RunOptions {
    /// Seconds after which the command is killed
    #[arg(long, value_name = "SECS", default_value_t = 600)]
    pub timeout: u64,
    /// A variable for the command: KEY=VALUE, or KEY to pass on our own
    #[arg(long, value_name = "KEY[=VALUE]")]
    pub env: Vec<OsString>,
    /// Working directory, by default the current one
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// Say nothing on standard error unless something is wrong
    #[arg(long, short)]
    pub quiet: bool,
    /// Program and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub argv: Vec<OsString>,
}

/// What `stress` runs, and how.
#[derive(Debug, Args)]
pub struct StressOptions {
    /// How often the command is run
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub guests: usize,
    /// How many run at a time
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub parallel: usize,
    /// Boot a fresh host after so many; 0: one host for all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub per_boot: usize,
    /// Seconds that one run may take
    #[arg(long, value_name = "SECS", default_value_t = 120)]
    pub guest_timeout: u64,
    /// A shell command run after each boot
    #[arg(long, value_name = "COMMAND")]
    pub setup: Option<OsString>,
    /// Program and arguments; the variable STRESS_GUEST counts the runs from 0
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub argv: Vec<OsString>,
}

impl RunOptions {
    pub fn start(&self) -> std::io::Result<Start> {
        let cwd = match &self.cwd {
            Some(cwd) => std::path::absolute(cwd)?,
            None => std::env::current_dir()?,
        };
        let env = self.env.iter().filter_map(|entry| variable(entry));
        // Programs that colour or lay out their output ask for it.
        let terminal = variable(OsStr::new("TERM"));
        Ok(Start {
            argv: self.argv.iter().map(|a| a.as_bytes().to_vec()).collect(),
            env: terminal.into_iter().chain(env).collect(),
            cwd: cwd.into_os_string().into_vec(),
            keep: false,
            fresh: false,
        })
    }

    pub fn limit(&self) -> Option<Duration> {
        (self.timeout > 0).then(|| Duration::from_secs(self.timeout))
    }
}

fn variable(entry: &OsStr) -> Option<Vec<u8>> {
    if entry.as_bytes().contains(&b'=') {
        return Some(entry.as_bytes().to_vec());
    }
    let value = std::env::var_os(entry)?;
    Some([entry.as_bytes(), b"=", value.as_bytes()].concat())
}

fn bind(text: &str) -> Result<(PathBuf, PathBuf), String> {
    let (outside, inside) = text.split_once(':').unwrap_or((text, text));
    let absolute = |path: &str| std::path::absolute(path).map_err(|e| format!("{path:?}: {e}"));
    let outside = absolute(outside)?;
    if !outside.is_dir() {
        return Err(format!("{} is not a folder", outside.display()));
    }
    Ok((outside, absolute(inside)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_after_the_command_are_the_commands() {
        let cli = Cli::parse_from(["testhost", "run", "--timeout", "5", "--", "ls", "--bind"]);
        match cli.command {
            Command::Run { command, .. } => {
                assert_eq!(command.timeout, 5);
                assert_eq!(command.argv, ["ls", "--bind"]);
            }
            other => panic!("{other:?}"),
        }
    }
}

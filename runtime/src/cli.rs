//! The command line: arguments, dispatch, and how errors are told.

mod attach;
mod check;
mod client;
mod create;
mod describe;
mod descriptors;
mod events;
mod exec;
mod foreground;
mod inspect;
mod known;
mod lifecycle;
mod log;
mod misuse;
mod proxy;
mod signals;
mod terminal;
mod update;
mod words;

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use bulkhead_runtime::config::Config;
use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use log::{Format, Log};

/// runc's exit code for whatever goes wrong before there is a container's.
const FAILURE: i32 = 1;

/// What `--version` says behind our name. Engines read the lines apart: docker looks for "version", podman shows all.
const VERSION: &str = concat!("version ", env!("CARGO_PKG_VERSION"), "\nspec: 1.2.1");

/// Runs OCI containers, each in its own small KVM guest.
#[derive(Debug, Parser)]
#[command(
    name = "bulkhead",
    version = VERSION,
    disable_version_flag = true,
    disable_help_subcommand = true,
    // The last one counts.
    args_override_self = true
)]
struct Arguments {
    /// Print version
    #[arg(short, long, action = ArgAction::Version)]
    version: (),
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
    /// File to which warnings are written, and errors too
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Format of that file, or, without one, of what goes to standard error
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Text)]
    log_format: Format,
    /// Log everything, and show the guest's console
    #[arg(long)]
    debug: bool,
    /// Let systemd make the host's cgroup; cgroupsPath is then "slice:prefix:name"
    #[arg(long)]
    systemd_cgroup: bool,
    /// Accepted for runc's sake: there are no checkpoints
    #[arg(long, value_name = "FILE", hide = true)]
    criu: Option<PathBuf>,
    /// Accepted for runc's sake: whoever may run guests is not short of permissions for cgroups
    #[arg(long, value_name = "WHETHER", value_parser = ["true", "false", "auto"], hide = true)]
    rootless: Option<String>,
    /// Configuration file [default: /etc/bulkhead/config.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create a container
    Create(create::CreateArgs),
    /// Start the program of a created container
    Start(lifecycle::IdArgs),
    /// Create and run a container, and wait for its end
    Run(create::RunArgs),
    /// Print the state of a container as JSON
    State(lifecycle::IdArgs),
    /// Send a signal to a container
    Kill(lifecycle::KillArgs),
    /// Delete a container and whatever there is of it
    Delete(lifecycle::DeleteArgs),
    /// Run another program in a container
    Exec(exec::ExecArgs),
    /// List the containers
    List(inspect::ListArgs),
    /// Show the processes of the host that stand for a container's
    Ps(inspect::PsArgs),
    /// Stop a container where it is
    Pause(lifecycle::IdArgs),
    /// Let a paused container go on
    Resume(lifecycle::IdArgs),
    /// Change a container's limits
    Update(update::UpdateArgs),
    /// Print a container's statistics and events
    Events(events::EventsArgs),
    /// Write a config.json to begin with
    Spec(describe::SpecArgs),
    /// Print what this runtime can do, as JSON
    Features,
    /// Tell whether this machine can run guests
    Check,
    /// Print this, or the help of a command
    #[command(visible_alias = "h")]
    Help {
        /// Name of the command
        command: Option<String>,
        /// Without effect
        #[arg(hide = true)]
        more: Vec<String>,
    },
}

impl Command {
    fn name(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Start(_) => "start",
            Self::Run(_) => "run",
            Self::State(_) => "state",
            Self::Kill(_) => "kill",
            Self::Delete(_) => "delete",
            Self::Exec(_) => "exec",
            Self::List(_) => "list",
            Self::Ps(_) => "ps",
            Self::Pause(_) => "pause",
            Self::Resume(_) => "resume",
            Self::Update(_) => "update",
            Self::Events(_) => "events",
            Self::Spec(_) => "spec",
            Self::Features => "features",
            Self::Check => "check",
            Self::Help { .. } => "help",
        }
    }
}

/// Configuration and flags in force.
struct Invocation {
    config: Config,
    config_file: Option<PathBuf>,
    root: PathBuf,
    debug: bool,
    systemd_cgroup: bool,
}

impl Globals {
    fn open_log(&self) -> anyhow::Result<Log> {
        Log::open(self.log.as_deref(), self.log_format)
    }

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
            systemd_cgroup: self.systemd_cgroup,
        })
    }
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("{path:?} is no path"))
}

/// Runs the program and returns its exit code.
pub fn main() -> i32 {
    let line = words::spelled(std::env::args_os(), &misuse::built());
    let arguments = match parse(&line) {
        Ok(arguments) => arguments,
        // Help and version come this way too.
        Err(error) => return misuse::tell(&error, &line),
    };
    let name = arguments.command.name();
    match arguments.globals.open_log() {
        Ok(log) => log.start(),
        Err(error) => {
            eprintln!("error: bulkhead {name} failed: {error:#}");
            return FAILURE;
        }
    }
    let result = arguments
        .globals
        .resolve()
        .and_then(|context| match &arguments.command {
            Command::Create(args) => create::create(&context, args),
            Command::Start(args) => lifecycle::start(&context, args),
            Command::Run(args) => create::run(&context, args),
            Command::State(args) => inspect::state(&context, args),
            Command::Kill(args) => lifecycle::kill(&context, args),
            Command::Delete(args) => lifecycle::delete(&context, args),
            Command::Exec(args) => exec::exec(&context, args),
            Command::List(args) => inspect::list(&context, args),
            Command::Ps(args) => inspect::ps(&context, args),
            Command::Pause(args) => lifecycle::pause(&context, args),
            Command::Resume(args) => lifecycle::resume(&context, args),
            Command::Update(args) => update::update(&context, args),
            Command::Events(args) => events::events(&context, args),
            Command::Spec(args) => describe::spec(args),
            Command::Features => describe::features(),
            Command::Check => Ok(check::check(&context.config)),
            Command::Help { command, .. } => Ok(misuse::help(command.as_deref(), &line)),
        });
    result.unwrap_or_else(|error| {
        if let Some(Unread(cause)) = error.downcast_ref()
            && cause.kind() == std::io::ErrorKind::BrokenPipe
        {
            // As if by the signal: a reader such as head(1) that has seen enough is no failure to talk about.
            return 128 + libc::SIGPIPE;
        }
        tracing::error!("bulkhead {name} failed: {error:#}");
        exit_code(&error)
    })
}

/// Reads the command line. Switches may have a value, `--detach=false`, which runc's may too; help does not show it.
fn parse(line: &[OsString]) -> Result<Arguments, clap::Error> {
    Arguments::try_parse_from(line).or_else(|asked| {
        let matches = with_values(Arguments::command()).try_get_matches_from(line);
        matches
            .and_then(|matches| Arguments::from_arg_matches(&matches))
            // What is wrong with the line even so; not if it asks for help, or for the version.
            .map_err(|wrong| if asked.use_stderr() { wrong } else { asked })
    })
}

/// A command whose switches take a value behind `=`.
fn with_values(command: clap::Command) -> clap::Command {
    let command = command.mut_args(|arg| match arg.get_action() {
        ArgAction::SetTrue => arg
            .action(ArgAction::Set)
            .value_parser(BoolishValueParser::new())
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .default_value("false"),
        _ => arg,
    });
    command.mut_subcommands(with_values)
}

/// Nobody reads what this command prints.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to standard output: {0}")]
struct Unread(std::io::Error);

/// Prints to standard output.
fn say(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    let said = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
    Ok(said.map_err(Unread)?)
}

/// runc's exit code for an error.
fn exit_code(error: &anyhow::Error) -> i32 {
    if let Some(lost) = error.downcast_ref::<create::Lost>() {
        return lost.exit_code;
    }
    if error.is::<exec::NotExecuted>() {
        return exec::NotExecuted::EXIT_CODE;
    }
    FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(line: &[&str]) -> Result<Arguments, clap::Error> {
        let line = std::iter::once(&"bulkhead").chain(line);
        let matches = with_values(Arguments::command()).try_get_matches_from(line)?;
        Arguments::from_arg_matches(&matches)
    }

    #[test]
    fn switches_may_have_a_value() {
        for (line, systemd, all) in [
            (&["--systemd-cgroup", "kill", "--all", "c1"][..], true, true),
            (
                &["--systemd-cgroup=true", "kill", "--all=1", "c1"],
                true,
                true,
            ),
            (
                &["--systemd-cgroup=false", "kill", "-a=false", "c1"],
                false,
                false,
            ),
            (&["kill", "c1", "TERM"], false, false),
        ] {
            let arguments = matches(line).unwrap();
            assert_eq!(arguments.globals.systemd_cgroup, systemd, "{line:?}");
            let Command::Kill(args) = arguments.command else {
                panic!("{line:?}")
            };
            assert_eq!(args.all, all, "{line:?}");
        }
        assert!(matches(&["kill", "--all=maybe", "c1"]).is_err());
    }

    #[test]
    fn flags_may_stand_behind_the_id() {
        for (before, behind) in [
            (
                &["create", "--bundle", "b", "--pid-file", "p", "c1"][..],
                &["create", "c1", "--bundle", "b", "--pid-file", "p"][..],
            ),
            (
                &["create", "--bundle", "b", "--no-pivot", "c1"],
                &["create", "--no-pivot", "c1", "--bundle=b"],
            ),
            (&["kill", "--all", "c1", "9"], &["kill", "c1", "9", "--all"]),
            (&["kill", "--all", "c1", "9"], &["kill", "c1", "-a", "9"]),
            (&["delete", "--force", "c1"], &["delete", "c1", "--force"]),
            (
                &["update", "--memory", "1G", "--cpu-quota", "-1", "c1"],
                &["update", "c1", "--memory", "1G", "--cpu-quota", "-1"],
            ),
        ] {
            let parsed = |line| format!("{:?}", matches(line).unwrap().command);
            assert_eq!(parsed(behind), parsed(before));
        }
    }

    #[test]
    fn behind_the_id_every_word_is_the_programs() {
        for (line, id, words) in [
            (&["exec", "c1", "--help"][..], "c1", &["--help"][..]),
            (&["exec", "c1", "-t", "--", "sh"], "c1", &["-t", "--", "sh"]),
            (
                &["exec", "--tty", "--", "c1", "ls", "-l"],
                "c1",
                &["ls", "-l"],
            ),
            (&["ps", "c1", "--format", "pid"], "c1", &["--format", "pid"]),
            (&["ps", "c1"], "c1", &[]),
        ] {
            let target = match matches(line).unwrap().command {
                Command::Exec(args) => args.target,
                Command::Ps(args) => args.target,
                _ => panic!("{line:?}"),
            };
            assert_eq!(target.id(), id, "{line:?}");
            assert_eq!(target.words(), words, "{line:?}");
        }
        assert!(matches(&["exec"]).is_err());
    }
}

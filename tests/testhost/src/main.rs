//! The `testhost` command; as PID 1, the emulated host's init.

mod cli;
mod daemon;
mod run;
mod stress;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        testhost::guest::init();
    }
    let result = match cli::Cli::parse().command {
        cli::Command::Prepare { refresh } => run::prepare(refresh),
        cli::Command::Run { host, command } => run::run(&host, &command),
        cli::Command::Stress { host, stress } => stress::stress(&host, &stress),
        cli::Command::Up { name, host: _ } => daemon::up(&name),
        cli::Command::Supervise { name, host } => daemon::supervise(&name, &host),
        cli::Command::Exec {
            name,
            fresh,
            keep,
            command,
        } => daemon::exec(&name, fresh, keep, &command),
        cli::Command::Status { name } => daemon::status(&name),
        cli::Command::Down { name } => daemon::down(&name),
    };
    result.unwrap_or_else(|error| {
        eprintln!("testhost: {error:#}");
        ExitCode::from(run::UNUSABLE)
    })
}

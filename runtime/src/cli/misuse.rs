//! Command lines that name nothing to do, and wrong ones: help and errors, on the streams and with the exit codes of runc. The words
//! are our own.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser};

use super::{Arguments, FAILURE, Globals, with_values};

/// runc's exit code for a command that it does not know.
const UNKNOWN_COMMAND: i32 = 3;

/// Says why there is nothing to run on that line and returns the exit code.
pub fn tell(error: &clap::Error, line: &[OsString]) -> i32 {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            return 0;
        }
        // No command at all is no mistake to runc.
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            print_help(None);
            return 0;
        }
        _ => {}
    }
    let beginning = Beginning::read(line);
    let text = error.to_string();
    let (shown, code) = if error.kind() == ErrorKind::InvalidSubcommand {
        (text.trim_end().to_owned(), UNKNOWN_COMMAND)
    } else if is_unknown_choice(error) {
        (text.trim_end().to_owned(), FAILURE)
    } else {
        // Usage is runc's standard output; standard error has only what is wrong.
        print_help(beginning.as_ref().and_then(Beginning::named));
        (without_usage(&text), FAILURE)
    };
    // In the log, if the line names one, it is one sentence: clients show what they find there.
    let log = beginning.and_then(|beginning| beginning.globals.open_log().ok());
    match log {
        Some(log) => log.error(&sentence(&text), &shown),
        None => eprintln!("{shown}"),
    }
    code
}

/// Runs `bulkhead help`: prints the help of a command, or of all, and returns the exit code.
pub fn help(topic: Option<&str>, line: &[OsString]) -> i32 {
    let mut all = built();
    let (command, unknown) = match topic {
        None => (Some(&mut all), ""),
        Some(name) => (all.find_subcommand_mut(name), name),
    };
    match command {
        Some(command) => {
            let _ = command.print_long_help();
            0
        }
        None => {
            let message = format!("unrecognized subcommand '{unknown}'");
            tell(&all.error(ErrorKind::InvalidSubcommand, message), line)
        }
    }
}

/// Prints the short help of a command or, if there is none of that name, of all.
fn print_help(name: Option<&str>) {
    let mut all = built();
    let known = name.is_some_and(|name| all.find_subcommand(name).is_some());
    let command = match name.filter(|_| known) {
        Some(name) => all.find_subcommand_mut(name),
        None => Some(&mut all),
    };
    if let Some(command) = command {
        let _ = command.print_help();
    }
}

/// Every command, with its name as it is called.
pub fn built() -> clap::Command {
    let mut all = Arguments::command();
    all.build();
    all
}

/// Whether a flag has a value that is not of its few: runc finds that out later, when it shows no usage any more.
fn is_unknown_choice(error: &clap::Error) -> bool {
    let value = error.get(ContextKind::InvalidValue);
    let missing = matches!(value, Some(ContextValue::String(value)) if value.is_empty());
    error.kind() == ErrorKind::InvalidValue && !missing
}

/// The flags before the command, whatever follows.
#[derive(Debug, Parser)]
#[command(disable_help_flag = true, args_override_self = true)]
struct Beginning {
    #[command(flatten)]
    globals: Globals,
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

impl Beginning {
    /// That of a command line, if it is right so far.
    fn read(line: &[OsString]) -> Option<Self> {
        let matches = with_values(Self::command())
            .try_get_matches_from(line)
            .ok()?;
        Self::from_arg_matches(&matches).ok()
    }

    /// What stands where a command is named.
    fn named(&self) -> Option<&str> {
        self.rest.first()?.to_str()
    }
}

/// The first paragraph of what clap says, which tells what is wrong; usage and hints follow.
fn sentence(text: &str) -> String {
    let lines = text.lines().take_while(|line| !line.trim().is_empty());
    let words: Vec<_> = lines.flat_map(str::split_whitespace).collect();
    let all = words.join(" ");
    all.strip_prefix("error: ").unwrap_or(&all).to_owned()
}

/// What clap says but for the paragraphs that help says better.
fn without_usage(text: &str) -> String {
    let paragraphs = text.trim_end().split("\n\n").filter(|paragraph| {
        !paragraph.starts_with("Usage:") && !paragraph.starts_with("For more information")
    });
    let paragraphs: Vec<_> = paragraphs.collect();
    paragraphs.join("\n\n")
}

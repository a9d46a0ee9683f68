//! The words of a command line as runc's parser takes them, in the spelling that ours does.

use std::any::TypeId;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Arg, ArgAction, Command};

/// Spells the flags with one dash or two, as their names are short or long: to Go's flag package, which is runc's, both are one. A
/// path or text that is empty is none there, and is left out. Behind the id of a command that runs another program, and behind `--`,
/// every word stays as it is.
pub fn spelled(line: impl IntoIterator<Item = OsString>, mut command: &Command) -> Vec<OsString> {
    let mut line = line.into_iter();
    let mut spelled: Vec<OsString> = line.next().into_iter().collect();
    while let Some(word) = line.next() {
        let text = word.to_str().unwrap_or_default();
        let Some(flag) = text.strip_prefix('-').filter(|flag| !flag.is_empty()) else {
            let known = command.find_subcommand(text);
            spelled.push(word);
            match known {
                Some(known) => command = known,
                None if are_ours_behind_a_name(command) => {}
                None => break,
            }
            continue;
        };
        let flag = flag.strip_prefix('-').unwrap_or(flag);
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(OsString::from(value))),
            None => (flag, None),
        };
        let Some((arg, dashes)) = find(command, name) else {
            let is_end = text == "--";
            spelled.push(word);
            if is_end {
                break;
            }
            continue;
        };
        let flag = OsString::from(format!("{dashes}{flag}"));
        let follows = value.is_none() && arg.get_action().takes_values();
        let next = if follows { line.next() } else { None };
        let value = value.as_ref().or(next.as_ref());
        if value.is_some_and(|value| value.is_empty()) && is_none_if_empty(arg) {
            continue;
        }
        spelled.push(flag);
        spelled.extend(next);
    }
    spelled.extend(line);
    spelled
}

/// Whether flags may follow the name of a container.
fn are_ours_behind_a_name(command: &Command) -> bool {
    let mut names = command.get_positionals();
    !command.has_subcommands() && names.all(|name| !name.is_trailing_var_arg_set())
}

/// The flag of that name, and the dashes that it has.
fn find<'a>(command: &'a Command, name: &str) -> Option<(&'a Arg, &'static str)> {
    let mut letters = name.chars();
    let letter = letters.next().filter(|_| letters.next().is_none());
    command.get_arguments().find_map(|arg| {
        if arg.get_long() == Some(name) {
            return Some((arg, "--"));
        }
        let is_short = letter.is_some() && arg.get_short() == letter;
        is_short.then_some((arg, "-"))
    })
}

/// Of a list each entry counts, and a number or a choice is never empty.
fn is_none_if_empty(arg: &Arg) -> bool {
    let value = arg.get_value_parser().type_id();
    let is_text = value == TypeId::of::<String>() || value == TypeId::of::<PathBuf>();
    matches!(arg.get_action(), ArgAction::Set) && is_text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::misuse::built;

    #[test]
    fn flags_are_spelled_with_one_dash_or_two_up_to_the_words_of_a_program() {
        for (line, expected) in [
            ("-root /r list", "--root /r list"),
            ("--root -root list", "--root -root list"),
            ("-log-format=json list", "--log-format=json list"),
            ("delete -force c1", "delete --force c1"),
            ("delete c1 --f=false", "delete c1 -f=false"),
            ("kill c1 -all -- -all", "kill c1 --all -- -all"),
            ("h -help", "h --help"),
            ("-bogus -debug list", "-bogus --debug list"),
            ("nonesuch -debug", "nonesuch -debug"),
            ("update -resources - c1", "update --resources - c1"),
            ("update c1 -cpu-quota -1", "update c1 --cpu-quota -1"),
            (
                "exec -tty -env -cwd --e=A c1 sh -tty",
                "exec --tty --env -cwd -e=A c1 sh -tty",
            ),
            ("exec -- c1 -tty", "exec -- c1 -tty"),
            ("ps -format json c1 -format", "ps --format json c1 -format"),
            ("--log= --root", "--root"),
        ] {
            let words = |line: &str| Vec::from_iter(line.split(' ').map(OsString::from));
            let line = [vec!["bulkhead".into()], words(line)].concat();
            let spelled = spelled(line, &built());
            assert_eq!(&spelled[1..], words(expected), "{expected}");
        }
    }

    #[test]
    fn an_empty_path_or_text_is_none() {
        for (line, expected) in [
            (&["--log", "", "list"][..], &["list"][..]),
            (&["create", "-pid-file=", "c1"], &["create", "c1"]),
            (&["exec", "--user", "", "c1", ""], &["exec", "c1", ""]),
            (&["exec", "-e", "", "c1"], &["exec", "-e", "", "c1"]),
            (
                &["run", "--preserve-fds", "", "c1"],
                &["run", "--preserve-fds", "", "c1"],
            ),
        ] {
            let line = ["bulkhead"].iter().chain(line).map(OsString::from);
            assert_eq!(&spelled(line, &built())[1..], expected);
        }
    }
}

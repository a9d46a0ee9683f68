//! Command lines that run nothing: help, versions and mistakes. Exit codes and streams are runc's.

#![allow(clippy::unwrap_used)] // a failure of a test is a panic

use std::path::Path;
use std::process::{Command, Stdio};

/// What is written to: standard output, standard error.
type Streams = (bool, bool);

const HELP: (i32, Streams) = (0, (true, false));
const USAGE: (i32, Streams) = (1, (true, true));
const ERROR: (i32, Streams) = (1, (false, true));
const UNKNOWN_COMMAND: (i32, Streams) = (3, (false, true));
const NOT_EXECUTED: (i32, Streams) = (255, (false, true));

const LINES: [(&[&str], (i32, Streams)); 59] = [
    (&[], HELP),
    (&["--"], HELP),
    (&["--debug"], HELP),
    (&["--debug=true"], HELP),
    (&["help"], HELP),
    (&["h"], HELP),
    (&["help", "create"], HELP),
    (&["h", "create"], HELP),
    (&["help", "create", "start"], HELP),
    (&["help", "--help"], HELP),
    (&["-h"], HELP),
    (&["--help"], HELP),
    (&["--help", "create"], HELP),
    (&["--help", "nonesuch"], HELP),
    (&["create", "-h"], HELP),
    (&["create", "--help"], HELP),
    (&["create", "c1", "--help"], HELP),
    (&["exec", "--help"], HELP),
    (&["kill", "--all=true", "--help"], HELP),
    (&["-v"], HELP),
    (&["--version"], HELP),
    (&["--version", "create"], HELP),
    (&["--version", "nonesuch"], HELP),
    (&["nonesuch"], UNKNOWN_COMMAND),
    (&["nonesuch", "--help"], UNKNOWN_COMMAND),
    (&["--debug", "nonesuch"], UNKNOWN_COMMAND),
    (&["--debug=true", "nonesuch"], UNKNOWN_COMMAND),
    (&["help", "nonesuch"], UNKNOWN_COMMAND),
    (&["help", "--bogus"], USAGE),
    (&["--bogus"], USAGE),
    (&["--bogus", "create"], USAGE),
    (&["create", "--bogus"], USAGE),
    (&["--root"], USAGE),
    (&["create", "--bundle"], USAGE),
    (&["create"], USAGE),
    (&["create", "c1", "c2"], USAGE),
    (&["run"], USAGE),
    (&["run", "c1", "c2"], USAGE),
    (&["start"], USAGE),
    (&["state", "c1", "c2"], USAGE),
    (&["kill"], USAGE),
    (&["kill", "c1", "TERM", "c2"], USAGE),
    (&["delete", "c1", "c2"], USAGE),
    (&["exec"], USAGE),
    (&["list", "c1"], USAGE),
    (&["list", "--quiet=maybe"], USAGE),
    (&["ps"], USAGE),
    (&["pause"], USAGE),
    (&["resume", "c1", "c2"], USAGE),
    (&["update", "--pids-limit", "few", "c1"], USAGE),
    (&["update"], USAGE),
    (&["events", "--interval", "soon", "c1"], USAGE),
    (&["spec", "c1"], USAGE),
    (&["features", "c1"], USAGE),
    (&["list", "--format", "xml"], ERROR),
    (&["--log-format", "xml", "list"], ERROR),
    (&["kill", "c1", "0"], ERROR),
    (&["exec", "c1"], NOT_EXECUTED),
    (&["exec", "c1", "ls", "--help"], NOT_EXECUTED),
];

/// What a runtime with no container answers.
fn answer(runtime: &Path, line: &[&str]) -> (i32, Streams) {
    let root = tempfile::tempdir().unwrap();
    let mut command = Command::new(runtime);
    // Its own flag comes first, which is as good as none.
    command.arg("--root").arg(root.path()).args(line);
    let output = command.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", runtime.display()));
    let written = (!output.stdout.is_empty(), !output.stderr.is_empty());
    (output.status.code().unwrap(), written)
}

#[test]
fn exit_codes_and_streams_are_what_runc_is_known_for() {
    for (line, expected) in LINES {
        let answered = answer(Path::new(env!("CARGO_BIN_EXE_bulkhead")), line);
        assert_eq!(answered, expected, "{line:?}");
    }
}

#[test]
fn runc_does_what_it_is_known_for() {
    for (line, expected) in LINES {
        let answered = answer(Path::new("runc"), line);
        assert_eq!(answered, expected, "{line:?}");
    }
}

#[test]
fn help_goes_to_standard_output_and_what_is_wrong_to_standard_error() {
    for (line, help, error) in [
        (&["h", "kill"][..], "Usage: bulkhead kill ", ""),
        (&[], "Usage: bulkhead [OPTIONS] <COMMAND>", ""),
        (
            &["--debug=true", "kill"],
            "Usage: bulkhead kill ",
            "error: the following required arguments were not provided:\n  <ID>\n",
        ),
        (
            &["--bogus", "kill"],
            "Usage: bulkhead [OPTIONS] <COMMAND>",
            "error: unexpected argument '--bogus' found\n",
        ),
        (
            &["help", "--bogus"],
            "Usage: bulkhead help ",
            "error: unexpected argument '--bogus' found\n",
        ),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
            .args(line)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(said.contains(help), "{line:?}: {said}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.starts_with(error), "{line:?}: {said}");
        assert!(!said.contains("Usage"), "{line:?}: {said}");
    }
}

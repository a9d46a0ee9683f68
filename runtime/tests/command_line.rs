//! Command lines that run nothing: help, versions and mistakes. Exit codes and streams are runc's.

#![allow(clippy::unwrap_used)] // a failure of a test is a panic

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

/// What is written to: standard output, standard error.
type Streams = (bool, bool);

const HELP: (i32, Streams) = (0, (true, false));
const USAGE: (i32, Streams) = (1, (true, true));
const ERROR: (i32, Streams) = (1, (false, true));
const UNKNOWN_COMMAND: (i32, Streams) = (3, (false, true));
const NOT_EXECUTED: (i32, Streams) = (255, (false, true));
const LISTED: (i32, Streams) = (0, (true, false));
const SILENT: (i32, Streams) = (0, (false, false));

const LINES: [(&[&str], (i32, Streams)); 76] = [
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
    (&["--root", "nowhere", "--root", ".", "list", "-q"], SILENT),
    (&["--systemd-cgroup", "--systemd-cgroup", "list"], LISTED),
    (&["list", "-f", "table", "-f", "json"], LISTED),
    (&["delete", "-f", "-f", "c1"], SILENT),
    (&["delete", "-f", "-f=false", "c1"], ERROR),
    (&["-root", "nowhere", "list", "-q"], SILENT),
    (&["-log-format=json", "list", "-format=json"], LISTED),
    (&["delete", "-force", "c1"], SILENT),
    (&["delete", "c1", "-force"], SILENT),
    (&["delete", "--f", "c1"], SILENT),
    (&["-help"], HELP),
    (&["create", "-help"], HELP),
    (&["-version"], HELP),
    (&["-bogus"], USAGE),
    (&["--log", "", "list"], LISTED),
    (&["--log=", "list"], LISTED),
    (&["exec", "--pid-file", "", "c1", "ls"], NOT_EXECUTED),
];

/// What a runtime with no container answers.
fn answer(runtime: &Path, line: &[&str]) -> (i32, Streams) {
    let root = tempfile::tempdir().unwrap();
    let mut command = Command::new(runtime);
    // Its own flag comes first, which is as good as none.
    command.arg("--root").arg(root.path()).args(line);
    command.current_dir(root.path());
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

#[test]
fn the_version_is_told_in_the_lines_that_engines_look_for() {
    let output = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .arg("--version")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let expected = format!(
        "bulkhead version {}\nspec: 1.2.1\n",
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(said, expected);
}

/// A bundle with a capability that nobody knows; what `change` does to it decides how `create` fails. Returns what that says on
/// standard error, and in its log.
fn create(flags: &[&str], change: impl FnOnce(&mut Value)) -> (String, String) {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = json!({
        "ociVersion": "1.0.2",
        "process": {"args": ["true"], "cwd": "/", "capabilities": {"bounding": ["CAP_NOT_YET"]}},
        "root": {"path": "."},
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "network"}, {"type": "ipc"}]},
    });
    change(&mut spec);
    fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
    fs::write(
        dir.path().join("config.toml"),
        "server = \"/nonexistent\"\n",
    )
    .unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .args(["--config", "config.toml", "--root", "root"])
        .args(flags)
        .args(["create", "c1"])
        .env("NOTIFY_SOCKET", "/run/systemd/notify")
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let log = fs::read_to_string(dir.path().join("log")).unwrap_or_default();
    (String::from_utf8(output.stderr).unwrap(), log)
}

fn with_relative_cwd(spec: &mut Value) {
    spec["process"]["cwd"] = json!("tmp");
}

const WARNING: &str = "ignoring unknown or unavailable capabilities: [CAP_NOT_YET]";
const ERROR_OF_CWD: &str =
    "bulkhead create failed: config.json: `process.cwd` is \"tmp\": give an absolute path";

#[test]
fn warnings_and_errors_are_told_on_standard_error_if_there_is_no_log() {
    let (stderr, log) = create(&[], with_relative_cwd);
    assert_eq!(
        stderr,
        format!("warning: {WARNING}\nerror: {ERROR_OF_CWD}\n")
    );
    assert_eq!(log, "");
    let (stderr, _) = create(&["--log-format", "json"], with_relative_cwd);
    assert_eq!(
        entries(&stderr),
        [("warning", WARNING), ("error", ERROR_OF_CWD)].map(owned)
    );
}

#[test]
fn warnings_go_to_the_log_alone_and_errors_to_both() {
    let flags = ["--log", "log", "--log-format", "json"];
    let (stderr, log) = create(&flags, with_relative_cwd);
    assert_eq!(stderr, format!("error: {ERROR_OF_CWD}\n"));
    assert_eq!(
        entries(&log),
        [("warning", WARNING), ("error", ERROR_OF_CWD)].map(owned)
    );
    let (stderr, log) = create(&flags[..2], with_relative_cwd);
    assert_eq!(stderr, format!("error: {ERROR_OF_CWD}\n"));
    let levels: Vec<_> = log.lines().map(|line| line.split(' ').nth(1)).collect();
    assert_eq!(levels, [Some("level=warning"), Some("level=error")]);
}

#[test]
fn a_socket_for_readiness_is_not_ignored_silently() {
    let (stderr, _) = create(&[], |_| {});
    let warnings: Vec<_> = stderr
        .matches("warning: NOTIFY_SOCKET is ignored")
        .collect();
    assert_eq!(warnings.len(), 1, "{stderr}");
}

#[test]
fn a_wrong_command_line_is_one_entry_of_the_log() {
    let said = |flags: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
            .args(flags)
            .args(["kill", "c1", "TERM", "more"])
            .output()
            .unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    let wrong = "unexpected argument 'more' found";
    assert_eq!(said(&[]), format!("error: {wrong}\n"));
    assert_eq!(
        entries(&said(&["--log-format=json"])),
        [owned(("error", wrong))]
    );
}

fn owned((level, message): (&str, &str)) -> (String, String) {
    (level.to_owned(), message.to_owned())
}

/// Levels and messages of a log's lines.
fn entries(log: &str) -> Vec<(String, String)> {
    let entry = |line| {
        let entry: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{log}"));
        let text = |name: &str| entry[name].as_str().unwrap().to_owned();
        (text("level"), text("msg"))
    };
    log.lines().map(entry).collect()
}

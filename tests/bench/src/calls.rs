//! The system calls of a start, and of an idle sandbox: what polls or sleeps shows here.

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;

use anyhow::{Context, ensure};
use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{bulkhead, run_command};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::idle::IdleSandbox;
use crate::table::print;
use crate::wakeups::{SETTLE, WATCH};

/// Prints what `strace -f -c` counts while a container starts and ends, and in an idle sandbox.
pub fn measure() -> anyhow::Result<()> {
    let summary = tempfile::NamedTempFile::new()?;
    let bundle = Bundle::busybox(&["true"]);
    let mut tracer = strace(&summary);
    tracer.arg(bulkhead());
    let status = run_command(tracer, &bundle)
        .stdin(Stdio::null())
        .status()
        .context("cannot run strace")?;
    ensure!(status.success(), "strace of a start ended with {status}");
    show(
        "System calls of `bulkhead run true`, client, server and VMM",
        &summary,
    )?;

    let sandbox = IdleSandbox::start()?;
    sleep(SETTLE);
    let mut tracer = strace(&summary);
    for pid in &sandbox.pids {
        tracer.args(["-p", &pid.to_string()]);
    }
    let mut tracer = tracer.spawn().context("cannot run strace")?;
    sleep(WATCH);
    kill(Pid::from_raw(tracer.id().cast_signed()), Signal::SIGINT)?;
    tracer.wait()?;
    let title = format!("System calls of an idle sandbox in {} s", WATCH.as_secs());
    show(&title, &summary)
}

fn strace(summary: &tempfile::NamedTempFile) -> Command {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-c", "-qq", "-o"]).arg(summary.path());
    strace
}

fn show(title: &str, summary: &tempfile::NamedTempFile) -> anyhow::Result<()> {
    let rows: Vec<_> = fs::read_to_string(summary.path())?
        .lines()
        .filter_map(row)
        .collect();
    print(title, &["call", "times", "errors"], &rows);
    Ok(())
}

/// The name, calls and errors of a line "% time, seconds, usecs/call, calls, errors, syscall".
fn row(line: &str) -> Option<Vec<String>> {
    let words: Vec<_> = line.split_whitespace().collect();
    let (calls, errors) = match words[..] {
        [_, _, _, calls, _] => (calls, "0"),
        [_, _, _, calls, errors, _] => (calls, errors),
        _ => return None,
    };
    calls.parse::<u64>().ok()?;
    let name = words.last()?;
    Some([name, calls, errors].map(str::to_owned).to_vec())
}

#[cfg(test)]
mod tests {
    use super::row;

    #[test]
    fn a_line_has_a_name_calls_and_maybe_errors() {
        let wanted = |words: [&str; 3]| Some(words.map(str::to_owned).to_vec());
        assert_eq!(
            row(" 25.00    0.000005           5         3         1 openat"),
            wanted(["openat", "3", "1"])
        );
        assert_eq!(
            row("  0.00    0.000000           0        14           read"),
            wanted(["read", "14", "0"])
        );
        assert_eq!(
            row("------ ----------- ----------- --------- --------- ----------------"),
            None
        );
        assert_eq!(
            row("% time     seconds  usecs/call     calls    errors syscall"),
            None
        );
    }
}

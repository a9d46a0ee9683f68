//! How Bulkhead waits: for events, never by the clock.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::bulkhead;
use bulkhead_e2e::container::{Container, reap_all, wrapped};
use bulkhead_e2e::leaks::Host;

/// Every system call by which a thread can wait for time to pass.
const CALLS: &str = "nanosleep,clock_nanosleep,select,pselect6,poll,ppoll,epoll_wait,epoll_pwait,epoll_pwait2,futex";

/// `bulkhead` with all that it starts under strace; each run writes a file into `logs`.
fn traced(logs: &Path) -> PathBuf {
    let script = format!(
        "exec strace -DD -f -qq --seccomp-bpf -e trace={CALLS} -o {}/$$.log {} \"$@\"",
        logs.display(),
        bulkhead().display()
    );
    wrapped(logs, "bulkhead", &script)
}

/// Whether a line of strace's shows a sleep, or a wait that ended because its time was over.
fn by_the_clock(line: &str) -> bool {
    if line.contains("nanosleep") || line.contains("ETIMEDOUT") {
        return true;
    }
    // "epoll_wait(3, [], 1024, 100) = 0", "poll([{fd=3, events=POLLIN}], 1, 100) = 0 (Timeout)": a timeout of zero does not wait.
    let Some((arguments, result)) = line.rsplit_once(") = ") else {
        return false;
    };
    let waits = ["poll", "select"].iter().any(|name| line.contains(name));
    let timeout = arguments
        .rsplit_once(']')
        .and_then(|(_, rest)| rest.split(", ").nth(2));
    waits && (result == "0" || result.starts_with("0 ")) && timeout != Some("0")
}

#[test]
fn nothing_sleeps_or_waits_until_a_time_is_over_from_create_to_delete() {
    let _unchanged = Host::unchanged();
    for waited in [
        "7 clock_nanosleep(CLOCK_REALTIME, 0, {tv_sec=1, tv_nsec=0}, NULL) = 0",
        "7 epoll_wait(3, [], 1024, 100) = 0",
        "7 <... epoll_wait resumed>[], 1024, 100) = 0",
        "7 poll([{fd=3, events=POLLIN}], 1, 20) = 0 (Timeout)",
        "7 futex(0x7f, FUTEX_WAIT_PRIVATE, 2, {tv_sec=0, tv_nsec=9}) = -1 ETIMEDOUT (Connection timed out)",
    ] {
        assert!(by_the_clock(waited), "{waited}");
    }
    let logs = tempfile::tempdir().unwrap();
    {
        let bundle = Bundle::shell("exec sleep 100000");
        let container = Container::running(traced(logs.path()), bundle);
        assert_eq!(container.shell("exit 7").code, 7);
        container.command_with(&["kill"], &["KILL"]).expect_code(0);
        assert_eq!(container.wait(), 137);
        container.command(&["delete"]).expect_code(0);
    }
    // The tracers too: they end when the last traced process has ended.
    reap_all();
    let mut lines = 0;
    for log in fs::read_dir(logs.path()).unwrap().flatten() {
        if log.path().extension().is_none() {
            continue;
        }
        for line in fs::read_to_string(log.path()).unwrap().lines() {
            lines += 1;
            assert!(!by_the_clock(line), "{}: {line}", log.path().display());
        }
    }
    assert!(lines > 100, "only {lines} calls were traced");
}

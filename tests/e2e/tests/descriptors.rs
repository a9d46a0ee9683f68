//! Descriptors beyond the standard streams: what they carry under runc they carry here.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{Ended, bulkhead, fresh_id, hand_over, runc, start, wait};
use bulkhead_e2e::container::{Container, wait_for};
use bulkhead_e2e::leaks::Host;
use nix::unistd::Pid;

/// Uses a pipe in each direction, a socket, a file and the null device.
const SCRIPT: &str = "cat <&3 >&4; cat <&5 | tr a-z A-Z >&5; cat <&6; cat <&7; \
                      test -e /proc/self/fd/8 && echo more; exit 6";

/// What came of a command: its output and exit code, what came out of the pipe, and what the socket answered.
type Outcome = (i32, String, String, String);

/// Runs a command whose process executes [`SCRIPT`] with descriptors 3 to 7.
fn exchange(mut command: Command) -> Outcome {
    let (inward, mut feed) = std::io::pipe().unwrap();
    let (mut drain, outward) = std::io::pipe().unwrap();
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let named = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(named.path(), "before, after\n").unwrap();
    let mut file = File::open(named.path()).unwrap();
    file.read_exact(&mut [0; 8]).unwrap();
    let null = File::open("/dev/null").unwrap();
    hand_over(
        &mut command,
        [
            inward.into(),
            outward.into(),
            socket.into(),
            file.into(),
            null.into(),
        ],
    );
    let child = start(command.stdin(Stdio::null()));
    drop(command);
    feed.write_all(b"through the pipes\n").unwrap();
    drop(feed);
    peer.write_all(b"question\n").unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    let mut piped = String::new();
    drain.read_to_string(&mut piped).unwrap();
    let mut answer = String::new();
    peer.read_to_string(&mut answer).unwrap();
    let Ended {
        code,
        stdout,
        stderr,
    } = wait(child);
    assert_eq!(stderr, "");
    (code, stdout, piped, answer)
}

fn expected(code: i32) -> Outcome {
    (
        code,
        "after\n".into(),
        "through the pipes\n".into(),
        "QUESTION\n".into(),
    )
}

/// `run` with flags.
fn run(runtime: PathBuf, bundle: &Bundle, flags: &[&str]) -> Command {
    bundle.write();
    let mut command = Command::new(runtime);
    command
        .arg("run")
        .args(flags)
        .arg("--bundle")
        .arg(bundle.path())
        .arg(fresh_id());
    command
}

#[test]
fn a_container_in_the_foreground_uses_its_callers_descriptors() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::shell(SCRIPT);
    for runtime in [runc(), bulkhead()] {
        let outcome = exchange(run(runtime, &bundle, &["--preserve-fds", "5"]));
        assert_eq!(outcome, expected(6));
    }
}

#[test]
fn an_executed_process_uses_its_callers_descriptors() {
    let _unchanged = Host::unchanged();
    for runtime in [runc(), bulkhead()] {
        let container = Container::running(runtime, Bundle::busybox(&["sleep", "1000"]));
        let process = ["sh", "-c", SCRIPT];
        let outcome = exchange(container.prepare(&["exec", "--preserve-fds", "5"], &process));
        assert_eq!(outcome, expected(6));
        let pid_file = container.files().join("exec-pid");
        let detached = [
            "exec",
            "--preserve-fds",
            "5",
            "--detach",
            "--pid-file",
            pid_file.to_str().unwrap(),
        ];
        assert_eq!(
            exchange(container.prepare(&detached, &process)),
            expected(0)
        );
        let pid = std::fs::read_to_string(&pid_file).unwrap();
        assert_eq!(wait_for(Pid::from_raw(pid.parse().unwrap())), 6);
        // runc's delete waits in vain for one that is this test's to wait for.
        container.command_with(&["kill"], &["KILL"]).expect_code(0);
        assert_eq!(container.wait(), 137);
    }
}

#[test]
fn what_a_service_manager_passes_comes_first_and_is_announced() {
    let _unchanged = Host::unchanged();
    let script = "echo $LISTEN_FDS $LISTEN_PID; cat <&3; cat <&4";
    let outputs = [runc(), bulkhead()].map(|runtime| {
        let bundle = Bundle::shell(script);
        bundle.write();
        // It knows the pid of its child, as this shell does.
        let mut command = Command::new("sh");
        command
            .args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", "sh"])
            .arg(runtime)
            .args(["run", "--preserve-fds", "1", "--bundle"])
            .arg(bundle.path())
            .arg(fresh_id());
        let (fifo, mut passed) = std::io::pipe().unwrap();
        let (pipe, mut preserved) = std::io::pipe().unwrap();
        hand_over(&mut command, [fifo.into(), pipe.into()]);
        passed.write_all(b"passed\n").unwrap();
        preserved.write_all(b"preserved\n").unwrap();
        drop((passed, preserved));
        let ended = wait(start(command.stdin(Stdio::null()))).expect_code(0);
        ended.stdout
    });
    assert_eq!(outputs, ["1 1\npassed\npreserved\n"; 2]);
}

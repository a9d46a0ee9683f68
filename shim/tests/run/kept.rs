//! What the guest's agent keeps for those who have asked: no longer than somebody still does.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::Instant;

use bulkhead_e2e::steps::EXECUTING;
use bulkhead_e2e::watch;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Running;
use crate::bed::{Bed, PATIENCE, finish, text};
use crate::faults::{CREATE, assert_told, running};

/// `bulkhead events` in the background, that tells of nothing but kills for want of memory.
fn events(bed: &Bed, output: &str) -> Running {
    events_and_figures(bed, output, "1h")
}

/// The same, with statistics.
fn events_and_figures(bed: &Bed, output: &str, interval: &str) -> Running {
    let mut command = bed.bulkhead();
    command.args(["events", "--interval", interval, "c1"]);
    command.stdout(File::create(bed.path(output)).unwrap());
    Running(Some(command.spawn().unwrap()))
}

/// A kill for want of memory.
fn oom(bed: &Bed) {
    let killed = bed.about(&["kill", "c1", "USR1"]);
    assert!(killed.status.success(), "{}", text(&killed.stderr));
}

#[test]
fn however_many_watch_for_ooms_the_guest_is_asked_once() {
    let bed = running("ooms");
    for number in 1..=3 {
        let watching = events(&bed, "events");
        let asked = || bed.asked("ooms asked") >= number;
        watch::until(&bed.path(""), &[], asked);
        drop(watching);
    }
    let watching = [events(&bed, "events"), events(&bed, "others")];
    for output in ["events", "others"] {
        watch::until(&bed.path(""), &[], || {
            oom(&bed);
            let said = fs::read_to_string(bed.path(output)).unwrap();
            said.contains(r#"{"id":"c1","type":"oom"}"#)
        });
    }
    assert_eq!(bed.asked("wait_oom by 2"), 0);
    drop(watching);
    assert!(bed.about(&["delete", "--force", "c1"]).status.success());
    bed.await_clean();
}

#[test]
fn ooms_are_told_though_the_container_stood_still_when_they_began_to_be_watched() {
    let bed = running("ooms");
    oom(&bed);
    for number in 1..=2 {
        done(&bed, &["pause", "c1"]);
        let name = format!("events{number}");
        let watching = events_and_figures(&bed, &name, "50ms");
        let said = |kind: &str| {
            let said = fs::read_to_string(bed.path(&name)).unwrap();
            let kind = format!(r#""type":"{kind}"}}"#);
            said.lines().filter(|line| line.ends_with(&kind)).count()
        };
        // It has asked for kills before it asks for figures, which are told of one that stands still too.
        watch::until(&bed.path(""), &[], || said("stats") > 0);
        assert_eq!(bed.asked("ooms asked"), number - 1);
        done(&bed, &["resume", "c1"]);
        watch::until(&bed.path(""), &[], || bed.asked("ooms asked") == number);
        assert_eq!(said("oom"), 0);
        oom(&bed);
        watch::until(&bed.path(""), &[], || said("oom") == 1);
        drop(watching);
    }
    done(&bed, &["delete", "--force", "c1"]);
    bed.await_clean();
}

#[track_caller]
fn done(bed: &Bed, words: &[&str]) {
    let output = bed.about(words);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[test]
fn a_process_that_was_executed_before_the_start_is_forgotten() {
    let bed = Bed::new(&["/bin/true"]);
    done(&bed, CREATE);
    done(&bed, &["exec", "c1", "/bin/true"]);
    assert_eq!(bed.asked("delete_process"), 1);
    done(&bed, &["exec", "--detach", "c1", "/bin/true"]);
    watch::until(&bed.path(""), &[], || bed.asked("delete_process") == 2);
    done(&bed, &["delete", "c1"]);
    bed.await_clean();
}

#[test]
fn a_process_that_has_ended_as_its_guest_was_paused_is_forgotten_when_that_goes_on() {
    let bed = running("");
    let mut command = bed.bulkhead();
    command.args(["exec", "c1", "/bin/sh", "-c", "read line"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let stdin = child.stdin.take();
    let exec = Running(Some(child));
    watch::until(&bed.path(""), &[], || bed.asked("exec_process") == 1);
    done(&bed, &["pause", "c1"]);
    drop(stdin);
    assert_eq!(exec.ended().status.code(), Some(1));
    assert_eq!(bed.asked("delete_process"), 0);
    done(&bed, &["resume", "c1"]);
    assert_eq!(bed.asked("delete_process"), 1);
    done(&bed, &["delete", "--force", "c1"]);
    bed.await_clean();
}

#[test]
fn a_process_whose_stand_in_was_killed_as_it_came_to_be_is_forgotten() {
    let bed = running("slow exec");
    let mut command = bed.bulkhead();
    command.args(["exec", "--detach", "c1", "/bin/sleep", "1000"]);
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    let client = child.id();
    let exec = Running(Some(child));
    watch::until(&bed.path(""), &[], || bed.asked("exec_process") == 1);
    let children = format!("/proc/{client}/task/{client}/children");
    let stand_in = fs::read_to_string(children).unwrap();
    let stand_in = Pid::from_raw(stand_in.trim().parse().unwrap());
    kill(stand_in, Signal::SIGKILL).unwrap();
    let output = exec.ended();
    assert_eq!(output.status.code(), Some(255));
    assert_told(&output, "exec");
    watch::until(&bed.path(""), &[], || bed.asked("delete_process") == 1);
    done(&bed, &["delete", "--force", "c1"]);
    bed.await_clean();
}

/// The processes of the host that stand for the container's.
fn pids(bed: &Bed) -> Vec<u32> {
    let output = bed.about(&["ps", "--format", "json", "c1"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_process_whose_client_was_killed_lives_on_and_is_forgotten_once_it_has_ended() {
    let bed = running("");
    let init = pids(&bed);
    let end = bed.path("end");
    let script = format!("while [ ! -e {end:?} ]; do sleep 0.1; done");
    let mut command = bed.bulkhead();
    command.args(["exec", "c1", "/bin/sh", "-c", &script]);
    let exec = Running(Some(command.spawn().unwrap()));
    watch::until(&bed.path(""), &[], || bed.asked("executed") == 2);
    drop(exec);
    let running = pids(&bed);
    assert_ne!(running, init);
    fs::write(&end, "").unwrap();
    watch::until(&bed.path(""), &[], || bed.asked("delete_process") == 1);
    assert_eq!(pids(&bed), init);
    done(&bed, &["delete", "--force", "c1"]);
    bed.await_clean();
}

/// A process that says so when it runs, in the foreground of a command that writes a pid file.
fn executing_with_pid_file(bed: &Bed) -> Running {
    let mut command = bed.bulkhead();
    let script = "trap 'exit 7' TERM; echo > \"$0\"; while :; do sleep 0.1; done";
    command.args(["exec", "--pid-file"]).arg(bed.path("pid"));
    command
        .args(["c1", "/bin/sh", "-c", script])
        .arg(bed.path("trapped"));
    let exec = Running(Some(command.spawn().unwrap()));
    watch::until(&bed.path(""), &[], || bed.path("trapped").exists());
    fs::remove_file(bed.path("trapped")).unwrap();
    exec
}

#[test]
fn the_pid_of_a_process_in_the_foreground_is_its_commands_and_signals_of_that_are_the_processs() {
    let bed = running("");
    let init = pids(&bed);
    let exec = executing_with_pid_file(&bed);
    let pid: u32 = fs::read_to_string(bed.path("pid"))
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(Some(pid), exec.0.as_ref().map(std::process::Child::id));
    assert!(pids(&bed).contains(&pid));
    exec.signal(Signal::SIGTERM);
    assert_eq!(exec.ended().status.code(), Some(7));
    let exec = executing_with_pid_file(&bed);
    exec.signal(Signal::SIGKILL);
    assert_eq!(exec.ended().status.signal(), Some(9));
    // It is over with the process too, and with nothing else.
    watch::until(&bed.path(""), &[], || bed.asked("delete_process") == 2);
    assert_eq!(pids(&bed), init);
    done(&bed, &["delete", "--force", "c1"]);
    bed.await_clean();
}

#[test]
fn a_process_whose_client_was_killed_on_its_way_is_forgotten() {
    let bed = running("");
    let init = pids(&bed);
    for step in EXECUTING {
        let mut exec = bed.bulkhead();
        exec.args(["exec", "c1", "/bin/true"]);
        let output = finish(exec.env("BULKHEAD_FAULT", step));
        assert_eq!(output.status.signal(), Some(9), "{step}");
        let start = Instant::now();
        while pids(&bed) != init {
            assert!(start.elapsed() < PATIENCE, "{step}");
        }
    }
    // The first was never executed.
    watch::until(&bed.path(""), &[], || bed.asked("delete_process") == 1);
    done(&bed, &["delete", "--force", "c1"]);
    bed.await_clean();
}

#[test]
fn a_process_whose_pid_can_not_be_written_is_ended() {
    let bed = running("");
    let init = pids(&bed);
    for detach in [&[][..], &["--detach"]] {
        let mut exec = bed.bulkhead();
        exec.args(["exec", "--pid-file"])
            .arg(bed.path("missing/pid"));
        let output = finish(exec.args(detach).args(["c1", "/bin/sleep", "1000"]));
        assert_eq!(output.status.code(), Some(255));
        assert_told(&output, "exec");
        let start = Instant::now();
        while pids(&bed) != init {
            assert!(start.elapsed() < PATIENCE, "{detach:?}");
        }
    }
    done(&bed, &["delete", "--force", "c1"]);
    bed.await_clean();
}

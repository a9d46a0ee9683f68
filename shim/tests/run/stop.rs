//! SIGTERM to the server, as a service manager sends it to all of a cgroup: the containers end as they like to.

use std::fs;

use bulkhead_e2e::{processes, watch};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::bed::{Bed, text};
use crate::{READY, recorded, start};

/// Describes a container whose program does `at_term` at a SIGTERM, and says in a file when it is ready for that.
fn describe(bed: &Bed, at_term: &str, poststart: &Value) {
    let ready = bed.path("ready");
    let script = format!("trap '{at_term}' TERM; echo > {ready:?}; while :; do sleep 0.1; done");
    // Tells how often it has run.
    let poststop = format!("echo ran >> {:?}", bed.path("poststop"));
    bed.spec(|spec| {
        spec["process"]["args"] = json!(["/bin/sh", "-c", script]);
        spec["hooks"] = json!({
            "poststart": poststart, "poststop": [{"path": "/bin/sh", "args": ["sh", "-c", poststop]}],
        });
    });
}

/// Creates it in the background; returns who stands for it.
fn create(bed: &Bed) -> Pid {
    let pid_file = bed.path("pid");
    let created = bed.about(&["create", "--pid-file", pid_file.to_str().unwrap(), "c1"]);
    assert!(created.status.success(), "{}", text(&created.stderr));
    Pid::from_raw(fs::read_to_string(pid_file).unwrap().parse().unwrap())
}

fn await_readiness(bed: &Bed) {
    watch::until(&bed.path(""), &[], || bed.path("ready").exists());
}

/// A container in the background whose program does `at_term` at a SIGTERM, and leaves that to no chance: it runs when this returns.
fn in_the_background(bed: &Bed, at_term: &str) -> Pid {
    describe(bed, at_term, &json!([]));
    let stand_in = create(bed);
    let started = bed.about(&["start", "c1"]);
    assert!(started.status.success(), "{}", text(&started.stderr));
    await_readiness(bed);
    stand_in
}

fn told(bed: &Bed, words: &[&str]) -> Value {
    serde_json::from_slice(&bed.about(words).stdout).unwrap()
}

#[test]
fn a_container_that_a_service_manager_stops_ends_as_it_likes_and_has_stopped_until_it_is_deleted() {
    let bed = Bed::new(&[]);
    let ended = bed.path("ended");
    let stand_in = in_the_background(&bed, &format!("sleep 0.3; echo > {ended:?}; exit 7"));
    let sandbox = bed.pids();
    let server = bed.pid_of("containerd-shim-bulkhead-v2");
    // As to a whole cgroup, and the server is the first to see it.
    for pid in [server, stand_in] {
        kill(pid, Signal::SIGTERM).unwrap();
    }
    processes::wait_for_end(&sandbox);
    assert!(ended.exists());
    let state = told(&bed, &["state", "c1"]);
    assert_eq!(
        (&state["status"], &state["pid"]),
        (&json!("stopped"), &json!(0))
    );
    assert_eq!(
        told(&bed, &["list", "--format", "json"])[0]["status"],
        "stopped"
    );
    // As under runc this is of the deletion.
    assert!(!bed.path("poststop").exists());
    let deleted = bed.about(&["delete", "c1"]);
    assert!(deleted.status.success(), "{}", text(&deleted.stderr));
    assert!(bed.path("poststop").exists());
    bed.await_clean();
}

#[test]
fn a_container_in_the_foreground_is_told_by_the_server_and_its_command_tells_the_code() {
    for flags in [&[][..], &["--keep"]] {
        let bed = Bed::new(&READY);
        let (run, _stdout) = start(&bed, flags);
        kill(bed.pid_of("containerd-shim-bulkhead-v2"), Signal::SIGTERM).unwrap();
        let output = run.ended();
        assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
        if !flags.is_empty() {
            processes::wait_for_end(&bed.pids());
            assert_eq!(recorded(&bed)["status"], "stopped");
            assert!(bed.about(&["delete", "c1"]).status.success());
        }
        bed.await_clean();
    }
}

#[test]
fn a_second_sigterm_to_the_server_ends_what_does_not_end_by_the_first() {
    let bed = Bed::new(&[]);
    let trapped = bed.path("trapped");
    let stand_in = in_the_background(&bed, &format!("echo > {trapped:?}"));
    let sandbox = bed.pids();
    let server = bed.pid_of("containerd-shim-bulkhead-v2");
    for pid in [server, stand_in] {
        kill(pid, Signal::SIGTERM).unwrap();
    }
    watch::until(&bed.path(""), &[], || trapped.exists());
    assert_eq!(told(&bed, &["state", "c1"])["status"], "running");
    kill(server, Signal::SIGTERM).unwrap();
    processes::wait_for_end(&sandbox);
    bed.await_clean();
    assert!(bed.path("poststop").exists());
}

#[test]
fn a_container_whose_program_has_not_been_started_does_not_keep_a_server_that_is_to_end() {
    let bed = Bed::new(&["/bin/true"]);
    let created = bed.about(&["create", "c1"]);
    assert!(created.status.success(), "{}", text(&created.stderr));
    let sandbox = bed.pids();
    kill(bed.pid_of("containerd-shim-bulkhead-v2"), Signal::SIGTERM).unwrap();
    processes::wait_for_end(&sandbox);
    assert_eq!(told(&bed, &["state", "c1"])["status"], "stopped");
    assert!(bed.about(&["delete", "c1"]).status.success());
    bed.await_clean();
}

#[test]
fn a_deletion_amid_the_end_of_a_stopped_container_runs_its_hooks_once() {
    let bed = Bed::new(&[]);
    // The server's end waits for this one.
    let slow = json!([{"path": "/bin/sleep", "args": ["sleep", "1"]}]);
    describe(&bed, "exit 7", &slow);
    let stand_in = create(&bed);
    let mut start = bed.bulkhead().args(["start", "c1"]).spawn().unwrap();
    await_readiness(&bed);
    let sandbox = bed.pids();
    for pid in [bed.pid_of("containerd-shim-bulkhead-v2"), stand_in] {
        kill(pid, Signal::SIGTERM).unwrap();
    }
    // As engines do as soon as the process that stands for the container has ended.
    processes::wait_for_end(&[stand_in.as_raw().unsigned_abs()]);
    let deleted = bed.about(&["delete", "c1"]);
    assert!(deleted.status.success(), "{}", text(&deleted.stderr));
    start.wait().unwrap();
    processes::wait_for_end(&sandbox);
    assert_eq!(fs::read_to_string(bed.path("poststop")).unwrap(), "ran\n");
    bed.await_clean();
}

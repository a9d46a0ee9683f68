//! Paused containers: what stands still, what is answered meanwhile, and what waits for the resume.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::process::Stdio;

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{bulkhead, runc};
use bulkhead_e2e::container::Container;
use bulkhead_e2e::leaks::Host;
use bulkhead_e2e::{processes, watch};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

#[test]
fn a_paused_container_stands_still_until_it_is_resumed() {
    let _unchanged = Host::unchanged();
    for runtime in [runc(), bulkhead()] {
        let bundle = Bundle::shell("trap 'echo >>/signals' USR2; while :; do echo >>/count; done");
        let length = |name: &str| fs::metadata(bundle.in_root(name)).map_or(0, |file| file.len());
        let root = bundle.in_root("");
        let container = Container::running(runtime, &bundle);
        watch::until(&root, &[], || length("count") > 0);
        container.command(&["pause"]).expect_code(0);
        assert_eq!(container.status(), "paused");
        // One that runs adds to it during every one of these commands.
        let count = length("count");
        let ended = container.exec(&["true"]);
        assert_eq!(ended.code, 255);
        assert!(ended.stderr.contains("paused"), "{}", ended.stderr);
        container.command(&["pause"]).expect_code(1);
        // A signal waits until the container goes on.
        container.command_with(&["kill"], &["USR2"]).expect_code(0);
        assert_eq!(container.status(), "paused");
        assert_eq!(length("count"), count, "it goes on");
        assert_eq!(length("signals"), 0, "the signal did not wait");
        container.command(&["resume"]).expect_code(0);
        container.command(&["resume"]).expect_code(1);
        assert_eq!(container.status(), "running");
        watch::until(&root, &[], || length("count") > count);
        watch::until(&root, &[], || length("signals") > 0);
        assert_eq!(length("signals"), 1);
    }
}

#[test]
fn what_is_asked_of_a_paused_container_is_done_when_it_is_resumed_or_told_at_once() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::idle();
    for runtime in [runc(), bulkhead()] {
        let container = Container::running(runtime, &bundle);
        container
            .shell("head -c 8m /dev/zero > /dev/shm/used")
            .expect_code(0);
        container.command(&["pause"]).expect_code(0);

        let figures = container.command(&["events", "--stats"]).expect_code(0);
        let event: Value = serde_json::from_str(&figures.stdout).unwrap();
        assert!(event["data"]["memory"]["usage"]["usage"].as_u64().unwrap() > 8 << 20);

        let echo = ["sh", "-c", "cat /sys/fs/cgroup/pids.max; exit 7"];
        let mut exec = container.prepare(&["exec", "--ignore-paused"], &echo);
        let exec = exec.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut exec = exec.spawn().unwrap();
        let waiting = processes::open(exec.id()).unwrap();
        let mut waiting = [PollFd::new(waiting.as_fd(), PollFlags::POLLIN)];
        let ended = poll(&mut waiting, PollTimeout::from(1000_u16)).unwrap();
        assert_eq!(ended, 0, "it did not wait for the resume");

        let update = ["update", "--pids-limit", "23"];
        container.command(&update).expect_code(0);
        container.command(&["resume"]).expect_code(0);
        let mut stdout = String::new();
        exec.stdout
            .take()
            .unwrap()
            .read_to_string(&mut stdout)
            .unwrap();
        assert_eq!(stdout, "23\n");
        assert_eq!(exec.wait().unwrap().code(), Some(7));
    }
}

#[test]
fn limits_given_during_a_pause_that_cannot_hold_are_told_at_the_resume() {
    let _unchanged = Host::unchanged();
    let container = Container::running(bulkhead(), Bundle::idle());
    container
        .shell("head -c 8m /dev/zero > /dev/shm/used")
        .expect_code(0);
    container.command(&["pause"]).expect_code(0);
    let resources = container.files().join("resources.json");
    let small = r#"{"memory": {"limit": 4194304, "checkBeforeUpdate": true}}"#;
    fs::write(&resources, small).unwrap();
    let update = ["update", "--resources", resources.to_str().unwrap()];
    container.command(&update).expect_code(0);
    let resumed = container.command(&["resume"]).expect_code(1);
    assert!(
        resumed.stderr.contains("goes on, but without the limits"),
        "{resumed:?}"
    );
    assert_eq!(container.status(), "running");
    container.exec(&["true"]).expect_code(0);
}

#[test]
fn an_exec_that_waits_for_a_resume_ends_with_its_container() {
    let _unchanged = Host::unchanged();
    let container = Container::running(bulkhead(), Bundle::idle());
    container.command(&["pause"]).expect_code(0);
    let mut exec = container.prepare(&["exec", "--ignore-paused"], &["true"]);
    let exec = exec.stdin(Stdio::null()).spawn().unwrap();
    container.command(&["delete", "--force"]).expect_code(0);
    assert_eq!(exec.wait_with_output().unwrap().status.code(), Some(255));
}

#[test]
fn sigkill_ends_a_paused_container() {
    let _unchanged = Host::unchanged();
    let container = Container::running(bulkhead(), Bundle::idle());
    container.command(&["pause"]).expect_code(0);
    container.command_with(&["kill"], &["KILL"]).expect_code(0);
    assert_eq!(container.wait(), 137);
    drop(container);
    let container = Container::running(bulkhead(), Bundle::idle());
    container.command(&["pause"]).expect_code(0);
    container.command(&["delete", "--force"]).expect_code(0);
}

//! The host's cgroup: the limits in it, beside runc's, and who is in it.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{bulkhead, runc};
use bulkhead_e2e::container::{Container, reap_all};
use bulkhead_e2e::leaks::Host;
use serde_json::{Value, json};

const CGROUP: &str = "/e2e-limits";

fn directory() -> PathBuf {
    Path::new("/sys/fs/cgroup").join(CGROUP.trim_start_matches('/'))
}

fn idle(resources: Value) -> Bundle {
    let mut bundle = Bundle::shell("exec sleep 100000");
    bundle.config["linux"]["cgroupsPath"] = json!(CGROUP);
    bundle.config["linux"]["resources"] = resources;
    bundle
}

/// What limits processors and block devices.
fn limits() -> BTreeMap<&'static str, Option<String>> {
    let files = [
        "cpu.weight",
        "cpu.max",
        "cpu.max.burst",
        "cpu.idle",
        "cpuset.cpus",
        "cpuset.mems",
        "io.weight",
        "io.bfq.weight",
        "io.max",
    ];
    files
        .map(|file| (file, fs::read_to_string(directory().join(file)).ok()))
        .into()
}

#[test]
fn limits_of_processors_and_block_devices_are_runcs() {
    let _unchanged = Host::unchanged();
    let life = |runtime: PathBuf| {
        let container = Container::running(
            runtime,
            idle(json!({
                "cpu": {"shares": 512, "quota": 50_000, "period": 50_000, "cpus": "0", "mems": "0"},
                "blockIO": {
                    "weight": 300, "leafWeight": 200,
                    "weightDevice": [{"major": 7, "minor": 0, "weight": 400, "leafWeight": 500}]
                },
                "memory": {"limit": 67_108_864}
            })),
        );
        let mut seen = vec![limits()];
        let mut flags = |flags: &[&str]| {
            let update = [&["update"], flags].concat();
            container.command(&update).expect_code(0);
            seen.push(limits());
        };
        flags(&["--cpu-share", "1024"]);
        // Together: what becomes of the other one has changed between runc's versions.
        flags(&["--cpu-quota", "30000", "--cpu-period", "50000"]);
        flags(&["--cpu-quota", "30000", "--cpu-period", "60000"]);
        flags(&["--cpu-quota=-1", "--cpu-period", "60000"]);
        flags(&["--cpuset-cpus", "0-0", "--blkio-weight", "700"]);
        seen
    };
    let (theirs, ours) = (life(runc()), life(bulkhead()));
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(theirs[0]["cpu.max"].as_deref(), Some("50000 50000\n"));
    assert_eq!(theirs[2]["cpu.max"].as_deref(), Some("30000 50000\n"));
    assert_ne!(theirs[0]["cpu.weight"], theirs[1]["cpu.weight"]);
}

#[test]
fn what_is_0_or_empty_says_nothing_as_under_runc() {
    let _unchanged = Host::unchanged();
    let nothing = json!({
        "cpu": {"shares": 0, "quota": 0, "period": 0, "cpus": "", "mems": "", "realtimeRuntime": 0, "realtimePeriod": 0},
        "memory": {"limit": 0, "reservation": 0, "swap": 0}, "blockIO": {"weight": 0}, "pids": {"limit": 0}
    });
    let life = |runtime: PathBuf| {
        let container = Container::running(runtime.clone(), idle(nothing.clone()));
        let mut seen = vec![limits()];
        drop(container);
        let container = Container::running(
            runtime,
            idle(json!({
                "cpu": {"shares": 512, "quota": 50_000, "period": 0}, "memory": {"limit": 67_108_864}
            })),
        );
        seen.push(limits());
        let docker = json!({
            "memory": {"limit": 67_108_864, "reservation": 0}, "cpu": {"shares": 0, "quota": 0, "period": 0}
        });
        for resources in [nothing.clone(), docker] {
            container.update(&resources).expect_code(0);
            seen.push(limits());
        }
        seen
    };
    let (theirs, ours) = (life(runc()), life(bulkhead()));
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(ours[0]["cpu.max"].as_deref(), Some("max 100000\n"));
    assert_eq!(ours[3]["cpu.max"].as_deref(), Some("50000 100000\n"));
}

#[test]
fn a_limit_that_the_host_does_not_take_is_told_and_the_container_lives_on() {
    let _unchanged = Host::unchanged();
    let container = Container::running(bulkhead(), idle(json!({})));
    let before = limits();
    let ended = container.command(&["update", "--cpuset-cpus", "20"]);
    assert_eq!(ended.code, 1);
    assert!(ended.stderr.contains("cpuset.cpus"), "{}", ended.stderr);
    assert_eq!(limits(), before);
    container.exec(&["true"]).expect_code(0);
}

#[test]
fn an_idle_container_gets_its_share_back() {
    let _unchanged = Host::unchanged();
    let idle = idle(json!({"cpu": {"idle": 1, "shares": 512, "quota": 50_000, "burst": 20_000}}));
    let container = Container::running(bulkhead(), idle);
    let idles = limits();
    assert_eq!(idles["cpu.idle"].as_deref(), Some("1\n"));
    assert_eq!(idles["cpu.max.burst"].as_deref(), Some("20000\n"));
    // A quota below the burst, which goes with it.
    container
        .update(&json!({"cpu": {"quota": 10_000, "burst": 0}}))
        .expect_code(0);
    assert_eq!(limits()["cpu.max"].as_deref(), Some("10000 100000\n"));
    assert_eq!(limits()["cpu.idle"].as_deref(), Some("1\n"));
    container
        .update(&json!({"cpu": {"idle": 0}}))
        .expect_code(0);
    assert_eq!(limits()["cpu.idle"].as_deref(), Some("0\n"));
}

#[test]
fn hooks_are_where_runcs_are_and_what_they_leave_outlives_the_container() {
    let _unchanged = Host::unchanged();
    let life = |runtime: PathBuf| {
        let mut bundle = idle(json!({"devices": [{"allow": false, "access": "rwm"}]}));
        let log = bundle.path().join("log");
        let hook = |kind: &str| {
            let log = log.display();
            let script = format!("echo {kind} $(cat /proc/self/cgroup) >> {log}");
            json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
        };
        let daemon = format!(
            "sleep 100000 > /dev/null 2>&1 & echo $! > {}.daemon",
            log.display()
        );
        bundle.config["hooks"] = json!({
            "prestart": hook("prestart"), "createRuntime": hook("createRuntime"),
            "createContainer": hook("createContainer"),
            "poststart": [{"path": "/bin/sh", "args": ["sh", "-c", daemon]}, hook("poststart")[0]],
            "poststop": hook("poststop"),
        });
        let container = Container::running(runtime, &bundle);
        container.command(&["delete", "--force"]).expect_code(0);
        drop(container);
        let daemon = fs::read_to_string(format!("{}.daemon", log.display())).unwrap();
        let lives = fs::read_to_string(format!("/proc/{}/stat", daemon.trim()))
            .is_ok_and(|stat| !stat.contains(") Z "));
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(daemon.trim().parse().unwrap()),
            nix::sys::signal::Signal::SIGKILL,
        );
        reap_all();
        let log = fs::read_to_string(&log).unwrap();
        let lines = log.lines().map(str::to_owned);
        let (of_container, others): (Vec<_>, Vec<_>) =
            lines.partition(|line| line.starts_with("createContainer"));
        (others, lives, of_container)
    };
    let (theirs, ours) = (life(runc()), life(bulkhead()));
    assert_eq!((&ours.0, ours.1), (&theirs.0, theirs.1));
    assert!(ours.1 && ours.0.len() == 4, "{ours:?}");
    assert!(!ours.0.iter().any(|line| line.contains(CGROUP)), "{ours:?}");
    // Under runc it sees the container's cgroup namespace.
    assert_eq!(ours.2, [format!("createContainer 0::{CGROUP}")]);
}

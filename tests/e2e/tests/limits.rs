//! Limits: in the guest, and in the host's cgroup beside runc's; who is in that, and what statistics tell.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{Ended, assert_same_as_runc, bulkhead, run, runc};
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

#[test]
fn limits_hold_in_the_guest_and_can_be_changed() {
    let _unchanged = Host::unchanged();
    for runtime in [runc(), bulkhead()] {
        let mut bundle = Bundle::idle();
        bundle.config["linux"]["resources"] = json!({
            "memory": {"limit": 67_108_864}, "pids": {"limit": 50}, "cpu": {"shares": 512, "quota": 50_000, "period": 100_000},
            "devices": [{"allow": false, "access": "rwm"}],
        });
        let container = Container::running(runtime.clone(), &bundle);
        let limits = || {
            let read = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight";
            container.shell(read).expect_code(0).stdout
        };
        assert_eq!(limits(), "67108864\n50\n50000 100000\n20\n");
        let update = [
            "update",
            "--memory",
            "33554432",
            "--pids-limit",
            "20",
            "--cpu-quota",
            "20000",
            "--cpu-share",
            "1024",
        ];
        container.command(&update).expect_code(0);
        assert_eq!(limits(), "33554432\n20\n20000 100000\n39\n");
        let mut update = container.prepare(&["update", "--resources", "-"], &[]);
        let mut update = update.stdin(Stdio::piped()).spawn().unwrap();
        update
            .stdin
            .take()
            .unwrap()
            .write_all(br#"{"pids": {"limit": 30}}"#)
            .unwrap();
        assert!(update.wait().unwrap().success());
        assert_eq!(limits(), "33554432\n30\n20000 100000\n39\n");
        if runtime == bulkhead() {
            let ended = container.command(&["update", "--memory", "9000000000"]);
            assert_eq!(ended.code, 1);
            assert!(ended.stderr.contains("do not fit"), "{}", ended.stderr);
        }
        // Last, since nothing more can be executed then.
        let ended = container.shell(
            "for n in $(seq 40); do sleep 1000 </dev/null >/dev/null 2>&1 & done; echo forty",
        );
        assert_ne!(ended.code, 0);
        assert_eq!(ended.stdout, "");
        assert!(ended.stderr.contains("can't fork"), "{}", ended.stderr);
    }
}

#[test]
fn a_quota_or_a_period_alone_leaves_the_other_as_it_was() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::idle();
    bundle.config["linux"]["resources"] = json!({"cpu": {"quota": 40_000, "period": 50_000}});
    for runtime in [runc(), bulkhead()] {
        let container = Container::running(runtime, &bundle);
        for (flags, expected) in [
            (&["--cpu-quota", "20000"][..], "20000 50000\n"),
            (&["--cpu-period", "100000"], "20000 100000\n"),
            (&["--cpu-quota", "-1"], "max 100000\n"),
            (&["--cpu-period", "50000"], "max 50000\n"),
            (
                &["--cpu-quota", "-1", "--cpu-period", "40000"],
                "max 40000\n",
            ),
            (&["--cpu-quota", "0", "--cpu-period", "0"], "max 40000\n"),
        ] {
            let update = [&["update"], flags].concat();
            container.command(&update).expect_code(0);
            let read = container.exec(&["cat", "/sys/fs/cgroup/cpu.max"]);
            assert_eq!(read.expect_code(0).stdout, expected, "{flags:?}");
        }
    }
}

/// The members of a JSON value and of the objects in it, by their paths, with what each holds: of numbers only that they are some.
fn members(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                members(value, &format!("{path}.{name}"), found);
            }
        }
        Value::Number(_) => drop(found.insert(format!("{path}: number"))),
        other => drop(found.insert(format!("{path}: {other}"))),
    }
}

#[test]
fn statistics_have_runcs_form_and_true_numbers() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::busybox(&["sleep", "1000"]);
    bundle.config["linux"]["resources"]["memory"] = json!({"limit": 67_108_864});
    let [theirs, ours] = [runc(), bulkhead()].map(|runtime| {
        let container = Container::running(runtime, &bundle);
        let ended = container.command(&["events", "--stats"]).expect_code(0);
        let event: Value = serde_json::from_str(&ended.stdout).unwrap();
        assert_eq!(event["type"], "stats");
        assert_eq!(event["id"], container.id.as_str());
        let data = &event["data"];
        assert_eq!(data["pids"]["current"], 1);
        assert_eq!(data["memory"]["usage"]["limit"], 67_108_864);
        assert!(data["memory"]["usage"]["usage"].as_u64().unwrap() > 0);
        assert!(data["cpu"]["usage"]["total"].as_u64().unwrap() > 0);
        let mut found = BTreeSet::new();
        members(data, "data", &mut found);
        found
    });
    // Which figures of memory.stat there are depends on the kernel and its configuration, and whether anything is cached on the file system.
    let of_runcs_form = |found: &BTreeSet<String>| -> BTreeSet<String> {
        let further = |name: &&String| {
            name.contains(".psi.")
                || name.contains(".raw.")
                || name.starts_with("data.memory.usage.max:")
                || name.starts_with("data.memory.cache:")
        };
        found
            .iter()
            .filter(|name| !further(name))
            .cloned()
            .collect()
    };
    assert_eq!(of_runcs_form(&ours), of_runcs_form(&theirs));
    let figure = "data.memory.raw.workingset_refault_anon: number".to_owned();
    assert!(theirs.contains(&figure) && ours.contains(&figure));
}

#[test]
fn a_process_killed_for_want_of_memory_is_an_event_and_the_guest_survives() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::idle();
    bundle.config["linux"]["resources"] = json!({"memory": {"limit": 33_554_432}});
    let container = Container::running(bulkhead(), &bundle);
    let mut events = container
        .prepare(&["events", "--interval", "1h"], &[])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(events.stdout.take().unwrap()).lines();
    // Whoever asks first, the event is not missed: it counts from before.
    let ended = container.shell("head -c 50m /dev/zero | tail -c 45m > /dev/null; echo $?");
    assert!(
        ended.stdout.contains("137") || ended.code == 137,
        "{ended:?}"
    );
    let event: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(
        (&event["type"], &event["id"]),
        (&json!("oom"), &json!(container.id))
    );
    assert_eq!(container.status(), "running");
    container.exec(&["true"]).expect_code(0);
    container.command_with(&["kill"], &["9"]).expect_code(0);
    assert_eq!(container.wait(), 137);
    assert!(events.wait().unwrap().success());
}

#[test]
fn a_container_whose_own_process_is_killed_for_want_of_memory_ends_as_by_sigkill() {
    let _unchanged = Host::unchanged();
    for runtime in [runc(), bulkhead()] {
        // It keeps what it reads until a line ends, which none does.
        let mut bundle = Bundle::busybox(&["tail", "/dev/zero"]);
        bundle.config["linux"]["resources"] = json!({"memory": {"limit": 33_554_432}});
        let container = Container::running(runtime, &bundle);
        assert_eq!(container.wait(), 137);
        assert_eq!(container.status(), "stopped");
        container.command(&["delete"]).expect_code(0);
    }
}

#[test]
fn the_hosts_cgroup_is_where_the_bundle_says_and_holds_the_sandbox() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::idle();
    bundle.config["linux"]["cgroupsPath"] = json!("/e2e-parent/the-container");
    bundle.config["process"]["oomScoreAdj"] = json!(321);
    bundle.config["linux"]["resources"] = json!({
        "memory": {"limit": 64 << 20}, "cpu": {"shares": 512, "quota": 50_000, "period": 100_000},
    });
    let cgroup = PathBuf::from("/sys/fs/cgroup/e2e-parent/the-container");
    let container = Container::running(bulkhead(), &bundle);
    let procs = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
    let mut programs: Vec<_> = procs
        .lines()
        .map(|pid| {
            let read = |name| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
            format!("{} {}", read("comm").trim(), read("oom_score_adj").trim())
        })
        .collect();
    // The kernel puts a thread of KVM's there too.
    programs.retain(|program| !program.starts_with("kvm-"));
    programs.sort();
    assert_eq!(
        programs,
        [
            "bulkhead-proxy 321",
            "bulkhead-vmm 321",
            "containerd-shim -998"
        ]
    );
    let used = container.shell("dd if=/dev/zero of=/dev/shm/used bs=1M count=24 2>&1");
    used.expect_code(0);
    let read = |name: &str| {
        let text = fs::read_to_string(cgroup.join(name)).unwrap();
        text.trim().to_owned()
    };
    let current: u64 = read("memory.current").parse().unwrap();
    assert!(
        current > 24 << 20,
        "the guest's memory is not counted: {current}"
    );
    // The container's, the guest's own, what is beside the guest, and the files that the guest may have cached.
    let memory = ((64 + 64 + 64 + 64) << 20).to_string();
    assert_eq!(read("memory.max"), memory);
    assert_eq!(read("cpu.max"), "50000 100000");
    assert_eq!(read("cpu.weight"), "20");
    container
        .command(&["update", "--memory", "32M", "--cpu-quota", "20000"])
        .expect_code(0);
    // The guest stays as large as it was made.
    assert_eq!(read("memory.max"), memory);
    assert_eq!(read("cpu.max"), "20000 100000");
    container.command(&["delete", "--force"]).expect_code(0);
    assert!(!cgroup.exists());
    drop(container);
    fs::remove_dir("/sys/fs/cgroup/e2e-parent").unwrap();
}

#[test]
fn a_populated_cgroup_is_refused() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::idle();
    bundle.config["linux"]["cgroupsPath"] = json!("/e2e-shared");
    let first = Container::create(bulkhead(), &bundle);
    let Err(Ended { code, stderr, .. }) = Container::try_create(bulkhead(), &bundle, &[]) else {
        panic!("a second container in the same cgroup");
    };
    assert_eq!(code, 1);
    assert!(stderr.contains("not empty"), "{stderr}");
    assert_eq!(first.status(), "created");
}

#[test]
fn a_container_that_may_divide_its_cgroup_does_not_lift_its_own_limits() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell(
        "cd /sys/fs/cgroup; echo max > pids.max; cat pids.max; mkdir below && echo max > below/cgroup.max.depth && echo divided; \
         grep -c ' /sys/fs/cgroup .*nsdelegate.*memory_recursiveprot' /proc/self/mounts",
    );
    bundle.with_own_cgroups();
    assert_same_as_runc(&bundle);
}

#[test]
fn a_container_without_a_cgroup_namespace_leaves_the_hierarchy_as_it_is() {
    let _unchanged = Host::unchanged();
    // Not beside runc, whose mount would change the host's.
    let mut bundle = Bundle::shell(
        "grep -c ' /sys/fs/cgroup .*nsdelegate.*memory_recursiveprot' /proc/self/mounts; cat /sys/fs/cgroup$(cut -d : -f 3 /proc/self/cgroup)/pids.max",
    );
    bundle.with_own_cgroups();
    let namespaces = bundle.config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "cgroup");
    let ended = run(&bundle).expect_code(0);
    assert_eq!(ended.stdout, "1\n50\n");
}

#[test]
fn processors_and_devices_of_the_host_may_be_limited_by_their_files_names() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell("cat /sys/fs/cgroup/pids.max; nproc");
    let mut files = json!({"cpuset.cpus": "0", "cpuset.mems": "0", "pids.max": "77"});
    // One that the guest has not; a host may have none at all.
    if let Some(Ok(device)) = fs::read_dir("/sys/block").unwrap().next() {
        let number = fs::read_to_string(device.path().join("dev")).unwrap();
        files["io.max"] = json!(format!("{} rbps=1048576", number.trim()));
    }
    bundle.config["linux"]["resources"]["unified"] = files;
    assert_same_as_runc(&bundle);
}

#[test]
fn a_guest_is_as_large_as_limits_or_annotations_say() {
    let _unchanged = Host::unchanged();
    // The guest's kernel keeps some of the memory for itself. Where the host has one processor, a guest has no more by any means: how they
    // are counted where it has more is shown by the unit tests (runtime/src/sizing.rs).
    let mebibytes = |change: &dyn Fn(&mut serde_json::Value)| -> u64 {
        let mut bundle = Bundle::shell("grep MemTotal /proc/meminfo; nproc");
        change(&mut bundle.config);
        let ended = run(&bundle).expect_code(0);
        let mut words = ended.stdout.split_whitespace();
        let kib: u64 = words.nth(1).unwrap().parse().unwrap();
        assert_eq!(words.nth(1), Some("1"), "{}", ended.stdout);
        kib >> 10
    };
    let one = |config: &mut serde_json::Value| {
        config["annotations"] = json!({"io.bulkhead.vcpus": "1", "io.bulkhead.memory_mib": "100"});
    };
    let limited = |config: &mut serde_json::Value| {
        config["linux"]["resources"] = json!({
            "memory": {"limit": 134_217_728}, "cpu": {"quota": 50_000, "period": 100_000}
        });
    };
    let annotated = mebibytes(&one);
    assert!((60..100).contains(&annotated), "{annotated}");
    let limit = mebibytes(&limited);
    assert!((140..192).contains(&limit), "{limit}");
}

#[test]
fn a_users_processes_are_not_limited_by_the_guests_memory() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell("grep -E 'processes|pending' /proc/self/limits | tr -s ' '");
    bundle.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let expected =
        "Max processes 65536 65536 processes \nMax pending signals 65536 65536 signals \n";
    assert_eq!(run(&bundle).expect_code(0).stdout, expected);
}

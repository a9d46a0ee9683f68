//! The host's cgroup where systemd makes it, beside runc's. Run by `tests/scripts/under-systemd`.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{Ended, bulkhead, runc};
use bulkhead_e2e::container::{Container, reap_all, wrapped};
use bulkhead_e2e::leaks::Host;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A runtime that is always told to let systemd make the cgroups.
fn with_systemd(folder: &TempDir, runtime: &Path) -> PathBuf {
    let name = runtime.file_name().unwrap().to_str().unwrap();
    let script = format!("exec {} --systemd-cgroup \"$@\"", runtime.display());
    wrapped(folder.path(), name, &script)
}

/// What systemd says of a unit.
fn properties(unit: &str) -> BTreeMap<String, String> {
    let names = "LoadState,ActiveState,Slice,ControlGroup,Delegate,CPUQuotaPerSecUSec,MemoryMax";
    let output = Command::new("systemctl")
        .args(["show", "--property", names, unit])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

fn directory(properties: &BTreeMap<String, String>) -> PathBuf {
    Path::new("/sys/fs/cgroup").join(properties["ControlGroup"].trim_start_matches('/'))
}

/// The programs in a cgroup, but for the kernel's.
fn programs(directory: &Path) -> Vec<String> {
    let procs = fs::read_to_string(directory.join("cgroup.procs")).unwrap();
    // A process beyond the namespace, such as a thread of KVM's, is shown as 0.
    let pids = procs.lines().filter(|pid| *pid != "0");
    let mut programs: Vec<_> = pids
        .map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap())
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.starts_with("kvm-"))
        .collect();
    programs.sort();
    programs
}

#[test]
fn systemd_makes_the_scope_that_the_bundle_names_and_forgets_it_with_the_container() {
    let _unchanged = Host::unchanged();
    let folder = tempfile::tempdir().unwrap();
    let life = |runtime: PathBuf| {
        let mut bundle = Bundle::idle();
        let linux = &mut bundle.config["linux"];
        linux["cgroupsPath"] = json!("system.slice:e2e:scoped");
        linux["resources"] = json!({
            "cpu": {"quota": 50_000, "period": 100_000}, "memory": {"limit": 67_108_864}
        });
        let container = Container::running(with_systemd(&folder, &runtime), bundle);
        let unit = properties("e2e-scoped.scope");
        let programs = programs(&directory(&unit));
        container
            .command_with(
                &["update", "--cpu-quota", "20000", "--cpu-period", "100000"],
                &[],
            )
            .expect_code(0);
        let updated = properties("e2e-scoped.scope")["CPUQuotaPerSecUSec"].clone();
        let limit: u64 = unit["MemoryMax"].parse().unwrap();
        container.command(&["delete", "--force"]).expect_code(0);
        drop(container);
        reap_all();
        assert!(!directory(&unit).exists());
        assert_eq!(properties("e2e-scoped.scope")["LoadState"], "not-found");
        let same = [
            "LoadState",
            "ActiveState",
            "Slice",
            "ControlGroup",
            "Delegate",
            "CPUQuotaPerSecUSec",
        ];
        let same = same.map(|name| unit[name].clone());
        (same, updated, limit, programs)
    };
    let (ours, theirs) = (life(bulkhead()), life(runc()));
    assert_eq!(ours.0, theirs.0);
    assert_eq!(ours.1, theirs.1);
    // The container's own limit is the guest's to keep: around it are the rest of the guest and the VMM.
    assert!(ours.2 > theirs.2 && ours.2 < 1 << 30, "{} bytes", ours.2);
    assert_eq!(
        ours.3,
        ["bulkhead-proxy", "bulkhead-vmm", "containerd-shim"]
    );
}

#[test]
fn annotations_give_the_scope_properties_as_under_runc() {
    let _unchanged = Host::unchanged();
    let folder = tempfile::tempdir().unwrap();
    let life = |runtime: PathBuf, value: &str| {
        let mut bundle = Bundle::idle();
        bundle.config["linux"]["cgroupsPath"] = json!("system.slice:e2e:properties");
        bundle.config["annotations"] = json!({
            "org.systemd.property.KillSignal": value,
            "org.systemd.property.TimeoutStopUSec": "uint64 12000000",
            "org.systemd.property.RuntimeMaxSec": "86400",
            "org.systemd.property.CollectMode": "'inactive-or-failed'",
            "org.systemd.property.After": "['basic.target']",
        });
        let container = Container::try_create(with_systemd(&folder, &runtime), bundle, &[])?;
        let names = "KillSignal,TimeoutStopUSec,RuntimeMaxUSec,CollectMode,After";
        let shown = Command::new("systemctl")
            .args(["show", "--property", names, "e2e-properties.scope"])
            .output()
            .unwrap();
        drop(container);
        reap_all();
        Ok::<_, Ended>(String::from_utf8(shown.stdout).unwrap())
    };
    let ours = life(bulkhead(), "10").unwrap();
    for property in [
        "KillSignal=10",
        "TimeoutStopUSec=12s",
        "RuntimeMaxUSec=1d",
        "CollectMode=inactive-or-failed",
        "basic.target",
    ] {
        assert!(ours.contains(property), "{property}: {ours}");
    }
    assert_eq!(ours, life(runc(), "10").unwrap());
    for runtime in [bulkhead(), runc()] {
        let refused = life(runtime, "TERM").unwrap_err();
        let name = "org.systemd.property.KillSignal";
        assert!(refused.stderr.contains(name), "{refused:?}");
    }
}

#[test]
fn without_a_path_the_scope_has_the_containers_name() {
    let _unchanged = Host::unchanged();
    let folder = tempfile::tempdir().unwrap();
    let container = Container::running(with_systemd(&folder, &bulkhead()), Bundle::idle());
    let scope = format!("bulkhead-{}.scope", container.id);
    let unit = properties(&scope);
    assert_eq!(unit["ActiveState"], "active");
    assert_eq!(unit["Slice"], "system.slice");
    container.command_with(&["kill"], &["KILL"]).expect_code(0);
    assert_eq!(container.wait(), 137);
    container.command(&["delete"]).expect_code(0);
    drop(container);
    reap_all();
    assert_eq!(properties(&scope)["LoadState"], "not-found");
}

/// A container of a scope of that name, with a life of its own in `slice`.
fn scoped(slice: &str, name: &str, resources: Value) -> Bundle {
    let mut bundle = Bundle::idle();
    bundle.config["linux"]["cgroupsPath"] = json!(format!("{slice}:e2e:{name}"));
    bundle.config["linux"]["resources"] = resources;
    bundle
}

/// What limits processors and block devices.
fn limits(directory: &Path) -> BTreeMap<&'static str, Option<String>> {
    let files = [
        "cpu.weight",
        "cpu.max",
        "cpu.max.burst",
        "cpu.idle",
        "cpuset.cpus",
        "cpuset.mems",
        "io.weight",
        "io.bfq.weight",
    ];
    files
        .map(|file| (file, fs::read_to_string(directory.join(file)).ok()))
        .into()
}

fn reload() {
    let status = Command::new("systemctl").arg("daemon-reload").status();
    assert!(status.unwrap().success());
}

#[test]
fn limits_are_runcs_and_systemd_keeps_to_them() {
    let _unchanged = Host::unchanged();
    let folder = tempfile::tempdir().unwrap();
    let life = |runtime: PathBuf| {
        let resources = json!({
            "cpu": {"shares": 512, "quota": 25_000, "period": 50_000, "cpus": "0", "mems": "0"},
            "blockIO": {
                "weight": 300, "leafWeight": 200,
                "weightDevice": [{"major": 7, "minor": 0, "weight": 400, "leafWeight": 500}]
            },
            "memory": {"limit": 67_108_864}
        });
        let bundle = scoped("system.slice", "limited", resources);
        let container = Container::running(with_systemd(&folder, &runtime), bundle);
        let directory = directory(&properties("e2e-limited.scope"));
        let memory = || fs::read_to_string(directory.join("memory.max")).unwrap();
        let set = memory();
        let mut seen = vec![limits(&directory)];
        let mut flags = |flags: &[&str]| {
            let update = [&["update"], flags].concat();
            container.command(&update).expect_code(0);
            seen.push(limits(&directory));
        };
        flags(&["--cpu-share", "1024"]);
        // Together: what becomes of the other one has changed between runc's versions.
        flags(&["--cpu-quota", "30000", "--cpu-period", "50000"]);
        flags(&["--cpu-quota", "30000", "--cpu-period", "60000"]);
        flags(&["--cpuset-cpus", "0-0", "--blkio-weight", "700"]);
        container
            .update(&json!({"cpu": {"quota": 50_000, "period": 0}}))
            .expect_code(0);
        container
            .update(&json!({"cpu": {"quota": 50_000, "period": 100_000}}))
            .expect_code(0);
        container
            .update(&json!({
                "memory": {"limit": 67_108_864}, "cpu": {"shares": 0, "quota": 0, "period": 0, "cpus": "", "mems": ""}
            }))
            .expect_code(0);
        seen.push(limits(&directory));
        reload();
        assert_eq!(memory(), set);
        let reloaded = limits(&directory);
        (seen, reloaded)
    };
    let (theirs, ours) = (life(runc()), life(bulkhead()));
    for (ours, theirs) in ours.0.iter().zip(&theirs.0) {
        // A weight of block I/O runc does not tell systemd, which takes it back when it is told of something else.
        let [ours, theirs] = [ours, theirs].map(|limits| {
            let mut limits = limits.clone();
            limits.remove("io.weight");
            limits
        });
        assert_eq!(ours, theirs);
    }
    assert_eq!(Some(&ours.1), ours.0.last());
    assert_eq!(ours.0[0]["cpu.max"].as_deref(), Some("25000 50000\n"));
    assert_eq!(ours.0[2]["cpu.max"].as_deref(), Some("30000 50000\n"));
}

#[test]
fn what_systemd_has_no_property_for_holds_too() {
    let _unchanged = Host::unchanged();
    let folder = tempfile::tempdir().unwrap();
    let resources = json!({
        "cpu": {"idle": 1, "quota": 12_345, "period": 100_000},
        "unified": {"cpu.max.burst": "5000"}
    });
    let bundle = scoped("system.slice", "unified", resources);
    let container = Container::running(with_systemd(&folder, &bulkhead()), bundle);
    let directory = directory(&properties("e2e-unified.scope"));
    let read = |file: &str| fs::read_to_string(directory.join(file)).unwrap();
    let files = || ["cpu.max", "cpu.max.burst", "cpu.idle"].map(read);
    let expected = ["12345 100000\n", "5000\n", "1\n"];
    assert_eq!(files(), expected);
    // systemd, which counts in hundredths of a processor, sets all of a kind when one changes.
    container
        .update(&json!({"cpu": {"mems": "0"}, "blockIO": {"weight": 300}}))
        .expect_code(0);
    assert_eq!(files(), expected);
    reload();
    assert_eq!(files(), ["13000 100000\n", "5000\n", "1\n"]);
    container
        .update(&json!({"cpu": {"idle": 0, "shares": 512}}))
        .expect_code(0);
    assert_eq!(read("cpu.idle"), "0\n");
    assert_eq!(read("cpu.weight"), "20\n");
}

#[test]
fn a_limit_that_the_host_does_not_take_is_told_and_the_container_lives_on() {
    let _unchanged = Host::unchanged();
    let folder = tempfile::tempdir().unwrap();
    let bundle = scoped("system.slice", "refused", json!({}));
    let container = Container::running(with_systemd(&folder, &bulkhead()), bundle);
    let ended = container.command(&["update", "--cpuset-cpus", "20"]);
    assert_eq!(ended.code, 1);
    assert!(ended.stderr.contains("cpuset.cpus"), "{}", ended.stderr);
    container.exec(&["true"]).expect_code(0);
}

#[test]
fn the_unit_of_another_container_is_refused_and_stays() {
    let _unchanged = Host::unchanged();
    let folder = tempfile::tempdir().unwrap();
    let runtime = with_systemd(&folder, &bulkhead());
    let first = Container::running(runtime.clone(), scoped("system.slice", "one", json!({})));
    // Units have their names to themselves, whatever slice they are in.
    for slice in ["system.slice", "e2e.slice"] {
        let bundle = scoped(slice, "one", json!({}));
        let Err(Ended { code, stderr, .. }) = Container::try_create(runtime.clone(), &bundle, &[])
        else {
            panic!("a second container of the same unit");
        };
        assert_eq!(code, 1);
        assert!(stderr.contains("linux.cgroupsPath"), "{stderr}");
        assert_eq!(properties("e2e-one.scope")["ActiveState"], "active");
        assert_eq!(first.status(), "running");
        first.exec(&["true"]).expect_code(0);
    }
}

#[test]
fn who_has_killed_the_server_deletes_its_scope_too() {
    let _unchanged = Host::unchanged();
    let folder = tempfile::tempdir().unwrap();
    let bundle = scoped("e2e-sub.slice", "killed", json!({}));
    let container = Container::running(with_systemd(&folder, &bulkhead()), bundle);
    let unit = properties("e2e-killed.scope");
    assert_eq!(unit["Slice"], "e2e-sub.slice");
    let directory = directory(&unit);
    // A daemon of somebody's that SIGTERM does not end, in a cgroup that somebody has made.
    fs::create_dir(directory.join("more")).unwrap();
    let mut daemon = Command::new("sh")
        .args(["-c", "trap '' TERM; exec sleep 100000"])
        .spawn()
        .unwrap();
    fs::write(directory.join("more/cgroup.procs"), daemon.id().to_string()).unwrap();
    fs::write(directory.join("cgroup.kill"), "1").unwrap();
    daemon.wait().unwrap();
    container.command(&["delete"]).expect_code(0);
    drop(container);
    reap_all();
    assert!(!directory.exists());
    assert_eq!(properties("e2e-killed.scope")["LoadState"], "not-found");
    let _ = Command::new("systemctl")
        .args(["stop", "e2e-sub.slice", "e2e.slice"])
        .status();
}

#[test]
fn a_connection_to_systemd_is_nobodys_but_the_servers_and_not_for_long() {
    let _unchanged = Host::unchanged();
    let folder = tempfile::tempdir().unwrap();
    let sockets = |pid: u32| {
        let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let links = entries.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
        links
            .filter(|link| link.to_string_lossy().starts_with("socket:"))
            .count()
    };
    let life = |runtime: PathBuf, mut bundle: Bundle| {
        let list = bundle.path().join("list");
        let script = format!("ls -l /proc/$$/fd > {}", list.display());
        bundle.config["hooks"] =
            json!({"poststart": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]});
        let container = Container::running(runtime, bundle);
        let own = fs::read_to_string(format!("/proc/{}/cgroup", container.pid)).unwrap();
        let own = Path::new("/sys/fs/cgroup").join(own.trim().trim_start_matches("0::/"));
        let find = |name: &str| {
            let procs = fs::read_to_string(own.join("cgroup.procs")).unwrap();
            let mut pids = procs.lines().filter_map(|pid| pid.parse::<u32>().ok());
            pids.find(|pid| {
                let comm = fs::read_to_string(format!("/proc/{pid}/comm"));
                comm.is_ok_and(|comm| comm.trim() == name)
            })
            .unwrap()
        };
        let (server, vmm) = (find("containerd-shim"), find("bulkhead-vmm"));
        let before = sockets(server);
        let updates = 8;
        for n in 0..updates {
            let shares = (100 + n).to_string();
            container
                .command(&["update", "--cpu-share", &shares])
                .expect_code(0);
        }
        // The client of the last one may not be forgotten yet.
        assert!(sockets(server) < before + updates);
        let list = fs::read_to_string(&list).unwrap();
        (sockets(vmm), list.matches("socket:").count())
    };
    let scoped = scoped("system.slice", "descriptors", json!({}));
    assert_eq!(
        life(with_systemd(&folder, &bulkhead()), scoped),
        life(bulkhead(), Bundle::idle())
    );
}

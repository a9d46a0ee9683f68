//! The host's cgroup where systemd makes it, beside runc's. Run by `tests/scripts/under-systemd`.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{bulkhead, runc};
use bulkhead_e2e::container::{Container, reap_all, wrapped};
use bulkhead_e2e::leaks::Host;
use serde_json::json;
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

//! What a container sees and what comes back from it; where runc defines it, runc runs the same bundle.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{
    assert_same_as_runc, bulkhead, finish, run, run_command, run_with_input, runc, start, wait,
};
use bulkhead_e2e::leaks::Host;
use bulkhead_e2e::processes;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

#[track_caller]
fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
}

/// Starts a bundle and returns once the container has printed its first line, `ready`.
fn start_until_ready(bundle: &Bundle) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = start(run_command(Command::new(bulkhead()), bundle).stdin(Stdio::null()));
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    if line != "ready\n" {
        let mut stderr = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut stderr)
            .unwrap();
        panic!("the container said {line:?} and not \"ready\"; stderr: {stderr}");
    }
    (child, stdout)
}

#[test]
fn output_and_exit_code_come_back() {
    let _unchanged = Host::unchanged();
    let ended = run(&Bundle::shell("echo to stdout; echo to stderr >&2; exit 7")).expect_code(7);
    assert_eq!(ended.stdout, "to stdout\n");
    assert_eq!(ended.stderr, "to stderr\n");
}

#[test]
fn the_process_is_pid_1_on_a_kernel_of_its_own() {
    let _unchanged = Host::unchanged();
    let ended = run(&Bundle::shell(
        "echo $$; uname -r; hostname; cat /proc/self/cgroup",
    ))
    .expect_code(0);
    let lines: Vec<_> = ended.stdout.lines().collect();
    let host_release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(lines[0], "1");
    assert_ne!(
        lines[1],
        host_release.trim(),
        "the container runs on the host's kernel"
    );
    assert_eq!(lines[2], "bulkhead");
    assert_eq!(
        lines[3], "0::/",
        "the cgroup namespace hides the guest's own tree"
    );
}

#[test]
fn what_runc_does_without_may_be_missing_in_a_config() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell("hostname; id; grep Seccomp: /proc/self/status");
    bundle.config.as_object_mut().unwrap().remove("hostname");
    bundle.config["linux"]["seccomp"] = json!({});
    let process = bundle.config["process"].as_object_mut().unwrap();
    process.remove("user");
    assert_same_as_runc(&bundle);
    bundle.config["hostname"] = json!("");
    assert_same_as_runc(&bundle);
    bundle.config["linux"]["sysctl"] = json!({"kernel.hostname": "by-sysctl"});
    assert_same_as_runc(&bundle);
}

#[test]
fn standard_input_arrives_and_its_end_is_seen() {
    let _unchanged = Host::unchanged();
    let ended = run_with_input(&Bundle::shell("cat; echo done"), b"one\ntwo\n").expect_code(0);
    assert_eq!(ended.stdout, "one\ntwo\ndone\n");
}

#[test]
fn thirty_two_mebibytes_pass_both_ways_whole_and_in_order() {
    let _unchanged = Host::unchanged();
    let block: Vec<u8> = (0..1 << 20)
        .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let bundle = Bundle::busybox(&["cat"]);
    let mut child = start(run_command(Command::new(bulkhead()), &bundle).stdin(Stdio::piped()));
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..32 {
                stdin.write_all(&block).unwrap();
            }
            drop(stdin);
        });
        let mut echoed = vec![0; block.len()];
        for round in 0..32 {
            stdout.read_exact(&mut echoed).unwrap();
            assert!(echoed == block, "block {round} differs");
        }
        assert_eq!(
            stdout.read(&mut echoed).unwrap(),
            0,
            "more came back than went in"
        );
    });
    wait(child).expect_code(0);
}

#[test]
fn output_that_nobody_reads_any_more_ends_the_writer() {
    let _unchanged = Host::unchanged();
    // A child of PID 1, since signals of its own making don't end the init of a pid namespace.
    let bundle = Bundle::shell("yes; exit $?");
    let mut child = start(run_command(Command::new(bulkhead()), &bundle).stdin(Stdio::null()));
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "y\n");
    drop(stdout);
    // SIGPIPE of the writer, as under runc.
    wait(child).expect_code(128 + 13);
}

#[test]
fn death_by_signal_n_is_exit_code_128_plus_n() {
    let _unchanged = Host::unchanged();
    // PID 1 of a pid namespace can't kill itself, so its child does and the shell passes the status on.
    assert_same_as_runc(&Bundle::shell("sh -c 'kill -9 $$'; echo $?"));
}

#[test]
fn sigterm_and_sigint_reach_the_process() {
    let _unchanged = Host::unchanged();
    for (sent, name) in [(Signal::SIGTERM, "TERM"), (Signal::SIGINT, "INT")] {
        let script =
            format!("trap 'echo got {name}; exit 3' {name}; echo ready; while :; do sleep 1; done");
        let (child, mut stdout) = start_until_ready(&Bundle::shell(&script));
        signal(&child, sent);
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, format!("got {name}\n"));
        wait(child).expect_code(3);
    }
}

#[test]
fn a_killed_client_leaves_nothing_behind() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::shell("echo ready; exec sleep 1000");
    let (mut child, _stdout) = start_until_ready(&bundle);
    let sandbox = processes::of_the_build_under_test();
    assert!(
        sandbox.len() >= 3,
        "client, server and VMM run: {sandbox:?}"
    );
    signal(&child, Signal::SIGKILL);
    child.wait().unwrap();
    processes::wait_for_end(&sandbox);
}

#[test]
fn a_killed_vmm_ends_the_run_with_one_sentence() {
    let unchanged = Host::unchanged();
    let bundle = Bundle::shell("echo ready; exec sleep 1000");
    let (child, _stdout) = start_until_ready(&bundle);
    let vmm = processes::named("bulkhead-vmm");
    assert_eq!(vmm.len(), 1);
    kill(Pid::from_raw(vmm[0].cast_signed()), Signal::SIGKILL).unwrap();
    let ended = wait(child);
    assert_ne!(ended.code, 0);
    assert_eq!(
        ended.stderr.trim().lines().count(),
        1,
        "stderr: {}",
        ended.stderr
    );
    unchanged.at_once("run");
}

#[test]
fn user_groups_umask_and_working_directory_are_those_of_the_config() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell(
        "id -u; id -g; grep Groups /proc/self/status; umask; pwd; touch /tmp/mine; stat -c '%u %g %a' /tmp/mine",
    );
    bundle.config["process"]["user"] =
        json!({"uid": 1000, "gid": 1000, "additionalGids": [7, 8], "umask": 0o027});
    bundle.config["process"]["cwd"] = json!("/tmp");
    assert_same_as_runc(&bundle);
    let made = fs::metadata(bundle.in_root("tmp/mine")).unwrap();
    assert_eq!(
        (made.uid(), made.gid()),
        (1000, 1000),
        "the host sees the container's owner"
    );
}

#[test]
fn a_missing_working_directory_is_made() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell("pwd");
    bundle.config["process"]["cwd"] = json!("/not/there/yet");
    assert_same_as_runc(&bundle);
}

#[test]
fn the_environment_is_exactly_that_of_the_config() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::busybox(&["env"]);
    bundle.config["process"]["env"] =
        json!(["PATH=/bin", "EMPTY=", "SPACED=a b", "HOME=/elsewhere"]);
    assert_same_as_runc(&bundle);
}

#[test]
fn home_comes_from_the_images_passwd_when_the_config_has_none() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell("echo $HOME");
    bundle.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    assert_same_as_runc(&bundle);
}

#[test]
fn capabilities_limits_and_no_new_privs_are_those_of_the_config() {
    let _unchanged = Host::unchanged();
    for (uid, no_new_privs) in [(0, true), (1000, false)] {
        let mut bundle =
            Bundle::shell("grep -E '^(Cap|NoNewPrivs)' /proc/self/status; cat /proc/self/limits");
        let process = &mut bundle.config["process"];
        process["user"] = json!({"uid": uid, "gid": 0});
        process["noNewPrivileges"] = json!(no_new_privs);
        process["capabilities"] = json!({
            "bounding": ["CAP_KILL", "CAP_CHOWN", "CAP_SYS_CHROOT"],
            "effective": ["CAP_KILL", "CAP_CHOWN"],
            "permitted": ["CAP_KILL", "CAP_CHOWN"],
            "inheritable": ["CAP_KILL"],
            "ambient": ["CAP_KILL"],
        });
        process["rlimits"] = json!([
            {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            {"type": "RLIMIT_NPROC", "soft": 50, "hard": 60},
        ]);
        bundle.config["process"]["args"][2] = json!(
            "grep -E '^(Cap|NoNewPrivs)' /proc/self/status; grep -E 'open files|core|Max processes' /proc/self/limits"
        );
        assert_same_as_runc(&bundle);
    }
}

#[test]
fn capabilities_that_nobody_knows_are_told_and_passed_over() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell("grep CapBnd /proc/self/status");
    let sets = &mut bundle.config["process"]["capabilities"];
    sets["bounding"] = json!(["CAP_NOT_YET", "CAP_KILL"]);
    sets["effective"] = json!(["CAP_NOT_YET"]);
    sets["permitted"] = json!([]);
    for runtime in [bulkhead(), runc()] {
        let ended = finish(run_command(Command::new(runtime), &bundle).stdin(Stdio::null()));
        let ended = ended.expect_code(0);
        assert_eq!(ended.stdout, "CapBnd:\t0000000000000020\n");
        let told = "ignoring unknown or unavailable capabilities: [CAP_NOT_YET]";
        assert_eq!(ended.stderr.matches(told).count(), 1, "{}", ended.stderr);
    }
}

#[test]
fn kernel_parameters_scheduling_and_scores_are_those_of_the_config() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell(
        "cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_forward /proc/self/oom_score_adj; uname -m",
    );
    bundle.config["linux"]["sysctl"] =
        json!({"kernel.msgmax": "12345", "net.ipv4.ip_forward": "1"});
    bundle.config["process"]["oomScoreAdj"] = json!(77);
    bundle.config["linux"]["personality"] = json!({"domain": "LINUX"});
    assert_same_as_runc(&bundle);

    // What runc 1.1 does not know yet.
    let mut bundle = Bundle::shell(
        "awk '{print \"policy\", $41, \"nice\", $19}' /proc/self/stat; ionice -p $$; uname -m",
    );
    bundle.config["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 5});
    bundle.config["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
    bundle.config["linux"]["personality"] = json!({"domain": "LINUX32"});
    let ended = run(&bundle).expect_code(0);
    for expected in ["policy 3 nice 5", "best-effort: prio 6", "i686"] {
        assert!(ended.stdout.contains(expected), "{}", ended.stdout);
    }
}

#[test]
fn the_guests_kernel_guards_itself_against_the_processor_as_the_hosts_does() {
    let _unchanged = Host::unchanged();
    // The first word: what is done in particular depends on what the kernels know of the processor.
    let mut bundle = Bundle::shell(
        "read word rest </sys/devices/system/cpu/vulnerabilities/spectre_v2; echo ${word%%[;:,]*}",
    );
    assert_same_as_runc(&bundle);
    for (argument, expected) in [
        ("mitigations=off", "Vulnerable\n"),
        ("mitigations=auto", "Mitigation\n"),
    ] {
        bundle.config["annotations"] = json!({"io.bulkhead.kernel_arguments": argument});
        assert_eq!(run(&bundle).expect_code(0).stdout, expected);
    }
}

#[test]
fn a_small_guest_has_the_kernel_limits_of_a_host() {
    let _unchanged = Host::unchanged();
    // More memory than the guest has may be reserved, if not used.
    assert_same_as_runc(&Bundle::shell(
        "dd if=/dev/null of=/dev/null bs=3G count=1 2>&1 | grep records; cat /proc/sys/vm/swappiness",
    ));
    let mut bundle = Bundle::shell(
        "ulimit -Hn; cd /proc/sys; cat kernel/threads-max kernel/pid_max fs/file-max fs/inotify/max_user_watches",
    );
    bundle.config["process"]["rlimits"] =
        json!([{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 2_000_000}]);
    let ended = run(&bundle).expect_code(0);
    let limits: Vec<u64> = ended
        .stdout
        .lines()
        .map(|line| line.parse().unwrap())
        .collect();
    assert_eq!(limits[0], 2_000_000);
    assert!(
        limits[1..].iter().all(|limit| *limit >= 131_072),
        "{limits:?}"
    );
}

#[test]
fn a_seccomp_profile_holds() {
    let _unchanged = Host::unchanged();
    for no_new_privs in [true, false] {
        let mut bundle = Bundle::shell(
            "grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status; mkdir /tmp/x 2>&1; chmod 700 /tmp 2>&1; echo $?; \
             (echo a child); sleep 0; rm -f /tmp/fifo; mknod /tmp/fifo p && echo made; mknod /tmp/null c 1 3 2>&1; true",
        );
        bundle.config["process"]["noNewPrivileges"] = json!(no_new_privs);
        let fifo = 0o010_000;
        bundle.config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                {"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
                {"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO"},
                {"names": ["mknod"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38,
                 "args": [{"index": 1, "value": 0o170_000, "valueTwo": 0o020_000, "op": "SCMP_CMP_MASKED_EQ"}]},
                {"names": ["mknodat"], "action": "SCMP_ACT_KILL",
                 "args": [{"index": 2, "value": fifo, "op": "SCMP_CMP_LT"}]}
            ]
        });
        assert_same_as_runc(&bundle);
    }
}

#[test]
fn a_user_namespace_is_as_under_runc() {
    let _unchanged = Host::unchanged();
    fn give(path: &Path) {
        std::os::unix::fs::lchown(path, Some(100_000), Some(100_000)).unwrap();
        if path.is_dir() && !path.is_symlink() {
            for entry in fs::read_dir(path).unwrap() {
                give(&entry.unwrap().path());
            }
        }
    }
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("shared"), "volume\n").unwrap();
    fs::set_permissions(volume.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut bundle = Bundle::shell(
        "cat /proc/self/uid_map /proc/self/gid_map; id -u; id -G; cat /volume/shared; touch /volume/x 2>&1; \
         touch /tmp/mine; stat -c '%u %g %n' /tmp/mine /dev/pts /dev/shm /volume/shared; stat -c '%t %T' /dev/null; \
         awk '$5 ~ \"^/(volume)?$\" {print $6}' /proc/self/mountinfo; \
         echo through > /dev/stdout; grep -E '^Cap' /proc/self/status; hostname; mount -t tmpfs x /tmp 2>&1; echo $?",
    );
    // runc's mapped root has to reach the root file system.
    fs::set_permissions(bundle.path(), fs::Permissions::from_mode(0o755)).unwrap();
    give(&bundle.in_root("/"));
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    bundle.config["linux"]["uidMappings"] = map.clone();
    bundle.config["linux"]["gidMappings"] = map;
    let namespaces = bundle.config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user"}));
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    // Not read-only: runc 1.1 fails where the source has flags that a user namespace can't change.
    mounts.push(json!({"destination": "/volume", "source": volume.path(), "options": ["rbind"]}));
    assert_same_as_runc(&bundle);
    let made = fs::metadata(bundle.in_root("tmp/mine")).unwrap();
    assert_eq!((made.uid(), made.gid()), (100_000, 100_000));
}

#[test]
fn devices_are_the_standard_ones() {
    let _unchanged = Host::unchanged();
    assert_same_as_runc(&Bundle::shell(
        "for d in null zero full random urandom tty; do stat -c '%n %t %T %a %F' /dev/$d; done; \
         for l in fd stdin stdout stderr ptmx; do echo $l $(readlink /dev/$l); done; \
         echo x > /dev/null; head -c 4 /dev/zero | wc -c; ls /dev | grep -v '^core$'",
    ));
}

#[test]
fn dev_stdout_can_be_opened() {
    let _unchanged = Host::unchanged();
    assert_same_as_runc(&Bundle::shell(
        "echo out > /dev/stdout; cat /dev/stdin < /etc/group",
    ));
}

#[test]
fn check_finds_this_machine_able() {
    let _unchanged = Host::unchanged();
    let ended = finish(Command::new(bulkhead()).arg("check")).expect_code(0);
    assert!(!ended.stdout.contains("FAIL"), "{}", ended.stdout);
    assert!(ended.stdout.contains("/dev/kvm"), "{}", ended.stdout);
}

#[test]
fn the_leak_checker_sees_what_is_left() {
    let unchanged = Host::unchanged();
    let at_once = |host: &Host| catch_unwind(AssertUnwindSafe(|| host.at_once("a step")));
    let at_the_end = |host: Host| catch_unwind(AssertUnwindSafe(|| drop(host)));

    let mut sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
    assert!(at_once(&unchanged).is_err());
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    unchanged.at_once("a process that has gone");

    let before = Host::unchanged();
    let folder = tempfile::tempdir().unwrap();
    unchanged.at_once("a file of the test's own");
    assert!(at_the_end(before).is_err());

    let tmpfs = || {
        let none: Option<&str> = None;
        mount(
            Some("t"),
            folder.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            none,
        )
        .unwrap();
    };
    tmpfs();
    assert!(at_once(&unchanged).is_err());
    // One more of the same kind in the same place.
    let with_one = Host::unchanged();
    tmpfs();
    assert!(at_once(&with_one).is_err());
    assert!(at_the_end(with_one).is_err());
    umount2(folder.path(), MntFlags::empty()).unwrap();
    umount2(folder.path(), MntFlags::empty()).unwrap();

    let templates = Path::new("/var/cache/bulkhead");
    fs::create_dir_all(templates).unwrap();
    let unfinished = templates.join("e2e.template.unfinished");
    fs::write(&unfinished, "").unwrap();
    assert!(at_once(&unchanged).is_err());
    fs::remove_file(unfinished).unwrap();
}

#[test]
fn two_containers_run_side_by_side() {
    let _unchanged = Host::unchanged();
    let first = Bundle::shell("echo ready; read line < /go 2>/dev/null; exec sleep 1000");
    let (child, _stdout) = start_until_ready(&first);
    let second = run(&Bundle::shell("echo second; exit 5")).expect_code(5);
    assert_eq!(second.stdout, "second\n");
    signal(&child, Signal::SIGKILL);
    let left = processes::of_the_build_under_test();
    wait(child);
    processes::wait_for_end(&left);
}

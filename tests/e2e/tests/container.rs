//! What a container sees and what comes back from it; where runc defines it, runc runs the same bundle.

#![allow(clippy::unwrap_used)]

use std::ffi::{CStr, CString, OsStr};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{
    bulkhead, finish, run, run_command, run_with_input, runc, start, wait,
};
use bulkhead_e2e::container::Container;
use bulkhead_e2e::leaks::Host;
use bulkhead_e2e::processes;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

/// Runs the bundle under runc and under Bulkhead; stdout and exit code must be the same.
#[track_caller]
fn assert_same_as_runc(bundle: &Bundle) {
    let theirs = finish(run_command(Command::new(runc()), bundle).stdin(Stdio::null()));
    let unchanged = Host::unchanged();
    let ours = run(bundle);
    assert_eq!(
        (ours.code, ours.stdout.as_str()),
        (theirs.code, theirs.stdout.as_str()),
        "bulkhead (left) and runc (right) differ; stderr of bulkhead: {}, of runc: {}",
        ours.stderr,
        theirs.stderr
    );
    unchanged.at_once("run");
}

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

#[test]
fn files_of_the_bundle_are_read_and_written_back() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::shell(
        "cat /given && echo from the guest > /made && mkdir /folder && ln -s made /folder/link && chmod 640 /made",
    );
    fs::write(bundle.in_root("given"), "from the host\n").unwrap();
    let ended = run(&bundle).expect_code(0);
    assert_eq!(ended.stdout, "from the host\n");
    assert_eq!(
        fs::read_to_string(bundle.in_root("made")).unwrap(),
        "from the guest\n"
    );
    assert_eq!(
        fs::metadata(bundle.in_root("made")).unwrap().mode() & 0o7777,
        0o640
    );
    assert_eq!(
        fs::read_link(bundle.in_root("folder/link"))
            .unwrap()
            .to_str(),
        Some("made")
    );
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

/// Gives a file an access control list (acl(5)) in which a user has rights that the owning group has not.
fn give_access(path: &Path, attribute: &CStr, user: u32) {
    const NOBODY: u32 = u32::MAX;
    let entries: [(u16, u16, u32); 5] = [
        (0x01, 6, NOBODY), // the owner
        (0x02, 6, user),
        (0x04, 0, NOBODY), // the owning group
        (0x10, 6, NOBODY), // the mask
        (0x20, 0, NOBODY), // others
    ];
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        list.extend(tag.to_le_bytes());
        list.extend(rights.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: two C strings, and a buffer of the length given; the kernel only reads them.
    let done = unsafe {
        let (value, len) = (list.as_ptr().cast(), list.len());
        libc::setxattr(path.as_ptr(), attribute.as_ptr(), value, len, 0)
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn access_control_lists_hold_as_under_runc() {
    let _unchanged = Host::unchanged();
    let script = "cat /given; echo $?; (: >>/given) 2>/dev/null; echo $?; touch /folder/made; stat -c %a /folder/made; cat /plain";
    let mut bundle = Bundle::shell(script);
    for (name, mode) in [("given", 0o660), ("plain", 0o640), ("folder", 0o777)] {
        let path = bundle.in_root(name);
        if name == "folder" {
            fs::create_dir(&path).unwrap();
        } else {
            fs::write(&path, format!("{name}\n")).unwrap();
        }
        std::os::unix::fs::chown(&path, Some(0), Some(100)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    give_access(&bundle.in_root("given"), c"system.posix_acl_access", 4242);
    give_access(&bundle.in_root("folder"), c"system.posix_acl_default", 4242);
    for user in [1000, 4242] {
        bundle.config["process"]["user"] = json!({"uid": user, "gid": 100});
        fs::write(bundle.in_root("given"), "given\n").unwrap();
        let _ = fs::remove_file(bundle.in_root("folder/made"));
        assert_same_as_runc(&bundle);
    }
}

#[test]
fn what_the_hosts_kernel_makes_up_is_read_whole() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell("cat /host/version /host/sys/kernel/osrelease /filesystems");
    bundle.config["mounts"].as_array_mut().unwrap().extend([
        json!({"destination": "/host", "type": "bind", "source": "/proc", "options": ["bind", "ro"]}),
        json!({"destination": "/filesystems", "type": "bind", "source": "/proc/filesystems", "options": ["bind", "ro"]}),
    ]);
    assert_same_as_runc(&bundle);
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
fn a_users_processes_are_not_limited_by_the_guests_memory() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell("grep -E 'processes|pending' /proc/self/limits | tr -s ' '");
    bundle.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let expected =
        "Max processes 65536 65536 processes \nMax pending signals 65536 65536 signals \n";
    assert_eq!(run(&bundle).expect_code(0).stdout, expected);
}

#[test]
fn mounts_of_the_config_are_there() {
    let _unchanged = Host::unchanged();
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("shared"), "volume\n").unwrap();
    let mut bundle = Bundle::shell(
        "cat /volume/shared /one-file; echo written > /volume/new; echo no > /fixed/new; echo $?; \
         stat -f -c %T /scratch; stat -c %a /scratch; grep -c ' /scratch ' /proc/mounts",
    );
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/volume", "source": volume.path(), "options": ["rbind", "rw"]}),
    );
    mounts.push(
        json!({"destination": "/fixed", "source": volume.path(), "options": ["rbind", "ro"]}),
    );
    mounts.push(json!({"destination": "/one-file", "source": volume.path().join("shared"), "options": ["bind", "ro"]}));
    mounts.push(json!({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1750", "size=1m"]}));
    assert_same_as_runc(&bundle);
    assert_eq!(
        fs::read_to_string(volume.path().join("new")).unwrap(),
        "written\n"
    );
}

/// A tmpfs on the host, unmounted when it goes.
struct Mounted(PathBuf);

impl Mounted {
    fn on(place: PathBuf, flags: MsFlags) -> Self {
        fs::create_dir(&place).unwrap();
        mount(Some("e2e"), &place, Some("tmpfs"), flags, None::<&str>).unwrap();
        Self(place)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn what_is_mounted_below_a_volume_is_a_mount_of_the_container_too() {
    let _unchanged = Host::unchanged();
    let volume = tempfile::tempdir().unwrap();
    let noexec = Mounted::on(volume.path().join("a noexec"), MsFlags::MS_NOEXEC);
    // A name that is no UTF-8.
    let below = noexec.0.join(OsStr::from_bytes(b"below\xff"));
    let _below = Mounted::on(below, MsFlags::MS_NOATIME);
    let _fixed = Mounted::on(volume.path().join("fixed"), MsFlags::MS_RDONLY);
    for options in [
        &["rbind", "ro"][..],
        &["rbind", "rprivate"],
        &["rbind", "rro", "rnosuid", "rnoatime"],
        &["bind", "ro"],
    ] {
        let mut bundle = Bundle::shell(
            "awk '$5 ~ \"^/volume/\" {print $5, $6}' /proc/self/mountinfo; cd /volume; \
             for place in . 'a noexec' 'a noexec'/below* fixed; do touch \"$place/x\"; echo $?; rm -f \"$place/x\"; done",
        );
        let mount = json!({"destination": "/volume", "source": volume.path(), "options": options});
        bundle.config["mounts"].as_array_mut().unwrap().push(mount);
        assert_same_as_runc(&bundle);
    }
}

#[test]
fn a_volume_has_the_attributes_of_the_mount_it_is_of() {
    let _unchanged = Host::unchanged();
    let dir = tempfile::tempdir().unwrap();
    let all = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NODIRATIME;
    let source = Mounted::on(dir.path().join("source"), all);
    fs::copy("/bin/busybox", source.0.join("busybox")).unwrap();
    for (source, options) in [
        (source.0.clone(), &["rbind", "rprivate"][..]),
        (source.0.clone(), &["rbind", "exec", "suid"]),
        (source.0.clone(), &["bind", "ro"]),
        (source.0.clone(), &["bind", "nosuid", "noatime"]),
        (source.0.clone(), &["rbind", "rexec"]),
        (source.0.join("busybox"), &["bind"]),
    ] {
        let mut bundle = Bundle::shell(
            "awk '$5 == \"/volume\" {print $6}' /proc/self/mountinfo; \
             for program in /volume /volume/busybox; do $program true 2>&1; echo $?; done",
        );
        let mount = json!({"destination": "/volume", "source": source, "options": options});
        bundle.config["mounts"].as_array_mut().unwrap().push(mount);
        assert_same_as_runc(&bundle);
    }
}

#[test]
fn the_root_has_the_attributes_of_the_mount_it_is_of() {
    let _unchanged = Host::unchanged();
    for (flags, read_only) in [
        (MsFlags::MS_NODEV | MsFlags::MS_NOSUID, false),
        (MsFlags::MS_NODEV | MsFlags::MS_NOSUID, true),
        (MsFlags::MS_NOEXEC, false),
    ] {
        let mut bundle = Bundle::shell(
            "awk '$5 == \"/\" {print $6}' /proc/self/mountinfo; mknod /tmp/k c 1 3; cat /tmp/k 2>&1; echo $?",
        );
        let root = bundle.in_root("/");
        let outside = bundle.path().join("outside");
        fs::rename(&root, &outside).unwrap();
        let _mounted = Mounted::on(root.clone(), flags);
        let copied = Command::new("cp")
            .arg("-aT")
            .arg(&outside)
            .arg(&root)
            .status();
        assert!(copied.unwrap().success());
        bundle.config["root"]["readonly"] = json!(read_only);
        for set in ["bounding", "effective", "permitted"] {
            bundle.config["process"]["capabilities"][set] = json!(["CAP_MKNOD"]);
        }
        assert_same_as_runc(&bundle);
    }
}

#[test]
fn the_usual_devices_can_be_volumes() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell(
        "wc -c < /etc/group; head -c 3 /etc/zero | wc -c; echo x > /etc/group; echo $?; \
         for d in /etc/group /etc/zero; do stat -c '%t %T %a %F' $d; done; grep -c ' /etc/' /proc/self/mountinfo",
    );
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    for (source, destination) in [("/dev/null", "/etc/group"), ("/dev/zero", "/etc/zero")] {
        let options = ["rbind", "rprivate", "ro"];
        mounts.push(json!({"destination": destination, "source": source, "options": options}));
    }
    assert_same_as_runc(&bundle);
}

#[test]
fn a_read_only_root_refuses_writes() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell("touch /x; echo $?; touch /dev/shm/x; echo $?");
    bundle.config["root"]["readonly"] = json!(true);
    assert_same_as_runc(&bundle);
}

#[test]
fn masked_and_read_only_paths_hold() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell(
        "ls /masked-dir; wc -c < /masked-file; touch /fixed-dir/x; echo $?; echo 1 > /proc/sys/kernel/domainname; echo $?",
    );
    for (path, content) in [
        ("masked-file", Some("secret")),
        ("masked-dir/secret", Some("")),
        ("fixed-dir", None),
    ] {
        let path = bundle.in_root(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match content {
            Some(content) => fs::write(path, content).unwrap(),
            None => fs::create_dir(path).unwrap(),
        }
    }
    bundle.config["linux"]["maskedPaths"] =
        json!(["/masked-file", "/masked-dir", "/proc/kcore", "/not/there"]);
    bundle.config["linux"]["readonlyPaths"] = json!(["fixed-dir", "/proc/sys"]);
    assert_same_as_runc(&bundle);
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
fn start_hooks_run_in_the_container() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell("cat /tmp/hooked; grep -o '\"status\":\"[a-z]*\"' /tmp/state");
    bundle.config["hooks"] = json!({"startContainer": [
        {"path": "/bin/sh", "args": ["sh", "-c", "cat > /tmp/state; echo $A > /tmp/hooked; uname -s >> /tmp/hooked"],
         "env": ["A=1", "PATH=/bin"], "timeout": 100},
        {"path": "/bin/sh", "args": ["sh", "-c", "echo $TERM >> /tmp/hooked"]}
    ]});
    assert_same_as_runc(&bundle);
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
fn a_volume_at_two_places_is_one() {
    let _unchanged = Host::unchanged();
    let volume = tempfile::tempdir().unwrap();
    // A FIFO, a lock, and a file that is written and read.
    let mut bundle = Bundle::shell(
        "rm -f /a/*; mkfifo /a/fifo; (echo through the fifo > /a/fifo) & cat /b/fifo; \
         exec 8> /a/lock 9> /b/lock; flock -n 8 && echo locked; flock -n 9 || echo held; \
         echo one > /a/file; cat /b/file; echo two >> /b/file; cat /a/file; \
         ln /b/file /b/link && stat -c %h /a/link; ln /a/file /b/other 2>&1; \
         [ $(stat -c %i /a/file) = $(stat -c %i /b/file) ] && echo same; cat /c/file; echo x 2>&1 > /c/file",
    );
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    for (destination, how) in [("/a", "rw"), ("/b", "rw"), ("/c", "ro")] {
        mounts.push(
            json!({"destination": destination, "source": volume.path(), "options": ["bind", how]}),
        );
    }
    assert_same_as_runc(&bundle);
}

#[test]
fn a_file_system_of_layers_is_as_under_runc() {
    let _unchanged = Host::unchanged();
    let folder = tempfile::tempdir().unwrap();
    let layer = |name: &str| folder.path().join(name);
    for name in ["lower", "merged"] {
        fs::create_dir(layer(name)).unwrap();
    }
    fs::write(layer("lower/a"), "old\n").unwrap();
    for name in ["lower/b", "lower/c"] {
        fs::hard_link(layer("lower/a"), layer(name)).unwrap();
    }
    // Hard links of a lower layer part when one is written to.
    let mut bundle = Bundle::shell(
        "cd /layers; cat a b c; echo new > b; cat a b c; echo more >> c; cat a b c; \
         ln b d; echo newer > d; cat b d; stat -c '%h %n' a b c d; sync && echo written",
    );
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/layers", "source": layer("merged"), "options": ["bind", "rw"]}),
    );
    let said = [runc(), bulkhead()].map(|runtime| {
        for name in ["upper", "work"] {
            let _ = fs::remove_dir_all(layer(name));
            fs::create_dir(layer(name)).unwrap();
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={},index=off",
            layer("lower").display(),
            layer("upper").display(),
            layer("work").display()
        );
        let options = Some(options.as_str());
        let merged = layer("merged");
        mount(
            Some("o"),
            &merged,
            Some("overlay"),
            MsFlags::empty(),
            options,
        )
        .unwrap();
        let ended = finish(run_command(Command::new(runtime), &bundle).stdin(Stdio::null()));
        umount2(&merged, MntFlags::empty()).unwrap();
        ended.expect_code(0).stdout
    });
    assert_eq!(said[1], said[0], "bulkhead (left) and runc (right) differ");
}

#[test]
fn the_memory_of_the_hosts_processes_is_not_a_containers_to_read() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell(&format!(
        "cat /host/proc/{}/comm; head -c 1 /host/proc/{0}/mem 2>&1",
        std::process::id()
    ));
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/host/proc", "source": "/proc", "options": ["bind", "ro"]}));
    assert_same_as_runc(&bundle);
}

#[test]
fn a_limit_of_the_size_of_files_on_the_host_fails_the_containers_writes() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::shell(
        "dd if=/dev/zero of=/big bs=1 count=1 seek=700M 2>&1 | grep -c 'too large'; echo small > /small; cat /small",
    );
    let mut command = Command::new("/bin/sh");
    // In blocks of 512 bytes.
    command.args(["-c", "ulimit -f 1048576; exec \"$@\"", "sh"]);
    let run = run_command(Command::new(bulkhead()), &bundle);
    command.arg(run.get_program()).args(run.get_args());
    let ended = finish(command.stdin(Stdio::null())).expect_code(0);
    assert_eq!(ended.stdout, "1\nsmall\n");
}

#[test]
fn a_file_that_the_host_makes_while_the_container_creates_it_keeps_its_permissions() {
    let _unchanged = Host::unchanged();
    let volume = tempfile::tempdir().unwrap();
    fs::set_permissions(volume.path(), fs::Permissions::from_mode(0o777)).unwrap();
    // The container has just seen that the file is not there, and believes it for a second.
    let mut bundle = Bundle::shell(
        "[ -e /volume/file ] || echo ready; read line; echo written > /volume/file && echo done",
    );
    bundle.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/volume", "source": volume.path(), "options": ["bind", "rw"]}),
    );
    let mut child = start(run_command(Command::new(bulkhead()), &bundle).stdin(Stdio::piped()));
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let file = volume.path().join("file");
    fs::write(&file, "root's").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "");
    wait(child).expect_code(1);
    assert_eq!(fs::read(&file).unwrap(), b"root's");
}

/// A cgroup mount that can be written.
fn with_own_cgroups(bundle: &mut Bundle) {
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    let cgroups = mounts
        .iter_mut()
        .find(|mount| mount["type"] == "cgroup")
        .unwrap();
    cgroups["options"] = json!(["nosuid", "noexec", "nodev", "relatime", "rw"]);
    bundle.config["linux"]["resources"]["pids"] = json!({"limit": 50});
}

#[test]
fn a_container_that_may_divide_its_cgroup_does_not_lift_its_own_limits() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell(
        "cd /sys/fs/cgroup; echo max > pids.max; cat pids.max; mkdir below && echo max > below/cgroup.max.depth && echo divided; \
         grep -c ' /sys/fs/cgroup .*nsdelegate.*memory_recursiveprot' /proc/self/mounts",
    );
    with_own_cgroups(&mut bundle);
    assert_same_as_runc(&bundle);
}

#[test]
fn a_container_without_a_cgroup_namespace_leaves_the_hierarchy_as_it_is() {
    let _unchanged = Host::unchanged();
    // Not beside runc, whose mount would change the host's.
    let mut bundle = Bundle::shell(
        "grep -c ' /sys/fs/cgroup .*nsdelegate.*memory_recursiveprot' /proc/self/mounts; cat /sys/fs/cgroup$(cut -d : -f 3 /proc/self/cgroup)/pids.max",
    );
    with_own_cgroups(&mut bundle);
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
fn a_container_looks_at_more_files_than_its_guest_may_have_cached() {
    let _unchanged = Host::unchanged();
    const MOST: usize = 16_384;
    const EACH: usize = 5_000;
    let volume = tempfile::tempdir().unwrap();
    let folders = ["a", "b", "c", "d", "e"];
    for folder in folders {
        let folder = volume.path().join(folder);
        fs::create_dir(&folder).unwrap();
        for file in 0..EACH {
            fs::write(folder.join(file.to_string()), "").unwrap();
        }
    }
    let mut bundle = Bundle::shell("exec sleep 100000");
    bundle.config["annotations"] = json!({"io.bulkhead.memory_mib": "128"});
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/volume", "source": volume.path(), "options": ["bind", "ro"]}),
    );
    let container = Container::running(bulkhead(), bundle);
    let vmm = processes::named("bulkhead-vmm");
    let descriptors = || {
        let entries = fs::read_dir(format!("/proc/{}/fd", vmm[0])).unwrap();
        entries.count()
    };
    let mut held = Vec::new();
    for folder in folders {
        let seen = container.shell(&format!("ls -l /volume/{folder} | wc -l"));
        assert_eq!(seen.expect_code(0).stdout, format!("{}\n", EACH + 1));
        held.push(descriptors());
    }
    assert!(held.iter().all(|held| *held < MOST), "{held:?}");
    // What it has looked at last may be forgotten a little later.
    let start = std::time::Instant::now();
    while descriptors() > MOST * 5 / 8 {
        assert!(start.elapsed().as_secs() < 60, "{held:?}");
        container.shell("true").expect_code(0);
    }
}

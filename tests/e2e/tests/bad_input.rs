//! Bad input of every kind: one sentence that names the file or field, runc's exit code, and nothing left behind.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{Ended, bulkhead, finish, fresh_id, run, run_command};
use bulkhead_e2e::dist;
use bulkhead_e2e::leaks::Host;
use serde_json::{Value, json};

/// One sentence on stderr, with every one of these words; exit code 1, as runc's; nothing on stdout.
#[track_caller]
fn assert_refused(case: &str, ended: &Ended, words: &[&str]) {
    assert_eq!(ended.code, 1, "{case}: {ended:?}");
    assert_eq!(
        ended.stderr.trim().lines().count(),
        1,
        "{case}: not one line: {}",
        ended.stderr
    );
    for word in words {
        assert!(
            ended.stderr.contains(word),
            "{case}: no {word:?} in: {}",
            ended.stderr
        );
    }
    assert_eq!(ended.stdout, "", "{case}");
}

#[test]
fn a_wrong_config_is_refused_by_the_name_of_its_field() {
    let unchanged = Host::unchanged();
    type Edit = fn(&mut Value);
    let cases: &[(&str, Edit, &[&str])] = &[
        (
            "no process",
            |c| drop(c.as_object_mut().unwrap().remove("process")),
            &["config.json", "process"],
        ),
        (
            "no root",
            |c| drop(c.as_object_mut().unwrap().remove("root")),
            &["config.json", "root"],
        ),
        (
            "empty args",
            |c| c["process"]["args"] = json!([]),
            &["process.args"],
        ),
        (
            "no args",
            |c| drop(c["process"].as_object_mut().unwrap().remove("args")),
            &["process.args"],
        ),
        (
            "empty program",
            |c| c["process"]["args"] = json!([""]),
            &["exec: \"\": executable file not found in $PATH"],
        ),
        (
            "relative cwd",
            |c| c["process"]["cwd"] = json!("tmp"),
            &["process.cwd"],
        ),
        (
            "named user",
            |c| c["process"]["user"]["uid"] = json!("nobody"),
            &["process.user.uid"],
        ),
        (
            "rootfs missing",
            |c| c["root"]["path"] = json!("nowhere"),
            &["root.path", "nowhere"],
        ),
        (
            "rootfs is a file",
            |c| c["root"]["path"] = json!("config.json"),
            &["root.path", "config.json"],
        ),
        (
            "rootfs is a link",
            |c| c["root"]["path"] = json!("/proc/self/root"),
            &["root.path", "/proc/self/root: a symlink", "name /,"],
        ),
        (
            "rootfs behind a link",
            |c| c["root"]["path"] = json!("/proc/self/root/usr/"),
            &["root.path", "/proc/self/root/usr: a symlink", "name /usr,"],
        ),
        (
            "malformed environment",
            |c| c["process"]["env"] = json!(["=x"]),
            &["process.env"],
        ),
        (
            "unknown limit",
            |c| c["process"]["rlimits"] = json!([{"type": "RLIMIT_BOGUS", "soft": 1, "hard": 1}]),
            &["rlimits"],
        ),
        (
            "soft above hard",
            |c| c["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 1}]),
            &["rlimits"],
        ),
        (
            "foreign network namespace",
            |c| c["linux"]["namespaces"][1]["path"] = json!("/proc/1/ns/net"),
            &["linux.namespaces"],
        ),
        (
            "foreign pid namespace",
            |c| c["linux"]["namespaces"][0]["path"] = json!("/proc/1/ns/pid"),
            &["linux.namespaces"],
        ),
        (
            "unknown namespace",
            |c| c["linux"]["namespaces"][0]["type"] = json!("bogus"),
            &["linux.namespaces"],
        ),
        (
            "twice the same namespace",
            |c| c["linux"]["namespaces"][1] = json!({"type": "pid"}),
            &["linux.namespaces"],
        ),
        (
            "missing bind source",
            |c| {
                c["mounts"][0] =
                    json!({"destination": "/x", "source": "/no/such/source", "options": ["bind"]})
            },
            &["mounts", "/no/such/source"],
        ),
        (
            "empty bind source",
            |c| c["mounts"][0] = json!({"destination": "/x", "source": "", "options": ["bind"]}),
            &["mounts"],
        ),
        (
            "unknown file system",
            |c| c["mounts"][0]["type"] = json!("bogusfs"),
            &["mounts", "bogusfs"],
        ),
        (
            "host sysctl",
            |c| c["linux"]["sysctl"] = json!({"kernel.panic": "1"}),
            &["linux.sysctl", "kernel.panic"],
        ),
        (
            "absolute program missing",
            |c| c["process"]["args"] = json!(["/no/such"]),
            &["/no/such", "no such file or directory"],
        ),
        (
            "program not in PATH",
            |c| c["process"]["args"] = json!(["no-such"]),
            &["exec: \"no-such\": executable file not found in $PATH"],
        ),
        (
            "program not executable",
            |c| c["process"]["args"] = json!(["/etc/passwd"]),
            &["/etc/passwd", "permission denied"],
        ),
        (
            "program is a folder",
            |c| c["process"]["args"] = json!(["/etc"]),
            &["/etc"],
        ),
        ("wrong type", |c| c["hostname"] = json!(5), &["hostname"]),
        (
            "unknown annotation of ours",
            |c| c["annotations"] = json!({"io.bulkhead.vcpu": "1"}),
            &["annotations", "io.bulkhead.vcpu"],
        ),
        (
            "more vCPUs than processors",
            |c| c["annotations"] = json!({"io.bulkhead.vcpus": "99"}),
            &["io.bulkhead.vcpus", "99", "the host's processors"],
        ),
        (
            "too little memory for a guest",
            |c| c["annotations"] = json!({"io.bulkhead.memory_mib": "10"}),
            &["io.bulkhead.memory_mib", "64"],
        ),
        (
            "more memory than the host's",
            |c| c["annotations"] = json!({"io.bulkhead.memory_mib": "1048576000"}),
            &["io.bulkhead.memory_mib", "at most", "the host's memory"],
        ),
        (
            "kernel arguments of several lines",
            |c| c["annotations"] = json!({"io.bulkhead.kernel_arguments": "a\nb"}),
            &["io.bulkhead.kernel_arguments", "printable"],
        ),
        (
            "relative hook",
            |c| c["hooks"] = json!({"prestart": [{"path": "bin/true"}]}),
            &["hooks.prestart[0].path", "absolute"],
        ),
        (
            "hook without time",
            |c| c["hooks"] = json!({"poststop": [{"path": "/bin/true", "timeout": -1}]}),
            &["hooks.poststop[0].timeout"],
        ),
        (
            "hook that is not there",
            |c| c["hooks"] = json!({"createRuntime": [{"path": "/no/such/hook"}]}),
            &["hooks.createRuntime[0]", "/no/such/hook", "No such file"],
        ),
        (
            "hook in the container that is not there",
            |c| c["hooks"] = json!({"startContainer": [{"path": "/no/such/hook"}]}),
            &["hooks.startContainer[0]", "no such file or directory"],
        ),
        (
            "cgroup above the root",
            |c| c["linux"]["cgroupsPath"] = json!("/../x"),
            &["linux.cgroupsPath", ".."],
        ),
        (
            "terminal without one",
            |c| c["process"]["terminal"] = json!(true),
            &["process.terminal", "no terminal"],
        ),
        (
            "network interface of the host",
            |c| c["linux"]["netDevices"] = json!({"eth0": {}}),
            &["linux.netDevices"],
        ),
        (
            "processors' caches",
            |c| c["linux"]["intelRdt"] = json!({"closID": "x"}),
            &["linux.intelRdt"],
        ),
        (
            "unknown seccomp action",
            |c| c["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_BOGUS"}),
            &["linux.seccomp.defaultAction"],
        ),
        (
            "seccomp notification",
            |c| {
                c["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
                    "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]})
            },
            &["linux.seccomp", "SCMP_ACT_NOTIFY"],
        ),
        (
            "mappings without a user namespace",
            |c| c["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 0, "size": 1}]),
            &["linux.gidMappings", "missing"],
        ),
        (
            "user namespace without mappings",
            |c| {
                c["linux"]["namespaces"]
                    .as_array_mut()
                    .unwrap()
                    .push(json!({"type": "user"}))
            },
            &["uidMappings"],
        ),
        (
            "time offset without a time namespace",
            |c| c["linux"]["timeOffsets"] = json!({"monotonic": {"secs": 5}}),
            &["timeOffsets"],
        ),
        (
            "unknown mount propagation",
            |c| c["linux"]["rootfsPropagation"] = json!("sideways"),
            &["rootfsPropagation", "sideways"],
        ),
        (
            "unknown device type",
            |c| {
                c["linux"]["devices"] =
                    json!([{"path": "/dev/x", "type": "z", "major": 1, "minor": 3}])
            },
            &["linux.devices[0]"],
        ),
        (
            "too little memory for a process",
            |c| c["linux"]["resources"]["memory"] = json!({"limit": 1_048_576}),
            &["linux.resources.memory.limit", "2097152"],
        ),
        (
            "a user that is none",
            |c| c["process"]["user"]["uid"] = json!(u32::MAX),
            &["process.user.uid", "2147483647"],
        ),
        (
            "read and write limits of nothing",
            |c| c["linux"]["resources"]["unified"] = json!({"../x": "1"}),
            &["linux.resources.unified", "../x"],
        ),
        (
            "unknown personality",
            |c| c["linux"]["personality"] = json!({"domain": "SOLARIS"}),
            &["linux.personality"],
        ),
        (
            "working directory that is a file",
            |c| c["process"]["cwd"] = json!("/etc/passwd"),
            &["/etc/passwd"],
        ),
        (
            "file system label",
            |c| c["linux"]["mountLabel"] = json!("system_u:object_r:x"),
            &["linux.mountLabel"],
        ),
        (
            "unsupported version",
            |c| c["ociVersion"] = json!("2.0.0"),
            &["ociVersion"],
        ),
    ];
    for (case, edit, words) in cases {
        let mut bundle = Bundle::busybox(&["true"]);
        edit(&mut bundle.config);
        assert_refused(case, &run(&bundle), words);
        unchanged.at_once(case);
    }
}

#[test]
fn a_broken_bundle_is_refused_by_the_name_of_its_file() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::busybox(&["true"]);
    let run_in = |bundle: &Bundle| {
        finish(
            Command::new(bulkhead())
                .arg("run")
                .arg("-b")
                .arg(bundle.path())
                .arg(fresh_id()),
        )
    };
    assert_refused("no config.json", &run_in(&bundle), &["config.json"]);
    for text in [
        "",
        "{",
        "[]",
        "null",
        "{\"ociVersion\": \"1.0.2\", \"process\": 3}",
    ] {
        bundle.write_raw(text);
        assert_refused(text, &run_in(&bundle), &["config.json"]);
    }
    let nowhere = finish(
        Command::new(bulkhead())
            .args(["run", "-b", "/no/such/bundle"])
            .arg(fresh_id()),
    );
    assert_refused("no bundle", &nowhere, &["/no/such/bundle"]);
}

#[test]
fn a_bad_id_is_refused() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::busybox(&["true"]);
    bundle.write();
    for id in ["..", ".", "a/b", "a b", "", "\u{e9}"] {
        let ended = finish(
            Command::new(bulkhead())
                .arg("run")
                .arg("-b")
                .arg(bundle.path())
                .arg("--")
                .arg(id),
        );
        assert_refused(id, &ended, &["id"]);
    }
}

#[test]
fn a_wrong_command_line_is_refused() {
    let _unchanged = Host::unchanged();
    for arguments in [
        &["run"][..],
        &["bogus"],
        &["run", "--bogus", "x"],
        &["create"],
        &["exec"],
        &["exec", "nonesuch"],
        &["kill"],
        &["kill", "nonesuch", "BOGUS"],
        &["list", "--format", "xml"],
        &["update", "--memory", "much", "x"],
        &["update", "--l3-cache-schema", "L3:0=f", "x"],
        &["events", "--interval", "soon", "x"],
        &["spec", "--bundle", "/no/such/folder"],
    ] {
        let ended = finish(Command::new(bulkhead()).args(arguments));
        assert_ne!(ended.code, 0, "{arguments:?}: {ended:?}");
        assert!(
            !ended.stderr.is_empty() || !ended.stdout.is_empty(),
            "{arguments:?}: says nothing"
        );
    }
}

#[test]
fn a_descriptor_that_is_no_stream_is_refused_by_its_number_and_kind() {
    let _unchanged = Host::unchanged();
    use std::net::TcpListener;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::OpenOptionsExt;
    use std::os::unix::net::{UnixDatagram, UnixListener};
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let open = |name: &str, flags: i32| {
        let mut options = fs::File::options();
        options.read(true).custom_flags(flags);
        OwnedFd::from(options.open(name).unwrap())
    };
    let both_ways = |path| {
        let mut options = fs::File::options();
        OwnedFd::from(options.read(true).write(true).open(path).unwrap())
    };
    nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::write(path("file"), "").unwrap();
    let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::EPOLL_CLOEXEC);
    let event = nix::sys::eventfd::EventFd::new().unwrap();
    let memory = nix::sys::memfd::memfd_create(c"m", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
    let cases: Vec<(OwnedFd, &str)> = vec![
        (
            UnixListener::bind(path("socket")).unwrap().into(),
            "a listening socket",
        ),
        (
            TcpListener::bind("127.0.0.1:0").unwrap().into(),
            "a listening socket",
        ),
        (
            UnixDatagram::pair().unwrap().0.into(),
            "a socket of messages",
        ),
        (
            both_ways(path("fifo")),
            "a pipe that is open for reading and writing",
        ),
        (
            both_ways(path("file")),
            "a file that is open for reading and writing",
        ),
        (
            memory.unwrap(),
            "a file that is open for reading and writing",
        ),
        (open("/", 0), "a directory"),
        (open("/", libc::O_PATH), "O_PATH"),
        (open("/dev/zero", 0), "a character device"),
        (epoll.unwrap().0, "eventpoll"),
        (event.into(), "eventfd"),
    ];
    let bundle = Bundle::busybox(&["true"]);
    bundle.write();
    let refused = |fd: Option<OwnedFd>, words: &[&str]| {
        let mut command = Command::new(bulkhead());
        command
            .args(["run", "--preserve-fds", "2", "-b"])
            .arg(bundle.path())
            .arg(fresh_id());
        let (reader, _writer) = std::io::pipe().unwrap();
        let given = std::iter::once(reader.into()).chain(fd);
        bulkhead_e2e::command::hand_over(&mut command, given);
        assert_refused(words[1], &finish(&mut command), words);
    };
    for (fd, kind) in cases {
        refused(Some(fd), &["descriptor 4", kind]);
    }
    // As runc says it.
    refused(None, &["preserved-fd 1 (of 2)", "descriptor 4"]);
}

/// `bulkhead --config FILE run` of a bundle that is fine, with a configuration that isn't.
fn run_with_config(config: &str) -> Ended {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), config).unwrap();
    let mut command = Command::new(bulkhead());
    command.arg("--config").arg(file.path());
    finish(run_command(command, &Bundle::busybox(&["true"])).stdin(Stdio::null()))
}

#[test]
fn missing_guest_files_are_named() {
    let unchanged = Host::unchanged();
    for key in ["kernel", "initramfs", "vmm", "server"] {
        let ended = run_with_config(&format!("{key} = \"/no/such/{key}\"\n"));
        assert_refused(key, &ended, &[&format!("/no/such/{key}")]);
        unchanged.at_once(key);
    }
}

#[test]
fn a_kernel_that_is_none_is_refused() {
    let unchanged = Host::unchanged();
    for junk in [
        b"".as_slice(),
        b"not an ELF file",
        &[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0],
    ] {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), junk).unwrap();
        let path = file.path().to_str().unwrap();
        assert_refused(
            "junk kernel",
            &run_with_config(&format!("kernel = \"{path}\"\n")),
            &["kernel"],
        );
        unchanged.at_once(path);
    }
}

#[test]
fn an_initramfs_that_is_none_ends_the_run() {
    let _unchanged = Host::unchanged();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), b"no archive at all").unwrap();
    let path = file.path().to_str().unwrap();
    let ended = run_with_config(&format!("initramfs = \"{path}\"\n"));
    assert_refused("junk initramfs", &ended, &["guest"]);
}

#[test]
fn a_wrong_configuration_file_is_refused() {
    let _unchanged = Host::unchanged();
    assert_refused(
        "unknown key",
        &run_with_config("kernal = \"/x\"\n"),
        &["kernal", "did you mean `kernel`?"],
    );
    assert_refused("malformed", &run_with_config("kernel = \n"), &["line 1"]);
}

#[test]
fn a_machine_without_kvm_is_told_so() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::busybox(&["true"]);
    bundle.write();
    // A mount namespace of its own, in which /dev has no kvm.
    let script = "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec \"$0\" \"$@\"";
    let without_kvm = |arguments: &[&std::ffi::OsStr]| {
        let program = dist().join("bin/bulkhead");
        finish(
            Command::new("unshare")
                .args(["--mount", "sh", "-c", script])
                .arg(program)
                .args(arguments),
        )
    };
    let id = fresh_id();
    let ended = without_kvm(&[
        "run".as_ref(),
        "-b".as_ref(),
        bundle.path().as_ref(),
        id.as_ref(),
    ]);
    assert_refused("run", &ended, &["/dev/kvm"]);
    let ended = without_kvm(&["check".as_ref()]);
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.stdout.contains("/dev/kvm"), "{ended:?}");
}

#[test]
fn a_user_who_is_not_root_is_told_so() {
    let _unchanged = Host::unchanged();
    // Programs and bundle where anybody may look at them.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.path().join("bulkhead");
    fs::copy(dist().join("bin/bulkhead"), &program).unwrap();
    let bundle = Bundle::busybox(&["true"]);
    bundle.write();
    fs::set_permissions(bundle.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(program);
    command
        .uid(1000)
        .gid(1000)
        .arg("run")
        .arg("-b")
        .arg(bundle.path())
        .arg(fresh_id());
    assert_refused("run", &finish(&mut command), &["root"]);
}

#[test]
fn an_id_in_use_is_refused_and_its_owner_lives_on() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::shell("cat; echo alive");
    bundle.write();
    let id = fresh_id();
    let command = || {
        let mut command = Command::new(bulkhead());
        command
            .arg("run")
            .arg("-b")
            .arg(bundle.path())
            .arg(&id)
            .stdin(Stdio::piped());
        command
    };
    let mut owner = bulkhead_e2e::command::start(&mut command());
    let mut stdin = owner.stdin.take().unwrap();
    let mut stdout = owner.stdout.take().unwrap();
    // The echo of a line shows that the container runs.
    std::io::Write::write_all(&mut stdin, b"hello\n").unwrap();
    let mut echoed = [0; 6];
    std::io::Read::read_exact(&mut stdout, &mut echoed).unwrap();
    assert_refused("second", &finish(&mut command()), &[&id, "exist"]);
    drop(stdin);
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut stdout, &mut rest).unwrap();
    assert_eq!(rest, "alive\n");
    bulkhead_e2e::command::wait(owner).expect_code(0);
}

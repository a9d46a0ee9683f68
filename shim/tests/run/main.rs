//! `bulkhead run` and the sandbox server from end to end, natively: the VMM and its guest are a stand-in
//! (`examples/fake-vmm.rs`) that runs the container's program as a plain process. Needs root, for mounts.

#![allow(clippy::unwrap_used)] // a failure of a test is a panic

mod bed;
mod descriptors;
mod faults;
mod files;
mod hooks;
mod kept;
mod patience;
mod states;
mod stop;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use bed::{Bed, bulkhead, finish, text};
use bulkhead_e2e::{processes, watch};
use bulkhead_protocol::PROTOCOL_VERSION;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// A failed command says one line, and what is expected is in it.
fn assert_sentence(output: &Output, expected: &str) {
    let stderr = text(&output.stderr);
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(
        stderr.starts_with("error: bulkhead run failed: "),
        "{stderr}"
    );
    assert!(stderr.contains(expected), "{stderr}");
}

/// A command in the background. A test that fails must not leave it running.
struct Running(Option<Child>);

impl Running {
    fn signal(&self, signal: Signal) {
        let id = self.0.as_ref().unwrap().id();
        kill(Pid::from_raw(id as i32), signal).unwrap();
    }

    fn output(mut self) -> Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }

    /// What it says in the end, which must not be far off.
    fn ended(mut self) -> Output {
        let child = self.0.take().unwrap();
        bulkhead_e2e::processes::wait_for_end(&[child.id()]);
        child.wait_with_output().unwrap()
    }

    fn wait(self) -> ExitStatus {
        self.output().status
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Starts the command and reads the line that its program says first.
fn start(bed: &Bed, flags: &[&str]) -> (Running, BufReader<std::process::ChildStdout>) {
    let mut command = bed.command();
    command.args(flags).stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let running = Running(Some(child));
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    (running, stdout)
}

/// What is on record of the container; null without a record.
fn recorded(bed: &Bed) -> Value {
    let record = fs::read(bed.path("state/c1/state.json")).unwrap_or_default();
    serde_json::from_slice(&record).unwrap_or_default()
}

const READY: [&str; 3] = [
    "/bin/sh",
    "-c",
    "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done",
];

#[test]
fn output_and_exit_code_come_back_and_nothing_is_left() {
    let bed = Bed::new(&["/bin/sh", "-c", "echo out; echo err >&2; exit 3"]);
    let output = bed.run();
    assert_eq!(text(&output.stderr), "err\n");
    assert_eq!(text(&output.stdout), "out\n");
    assert_eq!(output.status.code(), Some(3));
}

#[test]
fn a_guest_that_has_written_everything_back_is_not_waited_for() {
    let bed = Bed::new(&["/bin/true"]);
    let began = Instant::now();
    let output = bed.mode("linger").run();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    // A guest that does not end is killed after thirty seconds.
    assert!(began.elapsed() < Duration::from_secs(8));
}

#[test]
fn a_death_by_signal_is_128_and_the_signal() {
    let bed = Bed::new(&["/bin/sh", "-c", "kill -9 $$"]);
    assert_eq!(bed.run().status.code(), Some(137));
}

#[test]
fn input_goes_in_and_its_end_is_an_end_of_file() {
    let bed = Bed::new(&["/bin/sh", "-c", "wc -c"]);
    let mut child = bed.command().stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&vec![b'x'; 1_000_000]).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout).trim(), "1000000");
    assert_eq!(output.status.code(), Some(0));
    bed.assert_clean();
}

#[test]
fn all_output_is_there_when_the_command_ends() {
    let bed = Bed::new(&["/bin/sh", "-c", "head -c 20000000 /dev/zero"]);
    assert_eq!(bed.run().stdout.len(), 20_000_000);
}

#[test]
fn an_exit_does_not_wait_for_input_that_nobody_reads() {
    let bed = Bed::new(&["/bin/true"]);
    let mut child = bed.command().stdin(Stdio::piped()).spawn().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    bed.assert_clean();
}

#[test]
fn a_reader_of_output_that_goes_away_ends_the_writer() {
    let bed = Bed::new(&["/bin/sh", "-c", "echo ready; exec cat /dev/zero"]);
    let (child, stdout) = start(&bed, &[]);
    drop(stdout);
    assert_eq!(child.wait().code(), Some(128 + Signal::SIGPIPE as i32));
    bed.assert_clean();
}

#[test]
fn signals_are_passed_on() {
    let bed = Bed::new(&READY);
    let (child, _stdout) = start(&bed, &[]);
    child.signal(Signal::SIGTERM);
    assert_eq!(child.wait().code(), Some(7));
    bed.assert_clean();
}

#[test]
fn a_signal_before_the_container_is_there_ends_the_start() {
    for mode in ["silent", "slow create"] {
        let bed = Bed::new(&["/bin/true"]).mode(mode);
        let child = Running(Some(bed.command().spawn().unwrap()));
        watch::until(&bed.path(""), &[], || {
            bed.path("state/c1/state.json").exists()
        });
        child.signal(Signal::SIGINT);
        assert_eq!(child.wait().code(), Some(130));
        bed.assert_clean();
    }
}

#[test]
fn a_killed_client_takes_its_sandbox_along() {
    let bed = Bed::new(&READY);
    let (child, _stdout) = start(&bed, &[]);
    child.signal(Signal::SIGKILL);
    assert_eq!(child.wait().signal(), Some(9));
    bed.await_clean();
}

#[test]
fn a_killed_server_is_told_and_leaves_nothing() {
    let bed = Bed::new(&READY);
    let (child, _stdout) = start(&bed, &[]);
    kill(bed.pid_of("containerd-shim-bulkhead-v2"), Signal::SIGKILL).unwrap();
    let output = child.output();
    assert_eq!(output.status.code(), Some(1));
    assert_sentence(&output, "the sandbox server ended unexpectedly");
    bed.await_clean();
}

#[test]
fn a_killed_vmm_is_told_with_its_reason() {
    let bed = Bed::new(&READY);
    let (child, _stdout) = start(&bed, &[]);
    kill(bed.pid_of("fake-vmm"), Signal::SIGKILL).unwrap();
    let output = child.output();
    // The program may have spoken before its start was answered; then it is the start that failed.
    let code = output.status.code().unwrap();
    assert!([1, 255].contains(&code), "{code}");
    assert_sentence(&output, "VMM was killed by SIGKILL");
    // What its program has started outlives it by a moment, as nothing does in a guest.
    bed.await_clean();
}

#[test]
fn a_guest_that_does_not_come_up_is_told_in_one_sentence() {
    let version = format!("agent 9.9 speaks protocol version {}", PROTOCOL_VERSION + 1);
    for (mode, expected) in [
        ("crash", "suberror 1; `bulkhead check` tells"),
        (
            "panic",
            "the guest ended while it booted: the guest reset itself",
        ),
        ("refuse", "the VMM refused: memory is too small"),
        ("die", "exited with code 3"),
        ("silent", "not ready within 1 s"),
        ("version", &version),
    ] {
        let bed = Bed::new(&["/bin/true"]).mode(mode);
        bed.configure("boot_timeout_s = 1\n");
        let output = bed.run();
        assert_eq!(output.status.code(), Some(1));
        assert_sentence(&output, expected);
    }
}

#[test]
fn a_vm_that_ends_at_start_is_told() {
    let bed = Bed::new(&["/bin/true"]);
    let output = bed.mode("die at start").run();
    assert_eq!(output.status.code(), Some(1));
    assert_sentence(&output, "exited with code 3");
}

#[test]
fn a_guest_that_takes_no_streams_is_told() {
    let bed = Bed::new(&["/bin/sleep", "1000"]);
    let output = bed.mode("deaf").run();
    assert_eq!(output.status.code(), Some(1));
    assert_sentence(&output, "cannot attach STDOUT of the container");
}

#[test]
fn bad_input_is_told_in_one_sentence_and_leaves_nothing() {
    type Change = fn(&Bed);
    let table: [(&str, Change); 10] = [
        ("config.json not found", |bed| {
            fs::remove_file(bed.path("bundle/config.json")).unwrap()
        }),
        ("not a valid runtime spec", |bed| {
            fs::write(bed.path("bundle/config.json"), "{").unwrap()
        }),
        ("`root.path` names an invalid rootfs", |bed| {
            fs::remove_dir_all(bed.path("bundle/rootfs")).unwrap();
        }),
        ("`process.args` must not be empty", |bed| {
            bed.spec(|spec| spec["process"]["args"] = json!([]))
        }),
        ("`process.user.uid`: invalid", |bed| {
            bed.spec(|spec| spec["process"]["user"]["uid"] = json!("nobody"))
        }),
        ("exec: \"foo\": executable file not found in $PATH", |bed| {
            bed.spec(|spec| spec["process"]["args"] = json!(["foo"]));
        }),
        ("`mounts[0].source` names /proc/nonexistent", |bed| {
            bed.spec(|spec| {
                spec["mounts"] =
                    json!([{"destination": "/d", "type": "bind", "source": "/proc/nonexistent"}]);
            });
        }),
        ("set `kernel` in the configuration file", |bed| {
            fs::remove_file(bed.path("kernel")).unwrap()
        }),
        ("set `initramfs` in the configuration file", |bed| {
            fs::remove_file(bed.path("initramfs")).unwrap()
        }),
        ("unknown key `nonsense`", |bed| {
            bed.configure("nonsense = 1\n")
        }),
    ];
    for (expected, change) in table {
        let bed = Bed::new(&["/bin/true"]);
        change(&bed);
        let output = bed.run();
        assert_eq!(output.status.code(), Some(1), "{expected}");
        assert_sentence(&output, expected);
    }
}

#[test]
fn an_id_that_is_taken_is_refused_and_its_container_lives_on() {
    let bed = Bed::new(&READY);
    let (child, _stdout) = start(&bed, &[]);
    let output = bed.command().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_sentence(&output, "container with id c1 already exists");
    child.signal(Signal::SIGTERM);
    assert_eq!(child.wait().code(), Some(7));
    bed.assert_clean();
}

#[test]
fn only_the_first_call_to_the_host_is_taken() {
    let bed = Bed::new(&["/bin/true"]);
    let bed = bed.mode("dial twice");
    let output = bed.run();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[test]
fn the_timeline_has_the_moments_of_client_and_server() {
    let bed = Bed::new(&["/bin/true"]);
    let output = bed
        .command()
        .arg("--timeline")
        .arg(bed.path("t.json"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let record: Value =
        serde_json::from_str(&fs::read_to_string(bed.path("t.json")).unwrap()).unwrap();
    let names: Vec<_> = record["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["name"].as_str().unwrap())
        .collect();
    for name in [
        "client: started",
        "server: started",
        "server: agent called",
        "server: cleaned",
        "client: server ended",
    ] {
        assert!(names.contains(&name), "{names:?}");
    }
    bed.assert_clean();
}

#[test]
fn errors_go_to_the_log_file_in_runcs_form() {
    let bed = Bed::new(&["/bin/true"]);
    fs::remove_file(bed.path("kernel")).unwrap();
    let log = bed.path("log.json");
    let mut command = Command::new(bulkhead());
    command.arg("--config").arg(bed.path("config.toml"));
    command
        .arg("--log")
        .arg(&log)
        .args(["--log-format", "json", "run", "--bundle"]);
    let mut child = command
        .arg(bed.path("bundle"))
        .arg("c1")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut stderr)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let entry: Value = serde_json::from_str(&fs::read_to_string(log).unwrap()).unwrap();
    assert_eq!(entry["level"], "error");
    let message = entry["msg"].as_str().unwrap();
    assert_eq!(stderr, format!("error: {message}\n"));
    bed.assert_clean();
}

#[test]
fn wrong_command_lines_go_to_the_log_file_too() {
    let bed = Bed::new(&[]);
    for (words, code, expected) in [
        (
            &["create", "--bogus", "c1"][..],
            1,
            "unexpected argument '--bogus' found",
        ),
        (
            &["--bogus", "create", "c1"],
            1,
            "unexpected argument '--bogus' found",
        ),
        (
            &["--debug=false", "create"],
            1,
            "required arguments were not provided: <ID>",
        ),
        (&["nonesuch"], 3, "unrecognized subcommand 'nonesuch'"),
        (
            &["help", "nonesuch"],
            3,
            "unrecognized subcommand 'nonesuch'",
        ),
        (
            &["list", "--format", "xml"],
            1,
            "invalid value 'xml' for '--format <FORMAT>'",
        ),
    ] {
        let log = bed.path("log.json");
        let mut command = Command::new(bulkhead());
        command
            .arg("--log")
            .arg(&log)
            .args(["--log-format", "json"]);
        let output = command.args(words).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}");
        assert!(text(&output.stderr).starts_with("error: "), "{words:?}");
        let entry: Value = serde_json::from_str(&fs::read_to_string(&log).unwrap()).unwrap();
        assert_eq!(entry["level"], "error");
        let message = entry["msg"].as_str().unwrap();
        assert!(message.contains(expected), "{words:?}: {message}");
        fs::remove_file(log).unwrap();
    }
}

#[test]
fn debug_logs_go_to_the_configured_directory() {
    let bed = Bed::new(&["/bin/true"]);
    let directory = bed.path("logs");
    fs::create_dir(&directory).unwrap();
    bed.configure(&format!("debug = true\ndebug_directory = {directory:?}\n"));
    let output = bed.run();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stderr), "");
    for log in ["c1-server.log", "c1-vmm.log", "c1-console.log"] {
        assert!(directory.join(log).exists(), "{log}");
    }
    let server = fs::read_to_string(directory.join("c1-server.log")).unwrap();
    assert!(server.contains("server: cleaned"), "{server}");
}

#[test]
fn a_container_in_the_background_goes_through_its_life() {
    let bed = Bed::new(&["/bin/sh", "-c", "exit 3"]);
    let pid_file = bed.path("pid");
    let created = bed.about(&["create", "--pid-file", pid_file.to_str().unwrap(), "c1"]);
    assert!(created.status.success(), "{}", text(&created.stderr));
    let pid = fs::read_to_string(&pid_file).unwrap();
    assert!(Path::new("/proc").join(&pid).exists());
    for (words, success) in [
        (&["state", "c1"][..], true),
        (&["start", "c1"], true),
        (&["start", "c1"], false),
        (&["state", "c2"], false),
        (&["delete", "--force", "c1"], true),
        (&["delete", "--force", "c1"], true),
        (&["delete", "c1"], false),
    ] {
        let output = bed.about(words);
        let said = text(&output.stderr);
        assert_eq!(output.status.success(), success, "{words:?}: {said}");
        assert_eq!(
            said.lines().count(),
            usize::from(!success),
            "{words:?}: {said}"
        );
    }
    bed.await_clean();
}

#[test]
fn what_a_caller_has_open_is_not_kept_open_by_what_lives_on() {
    let bed = Bed::new(&["/bin/true"]);
    let (mut reader, writer) = std::io::pipe().unwrap();
    let created = Command::new("/bin/sh")
        .args([
            "-c",
            "exec 9<&0 </dev/null >/dev/null 2>&1; exec \"$@\"",
            "sh",
        ])
        .arg(bulkhead())
        .arg("--config")
        .arg(bed.path("config.toml"))
        .args(["create", "c1"])
        .current_dir(bed.path("bundle"))
        .stdin(writer)
        .status()
        .unwrap();
    assert!(created.success());
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(reader.read_to_end(&mut vec![])));
    let ended = receiver.recv_timeout(Duration::from_secs(5));
    let deleted = bed.about(&["delete", "--force", "c1"]);
    assert!(deleted.status.success(), "{}", text(&deleted.stderr));
    assert!(ended.is_ok(), "somebody holds the caller's pipe");
    bed.await_clean();
}

#[test]
fn a_reader_that_has_seen_enough_of_a_list_is_no_failure_to_talk_about() {
    let bed = Bed::new(&["/bin/true"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(bulkhead())
        .arg("--config")
        .arg(bed.path("config.toml"))
        .arg("features")
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(text(&output.stderr), "");
    assert_eq!(output.status.code(), Some(128 + Signal::SIGPIPE as i32));
}

#[test]
fn a_guest_whose_processes_do_not_die_is_deleted_by_force_all_the_same() {
    let bed = Bed::new(&["/bin/true"]);
    let bed = bed.mode("undying");
    let created = bed.about(&["create", "c1"]);
    assert!(created.status.success(), "{}", text(&created.stderr));
    let deleted = Command::new("timeout")
        .arg("20")
        .arg(bulkhead())
        .arg("--config")
        .arg(bed.path("config.toml"))
        .args(["delete", "--force", "c1"])
        .status()
        .unwrap();
    assert_eq!(deleted.code(), Some(0));
    bed.await_clean();
}

#[test]
fn a_container_whose_stand_in_is_killed_has_stopped_even_if_its_guest_does_not_say_so() {
    let bed = Bed::new(&["/bin/true"]);
    let bed = bed.mode("undying");
    let pid_file = bed.path("pid");
    let created = bed.about(&["create", "--pid-file", pid_file.to_str().unwrap(), "c1"]);
    assert!(created.status.success(), "{}", text(&created.stderr));
    let pid = fs::read_to_string(&pid_file).unwrap();
    kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL).unwrap();
    let state = || {
        let output = Command::new(bulkhead())
            .arg("--config")
            .arg(bed.path("config.toml"))
            .args(["state", "c1"])
            .output()
            .unwrap();
        let state: Value = serde_json::from_slice(&output.stdout).unwrap();
        state["status"].clone()
    };
    watch::until(&bed.path(""), &bed.pids(), || state() == "stopped");
    let deleted = bed.about(&["delete", "c1"]);
    assert!(deleted.status.success(), "{}", text(&deleted.stderr));
    bed.await_clean();
}

#[test]
fn a_stand_in_whose_pid_is_known_catches_signals() {
    let bed = Bed::new(&["/bin/true"]);
    let pid_file = bed.path("pid");
    // While the guest has not made the container, nothing but the proxy is there to look at.
    let mut create = Command::new(bulkhead())
        .env("FAKE_VMM", "slow create")
        .arg("--config")
        .arg(bed.path("config.toml"))
        .args(["create", "--pid-file", pid_file.to_str().unwrap(), "c1"])
        .current_dir(bed.path("bundle"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = || recorded(&bed)["pid"].as_u64();
    watch::until(&bed.path(""), &[], || pid().is_some());
    let pid = pid().unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    create.kill().unwrap();
    create.wait().unwrap();
    // They are kept for it to read.
    let blocked = status
        .lines()
        .find_map(|line| line.strip_prefix("SigBlk:"))
        .unwrap();
    let blocked = u64::from_str_radix(blocked.trim(), 16).unwrap();
    assert_ne!(blocked & 1 << (Signal::SIGTERM as u64 - 1), 0);
    bed.await_clean();
}

#[test]
fn a_relative_console_socket_is_where_runc_looks_for_it() {
    let bed = Bed::new(&["/bin/true"]);
    bed.spec(|spec| spec["process"]["terminal"] = json!(true));
    let listen = |path: &str| {
        let listener = UnixListener::bind(bed.path(path)).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    };
    let (in_bundle, here) = (listen("bundle/console"), listen("console"));
    let run = |words: &[&str]| {
        let mut command = bed.bulkhead();
        finish(command.args(words).current_dir(bed.path("")));
    };
    // The stand-in for the VMM has no terminals: they are asked for, and not used.
    let console = ["--console-socket", "console"];
    run(&[&["create", "--bundle", "bundle"], &console[..], &["c1"]].concat());
    assert!(in_bundle.accept().is_ok() && here.accept().is_err());
    let exec = [&["exec", "--detach", "--tty"], &console[..]].concat();
    run(&[&exec[..], &["c1", "/bin/true"]].concat());
    assert!(in_bundle.accept().is_ok() && here.accept().is_err());
    let process = json!({"args": ["/bin/true"], "cwd": "/", "terminal": true});
    fs::write(bed.path("process"), process.to_string()).unwrap();
    run(&[&exec[..], &["--process", "process", "c1"]].concat());
    assert!(in_bundle.accept().is_err() && here.accept().is_ok());
    let deleted = bed.about(&["delete", "--force", "c1"]);
    assert!(deleted.status.success(), "{}", text(&deleted.stderr));
    bed.await_clean();
}

#[test]
fn the_exit_code_is_told_of_a_container_that_somebody_else_deletes_as_its_output_is_written() {
    for flags in [&[][..], &["--keep"]] {
        // More than fits into a pipe, and less than fits into that and a socket.
        let bed = Bed::new(&["/bin/sh", "-c", "head -c 150000 /dev/zero; exit 3"]);
        let mut child = bed.command().args(flags).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let run = Running(Some(child));
        watch::until(&bed.path(""), &[], || recorded(&bed)["status"] == "stopped");
        let deleted = bed.about(&["delete", "c1"]);
        assert!(deleted.status.success(), "{}", text(&deleted.stderr));
        stdout.read_to_end(&mut vec![]).unwrap();
        let output = run.ended();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{flags:?}: {said}");
        bed.await_clean();
    }
}

#[test]
fn the_pid_of_a_container_in_the_foreground_is_its_commands() {
    let bed = Bed::new(&READY);
    let pid_file = bed.path("pid");
    let mut command = bed.command();
    let mut child = command.arg("--pid-file").arg(&pid_file).spawn().unwrap();
    let pid = child.id();
    let mut line = String::new();
    let stdout = child.stdout.take().unwrap();
    BufReader::new(stdout).read_line(&mut line).unwrap();
    let run = Running(Some(child));
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), pid.to_string());
    let told = |words: &[&str]| -> Value {
        let output = bed.about(words);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    assert_eq!(told(&["state", "c1"])["pid"], pid);
    assert_eq!(told(&["list", "--format", "json"])[0]["pid"], pid);
    assert_eq!(told(&["ps", "--format", "json", "c1"]), json!([pid]));
    // Who looks for the container's network by that pid finds it, and not the host's.
    let network = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    let vmm = bed.pid_of("fake-vmm").as_raw().unsigned_abs();
    assert_eq!(network(pid), network(vmm));
    assert_ne!(network(pid), network(std::process::id()));
    run.signal(Signal::SIGTERM);
    assert_eq!(run.ended().status.code(), Some(7));
    bed.assert_clean();
}

#[test]
fn the_guest_of_a_container_that_is_kept_goes_with_its_command() {
    let bed = Bed::new(&["/bin/sh", "-c", "echo ready; read line; exit 3"]);
    let mut command = bed.command();
    let mut child = command.arg("--keep").stdin(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    let stdout = child.stdout.take().unwrap();
    BufReader::new(stdout).read_line(&mut line).unwrap();
    let vmm = bed.pid_of("fake-vmm").as_raw().unsigned_abs();
    drop(child.stdin.take());
    assert_eq!(Running(Some(child)).ended().status.code(), Some(3));
    processes::wait_for_end(&[vmm]);
    let state = bed.about(&["state", "c1"]);
    let state: Value = serde_json::from_slice(&state.stdout).unwrap();
    assert_eq!(
        (&state["status"], &state["pid"]),
        (&json!("stopped"), &json!(0))
    );
    let deleted = bed.about(&["delete", "c1"]);
    assert!(deleted.status.success(), "{}", text(&deleted.stderr));
    bed.await_clean();
}

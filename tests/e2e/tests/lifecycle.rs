//! The life of a container as clients drive it: create, start, exec, signals, pause, limits, delete; where runc defines what
//! comes out, runc runs beside.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{Ended, bulkhead, finish, run_with_input, runc};
use bulkhead_e2e::container::{Container, reap_all, wait_for};
use bulkhead_e2e::leaks::Host;
use bulkhead_e2e::{processes, watch};
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, KillRequest, PauseRequest, ResumeRequest, StartRequest,
    StateRequest, StatsRequest, Status, UpdateTaskRequest, WaitRequest,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::{Value, json};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

#[track_caller]
fn exists(pid: Pid) -> bool {
    kill(pid, None).is_ok()
}

/// Waits until a container has written `text`.
#[track_caller]
fn await_output(container: &Container, text: &str) {
    watch::until(container.files(), &[], || container.stdout().contains(text));
}

#[test]
fn a_container_goes_through_the_states_of_the_spec() {
    let _unchanged = Host::unchanged();
    for runtime in [runc(), bulkhead()] {
        let bundle = Bundle::idle();
        let container = Container::create(runtime, &bundle);
        let state = container.state();
        assert_eq!(state["status"], "created");
        assert_eq!(state["pid"], container.pid.as_raw());
        assert_eq!(state["bundle"], bundle.path().to_str().unwrap());
        assert_eq!(state["id"], container.id);
        assert_eq!(container.stdout(), "");
        container.command(&["start"]).expect_code(0);
        assert_eq!(container.status(), "running");
        await_output(&container, "ready\n");
        container.command_with(&["kill"], &["TERM"]).expect_code(0);
        assert_eq!(container.wait(), 5);
        let state = container.state();
        assert_eq!(
            (&state["status"], &state["pid"]),
            (&json!("stopped"), &json!(0))
        );
        container.command(&["delete"]).expect_code(0);
        container.command(&["state"]).expect_code(1);
    }
}

#[test]
fn the_exit_codes_of_misuse_are_runcs() {
    let _unchanged = Host::unchanged();
    let codes = |runtime: PathBuf| -> Vec<(&'static str, i32)> {
        let container = Container::create(runtime.clone(), Bundle::idle());
        let mut codes = vec![
            ("exec before start", container.exec(&["true"]).code),
            (
                "kill 0 before start",
                container.command_with(&["kill"], &["0"]).code,
            ),
            ("pause before start", container.command(&["pause"]).code),
            ("start", container.command(&["start"]).code),
            ("start twice", container.command(&["start"]).code),
            ("delete running", container.command(&["delete"]).code),
            ("resume running", container.command(&["resume"]).code),
            (
                "update of a realtime quota",
                container
                    .command(&["update", "--cpu-rt-period", "1000000"])
                    .code,
            ),
            ("exec", container.exec(&["sh", "-c", "exit 3"]).code),
            (
                "exec killed",
                container.exec(&["sh", "-c", "kill -9 $$"]).code,
            ),
            ("exec missing", container.exec(&["nonesuch"]).code),
            ("exec directory", container.exec(&["/etc"]).code),
            (
                "kill unknown signal",
                container.command_with(&["kill"], &["NONE"]).code,
            ),
            ("kill 0", container.command_with(&["kill"], &["0"]).code),
            ("kill", container.command_with(&["kill"], &["9"]).code),
        ];
        assert_eq!(container.wait(), 137);
        codes.extend([
            (
                "kill stopped",
                container.command_with(&["kill"], &["9"]).code,
            ),
            (
                "kill 0 stopped",
                container.command_with(&["kill"], &["0"]).code,
            ),
            (
                "kill all of stopped",
                container.command_with(&["kill", "--all"], &["9"]).code,
            ),
            ("exec stopped", container.exec(&["true"]).code),
            ("start stopped", container.command(&["start"]).code),
            ("pause stopped", container.command(&["pause"]).code),
            ("delete", container.command(&["delete"]).code),
            ("delete again", container.command(&["delete"]).code),
            (
                "delete by force again",
                container.command(&["delete", "--force"]).code,
            ),
            ("state of unknown", container.command(&["state"]).code),
            (
                "kill unknown",
                container.command_with(&["kill"], &["9"]).code,
            ),
            ("exec unknown", container.exec(&["true"]).code),
        ]);
        codes
    };
    assert_eq!(codes(bulkhead()), codes(runc()));
}

#[test]
fn an_id_is_taken_until_its_container_is_deleted() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::idle();
    let container = Container::create(bulkhead(), &bundle);
    let mut again = container.prepare(
        &["create", "--bundle", bundle.path().to_str().unwrap()],
        &[],
    );
    let ended = finish(again.stdin(Stdio::null())).expect_code(1);
    assert!(ended.stderr.contains("already exists"), "{}", ended.stderr);
    assert_eq!(container.status(), "created");
}

#[test]
fn a_created_container_is_deleted_without_having_run() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::shell("echo ran > /ran");
    let container = Container::create(bulkhead(), &bundle);
    container.command(&["delete"]).expect_code(0);
    container.wait();
    assert!(!bundle.in_root("ran").exists());
}

#[test]
fn a_container_that_is_said_to_have_stopped_can_be_deleted_at_once() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::shell("trap 'exit 5' USR1; echo ready; sleep 1000 & wait $!");
    for signal in ["KILL", "USR1", "KILL", "USR1"] {
        let container = Container::running(bulkhead(), &bundle);
        watch::until(container.files(), &[], || container.stdout() == "ready\n");
        container.command_with(&["kill"], &[signal]).expect_code(0);
        let stopped = || container.status() == "stopped";
        watch::until(Path::new("/run/bulkhead"), &[], stopped);
        container.command(&["delete"]).expect_code(0);
        container.wait();
    }
}

#[test]
fn lists_and_states_have_runcs_fields() {
    let _unchanged = Host::unchanged();
    let keys =
        |value: &Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
    let mut found = Vec::new();
    for runtime in [runc(), bulkhead()] {
        let mut bundle = Bundle::idle();
        bundle.config["annotations"] = json!({"some": "note"});
        let container = Container::running(runtime.clone(), &bundle);
        let list = finish(std::process::Command::new(&runtime).args(["list", "--format=json"]));
        let list: Value = serde_json::from_str(&list.expect_code(0).stdout).unwrap();
        let ours = list
            .as_array()
            .unwrap()
            .iter()
            .find(|one| one["id"] == container.id.as_str());
        let ps = container
            .command(&["ps", "--format", "json"])
            .expect_code(0);
        let pids: Vec<i32> = serde_json::from_str(&ps.stdout).unwrap();
        assert!(pids.contains(&container.pid.as_raw()), "{pids:?}");
        // What follows the id is for ps(1), here for columns of which the pid is not the first.
        let table = container
            .command_with(&["ps"], &["-o", "comm,pid"])
            .expect_code(0);
        let mut rows = table
            .stdout
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        assert_eq!(rows.next().unwrap(), ["COMMAND", "PID"]);
        let listed: Vec<i32> = rows.map(|row| row[1].parse().unwrap()).collect();
        assert!(listed.contains(&container.pid.as_raw()), "{listed:?}");
        assert!(!listed.contains(&Pid::this().as_raw()), "{listed:?}");
        let quiet =
            finish(std::process::Command::new(&runtime).args(["list", "-q"])).expect_code(0);
        assert!(quiet.stdout.lines().any(|line| line == container.id));
        assert_eq!(container.state()["annotations"], json!({"some": "note"}));
        found.push((keys(&container.state()), keys(ours.unwrap())));
    }
    assert_eq!(found[1], found[0]);
    let empty = finish(std::process::Command::new(bulkhead()).args([
        "--root",
        "/run/none",
        "list",
        "-f",
        "json",
    ]));
    assert_eq!(empty.expect_code(0).stdout, "null\n");
}

/// What a command of a runtime that is about no container prints.
#[track_caller]
fn printed(runtime: &Path, arguments: &[&str]) -> String {
    let mut command = std::process::Command::new(runtime);
    finish(command.args(arguments)).expect_code(0).stdout
}

#[test]
fn features_name_every_mount_option_of_runcs() {
    let _unchanged = Host::unchanged();
    let options = |runtime: PathBuf| -> BTreeSet<String> {
        let features: Value = serde_json::from_str(&printed(&runtime, &["features"])).unwrap();
        serde_json::from_value(features["mountOptions"].clone()).unwrap()
    };
    let (ours, theirs) = (options(bulkhead()), options(runc()));
    let missing: Vec<_> = theirs.difference(&ours).collect();
    assert!(missing.is_empty(), "{missing:?}");
    // What runc 1.1 does not know yet.
    let further: Vec<_> = ours.difference(&theirs).collect();
    assert_eq!(further, ["idmap", "ridmap"]);
}

#[test]
fn the_config_to_begin_with_is_runcs_but_for_the_hosts_name() {
    let _unchanged = Host::unchanged();
    let [theirs, ours] = [runc(), bulkhead()].map(|runtime| {
        let folder = tempfile::tempdir().unwrap();
        let bundle = folder.path().to_str().unwrap();
        assert_eq!(printed(&runtime, &["spec", "--bundle", bundle]), "");
        let text = fs::read(folder.path().join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        let hostname = config.as_object_mut().unwrap().remove("hostname").unwrap();
        (config, hostname)
    });
    assert_eq!(ours.0, theirs.0);
    assert_eq!((ours.1, theirs.1), (json!("bulkhead"), json!("runc")));
}

#[test]
fn an_executed_process_is_as_under_runc() {
    let _unchanged = Host::unchanged();
    let results = |runtime: PathBuf| -> Vec<(i32, String)> {
        let container = Container::running(runtime, Bundle::idle());
        let run = |flags: &[&str], args: &[&str]| {
            let ended = container.command_with(&[&["exec"], flags].concat(), args);
            (ended.code, ended.stdout)
        };
        vec![
            run(&[], &["sh", "-c", "echo out; echo err >&2; exit 7"]),
            run(&["--user", "1000:1000", "--additional-gids", "7"], &["id"]),
            run(
                &["--cwd", "/tmp", "--env", "A=b"],
                &["sh", "-c", "pwd; echo $A; echo $HOME"],
            ),
            run(&["--user", "1000"], &["sh", "-c", "echo $HOME"]),
            run(
                &[],
                &[
                    "grep",
                    "-E",
                    "^(Cap|NoNewPrivs|Seccomp:)",
                    "/proc/self/status",
                ],
            ),
            run(
                &["--cap", "CAP_CHOWN"],
                &["grep", "CapEff", "/proc/self/status"],
            ),
            run(
                &[],
                &[
                    "sh",
                    "-c",
                    "readlink /proc/self/ns/pid | cut -c1-4; ls /proc/1/root | wc -l; hostname",
                ],
            ),
            run(&[], &["cat", "/proc/self/cgroup"]),
            run(&[], &["tty"]),
        ]
    };
    assert_eq!(results(bulkhead()), results(runc()));
}

#[test]
fn executed_processes_stream_both_ways_and_their_exit_comes_after_the_last_byte() {
    let _unchanged = Host::unchanged();
    let container = Container::running(bulkhead(), Bundle::idle());
    let mut child = container
        .prepare(&["exec"], &["sh", "-c", "cat; echo end; seq 1 100000"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdin.write_all(b"hello\n").unwrap();
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "hello\n");
    drop(stdin);
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    let expected: String = std::iter::once("end\n".to_owned())
        .chain((1..=100_000).map(|n| format!("{n}\n")))
        .collect();
    assert!(rest == expected);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_detached_process_has_a_stand_in_that_clients_can_wait_for_and_signal() {
    let _unchanged = Host::unchanged();
    let container = Container::running(bulkhead(), Bundle::idle());
    let pid_file = container.files().join("exec-pid");
    let flags = ["exec", "--detach", "--pid-file", pid_file.to_str().unwrap()];
    let exec = |script: &str| {
        let mut command = container.prepare(&flags, &["sh", "-c", script]);
        let log = fs::File::create(container.files().join("log")).unwrap();
        let status = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .status();
        let log = fs::read_to_string(container.files().join("log")).unwrap();
        assert!(status.unwrap().success(), "{log}");
        Pid::from_raw(fs::read_to_string(&pid_file).unwrap().parse().unwrap())
    };
    assert_eq!(
        wait_for(exec("exit 9")),
        9,
        "{}",
        fs::read_to_string(container.files().join("log")).unwrap()
    );
    let trapped =
        exec("trap 'exit 4' TERM; touch /tmp/trapped; while :; do sleep 1000 & wait $!; done");
    container
        .shell("while [ ! -e /tmp/trapped ]; do :; done")
        .expect_code(0);
    kill(trapped, Signal::SIGTERM).unwrap();
    assert_eq!(wait_for(trapped), 4);
    let killed = exec("exec sleep 1234");
    kill(killed, Signal::SIGKILL).unwrap();
    assert_eq!(wait_for(killed), 137);
    // The guest's process goes too, a moment later.
    container
        .shell("while ps | grep -q '[s]leep 1234'; do :; done")
        .expect_code(0);
    assert_eq!(container.status(), "running");
}

#[test]
fn signals_to_the_stand_in_reach_the_container() {
    let _unchanged = Host::unchanged();
    let container = Container::running(bulkhead(), Bundle::idle());
    await_output(&container, "ready\n");
    kill(container.pid, Signal::SIGUSR1).unwrap();
    await_output(&container, "usr1\n");
    kill(container.pid, Signal::SIGTERM).unwrap();
    assert_eq!(container.wait(), 5);
}

#[test]
fn whatever_can_be_caught_reaches_the_container_through_its_stand_in() {
    let _unchanged = Host::unchanged();
    const NAMES: &str = "HUP INT QUIT ILL TRAP ABRT BUS FPE USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT TSTP TTIN TTOU URG \
                         XCPU XFSZ VTALRM PROF WINCH IO PWR SYS";
    let script = format!(
        "for s in {NAMES}; do trap \"echo got $s.\" $s; done; echo ready; sleep 1000 & while :; do wait $!; done"
    );
    for runtime in [runc(), bulkhead()] {
        let container = Container::running(runtime, Bundle::shell(&script));
        await_output(&container, "ready\n");
        for name in NAMES.split_whitespace() {
            let signal: Signal = format!("SIG{name}").parse().unwrap();
            kill(container.pid, signal).unwrap();
            await_output(&container, &format!("got {name}.\n"));
        }
        assert_eq!(container.status(), "running");
    }
}

#[test]
fn killing_the_stand_in_kills_the_container() {
    let _unchanged = Host::unchanged();
    let container = Container::running(bulkhead(), Bundle::idle());
    kill(container.pid, Signal::SIGKILL).unwrap();
    assert_eq!(container.wait(), 137);
    processes::wait_for_end(&processes::named("bulkhead-vmm"));
    assert_eq!(container.status(), "stopped");
    container.command(&["delete"]).expect_code(0);
}

#[test]
fn a_deletion_lets_a_stand_in_write_what_its_container_has_written() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::shell("echo last words; exit 3");
    let (mut stdout, mut theirs) = std::io::pipe().unwrap();
    // Full, so that nothing can be written until somebody reads.
    let room = fcntl(&theirs, FcntlArg::F_GETPIPE_SZ).unwrap();
    let filling = vec![b'x'; usize::try_from(room).unwrap()];
    theirs.write_all(&filling).unwrap();
    let null = || Stdio::from(fs::File::options().write(true).open("/dev/null").unwrap());
    let streams = [Stdio::null(), theirs.into(), null()];
    let container = Container::create_on(bulkhead(), &bundle, streams);
    container.command(&["start"]).expect_code(0);
    let stopped = || container.status() == "stopped";
    watch::until(Path::new("/run/bulkhead"), &[], stopped);

    let vmms = processes::named("bulkhead-vmm");
    assert_eq!(vmms.len(), 1, "its output is not written");
    let mut deletion = container.prepare(&["delete"], &[]).spawn().unwrap();
    processes::wait_for_end(&vmms);
    let waiting = processes::open(deletion.id()).unwrap();
    let mut waiting = [PollFd::new(waiting.as_fd(), PollFlags::POLLIN)];
    let ended = poll(&mut waiting, PollTimeout::from(200_u16)).unwrap();
    assert_eq!(ended, 0, "there is output that nobody has read");
    let mut written = Vec::new();
    stdout.read_to_end(&mut written).unwrap();
    assert_eq!(written.split_off(filling.len()), b"last words\n");
    assert!(deletion.wait().unwrap().success());
    assert_eq!(container.wait(), 3);
}

#[test]
fn a_stopped_container_holds_no_machine_and_keeps_its_state() {
    let _unchanged = Host::unchanged();
    let container = Container::running(bulkhead(), Bundle::shell("echo done; exit 3"));
    assert_eq!(container.wait(), 3);
    processes::wait_for_end(&processes::named("bulkhead-vmm"));
    assert_eq!(container.stdout(), "done\n");
    assert_eq!(container.status(), "stopped");
}

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

#[test]
fn a_process_from_a_file_need_not_name_what_runc_fills_in() {
    let _unchanged = Host::unchanged();
    let exec = |container: &Container, process: Value| {
        let file = container.files().join("process.json");
        fs::write(&file, process.to_string()).unwrap();
        container.command(&["exec", "--process", file.to_str().unwrap()])
    };
    for runtime in [runc(), bulkhead()] {
        let mut bundle = Bundle::idle();
        bundle.config["process"]["user"] = Value::Null;
        let container = Container::running(runtime, &bundle);
        let who = container.exec(&["/bin/id", "-u"]).expect_code(0);
        assert_eq!(who.stdout, "0\n");
        for user in [
            json!({}),
            json!({"user": null}),
            json!({"user": {"gid": 0}}),
        ] {
            let mut process = json!({"args": ["/bin/id", "-u"], "cwd": "/", "env": null});
            process
                .as_object_mut()
                .unwrap()
                .extend(user.as_object().unwrap().clone());
            assert_eq!(exec(&container, process).expect_code(0).stdout, "0\n");
        }
        let secret = json!({"args": ["/bin/id"], "cwd": "/", "env": "PASSWORD=x"});
        let ended = exec(&container, secret).expect_code(255);
        assert!(!ended.stderr.contains("PASSWORD"), "{}", ended.stderr);
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
fn statistics_have_runcs_form_and_true_numbers() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::busybox(&["sleep", "1000"]);
    bundle.config["linux"]["resources"]["memory"] = json!({"limit": 67_108_864});
    for runtime in [runc(), bulkhead()] {
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
    }
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
fn hooks_run_in_the_order_of_the_spec_with_the_state_on_standard_input() {
    let _unchanged = Host::unchanged();
    // A poststart hook runs beside the container, which therefore waits for it here.
    let mut bundle =
        Bundle::shell("while [ ! -e /order.poststart.ran ]; do :; done; echo container >> /order");
    let order = bundle.in_root("order");
    let log = order.to_str().unwrap().to_owned();
    let hook = |name: &str| {
        let script = format!("cat > {log}.{name}; echo {name} >> {log}; echo > {log}.{name}.ran");
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
    };
    bundle.config["hooks"] = json!({
        "prestart": hook("prestart"), "createRuntime": hook("createRuntime"), "createContainer": hook("createContainer"),
        "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "echo startContainer >> /order"]}],
        "poststart": hook("poststart"), "poststop": hook("poststop"),
    });
    let container = Container::running(bulkhead(), &bundle);
    assert_eq!(container.wait(), 0);
    container.command(&["delete"]).expect_code(0);
    assert_eq!(
        fs::read_to_string(&order).unwrap(),
        "prestart\ncreateRuntime\ncreateContainer\nstartContainer\npoststart\ncontainer\npoststop\n"
    );
    let state = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(format!("{log}.{name}")).unwrap()).unwrap()
    };
    for (name, status) in [
        ("prestart", "creating"),
        ("createRuntime", "creating"),
        ("createContainer", "creating"),
        ("poststart", "running"),
    ] {
        let state = state(name);
        assert_eq!(state["id"], container.id.as_str(), "{name}");
        assert_eq!(state["pid"], container.pid.as_raw(), "{name}");
        assert_eq!(state["status"], status, "{name}");
    }
    assert_eq!(state("poststop")["status"], "stopped");
}

#[test]
fn a_hook_that_fails_before_the_start_undoes_the_container() {
    let unchanged = Host::unchanged();
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let mut bundle = Bundle::idle();
        bundle.config["hooks"] =
            json!({kind: [{"path": "/bin/sh", "args": ["sh", "-c", "echo no luck >&2; exit 3"]}]});
        let Err(ended) = Container::try_create(bulkhead(), &bundle, &[]) else {
            panic!("{kind}: created all the same");
        };
        assert_eq!(ended.code, 1);
        assert!(
            ended.stderr.contains(kind) && ended.stderr.contains("no luck"),
            "{}",
            ended.stderr
        );
        reap_all();
        unchanged.at_once(kind);
    }
}

#[test]
fn a_hook_that_fails_after_the_start_is_logged_and_changes_nothing() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell("read line; exit 6");
    let seen = bundle.in_root("seen").to_str().unwrap().to_owned();
    // Those behind it run all the same.
    let hooks = |kind: &str| {
        let scripts = [
            format!("echo no luck {kind} >&2; exit 3"),
            format!("echo {kind} >> {seen}"),
        ];
        let hooks = scripts.map(|script| json!({"path": "/bin/sh", "args": ["sh", "-c", script]}));
        json!(hooks)
    };
    bundle.config["hooks"] =
        json!({"poststart": hooks("poststart"), "poststop": hooks("poststop")});
    let told = |log: &str, kind: &str| {
        let told =
            log.contains(&format!("hooks.{kind}[0]")) && log.contains(&format!("no luck {kind}"));
        assert!(told, "{kind}: {log}");
    };

    let (input, mut line) = std::io::pipe().unwrap();
    let null = || Stdio::from(fs::File::options().write(true).open("/dev/null").unwrap());
    let container = Container::create_on(bulkhead(), &bundle, [input.into(), null(), null()]);
    container.command(&["start"]).expect_code(0);
    assert_eq!(container.status(), "running");
    let log = format!("/run/bulkhead/{}/server.log", container.id);
    told(&fs::read_to_string(log).unwrap(), "poststart");
    line.write_all(b"go on\n").unwrap();
    assert_eq!(container.wait(), 6);
    container.command(&["delete"]).expect_code(0);
    assert_eq!(fs::read_to_string(&seen).unwrap(), "poststart\npoststop\n");
    drop(container);

    let ended = run_with_input(&bundle, b"go on\n").expect_code(6);
    told(&ended.stderr, "poststart");
    told(&ended.stderr, "poststop");
}

#[test]
fn when_a_part_of_the_sandbox_is_killed_the_container_is_stopped_and_can_be_deleted() {
    let unchanged = Host::unchanged();
    for victim in ["bulkhead-vmm", "containerd-shim-bulkhead-v2"] {
        let container = Container::running(bulkhead(), Bundle::idle());
        await_output(&container, "ready\n");
        let pids = processes::named(victim);
        assert_eq!(pids.len(), 1, "{victim}");
        kill(Pid::from_raw(pids[0].cast_signed()), Signal::SIGKILL).unwrap();
        assert_eq!(
            container.wait(),
            255,
            "{victim}: a client that waits learns of the end"
        );
        assert_eq!(container.status(), "stopped", "{victim}");
        container.command(&["delete", "--force"]).expect_code(0);
        drop(container);
        unchanged.at_once(victim);
    }
}

#[test]
fn a_guest_that_panics_stops_its_container_and_touches_no_other() {
    let _unchanged = Host::unchanged();
    let other = Container::running(bulkhead(), Bundle::idle());
    let mut bundle = Bundle::idle();
    bundle.config["linux"]["resources"] = json!({"memory": {"limit": 33_554_432}});
    bundle.config["annotations"] = json!({
        "io.bulkhead.kernel_arguments": "sysctl.vm.panic_on_oom=2", "io.bulkhead.memory_mib": "128",
    });
    let container = Container::running(bulkhead(), &bundle);
    await_output(&container, "ready\n");
    let ended = container.shell("head -c 50m /dev/zero | tail -c 45m > /dev/null");
    assert_ne!(ended.code, 0);
    assert_eq!(container.wait(), 255);
    assert_eq!(container.status(), "stopped");
    container.command(&["delete"]).expect_code(0);
    assert_eq!(other.shell("echo alive").stdout, "alive\n");
}

#[test]
fn two_containers_do_not_touch_each_other() {
    let _unchanged = Host::unchanged();
    let one = Container::running(bulkhead(), Bundle::idle());
    let other = Container::running(bulkhead(), Bundle::idle());
    let vmms = processes::named("bulkhead-vmm");
    assert_eq!(vmms.len(), 2);
    one.command(&["delete", "--force"]).expect_code(0);
    assert!(exists(other.pid));
    assert_eq!(other.shell("echo alive").stdout, "alive\n");
}

/// The server of a sandbox, as engines call it that put several containers into one.
struct Server {
    runtime: tokio::runtime::Runtime,
    tasks: TaskClient,
}

impl Server {
    fn of(container: &Container) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let socket = format!("/run/bulkhead/{}/task.sock", container.id);
        let stream = UnixStream::connect(socket).unwrap();
        let tasks = runtime
            .block_on(async { TaskClient::new(Client::new(Socket::try_from(stream).unwrap())) });
        Self { runtime, tasks }
    }

    fn call<T>(
        &self,
        call: impl AsyncFnOnce(&TaskClient) -> ttrpc::Result<T>,
    ) -> Result<T, String> {
        let answer = self.runtime.block_on(call(&self.tasks));
        answer.map_err(|error| error.to_string())
    }

    fn create(&self, id: &str, bundle: &Bundle) -> Result<u32, String> {
        let request = CreateTaskRequest {
            id: id.to_owned(),
            bundle: bundle.path().to_str().unwrap().to_owned(),
            ..Default::default()
        };
        let answer = self.call(async |tasks| tasks.create(Context::default(), &request).await);
        answer.map(|answer| answer.pid)
    }

    fn start(&self, id: &str) {
        let request = StartRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.call(async |tasks| tasks.start(Context::default(), &request).await)
            .unwrap();
    }

    fn pause(&self, id: &str) {
        let request = PauseRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.call(async |tasks| tasks.pause(Context::default(), &request).await)
            .unwrap();
    }

    fn resume(&self, id: &str) {
        let request = ResumeRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.call(async |tasks| tasks.resume(Context::default(), &request).await)
            .unwrap();
    }

    fn status(&self, id: &str) -> Status {
        let request = StateRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = self.call(async |tasks| tasks.state(Context::default(), &request).await);
        answer.unwrap().status.unwrap()
    }

    fn signal(&self, id: &str, signal: Signal) {
        let request = KillRequest {
            id: id.to_owned(),
            signal: (signal as i32).unsigned_abs(),
            ..Default::default()
        };
        self.call(async |tasks| tasks.kill(Context::default(), &request).await)
            .unwrap();
    }

    fn limit_pids(&self, id: &str, limit: u64) {
        let resources = Any {
            value: json!({"pids": {"limit": limit}}).to_string().into_bytes(),
            ..Default::default()
        };
        let request = UpdateTaskRequest {
            id: id.to_owned(),
            resources: MessageField::some(resources),
            ..Default::default()
        };
        self.call(async |tasks| tasks.update(Context::default(), &request).await)
            .unwrap();
    }

    fn pids_limit(&self, id: &str) -> u64 {
        let request = StatsRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = self.call(async |tasks| tasks.stats(Context::default(), &request).await);
        let metrics = Metrics::parse_from_bytes(&answer.unwrap().stats.value).unwrap();
        metrics.pids.limit
    }

    fn wait(&self, id: &str) -> u32 {
        let request = WaitRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = self.call(async |tasks| tasks.wait(Context::default(), &request).await);
        answer.unwrap().exit_status
    }

    fn delete(&self, id: &str) {
        let request = DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.call(async |tasks| tasks.delete(Context::default(), &request).await)
            .unwrap();
    }
}

/// How many mounts the server of a container's sandbox has.
fn mounts_of_server(container: &Container) -> usize {
    let pid = fs::read_to_string(format!("/run/bulkhead/{}/server.pid", container.id)).unwrap();
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    mounts.lines().count()
}

/// One that joins namespaces of the container that a process stands for, and tells of signals in a file.
fn beside(pid: Pid) -> Bundle {
    let mut bundle = Bundle::shell(
        "trap 'echo >>/signals' USR1; echo $(readlink /proc/self/ns/ipc) $(hostname) >/joined; echo >/ready; \
         while :; do sleep 1000 & wait $!; done",
    );
    for namespace in bundle.config["linux"]["namespaces"].as_array_mut().unwrap() {
        for kind in ["ipc", "uts"] {
            if namespace["type"] == kind {
                namespace["path"] = json!(format!("/proc/{pid}/ns/{kind}"));
            }
        }
    }
    bundle.config.as_object_mut().unwrap().remove("hostname");
    bundle.write();
    bundle
}

#[test]
fn containers_of_one_sandbox_join_namespaces_and_are_paused_each_by_itself() {
    let _unchanged = Host::unchanged();
    let first = Container::running(bulkhead(), Bundle::idle());
    await_output(&first, "ready\n");
    let server = Server::of(&first);
    let bundle = beside(first.pid);
    let signals = bundle.in_root("signals");
    let signalled = |times: usize| {
        watch::until(&bundle.in_root(""), &[], || {
            fs::read(&signals).is_ok_and(|bytes| bytes.len() == times)
        });
    };

    // Of one that fails nothing is left.
    let mounts = mounts_of_server(&first);
    let mut missing = beside(first.pid);
    missing.config["process"]["args"] = json!(["/nonesuch"]);
    let refused = server.create("second", missing.write()).unwrap_err();
    assert!(refused.contains("/nonesuch"), "{refused}");
    let foreign = beside(Pid::this());
    let refused = server.create("second", &foreign).unwrap_err();
    assert!(refused.contains("namespace of the host"), "{refused}");
    let mut large = beside(first.pid);
    large.config["linux"]["resources"] = json!({"memory": {"limit": 1_u64 << 40}});
    let refused = server.create("second", large.write()).unwrap_err();
    assert!(refused.contains("do not fit"), "{refused}");
    let mut other = beside(first.pid);
    other.config["annotations"] = json!({"io.bulkhead.vcpus": "1"});
    let refused = server.create("second", other.write()).unwrap_err();
    assert!(refused.contains("first container"), "{refused}");
    assert_eq!(mounts_of_server(&first), mounts);

    server.create("second", &bundle).unwrap();
    assert!(mounts_of_server(&first) > mounts);
    server.start("second");
    watch::until(&bundle.in_root(""), &[], || {
        bundle.in_root("ready").exists()
    });
    let joined = fs::read_to_string(bundle.in_root("joined")).unwrap();
    let own = first.shell("echo $(readlink /proc/self/ns/ipc) $(hostname)");
    assert_eq!(joined, own.expect_code(0).stdout);

    server.pause("second");
    assert_eq!(server.status("second"), Status::PAUSED);
    assert_eq!(first.status(), "running");
    server.signal("second", Signal::SIGUSR1);
    server.limit_pids("second", 100);
    assert_eq!(server.pids_limit("second"), 100);
    assert_eq!(first.shell("echo alive").stdout, "alive\n");
    assert!(!signals.exists(), "it runs");
    server.resume("second");
    signalled(1);

    first.command(&["pause"]).expect_code(0);
    assert_eq!(first.status(), "paused");
    server.signal("second", Signal::SIGUSR1);
    signalled(2);
    server.pause("second");
    server.signal("second", Signal::SIGKILL);
    assert_eq!(server.wait("second"), 137);
    server.delete("second");
    assert_eq!(mounts_of_server(&first), mounts);
    first.command(&["resume"]).expect_code(0);
    assert_eq!(first.shell("echo alive").stdout, "alive\n");

    first.command(&["pause"]).expect_code(0);
    let third = beside(first.pid);
    let refused = server.create("third", &third).unwrap_err();
    assert!(refused.contains("resume it first"), "{refused}");
    first.command(&["resume"]).expect_code(0);

    // One that has stopped is asked about no less than one that runs.
    server.create("third", &third).unwrap();
    server.signal("third", Signal::SIGKILL);
    server.wait("third");
    first.command(&["pause"]).expect_code(0);
    server.delete("third");
    first.command(&["resume"]).expect_code(0);

    // The first is the sandbox's, and goes last.
    server.create("fourth", &third).unwrap();
    first.command_with(&["kill"], &["KILL"]).expect_code(0);
    assert_eq!(first.wait(), 137);
    let refused = first.command(&["delete"]).expect_code(1);
    assert!(
        refused.stderr.contains("before the others"),
        "{}",
        refused.stderr
    );
    server.delete("fourth");
    first.command(&["delete"]).expect_code(0);
}

#[test]
fn a_foreground_container_can_be_kept() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::shell("exit 6");
    bundle.write();
    let mut run = std::process::Command::new(bulkhead());
    run.args([
        "run",
        "--keep",
        "--bundle",
        bundle.path().to_str().unwrap(),
        "kept",
    ]);
    finish(run.stdin(Stdio::null())).expect_code(6);
    let state =
        finish(std::process::Command::new(bulkhead()).args(["state", "kept"])).expect_code(0);
    assert!(state.stdout.contains("\"stopped\""), "{}", state.stdout);
    finish(std::process::Command::new(bulkhead()).args(["delete", "kept"])).expect_code(0);
}

#[test]
fn whoever_enters_the_mount_namespace_of_the_pid_sees_the_containers_files_and_not_the_hosts() {
    let _unchanged = Host::unchanged();
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("in-volume"), "volume\n").unwrap();
    for runtime in [runc(), bulkhead()] {
        let mut bundle = Bundle::idle();
        fs::write(bundle.in_root("in-root"), "root\n").unwrap();
        // What an image's links name is the image's.
        symlink("/", bundle.in_root("link")).unwrap();
        let mounts = bundle.config["mounts"].as_array_mut().unwrap();
        for (destination, options) in [
            ("/volume", json!(["rbind", "ro"])),
            ("/link/new/volume", json!(["bind"])),
        ] {
            mounts.push(json!({"destination": destination, "type": "bind", "source": volume.path(), "options": options}));
        }
        let container = Container::running(runtime, &bundle);
        let script = "cat /in-root /volume/in-volume /new/volume/in-volume; echo client > /from-client; \
                      echo x > /volume/x || echo read-only; test -e /link/etc/debian_version || echo own";
        let ended = finish(
            Command::new("nsenter")
                .arg(format!("--mount=/proc/{}/ns/mnt", container.pid))
                .args(["/bin/sh", "-c", script]),
        );
        assert_eq!(
            ended.stdout, "root\nvolume\nvolume\nread-only\nown\n",
            "{ended:?}"
        );
        assert_eq!(container.shell("cat /from-client").stdout, "client\n");
        let root = PathBuf::from(format!("/proc/{}/root", container.pid));
        assert_eq!(fs::read_to_string(root.join("in-root")).unwrap(), "root\n");
    }
    assert!(!Path::new("/from-client").exists());
    assert!(!Path::new("/new").exists());
}

#[test]
fn an_engines_default_apparmor_profile_is_ignored_by_exec_too() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::idle();
    bundle.config["process"]["apparmorProfile"] = json!("docker-default");
    let container = Container::running(bulkhead(), &bundle);
    container.exec(&["true"]).expect_code(0);
    let process = container.files().join("process.json");
    let described = |profile: &str| {
        let user = json!({"uid": 0, "gid": 0});
        json!({"args": ["/bin/true"], "cwd": "/", "user": user, "apparmorProfile": profile})
    };
    for (profile, code) in [("containers-default-0.50.1", 0), ("mine", 255)] {
        fs::write(&process, described(profile).to_string()).unwrap();
        let exec = ["exec", "--process", process.to_str().unwrap()];
        container.command(&exec).expect_code(code);
    }
}

#[test]
fn the_output_of_an_executed_process_outlives_the_containers_init() {
    let _unchanged = Host::unchanged();
    const WRITTEN: usize = 200_000;
    let bundle = Bundle::idle();
    let container = Container::running(bulkhead(), &bundle);
    await_output(&container, "ready");
    let vmms = processes::named("bulkhead-vmm");
    let script = format!("head -c {WRITTEN} /dev/zero; echo > /written; exec sleep 1000");
    let mut exec = container.prepare(&["exec"], &["sh", "-c", &script]);
    let mut exec = exec
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let written = bundle.in_root("written");
    watch::until(&bundle.in_root(""), &[], || written.exists());
    container.command_with(&["kill"], &["TERM"]).expect_code(0);
    assert_eq!(container.wait(), 5);
    assert_eq!(container.status(), "stopped");
    // More than fits into a pipe has not been read yet.
    let mut output = Vec::new();
    let stdout = exec.stdout.as_mut().unwrap();
    stdout.read_to_end(&mut output).unwrap();
    assert_eq!(output.len(), WRITTEN);
    assert_eq!(exec.wait().unwrap().code(), Some(137));
    processes::wait_for_end(&vmms);
}

#[test]
fn files_of_a_container_that_is_deleted_from_a_sandbox_are_held_no_longer() {
    let _unchanged = Host::unchanged();
    const FILES: usize = 500;
    let first = Container::running(bulkhead(), Bundle::idle());
    await_output(&first, "ready\n");
    let server = Server::of(&first);
    let vmm = processes::named("bulkhead-vmm");
    let descriptors = || {
        let entries = fs::read_dir(format!("/proc/{}/fd", vmm[0])).unwrap();
        entries.count()
    };
    let volume = tempfile::tempdir().unwrap();
    for file in 0..FILES {
        fs::write(volume.path().join(file.to_string()), "").unwrap();
    }
    let mut bundle = Bundle::shell("ls -l /volume >/seen; mv /seen /ready; exec sleep 100000");
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/volume", "source": volume.path(), "options": ["bind"]}));
    let before = descriptors();
    server.create("second", bundle.write()).unwrap();
    server.start("second");
    watch::until(&bundle.in_root(""), &[], || {
        bundle.in_root("ready").exists()
    });
    assert!(descriptors() >= before + FILES);
    server.signal("second", Signal::SIGKILL);
    server.wait("second");
    server.delete("second");
    // The guest has said that it has forgotten them, and its requests are on their way.
    let start = std::time::Instant::now();
    while descriptors() > before + FILES / 10 {
        assert!(
            start.elapsed().as_secs() < 60,
            "{} of {before}",
            descriptors()
        );
        first.shell("true").expect_code(0);
    }
}

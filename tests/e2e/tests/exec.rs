//! Further processes in a container: as under runc, in the foreground and behind stand-ins.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{bulkhead, runc};
use bulkhead_e2e::container::{Container, wait_for};
use bulkhead_e2e::leaks::Host;
use bulkhead_e2e::{processes, watch};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

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
                &["grep", "^Cap", "/proc/self/status"],
            ),
            run(
                &["--cap", "CAP_CHOWN", "--user", "1000"],
                &["grep", "^Cap", "/proc/self/status"],
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
fn whoever_signals_the_pid_of_a_process_in_the_foreground_means_that_process() {
    let _unchanged = Host::unchanged();
    let results = |runtime: PathBuf| {
        let container = Container::running(runtime, Bundle::idle());
        let files = container.files();
        let pid_file = files.join("exec-pid");
        let flags = ["exec", "--pid-file", pid_file.to_str().unwrap()];
        let script = "trap 'exit 4' TERM; echo ready; while :; do sleep 1; done";
        let codes = [Signal::SIGTERM, Signal::SIGKILL].map(|signal| {
            let mut exec = container.prepare(&flags, &["sh", "-c", script]);
            let exec = exec.stdin(Stdio::null()).stdout(Stdio::piped());
            let mut exec = exec.spawn().unwrap();
            let mut stdout = BufReader::new(exec.stdout.take().unwrap());
            let mut line = String::new();
            stdout.read_line(&mut line).unwrap();
            assert_eq!(line, "ready\n");
            watch::until(files, &[], || pid_file.exists());
            let pid: i32 = fs::read_to_string(&pid_file).unwrap().parse().unwrap();
            fs::remove_file(&pid_file).unwrap();
            kill(Pid::from_raw(pid), signal).unwrap();
            let status = exec.wait().unwrap();
            // As a shell tells it.
            let signal = || 128 + status.signal().unwrap();
            status.code().unwrap_or_else(signal)
        });
        // It is gone, a moment later.
        container
            .shell("while ps | grep -q '[e]cho ready; while :; do sleep 1; done'; do :; done")
            .expect_code(0);
        (codes, container.status())
    };
    let ours = results(bulkhead());
    assert_eq!(ours, ([4, 137], "running".to_owned()));
    assert_eq!(ours, results(runc()));
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
    container.await_output("ready");
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
fn a_process_is_executed_in_a_cgroup_below_the_containers() {
    let _unchanged = Host::unchanged();
    let results = |runtime: PathBuf| -> Vec<(i32, String)> {
        let mut bundle = Bundle::idle();
        bundle.with_own_cgroups();
        let container = Container::running(runtime, bundle);
        container
            .shell("mkdir -p /sys/fs/cgroup/below/deep")
            .expect_code(0);
        let cgroups: [&[&str]; 9] = [
            &["below"],
            &["/below/deep"],
            &["below/../below"],
            &["/"],
            &["none"],
            &["../.."],
            &["cgroup.procs"],
            &["pids:below"],
            &["below", "/below/deep"],
        ];
        let executed = cgroups.iter().map(|cgroups| {
            let flags: Vec<_> = cgroups
                .iter()
                .flat_map(|cgroup| ["--cgroup", cgroup])
                .collect();
            let ended = container.command_with(
                &[&["exec"], &flags[..]].concat(),
                &["cat", "/proc/self/cgroup"],
            );
            let names_the_flag = ended.stderr.to_lowercase().contains("cgroup");
            assert!(ended.code == 0 || names_the_flag, "{ended:?}");
            (ended.code, ended.stdout)
        });
        executed.collect()
    };
    let ours = results(bulkhead());
    assert_eq!(ours, results(runc()));
    assert_eq!(ours[1], (0, "0::/below/deep\n".to_owned()));
}

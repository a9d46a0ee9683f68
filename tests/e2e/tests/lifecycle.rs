//! The life of a container as clients drive it: create, start, signals, delete, and what lists tell; where runc defines what comes
//! out, runc runs beside.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{bulkhead, finish, runc};
use bulkhead_e2e::container::Container;
use bulkhead_e2e::leaks::Host;
use bulkhead_e2e::{processes, watch};
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

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
        container.await_output("ready\n");
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
fn signals_to_the_stand_in_reach_the_container() {
    let _unchanged = Host::unchanged();
    let container = Container::running(bulkhead(), Bundle::idle());
    container.await_output("ready\n");
    kill(container.pid, Signal::SIGUSR1).unwrap();
    container.await_output("usr1\n");
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
        container.await_output("ready\n");
        for name in NAMES.split_whitespace() {
            let signal: Signal = format!("SIG{name}").parse().unwrap();
            kill(container.pid, signal).unwrap();
            container.await_output(&format!("got {name}.\n"));
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
fn when_a_part_of_the_sandbox_is_killed_the_container_is_stopped_and_can_be_deleted() {
    let unchanged = Host::unchanged();
    for victim in ["bulkhead-vmm", "containerd-shim-bulkhead-v2"] {
        let container = Container::running(bulkhead(), Bundle::idle());
        container.await_output("ready\n");
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
fn a_container_whose_whole_cgroup_gets_sigterm_ends_as_it_likes_and_is_known_until_it_is_deleted() {
    let _unchanged = Host::unchanged();
    let life = |runtime: PathBuf| {
        let path = format!("/e2e-stopped-{}", std::process::id());
        let mut bundle = Bundle::idle();
        bundle.config["linux"]["cgroupsPath"] = json!(path);
        let container = Container::running(runtime, bundle);
        container.await_output("ready");
        // As a service manager stops a scope.
        let procs = format!("/sys/fs/cgroup{path}/cgroup.procs");
        for pid in fs::read_to_string(procs).unwrap().lines() {
            kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGTERM).unwrap();
        }
        let code = container.wait();
        // The processes of ours end after that.
        processes::wait_for_end(&processes::of_the_build_under_test());
        let status = container.status();
        container.command(&["delete"]).expect_code(0);
        (code, status)
    };
    let ours = life(bulkhead());
    assert_eq!(ours, (5, "stopped".to_owned()));
    assert_eq!(ours, life(runc()));
}

//! What is left when a process of a sandbox is killed, or stops answering, at any step of a container's life.

use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use bulkhead_e2e::steps::{BACKGROUND, EXECUTING, FOREGROUND, PROXY, SERVER};
use bulkhead_e2e::watch;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::bed::{Bed, PATIENCE, finish, text};

pub const CREATE: &[&str] = &["create", "c1"];
const DETACH: &[&str] = &["exec", "--detach", "c1", "/bin/true"];

/// What is done to a container, in order.
const LIFE: [&[&str]; 6] = [
    CREATE,
    &["start", "c1"],
    &["exec", "c1", "/bin/true"],
    DETACH,
    &["kill", "c1", "KILL"],
    &["delete", "c1"],
];

/// What a sandbox is asked when it is looked at.
pub fn status(bed: &Bed) -> String {
    let output = bed.about(&["state", "c1"]);
    if !output.status.success() {
        assert_told(&output, "state");
        return "unknown".into();
    }
    let state: Value = serde_json::from_slice(&output.stdout).unwrap();
    state["status"].as_str().unwrap().to_owned()
}

/// A command that fails says why in one sentence.
#[track_caller]
pub fn assert_told(output: &Output, what: &str) {
    let said = text(&output.stderr);
    let code = output.status.code();
    assert_eq!(
        said.lines().count(),
        usize::from(code != Some(0)),
        "{what}: {code:?}: {said}"
    );
    assert!(
        code == Some(0) || said.starts_with("error: bulkhead "),
        "{what}: {said}"
    );
}

/// Leads a container through its life with a fault in the processes of one command, or of all, and looks at what remains. Returns
/// the commands that failed.
fn live(fault: &str, faulty: Option<&[&str]>) -> Vec<String> {
    let bed = Bed::new(&["/bin/sleep", "1000"]);
    let log = bed.path("fault");
    let ended = bed.path("ended");
    bed.spec(|spec| {
        spec["process"]["args"] = json!(["/bin/sleep", "1000"]);
        let hook = json!({"path": "/bin/touch", "args": ["touch", ended]});
        spec["hooks"] = json!({ "poststop": [hook] });
    });
    let mut failed = Vec::new();
    let mut waiting = None;
    for words in LIFE {
        let mut command = bed.bulkhead();
        if faulty.is_none_or(|faulty| faulty == words) {
            command
                .env("BULKHEAD_FAULT", fault)
                .env("BULKHEAD_FAULT_LOG", &log);
        }
        let what = format!("{fault}, {}", words[0]);
        let output = finish(command.args(words));
        assert_told(&output, &what);
        if !output.status.success() {
            failed.push(words[0].to_owned());
        }
        if words[0] == "start" {
            let wait = ["exec", "c1", "/bin/sleep", "1000"];
            let mut client = bed.bulkhead();
            let streams = [Stdio::null(), Stdio::null(), Stdio::piped()];
            let [stdin, stdout, stderr] = streams;
            let client = client.args(wait).stdin(stdin).stdout(stdout).stderr(stderr);
            waiting = Some(client.spawn().unwrap());
        }
        if words[0] == "kill" {
            await_end(&bed, &what);
        }
    }
    await_end(&bed, fault);
    let deleted = bed.about(&["delete", "--force", "c1"]);
    assert!(
        deleted.status.success(),
        "{fault}: {}",
        text(&deleted.stderr)
    );
    if let Some(client) = waiting {
        let output = client.wait_with_output().unwrap();
        assert!(!output.status.success(), "{fault}");
        let said = text(&output.stderr);
        assert!(said.lines().count() <= 1, "{fault}: {said}");
    }
    bed.await_clean();
    // Before it is on record nothing has been done that a hook could undo.
    let early = ["server: started", "server: spec validated"].contains(&fault);
    assert_eq!(ended.exists(), !early, "{fault}");
    let reached = fs::read_to_string(&log).unwrap_or_default();
    assert_eq!(reached.is_empty(), fault.is_empty(), "{fault}");
    failed
}

/// Within how long a container must be known to have stopped when a process of its sandbox is killed.
const PROMISE: Duration = Duration::from_secs(5);

/// Waits until the container has stopped, or is not there.
#[track_caller]
fn await_end(bed: &Bed, what: &str) {
    let start = Instant::now();
    let ended = || ["stopped", "unknown"].contains(&status(bed).as_str());
    watch::until(&bed.path(""), &bed.pids(), ended);
    assert!(start.elapsed() < PROMISE, "{what}: {:?}", start.elapsed());
}

#[test]
fn a_life_without_faults_has_none() {
    assert_eq!(live("", None), Vec::<String>::new());
}

#[test]
fn a_server_that_is_killed_at_any_step_leaves_nothing_that_delete_does_not_remove() {
    for step in SERVER {
        live(step, None);
    }
}

#[test]
fn a_vmm_that_is_killed_at_any_step_leaves_nothing_that_delete_does_not_remove() {
    for step in SERVER.iter().skip(3) {
        live(&format!("children at {step}"), None);
    }
}

#[test]
fn a_stand_in_that_is_killed_at_any_step_leaves_nothing_that_delete_does_not_remove() {
    for step in PROXY {
        live(step, Some(CREATE));
        // Only its own process goes with it.
        let failed = live(step, Some(DETACH));
        let before = ["proxy: forked", "proxy: set up"].contains(&step);
        assert!(
            failed.is_empty() || failed == ["exec"] && before,
            "{step}: {failed:?}"
        );
    }
}

#[test]
fn a_client_that_is_killed_at_any_step_takes_its_sandbox_along() {
    for step in FOREGROUND {
        let bed = Bed::new(&["/bin/true"]);
        let output = bed.command().env("BULKHEAD_FAULT", step).output().unwrap();
        assert_eq!(output.status.signal(), Some(9), "{step}");
        bed.await_clean();
    }
    // In the background too, until it has let the container stay.
    for step in BACKGROUND {
        let bed = Bed::new(&["/bin/true"]);
        let output = finish(bed.bulkhead().args(CREATE).env("BULKHEAD_FAULT", step));
        assert_eq!(output.status.signal(), Some(9), "{step}");
        bed.await_clean();
    }
}

#[test]
fn a_client_that_is_killed_on_its_way_into_a_container_leaves_that_alone() {
    let bed = running("");
    for step in EXECUTING {
        for detach in [&["--detach"][..], &[]] {
            let mut exec = bed.bulkhead();
            exec.arg("exec").args(detach).args(["c1", "/bin/true"]);
            let output = finish(exec.env("BULKHEAD_FAULT", step));
            assert_eq!(output.status.signal(), Some(9), "{step}");
            assert_eq!(status(&bed), "running");
        }
    }
    delete_at_once(&bed, Duration::from_secs(5));
}

/// A container that runs.
pub fn running(mode: &'static str) -> Bed {
    let bed = Bed::new(&["/bin/sleep", "1000"]).mode(mode);
    for words in [CREATE, &["start", "c1"]] {
        let output = bed.about(words);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    bed
}

/// Stops a process, which answers nothing from then on.
pub fn stop(pid: Pid) {
    kill(pid, Signal::SIGSTOP).unwrap();
    let start = Instant::now();
    let stat = || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    while !stat().contains(") T ") {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
}

#[test]
fn who_waits_for_a_process_is_told_why_it_is_lost() {
    for (program, reason) in [
        ("fake-vmm", "VMM was killed by SIGKILL"),
        (SERVER_PROGRAM, "the sandbox server ended unexpectedly"),
    ] {
        let bed = running("");
        let mut client = bed.bulkhead();
        let mut client = client
            .args(["exec", "c1", "/bin/sh", "-c", "echo ready; exec sleep 1000"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        client
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut ready)
            .unwrap();
        kill(bed.pid_of(program), Signal::SIGKILL).unwrap();
        let output = client.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(255));
        assert_told(&output, program);
        let said = text(&output.stderr);
        assert!(said.contains(reason), "{said}");
        await_end(&bed, program);
        delete_at_once(&bed, Duration::from_secs(5));
    }
}

#[test]
fn who_asks_a_server_that_ends_over_it_is_told_where_to_look_and_what_to_do() {
    for (step, words) in [
        ("server: VMM started", CREATE),
        ("server: signal delivered", &["kill", "c1", "KILL"][..]),
        ("server: process described", &["exec", "c1", "/bin/true"]),
        ("server: process described", DETACH),
    ] {
        let bed = Bed::new(&["/bin/sleep", "1000"]);
        let faulty =
            |words: &[&str]| finish(bed.bulkhead().args(words).env("BULKHEAD_FAULT", step));
        let log = bed.path("state/c1/server.log");
        let (output, expected) = if words == CREATE {
            (faulty(CREATE), "it said nothing; try again with --debug")
        } else {
            for words in [CREATE, &["start", "c1"]] {
                let output = faulty(words);
                assert!(output.status.success(), "{}", text(&output.stderr));
            }
            (bed.about(words), log.to_str().unwrap())
        };
        assert!(!output.status.success(), "{step}");
        assert_told(&output, step);
        let said = text(&output.stderr);
        assert!(
            said.contains("the sandbox server ended unexpectedly"),
            "{said}"
        );
        assert!(said.contains(expected), "{said}");
        assert!(
            words == CREATE || said.contains("`bulkhead delete --force c1`"),
            "{said}"
        );
        delete_at_once(&bed, Duration::from_secs(5));
    }
}

pub const SERVER_PROGRAM: &str = "containerd-shim-bulkhead-v2";

/// Deletes by force, in a time in which nothing can have been waited for that does not come.
#[track_caller]
fn delete_at_once(bed: &Bed, limit: Duration) {
    let began = Instant::now();
    let deleted = bed.about(&["delete", "--force", "c1"]);
    assert!(deleted.status.success(), "{}", text(&deleted.stderr));
    assert!(began.elapsed() < limit, "{:?}", began.elapsed());
    bed.await_clean();
}

#[test]
fn a_server_that_answers_nothing_is_done_without() {
    let bed = running("");
    let other = running("");
    stop(bed.pid_of(SERVER_PROGRAM));
    assert_eq!(status(&bed), "running");
    let list = bed.about(&["list", "--quiet"]);
    assert_eq!(text(&list.stdout), "c1\n");
    let deleted = bed.about(&["delete", "c1"]);
    assert_eq!(deleted.status.code(), Some(1));
    assert_told(&deleted, "delete");
    delete_at_once(&bed, Duration::from_secs(20));
    delete_at_once(&other, Duration::from_secs(5));
}

#[test]
fn an_id_is_taken_until_its_container_is_deleted_even_if_its_server_was_killed() {
    let bed = Bed::new(&["/bin/sleep", "1000"]);
    let ended = bed.path("ended");
    bed.spec(|spec| {
        spec["process"]["args"] = json!(["/bin/sleep", "1000"]);
        let script = format!("echo ended >> {ended:?}");
        let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
        spec["hooks"] = json!({ "poststop": [hook] });
    });
    assert!(bed.about(CREATE).status.success());
    kill(bed.pid_of(SERVER_PROGRAM), Signal::SIGKILL).unwrap();
    await_end(&bed, "a killed server");
    for words in [CREATE, &["run", "c1"]] {
        let refused = bed.about(words);
        assert_eq!(refused.status.code(), Some(1), "{words:?}");
        assert_told(&refused, words[0]);
        let said = text(&refused.stderr);
        assert!(
            said.contains("container with id c1 already exists"),
            "{said}"
        );
    }
    assert_eq!(status(&bed), "stopped");
    assert!(!ended.exists());
    assert!(bed.about(&["delete", "c1"]).status.success());
    assert_eq!(fs::read_to_string(&ended).unwrap(), "ended\n");
    assert!(bed.about(CREATE).status.success());
    delete_at_once(&bed, Duration::from_secs(5));
}

#[test]
fn a_container_whose_stand_in_has_ended_has_stopped_even_if_its_server_does_not_say_so() {
    let bed = running("");
    let state = bed.about(&["state", "c1"]);
    let state: Value = serde_json::from_slice(&state.stdout).unwrap();
    stop(bed.pid_of(SERVER_PROGRAM));
    let pid = i32::try_from(state["pid"].as_i64().unwrap()).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    await_end(&bed, "a killed stand-in");
    delete_at_once(&bed, Duration::from_secs(20));
}

#[test]
fn a_vmm_that_does_nothing_is_deleted_at_once() {
    let bed = running("");
    stop(bed.pid_of("fake-vmm"));
    assert_eq!(status(&bed), "running");
    delete_at_once(&bed, Duration::from_secs(5));
}

#[test]
fn a_guest_that_does_not_let_its_container_be_killed_is_killed_with_it() {
    let bed = running("unwilling");
    let killed = bed.about(&["kill", "c1", "KILL"]);
    assert!(killed.status.success(), "{}", text(&killed.stderr));
    await_end(&bed, "kill");
    let deleted = bed.about(&["delete", "c1"]);
    assert!(deleted.status.success(), "{}", text(&deleted.stderr));
    bed.await_clean();
}

#[test]
fn a_process_whose_stand_in_was_killed_is_given_up_by_a_guest_that_answers_nothing() {
    let bed = running("unwilling");
    let pid_file = bed.path("pid");
    let mut exec = bed.bulkhead();
    exec.args(["exec", "--detach", "--pid-file"]).arg(&pid_file);
    let output = finish(exec.args(["c1", "/bin/sleep", "1000"]));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let pid: i32 = fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    let listed = || {
        let output = bed.about(&["ps", "--format", "json", "c1"]);
        serde_json::from_slice::<Vec<i32>>(&output.stdout)
            .unwrap()
            .contains(&pid)
    };
    assert!(listed());
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let start = Instant::now();
    while listed() {
        assert!(start.elapsed() < PATIENCE);
    }
    assert_eq!(status(&bed), "running");
    delete_at_once(&bed, Duration::from_secs(5));
}

#[test]
fn a_guest_that_answers_nothing_is_deleted_at_once() {
    let bed = running("unwilling");
    delete_at_once(&bed, Duration::from_secs(5));
    let bed = Bed::new(&["/bin/true"]).mode("slow create");
    let mut create = bed.bulkhead();
    let create = create
        .args(CREATE)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    watch::until(&bed.path(""), &[], || bed.path("state/c1/vsock").exists());
    delete_at_once(&bed, Duration::from_secs(5));
    let created = create.wait_with_output().unwrap();
    assert_eq!(created.status.code(), Some(1));
    assert_told(&created, "create");
}

#[test]
fn the_hosts_oom_killer_sees_the_vmm_as_it_would_see_the_container_and_spares_the_server() {
    let score = |pid: &dyn std::fmt::Display| {
        let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        score.trim().parse::<i32>().unwrap()
    };
    let own = score(&"self");
    // Without CAP_SYS_RESOURCE nobody can be protected.
    let me = fs::read_to_string("/proc/self/status").unwrap();
    let capabilities = me.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = u64::from_str_radix(capabilities.unwrap().trim(), 16).unwrap();
    let protected = match capabilities & 1 << 24 {
        0 => own,
        _ => own.min(-998),
    };
    for (given, expected) in [(Some(321), 321), (None, own)] {
        let bed = Bed::new(&["/bin/true"]);
        bed.spec(|spec| {
            spec["process"]["args"] = json!(["/bin/sleep", "1000"]);
            if let Some(given) = given {
                spec["process"]["oomScoreAdj"] = given.into();
            }
            let hook = format!("cat /proc/self/oom_score_adj > {:?}", bed.path("hook"));
            let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", hook]});
            spec["hooks"] = json!({ "createRuntime": [hook] });
        });
        let created = bed.about(CREATE);
        assert!(created.status.success(), "{}", text(&created.stderr));
        let state = bed.about(&["state", "c1"]);
        let state: Value = serde_json::from_slice(&state.stdout).unwrap();
        assert_eq!(score(&bed.pid_of("fake-vmm")), expected);
        assert_eq!(score(&state["pid"]), expected);
        assert_eq!(score(&bed.pid_of(SERVER_PROGRAM)), protected);
        let hooks = fs::read_to_string(bed.path("hook")).unwrap();
        assert_eq!(hooks.trim(), own.to_string());
        delete_at_once(&bed, Duration::from_secs(5));
    }
}

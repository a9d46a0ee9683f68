//! Who waits for a server or a guest that answers nothing, and how long.

use std::io::Read;
use std::process::{ChildStdin, Command, Output, Stdio};
use std::thread::{self, JoinHandle};

use bulkhead_e2e::steps::ASKING_AGAIN;
use bulkhead_e2e::watch;

use crate::Running;
use crate::bed::{Bed, finish, text};
use crate::faults::{CREATE, SERVER_PROGRAM, assert_told, running, status, stop};

/// A command that must not run for ever.
fn spawn(bed: &Bed, words: &[&str]) -> JoinHandle<Output> {
    let mut command = bed.bulkhead();
    command.args(words);
    thread::spawn(move || finish(&mut command))
}

#[track_caller]
fn assert_failed(output: &Output, code: i32, what: &str, expected: &str) {
    assert_eq!(output.status.code(), Some(code), "{what}");
    assert_told(output, what);
    let said = text(&output.stderr);
    assert!(said.contains(expected), "{what}: {said}");
}

/// A container that is being made.
fn in_the_making(words: &[&str]) -> (Bed, JoinHandle<Output>) {
    let bed = Bed::new(&["/bin/true"]).mode("slow create");
    let command = spawn(&bed, words);
    watch::until(&bed.path(""), &[], || bed.path("state/c1/vsock").exists());
    (bed, command)
}

#[test]
fn a_server_that_stops_answering_while_it_makes_a_container_ends_with_what_it_made() {
    // All three at once: each takes the time in which an answer might still come.
    let commands = [CREATE, &["run", "--detach", "c1"], &["run", "c1"]];
    let made = commands.map(in_the_making);
    for (bed, _) in &made {
        stop(bed.pid_of(SERVER_PROGRAM));
    }
    for ((bed, command), words) in made.into_iter().zip(commands) {
        let output = command.join().unwrap();
        assert_failed(&output, 1, words[0], "did not answer and was killed");
        bed.await_clean();
    }
}

#[test]
fn a_server_that_answers_nothing_executes_nothing() {
    let bed = running("");
    stop(bed.pid_of(SERVER_PROGRAM));
    for words in [
        &["exec", "--detach", "c1", "/bin/true"][..],
        &["exec", "c1", "/bin/true"],
    ] {
        let told = "`bulkhead delete --force c1` ends it";
        assert_failed(&bed.about(words), 255, "exec", told);
    }
    assert!(bed.about(&["delete", "--force", "c1"]).status.success());
    bed.await_clean();
}

#[test]
fn a_signal_that_a_server_does_not_take_ends_the_command_in_the_foreground() {
    let args = ["/bin/sh", "-c", "echo ready; exec sleep 1000"];
    let bed = Bed::new(&args);
    let (command, _stdout) = crate::start(&bed, &[]);
    stop(bed.pid_of(SERVER_PROGRAM));
    command.signal(nix::sys::signal::Signal::SIGTERM);
    let output = command.ended();
    assert_eq!(output.status.code(), Some(1));
    assert_told(&output, "run");
    bed.await_clean();
}

/// A command in the foreground, once its program has said that it is there. The program ends with its input.
fn in_the_foreground(mut command: Command) -> (Running, ChildStdin) {
    command.stdin(Stdio::piped());
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let stdin = child.stdin.take().unwrap();
    let mut ready = [0; 6];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut ready)
        .unwrap();
    (Running(Some(child)), stdin)
}

fn exec(bed: &Bed, script: &str) -> Command {
    let mut command = bed.bulkhead();
    command.args(["exec", "c1", "/bin/sh", "-c", script]);
    command
}

#[test]
fn a_server_that_does_not_tell_of_an_end_is_given_up_once_the_output_has_ended() {
    let script = "echo ready; read line; exit 3";
    let bed = Bed::new(&["/bin/sh", "-c", script]);
    let other = running("");
    // Both at once: each takes the time in which an answer might still come.
    let commands = [
        (&bed, bed.command(), 1, "did not answer and was killed"),
        (&other, exec(&other, script), 255, "does not answer"),
    ];
    let waiting = commands.map(|(bed, command, code, told)| {
        let (command, stdin) = in_the_foreground(command);
        stop(bed.pid_of(SERVER_PROGRAM));
        drop(stdin);
        (command, code, told)
    });
    for (command, code, told) in waiting {
        assert_failed(&command.ended(), code, "the end", told);
    }
    bed.await_clean();
    assert!(other.about(&["delete", "--force", "c1"]).status.success());
    other.await_clean();
}

#[test]
fn a_process_that_closes_its_output_and_lives_on_is_waited_for_as_its_server_answers() {
    let bed = running("");
    let script = "echo ready; exec >/dev/null 2>&1; read line; exit 3";
    let mut command = exec(&bed, script);
    // At this step its children are killed, of which it has none: so it goes on, and the log tells that it was there.
    let asked = bed.path("asked");
    command
        .env("BULKHEAD_FAULT", format!("children at {ASKING_AGAIN}"))
        .env("BULKHEAD_FAULT_LOG", &asked);
    let (command, stdin) = in_the_foreground(command);
    watch::until(&bed.path(""), &[], || asked.exists());
    drop(stdin);
    let output = command.ended();
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert!(bed.about(&["delete", "--force", "c1"]).status.success());
    bed.await_clean();
}

#[test]
fn a_guest_that_greets_and_then_says_nothing_is_given_up() {
    let bed = Bed::new(&["/bin/true"]);
    let bed = bed.mode("mute");
    assert_failed(
        &bed.about(CREATE),
        1,
        "create",
        "the guest's agent has stopped answering",
    );
    bed.await_clean();
}

#[test]
fn a_guest_that_is_long_about_it_and_answers_is_waited_for() {
    let bed = Bed::new(&["/bin/true"]);
    let bed = bed.mode("late create");
    let output = bed.about(CREATE);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(status(&bed), "created");
    assert!(bed.about(&["delete", "c1"]).status.success());
    bed.await_clean();
}

#[test]
fn a_container_that_is_said_to_have_stopped_can_be_deleted_at_once() {
    for round in 0..30 {
        let bed = Bed::new(&["/bin/sh", "-c", "exit 3"]);
        for words in [CREATE, &["start", "c1"]] {
            let output = bed.about(words);
            assert!(output.status.success(), "{}", text(&output.stderr));
        }
        if round % 2 == 0 {
            // It may have ended by now.
            let _ = bed.about(&["kill", "c1", "KILL"]);
        }
        watch::until(&bed.path(""), &bed.pids(), || status(&bed) == "stopped");
        let deleted = bed.about(&["delete", "c1"]);
        assert!(deleted.status.success(), "{}", text(&deleted.stderr));
        bed.await_clean();
    }
}

#[test]
fn a_stopped_container_can_be_deleted_though_its_server_answers_nothing() {
    let bed = running("");
    assert!(bed.about(&["kill", "c1", "KILL"]).status.success());
    watch::until(&bed.path(""), &bed.pids(), || status(&bed) == "stopped");
    stop(bed.pid_of(SERVER_PROGRAM));
    assert_eq!(status(&bed), "stopped");
    let deleted = bed.about(&["delete", "c1"]);
    assert!(deleted.status.success(), "{}", text(&deleted.stderr));
    bed.await_clean();
}

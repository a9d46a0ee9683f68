//! Hooks that run when their sandbox ends.

use std::fs::{self, File};
use std::io::Write;
use std::time::{Duration, Instant};

use bulkhead_e2e::{processes, watch};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use serde_json::json;

use crate::Running;
use crate::bed::{Bed, text};
use crate::faults::CREATE;

/// A container in the foreground, in whose making a hook says in `log` that it has begun, and runs until something is written to `fifo`. The
/// file is that, for writing.
fn in_a_hook() -> (Bed, Running, File) {
    let bed = Bed::new(&["/bin/true"]);
    let [log, fifo] = ["log", "fifo"].map(|name| bed.path(name));
    nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let hook = |script: String| json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
    let says = |what: &str| hook(format!("echo {what} >> {log:?}"));
    bed.spec(|spec| {
        // The second is time for an end that does not wait.
        let waits =
            format!("echo begun >> {log:?}; read line < {fifo:?}; sleep 1; echo done >> {log:?}");
        spec["hooks"] = json!({
            "createRuntime": [hook(waits), says("second")],
            "createContainer": [says("third")],
            "poststop": [says("undone")],
        });
    });
    let running = Running(Some(bed.command().spawn().unwrap()));
    watch::until(&bed.path(""), &[], || said(&bed) == "begun\n");
    // Open both ways it waits for no reader.
    let fifo = File::options().read(true).write(true).open(fifo).unwrap();
    (bed, running, fifo)
}

fn said(bed: &Bed) -> String {
    fs::read_to_string(bed.path("log")).unwrap_or_default()
}

#[test]
fn what_undoes_a_hooks_work_comes_after_it_when_the_client_is_killed() {
    let (bed, client, mut fifo) = in_a_hook();
    let vmm = bed.pid_of("fake-vmm").as_raw().cast_unsigned();
    client.signal(Signal::SIGKILL);
    processes::wait_for_end(&[vmm]);
    fifo.write_all(b"go on\n").unwrap();
    bed.await_clean();
    assert_eq!(said(&bed), "begun\ndone\nundone\n");
}

#[test]
fn a_second_deletion_does_not_end_the_hooks_of_the_first() {
    let bed = Bed::new(&["/bin/sleep", "1000"]);
    let log = bed.path("log");
    bed.spec(|spec| {
        spec["process"]["args"] = json!(["/bin/sleep", "1000"]);
        // Time enough for an end that does not wait.
        let script = format!("echo begun >> {log:?}; sleep 2; echo undone >> {log:?}");
        let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
        spec["hooks"] = json!({ "poststop": [hook] });
    });
    let created = bed.about(CREATE);
    assert!(created.status.success(), "{}", text(&created.stderr));
    let first = Running(Some(bed.bulkhead().args(["delete", "c1"]).spawn().unwrap()));
    watch::until(&bed.path(""), &[], || said(&bed) == "begun\n");
    let second = bed.about(&["delete", "c1"]);
    assert!(second.status.success(), "{}", text(&second.stderr));
    assert_eq!(said(&bed), "begun\nundone\n");
    assert!(first.ended().status.success());
    bed.await_clean();
}

#[test]
fn a_hook_that_does_not_end_is_killed_by_deletion_by_force_and_its_work_undone() {
    let (bed, client, _fifo) = in_a_hook();
    let began = Instant::now();
    let deleted = bed.about(&["delete", "--force", "c1"]);
    assert!(deleted.status.success(), "{}", text(&deleted.stderr));
    let took = began.elapsed();
    // That time it is given.
    assert!(took >= Duration::from_secs(5), "{took:?}");
    assert!(took < Duration::from_secs(15), "{took:?}");
    bed.await_clean();
    assert_eq!(said(&bed), "begun\nundone\n");
    let output = client.ended();
    let stderr = text(&output.stderr);
    assert!(!output.status.success(), "{stderr}");
}

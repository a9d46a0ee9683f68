//! What can't be done in a state of a container's life.

use bulkhead_e2e::processes;

use crate::bed::{Bed, text};
use crate::faults::{CREATE, running, status};

#[test]
fn signal_0_asks_whether_a_container_is_there_and_changes_nothing() {
    let bed = Bed::new(&["/bin/sleep", "1000"]);
    let kill = |words: &[&str]| {
        let output = bed.about(words);
        (output.status.code(), text(&output.stderr))
    };
    let there = (Some(0), String::new());
    for (step, expected) in [(CREATE, "created"), (&["start", "c1"], "running")] {
        assert!(bed.about(step).status.success(), "{step:?}");
        assert_eq!(kill(&["kill", "c1", "0"]), there, "{expected}");
        assert_eq!(kill(&["kill", "--all", "c1", "0"]), there, "{expected}");
        assert_eq!(status(&bed), expected);
    }
    let vmm = bed.pid_of("fake-vmm");
    assert_eq!(kill(&["kill", "c1", "KILL"]), there);
    processes::wait_for_end(&[vmm.as_raw().unsigned_abs()]);
    let (code, said) = kill(&["kill", "c1", "0"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("container not running"), "{said}");
    assert_eq!(kill(&["kill", "--all", "c1", "0"]), there);
    assert!(bed.about(&["delete", "c1"]).status.success());
    bed.await_clean();
}

#[test]
fn what_does_not_go_with_a_containers_state_is_refused_in_the_words_that_clients_look_for() {
    let bed = running("");
    let refused = |cases: &[(&[&str], &str)]| {
        for (words, expected) in cases {
            let output = bed.about(words);
            let said = text(&output.stderr);
            assert!(!output.status.success(), "{words:?}");
            assert!(said.contains(expected), "{words:?}: {said}");
        }
    };
    refused(&[
        (
            &["start", "c1"],
            "cannot start an already running container",
        ),
        (&["resume", "c1"], "container not paused"),
        (&["delete", "c1"], "it is running"),
    ]);
    let vmm = bed.pid_of("fake-vmm");
    assert!(bed.about(&["kill", "c1", "KILL"]).status.success());
    // The guest is of no use any more, and none of its words is either.
    processes::wait_for_end(&[vmm.as_raw().unsigned_abs()]);
    assert_eq!(status(&bed), "stopped");
    refused(&[
        (
            &["start", "c1"],
            "cannot start a container that has stopped",
        ),
        (&["kill", "c1"], "container not running"),
        (&["pause", "c1"], "container not running"),
        (&["resume", "c1"], "container not paused"),
        (
            &["update", "--memory", "100M", "c1"],
            "container not running",
        ),
        (&["exec", "c1", "true"], "container not running"),
    ]);
    assert!(bed.about(&["kill", "--all", "c1"]).status.success());
    assert!(bed.about(&["delete", "c1"]).status.success());
    bed.await_clean();
}

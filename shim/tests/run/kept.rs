//! What the guest's agent keeps for those who have asked: no longer than somebody still does.

use std::fs::{self, File};

use bulkhead_e2e::watch;

use crate::Running;
use crate::bed::{Bed, text};
use crate::faults::running;

/// `bulkhead events` in the background, that tells of nothing but kills for want of memory.
fn events(bed: &Bed, output: &str) -> Running {
    let mut command = bed.bulkhead();
    command.args(["events", "--interval", "1h", "c1"]);
    command.stdout(File::create(bed.path(output)).unwrap());
    Running(Some(command.spawn().unwrap()))
}

/// A kill for want of memory.
fn oom(bed: &Bed) {
    let killed = bed.about(&["kill", "c1", "USR1"]);
    assert!(killed.status.success(), "{}", text(&killed.stderr));
}

#[test]
fn however_many_watch_for_ooms_the_guest_is_asked_once() {
    let Some(bed) = running("ooms") else { return };
    for number in 1..=3 {
        let watching = events(&bed, "events");
        let asked = || bed.asked("container_stats") >= number;
        watch::until(&bed.path(""), &[], asked);
        drop(watching);
    }
    let watching = [events(&bed, "events"), events(&bed, "others")];
    for output in ["events", "others"] {
        watch::until(&bed.path(""), &[], || {
            oom(&bed);
            let said = fs::read_to_string(bed.path(output)).unwrap();
            said.contains(r#"{"id":"c1","type":"oom"}"#)
        });
    }
    assert_eq!(bed.asked("wait_oom by 2"), 0);
    drop(watching);
    assert!(bed.about(&["delete", "--force", "c1"]).status.success());
    bed.await_clean();
}

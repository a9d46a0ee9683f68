//! Having the guest forget files that it does not use.

use std::fs;

use bulkhead_e2e::watch;

use crate::bed::{Bed, text};
use crate::faults::running;

#[track_caller]
fn done(bed: &Bed, words: &[&str]) {
    let output = bed.about(words);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

/// The guest has many files cached.
#[track_caller]
fn many_files(bed: &Bed) {
    done(bed, &["kill", "c1", "USR1"]);
}

/// It forgets those that it is asked to, one time, and is done with that.
#[track_caller]
fn forget(bed: &Bed, times: usize) {
    done(bed, &["kill", "c1", "USR2"]);
    asked(bed, "forgotten", times);
}

#[track_caller]
fn asked(bed: &Bed, what: &str, times: usize) {
    watch::until(&bed.path(""), &[], || bed.asked(what) >= times);
    assert_eq!(bed.asked(what), times);
}

#[test]
fn a_guest_with_many_files_is_asked_to_forget_them_once_at_a_time() {
    let bed = running("many files");
    assert_eq!(bed.asked("forget_files"), 0);
    many_files(&bed);
    asked(&bed, "forget_files", 1);
    // All that comes by the answer is one more reason.
    for _ in 0..3 {
        many_files(&bed);
    }
    assert_eq!(bed.asked("forget_files"), 1);
    forget(&bed, 1);
    asked(&bed, "forget_files", 2);
    forget(&bed, 2);
    done(&bed, &["exec", "c1", "/bin/true"]);
    assert_eq!(bed.asked("forget_files"), 2);
    // One that answers no more is left alone, and does no harm.
    many_files(&bed);
    asked(&bed, "forget_files", 3);
    done(&bed, &["exec", "c1", "/bin/true"]);
    done(&bed, &["kill", "c1", "KILL"]);
    done(&bed, &["delete", "c1"]);
    bed.await_clean();
}

#[test]
fn a_guest_that_stands_still_is_asked_to_forget_files_when_it_goes_on() {
    let bed = running("many files");
    for times in 1..=2 {
        // It has many as it is paused.
        done(&bed, &["pause", "c1"]);
        done(&bed, &["state", "c1"]);
        assert_eq!(bed.asked("forget_files"), times - 1);
        done(&bed, &["resume", "c1"]);
        asked(&bed, "forget_files", times);
        forget(&bed, times);
    }
    let log = fs::read_to_string(bed.path("agent.log")).unwrap();
    let story: Vec<_> = log
        .lines()
        .filter(|line| ["resumed", "forget_files", "forgotten"].contains(line))
        .collect();
    let each = ["resumed", "forget_files", "forgotten"];
    assert_eq!(story, [each, each].concat());
    done(&bed, &["delete", "--force", "c1"]);
    bed.await_clean();
}

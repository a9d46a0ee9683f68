//! The boot timeline: named moments from the VMM's start to the agent's readiness, for logs, `info` and benchmarks.

use std::fmt::Write as _;
use std::sync::Mutex;

use crate::control::TimelineEntry;
use crate::fault;
use crate::sync::lock;

/// Most entries kept. The VMM's own steps are few; this bounds what a guest can add by boot marks.
const MAX_ENTRIES: usize = 32;

/// Moments in the order of their arrival; each name at most once.
#[derive(Debug, Default)]
pub struct Timeline {
    entries: Mutex<Vec<TimelineEntry>>,
}

impl Timeline {
    /// An empty timeline.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes that `name` was reached now. Returns whether it was the first time.
    pub fn mark(&self, name: &str) -> bool {
        let at_ns = monotonic_ns();
        let mut entries = lock(&self.entries);
        if entries.len() >= MAX_ENTRIES || entries.iter().any(|entry| entry.name == name) {
            return false;
        }
        entries.push(TimelineEntry {
            name: name.to_owned(),
            at_ns,
        });
        drop(entries);
        fault::point(format_args!("vmm: {name}"));
        true
    }

    /// The entries so far.
    pub fn entries(&self) -> Vec<TimelineEntry> {
        lock(&self.entries).clone()
    }

    /// One line: each step with the milliseconds since the first one.
    pub fn summary(&self) -> String {
        summary(&lock(&self.entries))
    }
}

/// One line for a timeline: each step with the milliseconds since the first one.
pub fn summary(entries: &[TimelineEntry]) -> String {
    let Some(start) = entries.first().map(|entry| entry.at_ns) else {
        return String::new();
    };
    let mut line = String::new();
    for entry in entries {
        let since = entry.at_ns.saturating_sub(start);
        let _ = write!(
            line,
            "{}{} {}.{:03} ms",
            if line.is_empty() { "" } else { ", " },
            entry.name,
            since / 1_000_000,
            since / 1_000 % 1_000
        );
    }
    line
}

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid timespec that the call fills; CLOCK_MONOTONIC exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_noted_once_and_times_do_not_go_back() {
        let timeline = Timeline::new();
        assert!(timeline.mark("a"));
        assert!(timeline.mark("b"));
        assert!(!timeline.mark("a"));
        let entries = timeline.entries();
        assert_eq!(entries.len(), 2);
        assert!(entries[0].at_ns <= entries[1].at_ns);
    }

    #[test]
    fn a_guest_cannot_grow_it_without_bound() {
        let timeline = Timeline::new();
        for i in 0..1000 {
            timeline.mark(&i.to_string());
        }
        assert_eq!(timeline.entries().len(), MAX_ENTRIES);
    }

    #[test]
    fn the_summary_counts_from_the_first_entry() {
        let entry = |name: &str, at_ns| TimelineEntry {
            name: name.into(),
            at_ns,
        };
        let line = summary(&[entry("start", 1_000_000), entry("end", 3_250_000)]);
        assert_eq!(line, "start 0.000 ms, end 2.250 ms");
    }
}

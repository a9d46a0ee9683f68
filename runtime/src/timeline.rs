//! The boot timeline: named moments of the client, the server, the VMM and the guest on the host's monotonic clock.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

pub use bulkhead_vmm::control::TimelineEntry;
use bulkhead_vmm::fault;

/// A timeline as it is written for `make bench`.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Moments by `CLOCK_MONOTONIC` of the host.
    pub entries: Vec<TimelineEntry>,
    /// Moments by the guest's own clock, which starts with its kernel.
    pub guest: Vec<TimelineEntry>,
}

impl Record {
    /// Puts another process's moments among these, in the order of time.
    pub fn merge(&mut self, other: Record) {
        self.entries.extend(other.entries);
        self.entries.sort_by_key(|entry| entry.at_ns);
        self.guest.extend(other.guest);
    }
}

/// Most moments of one process: a server that executes processes all its life must not grow.
const MOST_ENTRIES: usize = 256;

/// Collects the moments of one process.
#[derive(Debug, Default)]
pub struct Timeline(Mutex<Record>);

impl Timeline {
    /// Notes that `name` is reached now.
    pub fn mark(&self, name: &str) {
        let at_ns = monotonic_ns();
        let mut record = self.lock();
        if record.entries.len() < MOST_ENTRIES {
            record.entries.push(TimelineEntry {
                name: name.to_owned(),
                at_ns,
            });
        }
        drop(record);
        fault::point(name);
    }

    /// Adds moments that another process has noted.
    pub fn merge(&self, other: Record) {
        self.lock().merge(other);
    }

    /// All moments so far.
    pub fn record(&self) -> Record {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Record> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(std::time::Duration::from)
        .unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_without_end_are_not_kept_without_end() {
        let timeline = Timeline::default();
        for _ in 0..10_000 {
            timeline.mark("again");
        }
        assert_eq!(timeline.record().entries.len(), MOST_ENTRIES);
    }

    #[test]
    fn moments_of_several_processes_come_out_in_the_order_of_time() {
        let timeline = Timeline::default();
        timeline.mark("late");
        timeline.merge(Record {
            entries: vec![TimelineEntry {
                name: "early".into(),
                at_ns: 1,
            }],
            guest: vec![],
        });
        let names: Vec<_> = timeline
            .record()
            .entries
            .into_iter()
            .map(|entry| entry.name)
            .collect();
        assert_eq!(names, ["early", "late"]);
    }
}

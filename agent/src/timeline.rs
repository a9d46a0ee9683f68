//! Named times of the boot, for the host's timeline.

use nix::time::{ClockId, clock_gettime};

use crate::fault;

/// Boot steps in order, with the nanoseconds since the kernel started its clock.
#[derive(Debug, Clone)]
pub struct Timeline(Vec<(&'static str, u64)>);

impl Default for Timeline {
    fn default() -> Self {
        // More than the boot has steps: one allocation.
        Self(Vec::with_capacity(16))
    }
}

impl Timeline {
    /// Notes that `step` is done now.
    pub fn mark(&mut self, step: &'static str) {
        self.0.push((step, nanoseconds(ClockId::CLOCK_BOOTTIME)));
        fault::point(step);
    }

    /// The steps.
    pub fn steps(&self) -> &[(&'static str, u64)] {
        &self.0
    }
}

/// What a clock shows, in nanoseconds; 0 if it is before its epoch.
pub fn nanoseconds(clock: ClockId) -> u64 {
    let Ok(now) = clock_gettime(clock) else {
        return 0;
    };
    let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
    let fraction = u64::try_from(now.tv_nsec()).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(fraction)
}

//! `process.scheduler`.

use oci_spec::runtime as oci;

use crate::error::{Error, Result};

/// `process.scheduler`, in the kernel's terms (sched_setattr(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduler {
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// Of the time-sharing policies.
    pub nice: i32,
    /// Of the real-time policies.
    pub priority: u32,
    /// Nanoseconds; these three of SCHED_DEADLINE.
    pub runtime: u64,
    /// Nanoseconds.
    pub deadline: u64,
    /// Nanoseconds.
    pub period: u64,
}

impl Scheduler {
    /// Checks what the kernel would refuse without a reason, as runc does.
    pub(super) fn from_spec(scheduler: &oci::Scheduler) -> Result<Self> {
        use oci::LinuxSchedulerPolicy as Policy;
        let policy = *scheduler.policy();
        let refuse = |field: &str, problem: &str| {
            Err(Error::spec(format!("process.scheduler.{field}"), problem))
        };
        let nice = scheduler.nice().unwrap_or(0);
        let priority = scheduler.priority().unwrap_or(0);
        let times = [
            scheduler.runtime().unwrap_or(0),
            scheduler.deadline().unwrap_or(0),
            scheduler.period().unwrap_or(0),
        ];
        if matches!(policy, Policy::SchedOther | Policy::SchedBatch) && !(-20..=19).contains(&nice)
        {
            return refuse("nice", "must be from -20 to 19");
        }
        if priority != 0 && !matches!(policy, Policy::SchedFifo | Policy::SchedRr) {
            return refuse("priority", "is for SCHED_FIFO and SCHED_RR only");
        }
        let Ok(priority) = u32::try_from(priority) else {
            return refuse("priority", "must not be negative");
        };
        if times != [0; 3] && policy != Policy::SchedDeadline {
            return refuse(
                "runtime",
                "runtime, deadline and period are for SCHED_DEADLINE only",
            );
        }
        let [runtime, deadline, period] = times;
        Ok(Self {
            policy: match policy {
                Policy::SchedOther => 0,
                Policy::SchedFifo => 1,
                Policy::SchedRr => 2,
                Policy::SchedBatch => 3,
                Policy::SchedIso => 4,
                Policy::SchedIdle => 5,
                Policy::SchedDeadline => 6,
            },
            flags: scheduler
                .flags()
                .iter()
                .flatten()
                .map(flag)
                .fold(0, |all, flag| all | flag),
            nice,
            priority,
            runtime,
            deadline,
            period,
        })
    }
}

fn flag(flag: &oci::LinuxSchedulerFlag) -> u64 {
    use oci::LinuxSchedulerFlag as Flag;
    match flag {
        Flag::SchedResetOnFork => 0x01,
        Flag::SchedFlagReclaim => 0x02,
        Flag::SchedFlagDLOverrun => 0x04,
        Flag::SchedFlagKeepPolicy => 0x08,
        Flag::SchedFlagKeepParams => 0x10,
        Flag::SchedFlagUtilClampMin => 0x20,
        Flag::SchedFlagUtilClampMax => 0x40,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn scheduler(json: Value) -> Result<Scheduler> {
        Scheduler::from_spec(&serde_json::from_value(json).unwrap())
    }

    #[test]
    fn every_policy_and_flag_has_its_number() {
        for (number, policy) in ["OTHER", "FIFO", "RR", "BATCH", "ISO", "IDLE", "DEADLINE"]
            .iter()
            .enumerate()
        {
            let planned = scheduler(json!({"policy": format!("SCHED_{policy}")})).unwrap();
            assert_eq!(planned.policy as usize, number);
        }
        let flags = json!([
            "SCHED_FLAG_RECLAIM",
            "SCHED_FLAG_KEEP_POLICY",
            "SCHED_FLAG_UTIL_CLAMP_MAX"
        ]);
        let planned = scheduler(json!({"policy": "SCHED_DEADLINE", "flags": flags})).unwrap();
        assert_eq!(planned.flags, 0x02 | 0x08 | 0x40);
    }

    #[test]
    fn what_does_not_belong_to_a_policy_is_refused() {
        for (json, field) in [
            (json!({"policy": "SCHED_OTHER", "nice": 20}), "nice"),
            (json!({"policy": "SCHED_BATCH", "priority": 1}), "priority"),
            (json!({"policy": "SCHED_RR", "priority": -1}), "priority"),
            (json!({"policy": "SCHED_FIFO", "period": 5}), "runtime"),
        ] {
            let error = scheduler(json).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("process.scheduler.{field}: ")),
                "{error}"
            );
        }
    }
}

//! `process.scheduler` and `process.execCPUAffinity`.

use nix::sched::CpuSet;
use oci_spec::runtime as oci;

use crate::cgroup::is_list;
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

/// `process.execCPUAffinity`: of processes that join the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Affinity {
    /// Before the process is in the container's cgroup.
    pub initial: Option<CpuSet>,
    /// From then on.
    pub last: Option<CpuSet>,
}

impl Affinity {
    /// None if it says nothing.
    pub(super) fn from_spec(affinity: &oci::ExecCPUAffinity) -> Result<Option<Self>> {
        let set = |list: &Option<String>, name: &str| {
            list.as_deref()
                .filter(|list| !list.is_empty())
                .map(|list| cpus(list, &format!("process.execCPUAffinity.{name}")))
                .transpose()
        };
        let affinity = Self {
            initial: set(affinity.initial(), "initial")?,
            last: set(affinity.cpu_affinity_final(), "final")?,
        };
        Ok((affinity.initial.is_some() || affinity.last.is_some()).then_some(affinity))
    }
}

fn cpus(list: &str, field: &str) -> Result<CpuSet> {
    if !is_list(list) {
        return Err(Error::spec(
            field,
            format!("{list:?} is not a list like 0-3,7"),
        ));
    }
    let mut set = CpuSet::new();
    for range in list.split(',') {
        let mut ends = range
            .split('-')
            .filter_map(|end| end.trim().parse::<usize>().ok());
        let first = ends.next().unwrap_or_default();
        let last = ends.next().unwrap_or(first);
        // One too many is enough to be refused.
        for cpu in first..=last.min(CpuSet::count()).max(first) {
            set.set(cpu).map_err(|_| {
                let most = CpuSet::count() - 1;
                Error::spec(field, format!("CPUs above {most} are not supported"))
            })?;
        }
    }
    Ok(set)
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

    #[test]
    fn lists_become_sets_of_cpus() {
        let affinity = |json: Value| Affinity::from_spec(&serde_json::from_value(json).unwrap());
        let found = affinity(json!({"initial": "0-2,5", "final": "1"}))
            .unwrap()
            .unwrap();
        let cpus: Vec<usize> = (0..8)
            .filter(|&cpu| found.initial.unwrap().is_set(cpu).unwrap())
            .collect();
        assert_eq!(cpus, [0, 1, 2, 5]);
        assert!(found.last.unwrap().is_set(1).unwrap());
        assert_eq!(affinity(json!({})).unwrap(), None);
        for list in ["5-3", "0-99999", "4294967295"] {
            let error = affinity(json!({"final": list})).unwrap_err().to_string();
            assert!(
                error.starts_with("process.execCPUAffinity.final: "),
                "{error}"
            );
        }
    }
}

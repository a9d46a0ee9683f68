//! What a container has used, in the words of containerd's cgroup v2 metrics.

use std::collections::HashMap;

use bulkhead_protocol::agent::{ContainerStatsResponse, IoStats, Pressure, PressureLine};
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats,
    PidsStat,
};
use protobuf::MessageField;

/// The guest's figures as containerd wants them.
pub fn metrics(stats: &ContainerStatsResponse) -> Metrics {
    let io = IOStat {
        usage: stats.io.iter().map(io_entry).collect(),
        psi: pressure(&stats.io_pressure),
        ..Default::default()
    };
    let hugetlb = stats.hugetlb.iter().map(|size| HugeTlbStat {
        current: size.current,
        max: size.max,
        pagesize: size.page_size.clone(),
        failcnt: size.failed,
        ..Default::default()
    });
    Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids_current,
            // containerd's word for none.
            limit: if stats.pids_max == u64::MAX {
                0
            } else {
                stats.pids_max
            },
            ..Default::default()
        }),
        cpu: MessageField::some(cpu(stats)),
        memory: MessageField::some(memory(stats)),
        io: MessageField::some(io),
        hugetlb: hugetlb.collect(),
        memory_events: MessageField::some(memory_events(&stats.memory_events)),
        ..Default::default()
    }
}

fn value(map: &HashMap<String, u64>, name: &str) -> u64 {
    map.get(name).copied().unwrap_or(0)
}

fn cpu(stats: &ContainerStatsResponse) -> CPUStat {
    let of = |name| value(&stats.cpu, name);
    CPUStat {
        usage_usec: of("usage_usec"),
        user_usec: of("user_usec"),
        system_usec: of("system_usec"),
        nr_periods: of("nr_periods"),
        nr_throttled: of("nr_throttled"),
        throttled_usec: of("throttled_usec"),
        nr_bursts: of("nr_bursts"),
        burst_usec: of("burst_usec"),
        psi: pressure(&stats.cpu_pressure),
        ..Default::default()
    }
}

fn memory(stats: &ContainerStatsResponse) -> MemoryStat {
    let of = |name| value(&stats.memory, name);
    MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        workingset_refault: of("workingset_refault_file"),
        workingset_activate: of("workingset_activate_file"),
        usage: stats.memory_current,
        usage_limit: stats.memory_max,
        max_usage: stats.memory_peak,
        swap_usage: stats.swap_current,
        swap_limit: stats.swap_max,
        psi: pressure(&stats.memory_pressure),
        ..Default::default()
    }
}

fn memory_events(events: &HashMap<String, u64>) -> MemoryEvents {
    let of = |name| value(events, name);
    MemoryEvents {
        low: of("low"),
        high: of("high"),
        max: of("max"),
        oom: of("oom"),
        oom_kill: of("oom_kill"),
        oom_group_kill: of("oom_group_kill"),
        ..Default::default()
    }
}

fn io_entry(device: &IoStats) -> IOEntry {
    let of = |name| value(&device.counters, name);
    IOEntry {
        major: device.major,
        minor: device.minor,
        rbytes: of("rbytes"),
        wbytes: of("wbytes"),
        rios: of("rios"),
        wios: of("wios"),
        ..Default::default()
    }
}

fn pressure(pressure: &MessageField<Pressure>) -> MessageField<PSIStats> {
    let line = |line: &MessageField<PressureLine>| {
        MessageField::from_option(line.as_ref().map(|line| PSIData {
            avg10: line.avg10,
            avg60: line.avg60,
            avg300: line.avg300,
            total: line.total,
            ..Default::default()
        }))
    };
    MessageField::from_option(pressure.as_ref().map(|pressure| PSIStats {
        some: line(&pressure.some),
        full: line(&pressure.full),
        ..Default::default()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_come_under_containerds_names() {
        let stats = ContainerStatsResponse {
            cpu: HashMap::from([("usage_usec".into(), 5)]),
            memory: HashMap::from([("anon".into(), 7)]),
            memory_current: 11,
            pids_max: u64::MAX,
            io: vec![IoStats {
                major: 8,
                counters: HashMap::from([("rbytes".into(), 13)]),
                ..Default::default()
            }],
            ..Default::default()
        };
        let metrics = metrics(&stats);
        assert_eq!(metrics.cpu.usage_usec, 5);
        assert_eq!((metrics.memory.anon, metrics.memory.usage), (7, 11));
        assert_eq!(metrics.pids.limit, 0);
        let io = &metrics.io.usage;
        assert_eq!((io[0].major, io[0].rbytes), (8, 13));
        assert!(metrics.cpu.psi.is_none());
    }
}

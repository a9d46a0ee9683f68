//! `bulkhead events`: statistics and kills for want of memory, in runc's JSON.

use std::time::Duration;

use anyhow::bail;
use clap::Args;
use containerd_shim_protos::cgroups_v2::metrics::{Metrics, PSIData, PSIStats};
use serde_json::{Value, json};

use super::Invocation;
use super::client::{Server, ServerError};
use super::known::Known;

#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Time between two statistics, such as 5s or 500ms
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = humantime::parse_duration)]
    interval: Duration,
    /// Print the statistics once and end
    #[arg(long)]
    stats: bool,
    /// Name of the container
    id: String,
}

/// Runs `bulkhead events`.
pub fn events(invocation: &Invocation, args: &EventsArgs) -> anyhow::Result<i32> {
    if args.interval.is_zero() {
        bail!("--interval is no time at all: give one of more than zero, such as 5s");
    }
    let known = Known::find(invocation, &args.id)?;
    let watched = known.unless_stopped(async |server| {
        if args.stats {
            let metrics = server.stats().await?;
            return print(&event("stats", &args.id, Some(stats(&metrics))));
        }
        tokio::select! {
            result = every(server, args) => result,
            result = ooms(server, &args.id) => result,
            // The container's end is the end of its events.
            _ = server.wait() => Ok(()),
        }
    })?;
    if watched.is_none() {
        bail!(
            "container with id {} is not running, and a stopped one has neither statistics nor events: run a new one",
            known.id
        );
    }
    Ok(0)
}

async fn every(server: &Server<'_>, args: &EventsArgs) -> anyhow::Result<()> {
    let mut ticks = tokio::time::interval(args.interval);
    // runc's first figures come after the first interval.
    ticks.tick().await;
    loop {
        ticks.tick().await;
        match server.stats().await {
            Ok(metrics) => print(&event("stats", &args.id, Some(stats(&metrics))))?,
            // One that stands still has none.
            Err(ServerError::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

async fn ooms(server: &Server<'_>, id: &str) -> anyhow::Result<()> {
    let watch = async {
        let mut seen = server.wait_oom(None).await?;
        loop {
            seen = server.wait_oom(Some(seen)).await?;
            print(&event("oom", id, None))?;
        }
    };
    let ended: anyhow::Result<()> = watch.await;
    let refused = ended
        .as_ref()
        .is_err_and(|error| matches!(error.downcast_ref(), Some(ServerError::Refused { .. })));
    if refused {
        // It ends, which is for another to see.
        std::future::pending::<()>().await;
    }
    ended
}

fn print(event: &Value) -> anyhow::Result<()> {
    super::say(&format!("{event}\n"))
}

fn event(kind: &str, id: &str, data: Option<Value>) -> Value {
    match data {
        Some(data) => json!({"type": kind, "id": id, "data": data}),
        None => json!({"type": kind, "id": id}),
    }
}

/// The figures in the form of runc's `types.Stats`; times are in nanoseconds there.
fn stats(metrics: &Metrics) -> Value {
    let (cpu, memory, pids) = (&metrics.cpu, &metrics.memory, &metrics.pids);
    let nanoseconds = |microseconds: u64| microseconds.saturating_mul(1000);
    let raw = json!({
        "active_anon": memory.active_anon, "active_file": memory.active_file, "anon": memory.anon,
        "anon_thp": memory.anon_thp, "file": memory.file, "file_dirty": memory.file_dirty,
        "file_mapped": memory.file_mapped, "file_writeback": memory.file_writeback,
        "inactive_anon": memory.inactive_anon, "inactive_file": memory.inactive_file,
        "kernel_stack": memory.kernel_stack, "pgactivate": memory.pgactivate,
        "pgdeactivate": memory.pgdeactivate, "pgfault": memory.pgfault, "pglazyfree": memory.pglazyfree,
        "pglazyfreed": memory.pglazyfreed, "pgmajfault": memory.pgmajfault, "pgrefill": memory.pgrefill,
        "pgscan": memory.pgscan, "pgsteal": memory.pgsteal, "shmem": memory.shmem, "slab": memory.slab,
        "slab_reclaimable": memory.slab_reclaimable, "slab_unreclaimable": memory.slab_unreclaimable,
        "sock": memory.sock, "thp_collapse_alloc": memory.thp_collapse_alloc,
        "thp_fault_alloc": memory.thp_fault_alloc, "unevictable": memory.unevictable,
        "workingset_activate": memory.workingset_activate,
        "workingset_nodereclaim": memory.workingset_nodereclaim,
        "workingset_refault": memory.workingset_refault,
    });
    let hugetlb: serde_json::Map<String, Value> = metrics
        .hugetlb
        .iter()
        .map(|size| {
            let entry = json!({"usage": size.current, "max": size.max, "failcnt": size.failcnt});
            (size.pagesize.clone(), entry)
        })
        .collect();
    let mut bytes = Vec::new();
    let mut operations = Vec::new();
    for device in &metrics.io.usage {
        let entry = |op: &str, value: u64| json!({"major": device.major, "minor": device.minor, "op": op, "value": value});
        bytes.extend([entry("Read", device.rbytes), entry("Write", device.wbytes)]);
        operations.extend([entry("Read", device.rios), entry("Write", device.wios)]);
    }
    json!({
        "cpu": {
            "usage": {
                "total": nanoseconds(cpu.usage_usec),
                "kernel": nanoseconds(cpu.system_usec),
                "user": nanoseconds(cpu.user_usec),
            },
            "throttling": {
                "periods": cpu.nr_periods,
                "throttledPeriods": cpu.nr_throttled,
                "throttledTime": nanoseconds(cpu.throttled_usec),
            },
            "psi": pressure(cpu.psi.as_ref()),
        },
        "cpuset": {},
        "memory": {
            "cache": memory.file,
            "usage": {
                "limit": memory.usage_limit, "usage": memory.usage, "max": memory.max_usage,
                "failcnt": metrics.memory_events.max,
            },
            "swap": {
                "limit": memory.swap_limit.saturating_add(memory.usage_limit),
                "usage": memory.swap_usage.saturating_add(memory.usage), "failcnt": 0,
            },
            "kernel": {"failcnt": 0},
            "kernelTCP": {"failcnt": 0},
            "raw": raw,
            "psi": pressure(memory.psi.as_ref()),
        },
        "pids": {"current": pids.current, "limit": pids.limit},
        "blkio": {"ioServiceBytesRecursive": bytes, "ioServicedRecursive": operations, "psi": pressure(metrics.io.psi.as_ref())},
        "hugetlb": hugetlb,
        "intel_rdt": {},
        "network_interfaces": null,
    })
}

fn pressure(psi: Option<&PSIStats>) -> Value {
    let line = |data: Option<&PSIData>| {
        data.map_or(Value::Null, |data| {
            json!({"avg10": data.avg10, "avg60": data.avg60, "avg300": data.avg300, "total": data.total})
        })
    };
    psi.map_or(
        Value::Null,
        |psi| json!({"some": line(psi.some.as_ref()), "full": line(psi.full.as_ref())}),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_runcs_names_and_units() {
        let mut metrics = Metrics::default();
        metrics.cpu.mut_or_insert_default().usage_usec = 7;
        metrics.memory.mut_or_insert_default().usage = 4096;
        metrics.pids.mut_or_insert_default().current = 2;
        let stats = stats(&metrics);
        assert_eq!(stats["cpu"]["usage"]["total"], 7000);
        assert_eq!(stats["memory"]["usage"]["usage"], 4096);
        assert_eq!(stats["pids"]["current"], 2);
        let event = event("stats", "c1", Some(stats));
        assert_eq!(
            (&event["type"], &event["id"]),
            (&json!("stats"), &json!("c1"))
        );
    }
}

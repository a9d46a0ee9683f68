//! `bulkhead events`: statistics and kills for want of memory, in runc's JSON.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::bail;
use bulkhead_protocol::agent::{ContainerStatsResponse, Pressure, PressureLine};
use clap::Args;
use serde_json::{Map, Value, json};

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
            let figures = server.stats().await?;
            return print(&event("stats", &args.id, Some(stats(&figures))));
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
            Ok(figures) => print(&event("stats", &args.id, Some(stats(&figures))))?,
            // One that has stopped has none.
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

/// The figures in the form of runc's `types.Stats`, which leaves out what is zero where that says nothing; times are in nanoseconds
/// there. runc 1.1 does not know the pressures and the most memory that was used.
fn stats(stats: &ContainerStatsResponse) -> Value {
    let nanoseconds = |name| of(&stats.cpu, name).saturating_mul(1000);
    let hugetlb: Map<String, Value> = stats
        .hugetlb
        .iter()
        .map(|size| {
            let mut entry = told(&[("usage", size.current)]);
            entry.insert("failcnt".into(), size.failed.into());
            (size.page_size.clone(), entry.into())
        })
        .collect();
    let services = |[read, write]: [&str; 2]| -> Vec<Value> {
        let devices = stats.io.iter();
        let entries = devices.flat_map(|device| {
            let entry = |op: &str, name| {
                let mut entry = told(&[
                    ("major", device.major),
                    ("minor", device.minor),
                    ("value", of(&device.counters, name)),
                ]);
                entry.insert("op".into(), op.into());
                entry.into()
            };
            [entry("Read", read), entry("Write", write)]
        });
        entries.collect()
    };
    let mut blkio = Map::new();
    for (name, entries) in [
        ("ioServiceBytesRecursive", services(["rbytes", "wbytes"])),
        ("ioServicedRecursive", services(["rios", "wios"])),
    ] {
        if !entries.is_empty() {
            blkio.insert(name.into(), entries.into());
        }
    }
    blkio.insert("psi".into(), pressure(stats.io_pressure.as_ref()));
    let memory = |limit: u64, usage, max, failures: u64| {
        let mut entry = told(&[("usage", usage), ("max", max)]);
        entry.insert("limit".into(), limit.into());
        entry.insert("failcnt".into(), failures.into());
        entry
    };
    let pids_limit = if stats.pids_max == u64::MAX {
        0
    } else {
        stats.pids_max
    };
    let mut memories = told(&[("cache", of(&stats.memory, "file"))]);
    for (name, value) in [
        (
            "usage",
            memory(
                stats.memory_max,
                stats.memory_current,
                stats.memory_peak,
                of(&stats.memory_events, "max"),
            ),
        ),
        // Together with the memory, as cgroup version 1 has it.
        (
            "swap",
            memory(
                stats.swap_max.saturating_add(stats.memory_max),
                stats.swap_current.saturating_add(stats.memory_current),
                0,
                0,
            ),
        ),
        ("kernel", memory(0, 0, 0, 0)),
        ("kernelTCP", memory(0, 0, 0, 0)),
    ] {
        memories.insert(name.into(), value.into());
    }
    memories.insert("raw".into(), json!(stats.memory));
    memories.insert("psi".into(), pressure(stats.memory_pressure.as_ref()));
    json!({
        "cpu": {
            "usage": {
                "total": nanoseconds("usage_usec"),
                "kernel": nanoseconds("system_usec"),
                "user": nanoseconds("user_usec"),
            },
            "throttling": told(&[
                ("periods", of(&stats.cpu, "nr_periods")),
                ("throttledPeriods", of(&stats.cpu, "nr_throttled")),
                ("throttledTime", nanoseconds("throttled_usec")),
            ]),
            "psi": pressure(stats.cpu_pressure.as_ref()),
        },
        // Of cgroup version 1 alone.
        "cpuset": {
            "cpu_exclusive": 0, "mem_exclusive": 0, "mem_hardwall": 0, "memory_migrate": 0, "memory_pressure": 0,
            "memory_spread_page": 0, "memory_spread_slab": 0, "sched_load_balance": 0, "sched_relax_domain_level": 0,
        },
        "memory": memories,
        "pids": told(&[("current", stats.pids_current), ("limit", pids_limit)]),
        "blkio": blkio,
        "hugetlb": hugetlb,
        "intel_rdt": {},
        "network_interfaces": null,
    })
}

fn of(figures: &HashMap<String, u64>, name: &str) -> u64 {
    figures.get(name).copied().unwrap_or_default()
}

/// The figures that are not zero.
fn told(figures: &[(&str, u64)]) -> Map<String, Value> {
    let figures = figures.iter().filter(|(_, figure)| *figure != 0);
    figures
        .map(|(name, figure)| ((*name).to_owned(), json!(figure)))
        .collect()
}

fn pressure(pressure: Option<&Pressure>) -> Value {
    let line = |line: Option<&PressureLine>| {
        line.map_or(Value::Null, |line| {
            json!({"avg10": line.avg10, "avg60": line.avg60, "avg300": line.avg300, "total": line.total})
        })
    };
    pressure.map_or(
        Value::Null,
        |pressure| json!({"some": line(pressure.some.as_ref()), "full": line(pressure.full.as_ref())}),
    )
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::agent::IoStats;

    use super::*;

    #[test]
    fn figures_have_runcs_names_and_units() {
        let response = ContainerStatsResponse {
            cpu: HashMap::from([("usage_usec".to_owned(), 7)]),
            memory: HashMap::from([("file".to_owned(), 512), ("zswap".to_owned(), 0)]),
            memory_current: 4096,
            memory_max: u64::MAX,
            pids_current: 2,
            pids_max: u64::MAX,
            io: vec![IoStats {
                major: 8,
                counters: HashMap::from([("rbytes".to_owned(), 9)]),
                ..Default::default()
            }],
            ..Default::default()
        };
        let stats = stats(&response);
        assert_eq!(stats["cpu"]["usage"]["total"], 7000);
        assert_eq!(stats["memory"]["usage"]["usage"], 4096);
        assert_eq!(
            stats["memory"]["swap"],
            json!({"limit": u64::MAX, "usage": 4096, "failcnt": 0})
        );
        assert_eq!(stats["memory"]["cache"], 512);
        assert_eq!(stats["memory"]["raw"], json!({"file": 512, "zswap": 0}));
        assert_eq!(stats["pids"], json!({"current": 2}));
        assert_eq!(
            stats["blkio"]["ioServiceBytesRecursive"],
            json!([{"major": 8, "op": "Read", "value": 9}, {"major": 8, "op": "Write"}])
        );
        assert_eq!(stats["cpu"]["throttling"], json!({}));
        let event = event("stats", "c1", Some(stats));
        assert_eq!(
            (&event["type"], &event["id"]),
            (&json!("stats"), &json!("c1"))
        );
    }
}

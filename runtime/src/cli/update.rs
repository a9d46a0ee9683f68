//! `bulkhead update`: a container's limits, with runc's flags.

use std::io::Read;

use anyhow::{Context, bail};
use clap::Args;
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use super::Invocation;
use super::known::Known;

#[derive(Debug, Args)]
pub struct UpdateArgs {
    /// File with the new linux.resources as JSON, - for standard input; other flags are then ignored
    #[arg(short, long, value_name = "FILE")]
    resources: Option<String>,
    /// Weight of block I/O, 10 to 1000
    #[arg(long, value_name = "WEIGHT")]
    blkio_weight: Option<u16>,
    /// Period of the CPU quota in microseconds
    #[arg(long, value_name = "US")]
    cpu_period: Option<u64>,
    /// CPU quota in microseconds a period, -1 for none
    #[arg(long, value_name = "US", allow_hyphen_values = true)]
    cpu_quota: Option<i64>,
    /// CPU burst in microseconds
    #[arg(long, value_name = "US")]
    cpu_burst: Option<u64>,
    /// Relative weight of CPU time, 2 to 262144
    #[arg(long, value_name = "SHARES")]
    cpu_share: Option<u64>,
    /// Whether the container runs only when nothing else does, 0 or 1
    #[arg(long, value_name = "IDLE")]
    cpu_idle: Option<i64>,
    /// Period of the realtime quota: cgroup v1's
    #[arg(long, value_name = "US", hide = true)]
    cpu_rt_period: Option<u64>,
    /// Realtime quota: cgroup v1's
    #[arg(long, value_name = "US", hide = true, allow_hyphen_values = true)]
    cpu_rt_runtime: Option<i64>,
    /// Processors to run on
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Memory nodes to use
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// Obsolete, without effect
    #[arg(long, value_name = "BYTES", hide = true)]
    kernel_memory: Option<String>,
    /// Obsolete, without effect
    #[arg(long, value_name = "BYTES", hide = true)]
    kernel_memory_tcp: Option<String>,
    /// Memory limit in bytes, -1 for none
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    memory: Option<i64>,
    /// Memory that is not reclaimed before others', in bytes
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    memory_reservation: Option<i64>,
    /// Limit of memory and swap together in bytes, -1 for none
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    memory_swap: Option<i64>,
    /// Most processes, -1 for any number
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pids_limit: Option<i64>,
    /// Cache allocation of the host's processors: not a VM's
    #[arg(long, value_name = "SCHEMA", hide = true)]
    l3_cache_schema: Option<String>,
    /// Memory bandwidth of the host's processors: not a VM's
    #[arg(long, value_name = "SCHEMA", hide = true)]
    mem_bw_schema: Option<String>,
    /// Name of the container
    id: String,
}

/// Runs `bulkhead update`.
pub fn update(invocation: &Invocation, args: &UpdateArgs) -> anyhow::Result<i32> {
    let resources = match &args.resources {
        Some(file) => read(file)?,
        None => of_flags(args)?,
    };
    let _: LinuxResources = serde_path_to_error::deserialize(&resources)
        .map_err(|error| anyhow::anyhow!("resources: `{}`: {}", error.path(), error.inner()))?;
    let json = serde_json::to_vec(&resources)?;
    Known::find(invocation, &args.id)?.call(async |server| server.update(json).await)?;
    Ok(0)
}

fn read(file: &str) -> anyhow::Result<Value> {
    let mut text = Vec::new();
    if file == "-" {
        std::io::stdin().read_to_end(&mut text)?;
    } else {
        text = std::fs::read(file).with_context(|| format!("cannot read {file}"))?;
    }
    serde_json::from_slice(&text)
        .with_context(|| format!("{file} is not the linux.resources of a runtime spec"))
}

fn of_flags(args: &UpdateArgs) -> anyhow::Result<Value> {
    for (flag, given) in [
        ("--l3-cache-schema", args.l3_cache_schema.is_some()),
        ("--mem-bw-schema", args.mem_bw_schema.is_some()),
        ("--cpu-rt-period", args.cpu_rt_period.is_some()),
        ("--cpu-rt-runtime", args.cpu_rt_runtime.is_some()),
    ] {
        if given {
            bail!("{flag} is not supported: neither a VM nor cgroup v2 has it; leave it out");
        }
    }
    let object = |entries: &[(&str, Option<Value>)]| -> Option<Value> {
        let given = entries
            .iter()
            .filter_map(|(name, value)| Some(((*name).to_owned(), value.clone()?)));
        let map: Map<String, Value> = given.collect();
        (!map.is_empty()).then_some(Value::Object(map))
    };
    let number = |value: Option<i64>| value.map(Value::from);
    let resources = object(&[
        (
            "cpu",
            object(&[
                ("shares", args.cpu_share.map(Value::from)),
                ("quota", number(args.cpu_quota)),
                ("period", args.cpu_period.map(Value::from)),
                ("burst", args.cpu_burst.map(Value::from)),
                ("idle", number(args.cpu_idle)),
                ("cpus", args.cpuset_cpus.clone().map(Value::from)),
                ("mems", args.cpuset_mems.clone().map(Value::from)),
            ]),
        ),
        (
            "memory",
            object(&[
                ("limit", number(args.memory)),
                ("reservation", number(args.memory_reservation)),
                ("swap", number(args.memory_swap)),
            ]),
        ),
        ("pids", args.pids_limit.map(|limit| json!({"limit": limit}))),
        (
            "blockIO",
            args.blkio_weight.map(|weight| json!({"weight": weight})),
        ),
    ]);
    Ok(resources.unwrap_or_else(|| json!({})))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        update: UpdateArgs,
    }

    fn resources(line: &[&str]) -> Result<Value, String> {
        let line = std::iter::once(&"update").chain(line).chain(&["c1"]);
        of_flags(&Line::parse_from(line).update).map_err(|e| e.to_string())
    }

    #[test]
    fn flags_name_what_changes_and_nothing_else() {
        assert_eq!(resources(&[]).unwrap(), json!({}));
        assert_eq!(
            resources(&["--memory", "1000", "--cpu-quota=-1", "--pids-limit", "-1"]).unwrap(),
            json!({"memory": {"limit": 1000}, "cpu": {"quota": -1}, "pids": {"limit": -1}})
        );
    }

    #[test]
    fn what_no_vm_has_is_refused_by_name() {
        let message = resources(&["--l3-cache-schema", "L3:0=f"]).unwrap_err();
        assert!(
            message.starts_with("--l3-cache-schema is not supported"),
            "{message}"
        );
    }
}

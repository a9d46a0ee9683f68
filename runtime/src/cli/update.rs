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
    /// Accepted for runc's sake, which ignores it as well where cgroup v2 is: that has no realtime quota
    #[arg(long, value_name = "US", hide = true)]
    cpu_rt_period: Option<u64>,
    /// Accepted for runc's sake: see above
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
    /// Memory limit in bytes, or with a unit such as M or GiB; -1 for none
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true, value_parser = bytes)]
    memory: Option<i64>,
    /// Memory that is not reclaimed before others', in bytes
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true, value_parser = bytes)]
    memory_reservation: Option<i64>,
    /// Limit of memory and swap together in bytes, -1 for none
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true, value_parser = bytes)]
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

/// A size as runc takes it: a number, which may have a fraction, and a unit of 1024, as in `512M`, `1.5g` or `64 KiB`; or -1.
fn bytes(text: &str) -> Result<i64, String> {
    if text == "-1" {
        return Ok(-1);
    }
    let wrong = || "give a number of bytes, or one with a unit such as 100M or 1.5GiB".to_owned();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic() || c == ' ');
    let unit = text.get(digits.len()..).unwrap_or_default();
    let unit = unit.strip_prefix(' ').unwrap_or(unit).to_ascii_lowercase();
    let power = match unit.as_str() {
        "" | "b" => 0,
        unit => {
            let letter = unit.trim_end_matches('b').trim_end_matches('i');
            let units = ["k", "m", "g", "t", "p"].iter().zip(1..);
            let power = units.clone().find(|(name, _)| **name == letter);
            let (name, power) = power.ok_or_else(wrong)?;
            let written = ["", "b", "ib"].map(|end| format!("{name}{end}"));
            if !written.contains(&unit.to_owned()) {
                return Err(wrong());
            }
            power
        }
    };
    if !digits
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.')
    {
        return Err(wrong());
    }
    let factor = 1_i64 << (10 * power);
    if let Ok(whole) = digits.parse::<i64>() {
        return whole.checked_mul(factor).ok_or_else(wrong);
    }
    let size = digits.parse::<f64>().map_err(|_| wrong())? * factor as f64;
    // Saturates: what is more than there are bytes is refused by whoever sets it.
    Ok(size as i64)
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
    fn a_realtime_quota_is_ignored_as_runc_ignores_it_with_cgroup_v2() {
        assert_eq!(
            resources(&["--cpu-rt-period", "1000000", "--cpu-rt-runtime", "950000"]).unwrap(),
            json!({})
        );
        assert_eq!(
            resources(&["--cpu-rt-runtime=-1", "--cpu-share", "512"]).unwrap(),
            json!({"cpu": {"shares": 512}})
        );
    }

    #[test]
    fn sizes_may_have_a_unit() {
        for (text, expected) in [
            ("0", Some(0)),
            ("-1", Some(-1)),
            ("100", Some(100)),
            ("100b", Some(100)),
            ("100M", Some(100 << 20)),
            ("100mb", Some(100 << 20)),
            ("2 GiB", Some(2 << 30)),
            ("1.5k", Some(1536)),
            ("", None),
            ("M", None),
            ("-2", None),
            ("1ibb", None),
            ("1e3", None),
            ("nan", None),
            ("1 M B", None),
            ("9223372036854775807k", None),
        ] {
            assert_eq!(bytes(text).ok(), expected, "{text}");
        }
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

//! Limits of processors and block devices as values for the files of a cgroup, the guest's and the host's: the spec's v1 terms
//! translated as runc translates them. Files: the kernel's Documentation/admin-guide/cgroup-v2.rst.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxThrottleDevice};

use crate::io_weight;

/// The file with BFQ's weights. A kernel without BFQ has none.
pub const BFQ_WEIGHT: &str = "io.bfq.weight";

/// One value for one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Of the spec's `linux.resources`, for messages.
    pub field: String,
    /// The file's name.
    pub file: String,
    /// What it is to hold.
    pub value: Value,
    /// What it means that it does not.
    pub unset: Unset,
}

/// What a file is to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// This.
    Text(String),
    /// A period of `cpu.max`; the quota stays.
    Period(u64),
    /// A weight of 10 to 1000 for BFQ, or scaled for `io.weight` where there is no BFQ.
    IoWeight(u16),
}

/// What it means that a value can't be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unset {
    /// That the limit does not hold.
    Refuse,
    /// That there is nothing to limit, if the kernel has no such file.
    PassOver,
    /// That something else has to be set first; it is set again after that.
    Retry,
}

/// A field of the spec that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// The field, below `linux.resources`.
    pub field: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

/// A value that could not be set.
#[derive(Debug)]
pub struct WriteError {
    /// The field, below `linux.resources`.
    pub field: String,
    /// The file.
    pub file: String,
    /// What it was to hold.
    pub value: String,
    /// What the kernel said.
    pub source: io::Error,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "linux.resources.{}: {}", self.field, self.problem)
    }
}

impl std::error::Error for FieldError {}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            field, file, value, ..
        } = self;
        write!(f, "linux.resources.{field}: cannot set {file} to {value:?}")
    }
}

impl std::error::Error for WriteError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

impl Setting {
    /// A value without which the limit does not hold.
    pub fn text(field: &str, file: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            field: field.to_owned(),
            file: file.into(),
            value: Value::Text(text.into()),
            unset: Unset::Refuse,
        }
    }

    /// The same, with other consequences.
    pub fn unless(self, unset: Unset) -> Self {
        Self { unset, ..self }
    }

    /// Sets it for the cgroup at `path`.
    pub fn write(&self, path: &Path) -> Result<(), WriteError> {
        let (file, value) = match &self.value {
            Value::Text(text) => (self.file.as_str(), text.clone()),
            Value::Period(period) => {
                let present = fs::read_to_string(path.join(&self.file)).unwrap_or_default();
                let quota = present.split_whitespace().next().unwrap_or("max");
                (self.file.as_str(), format!("{quota} {period}"))
            }
            Value::IoWeight(weight) if path.join(BFQ_WEIGHT).exists() => {
                (BFQ_WEIGHT, weight.to_string())
            }
            Value::IoWeight(weight) => (self.file.as_str(), io_weight(*weight).to_string()),
        };
        match write_file(&path.join(file), &value) {
            Err(source) => match self.unset {
                Unset::Retry => Ok(()),
                Unset::PassOver if source.kind() == io::ErrorKind::NotFound => Ok(()),
                _ => Err(WriteError {
                    field: self.field.clone(),
                    file: file.to_owned(),
                    value,
                    source,
                }),
            },
            Ok(()) => Ok(()),
        }
    }
}

/// Writes to a file of a cgroup; not as `fs::write`, which would make one where the kernel has none.
pub fn write_file(path: &Path, value: &str) -> io::Result<()> {
    File::options()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

/// The limits of processors. 0 and the empty list are what clients write that mean nothing by it.
pub fn cpu(cpu: &LinuxCpu) -> Result<Vec<Setting>, FieldError> {
    let mut settings = weight(cpu);
    let quota = cpu.quota().filter(|&quota| quota != 0);
    let quota = quota.map(limit_or_max);
    let period = cpu.period().filter(|&period| period != 0);
    let max = match (quota, period) {
        // Without a period the kernel keeps what there is.
        (Some(quota), None) => Some(Setting::text("cpu.quota", "cpu.max", quota)),
        (Some(quota), Some(period)) => {
            let value = format!("{quota} {period}");
            Some(Setting::text("cpu.quota", "cpu.max", value))
        }
        (None, Some(period)) => Some(Setting {
            value: Value::Period(period),
            ..Setting::text("cpu.period", "cpu.max", "")
        }),
        (None, None) => None,
    };
    let burst = cpu
        .burst()
        .map(|burst| Setting::text("cpu.burst", "cpu.max.burst", burst.to_string()));
    // A burst must never be beyond the quota: one that is to fall goes first, one that is to rise after it.
    if let Some(burst) = burst.clone().filter(|_| max.is_some()) {
        settings.push(burst.unless(Unset::Retry));
    }
    settings.extend(max.into_iter().chain(burst));
    for (field, file, list) in [
        ("cpu.cpus", "cpuset.cpus", cpu.cpus()),
        ("cpu.mems", "cpuset.mems", cpu.mems()),
    ] {
        if let Some(list) = list.as_deref().filter(|list| !list.is_empty()) {
            if !is_list(list) {
                return Err(FieldError {
                    field: field.to_owned(),
                    problem: "is not a list like 0-3,7",
                });
            }
            settings.push(Setting::text(field, file, list));
        }
    }
    Ok(settings)
}

/// What is idle has no weight to set: that goes before, when nothing is idle.
fn weight(cpu: &LinuxCpu) -> Vec<Setting> {
    let shares = cpu.shares().filter(|&shares| shares != 0);
    let weight = shares
        .map(|shares| Setting::text("cpu.shares", "cpu.weight", cpu_weight(shares).to_string()));
    let idle = |idle: i64| Setting::text("cpu.idle", "cpu.idle", idle.to_string());
    let first = weight.as_ref().and(cpu.idle()).map(|_| idle(0));
    let mut settings: Vec<_> = first.into_iter().chain(weight).collect();
    settings.extend(cpu.idle().map(idle));
    settings
}

/// The limits of block devices.
pub fn io(io: &LinuxBlockIo) -> Result<Vec<Setting>, FieldError> {
    let mut settings = Vec::new();
    // A weight compares those who use one device; a kernel without the file has none to share.
    if let Some(weight) = io.weight().filter(|&weight| weight != 0) {
        let value = Value::IoWeight(checked_weight(weight, "blockIO.weight")?);
        settings.push(Setting {
            value,
            ..Setting::text("blockIO.weight", "io.weight", "").unless(Unset::PassOver)
        });
    }
    for (index, device) in io.weight_device().iter().flatten().enumerate() {
        let Some(weight) = device.weight().filter(|&weight| weight != 0) else {
            continue;
        };
        let field = format!("blockIO.weightDevice[{index}]");
        let weight = checked_weight(weight, &format!("{field}.weight"))?;
        let value = format!("{}:{} {weight}", device.major(), device.minor());
        // Only BFQ has weights of single devices.
        settings.push(Setting::text(&field, BFQ_WEIGHT, value).unless(Unset::PassOver));
    }
    for (name, key, devices) in [
        ("ReadBps", "rbps", io.throttle_read_bps_device()),
        ("WriteBps", "wbps", io.throttle_write_bps_device()),
        ("ReadIOPS", "riops", io.throttle_read_iops_device()),
        ("WriteIOPS", "wiops", io.throttle_write_iops_device()),
    ] {
        settings.extend(throttles(name, key, devices));
    }
    Ok(settings)
}

fn throttles(
    name: &str,
    key: &str,
    devices: &Option<Vec<LinuxThrottleDevice>>,
) -> impl Iterator<Item = Setting> {
    devices
        .iter()
        .flatten()
        .enumerate()
        .map(move |(index, device)| {
            let rate = match device.rate() {
                0 => "max".to_owned(),
                rate => rate.to_string(),
            };
            let value = format!("{}:{} {key}={rate}", device.major(), device.minor());
            Setting::text(
                &format!("blockIO.throttle{name}Device[{index}]"),
                "io.max",
                value,
            )
        })
}

/// The spec's way to say that there is no limit.
pub fn limit_or_max(limit: i64) -> String {
    if limit < 0 {
        "max".to_owned()
    } else {
        limit.to_string()
    }
}

/// runc's linear map of 2..=262144 shares to a weight of 1..=10000.
fn cpu_weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

fn checked_weight(weight: u16, field: &str) -> Result<u16, FieldError> {
    if (10..=1000).contains(&weight) {
        return Ok(weight);
    }
    Err(FieldError {
        field: field.to_owned(),
        problem: "must be from 10 to 1000",
    })
}

/// `0-3,7`: cpuset(7), "List format".
pub fn is_list(text: &str) -> bool {
    text.trim_end().split(',').all(|range| {
        let mut ends = range.split('-').map(|end| end.trim().parse::<u32>().ok());
        match (ends.next(), ends.next(), ends.next()) {
            (Some(Some(_)), None, None) => true,
            (Some(Some(first)), Some(Some(last)), None) => first <= last,
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value as Json, json};

    use super::*;

    fn of_cpu(json: Json) -> Result<Vec<Setting>, FieldError> {
        cpu(&serde_json::from_value(json).unwrap())
    }

    fn of_io(json: Json) -> Result<Vec<Setting>, FieldError> {
        io(&serde_json::from_value(json).unwrap())
    }

    /// A folder with these files, as they are after the limits are written.
    fn written(settings: &[Setting], files: &[(&str, &str)]) -> Vec<(String, String)> {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in files {
            fs::write(dir.path().join(file), text).unwrap();
        }
        for setting in settings {
            setting.write(dir.path()).unwrap();
        }
        let read = |(file, _): &(&str, &str)| {
            let text = fs::read_to_string(dir.path().join(file)).unwrap();
            ((*file).to_owned(), text)
        };
        files.iter().map(read).collect()
    }

    fn texts(settings: Vec<Setting>) -> Vec<(String, String)> {
        let text = |setting: Setting| match setting.value {
            Value::Text(text) => (setting.file, text),
            other => panic!("{other:?}"),
        };
        settings.into_iter().map(text).collect()
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter()
            .map(|&(file, value)| (file.to_owned(), value.to_owned()))
            .collect()
    }

    #[test]
    fn limits_of_processors_are_translated_as_runc_translates_them() {
        let all = json!({
            "shares": 1024, "quota": 50_000, "period": 100_000, "cpus": "0-1", "mems": "0",
            "realtimeRuntime": 5, "realtimePeriod": 10
        });
        assert_eq!(
            texts(of_cpu(all).unwrap()),
            pairs(&[
                ("cpu.weight", "39"),
                ("cpu.max", "50000 100000"),
                ("cpuset.cpus", "0-1"),
                ("cpuset.mems", "0")
            ])
        );
    }

    #[test]
    fn what_is_0_or_empty_says_nothing() {
        let nothing = json!({"shares": 0, "quota": 0, "period": 0, "cpus": "", "mems": ""});
        assert_eq!(of_cpu(nothing).unwrap(), []);
        let half = json!({"quota": 50_000, "period": 0});
        assert_eq!(texts(of_cpu(half).unwrap()), pairs(&[("cpu.max", "50000")]));
        let nothing = json!({"weight": 0, "weightDevice": [{"major": 8, "minor": 0, "weight": 0}]});
        assert_eq!(of_io(nothing).unwrap(), []);
    }

    #[test]
    fn a_quota_alone_keeps_the_period_and_a_period_alone_the_quota() {
        let none = json!({"quota": -1});
        assert_eq!(texts(of_cpu(none).unwrap()), pairs(&[("cpu.max", "max")]));
        let period = of_cpu(json!({"period": 50_000})).unwrap();
        assert_eq!(
            written(&period, &[("cpu.max", "20000 10000")]),
            pairs(&[("cpu.max", "20000 50000")])
        );
    }

    #[test]
    fn a_burst_is_set_before_and_after_the_quota_that_may_have_to_come_first() {
        let files = |json: Json| -> Vec<(String, Unset)> {
            let settings = of_cpu(json).unwrap().into_iter();
            settings
                .map(|setting| (setting.file, setting.unset))
                .collect()
        };
        let burst = |unset| ("cpu.max.burst".to_owned(), unset);
        assert_eq!(
            files(json!({"burst": 5, "quota": 10})),
            [
                burst(Unset::Retry),
                ("cpu.max".to_owned(), Unset::Refuse),
                burst(Unset::Refuse)
            ]
        );
        assert_eq!(files(json!({"burst": 0})), [burst(Unset::Refuse)]);
        let missing = Path::new("/none");
        let settings = of_cpu(json!({"burst": 5, "quota": 10})).unwrap();
        let results = settings
            .iter()
            .map(|setting| setting.write(missing).is_ok());
        assert_eq!(results.collect::<Vec<_>>(), [true, false, false]);
    }

    #[test]
    fn shares_are_set_while_nothing_is_idle() {
        for (json, expected) in [
            (
                json!({"idle": 1, "shares": 512}),
                &[("cpu.idle", "0"), ("cpu.weight", "20"), ("cpu.idle", "1")][..],
            ),
            (json!({"idle": 1}), &[("cpu.idle", "1")]),
            (json!({"shares": 512}), &[("cpu.weight", "20")]),
        ] {
            assert_eq!(texts(of_cpu(json).unwrap()), pairs(expected));
        }
    }

    #[test]
    fn block_devices_are_throttled_one_by_one() {
        let device = |rate: u64| json!([{"major": 8, "minor": 16, "rate": rate}]);
        let json = json!({
            "throttleReadBpsDevice": device(1), "throttleWriteBpsDevice": device(2),
            "throttleReadIOPSDevice": device(3), "throttleWriteIOPSDevice": device(0)
        });
        let lines: Vec<_> = texts(of_io(json).unwrap())
            .into_iter()
            .map(|(_, value)| value)
            .collect();
        assert_eq!(
            lines,
            [
                "8:16 rbps=1",
                "8:16 wbps=2",
                "8:16 riops=3",
                "8:16 wiops=max"
            ]
        );
    }

    #[test]
    fn weights_go_to_bfq_where_there_is_one_and_are_scaled_where_not() {
        let io = of_io(json!({
            "weight": 500, "leafWeight": 7,
            "weightDevice": [{"major": 8, "minor": 0, "weight": 300}]
        }))
        .unwrap();
        assert_eq!(
            written(&io, &[("io.weight", "")]),
            pairs(&[("io.weight", "4950")])
        );
        assert_eq!(written(&io, &[]), []);
        let bfq = written(&io, &[("io.weight", ""), (BFQ_WEIGHT, "")]);
        // A plain file keeps the last that was written to it, and whatever is longer.
        assert_eq!(bfq, pairs(&[("io.weight", ""), (BFQ_WEIGHT, "8:0 300")]));
    }

    #[test]
    fn the_shares_of_the_spec_span_the_weights_of_the_kernel() {
        assert_eq!(
            [1, 2, 512, 1024, 262_144, u64::MAX].map(cpu_weight),
            [1, 1, 20, 39, 10_000, 10_000]
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_the_name_of_its_field() {
        for (result, field) in [
            (of_cpu(json!({"cpus": "0-"})), "cpu.cpus"),
            (of_cpu(json!({"mems": "3-1"})), "cpu.mems"),
            (of_io(json!({"weight": 5})), "blockIO.weight"),
            (
                of_io(json!({"weightDevice": [{"major": 8, "minor": 0, "weight": 5000}]})),
                "blockIO.weightDevice[0].weight",
            ),
        ] {
            let error = result.unwrap_err().to_string();
            let start = format!("linux.resources.{field}: ");
            assert!(error.starts_with(&start), "{error}");
        }
        assert!(["0", "0-3,7", "0-1,3\n"].into_iter().all(is_list));
    }

    #[test]
    fn a_limit_that_the_kernel_has_not_is_named() {
        let error = Setting::text("pids.limit", "pids.max", "5")
            .write(Path::new("/none"))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "linux.resources.pids.limit: cannot set pids.max to \"5\""
        );
        assert_eq!(error.source.kind(), std::io::ErrorKind::NotFound);
    }
}

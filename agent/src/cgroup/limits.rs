//! `linux.resources` as values for the files of a cgroup: the spec's v1 terms translated as runc translates them. Those of processors
//! and block devices, which the host has too, are in [`bulkhead_protocol::limits`].

use std::fs;
use std::io;
use std::path::Path;

use bulkhead_protocol::limits::{self, FieldError, Setting, Unset, WriteError, limit_or_max};
use oci_spec::runtime::{LinuxMemory, LinuxResources};

use crate::device_filter::DeviceFilter;
use crate::error::{Context, Error, Kind, Result, errno_of, errno_text};

/// What a cgroup limits. Holds only what the spec names: for a new container its limits, for an update the changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    settings: Vec<Setting>,
    check: Option<UsageCheck>,
    /// None leaves the devices as they are.
    pub(super) devices: Option<DeviceFilter>,
}

/// `checkBeforeUpdate`: no limit may be set that is used up already.
#[derive(Debug, Clone, PartialEq, Eq)]
struct UsageCheck {
    memory: i64,
    swap: i64,
}

impl Limits {
    /// Of a new container.
    pub fn from_spec(resources: Option<&LinuxResources>) -> Result<Self> {
        let rules = resources.and_then(|resources| resources.devices().as_deref());
        Ok(Self {
            devices: Some(DeviceFilter::from_spec(rules.unwrap_or_default())?),
            ..match resources {
                Some(resources) => Self::for_update(resources)?,
                None => Self {
                    settings: Vec::new(),
                    check: None,
                    devices: None,
                },
            }
        })
    }

    /// For a container that has limits. Its devices stay as they are, as with runc.
    pub fn for_update(resources: &LinuxResources) -> Result<Self> {
        let mut settings = Settings::default();
        settings.pids(resources);
        if let Some(memory) = resources.memory() {
            settings.memory(memory)?;
        }
        if let Some(io) = resources.block_io() {
            settings.0.extend(limits::io(io)?);
        }
        if let Some(cpu) = resources.cpu() {
            settings.0.extend(limits::cpu(cpu)?);
        }
        settings.huge_pages(resources)?;
        settings.rdma(resources)?;
        settings.unified(resources)?;
        let check = resources
            .memory()
            .as_ref()
            .filter(|memory| memory.check_before_update().unwrap_or(false))
            .map(|memory| UsageCheck {
                memory: memory.limit().unwrap_or(0),
                swap: memory.swap().unwrap_or(0),
            });
        Ok(Self {
            settings: settings.0,
            check,
            devices: None,
        })
    }

    /// Writes the values to the files of the cgroup at `path`.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        if let Some(check) = &self.check {
            check.against(path)?;
        }
        let write = |setting: &Setting| setting.write(path).map_err(Error::from);
        self.settings.iter().try_for_each(write)
    }
}

impl UsageCheck {
    fn against(&self, path: &Path) -> Result<()> {
        let what = || "linux.resources.memory.checkBeforeUpdate: cannot read memory.current";
        let usage = match fs::read_to_string(path.join("memory.current")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            usage => usage.what(what)?,
        };
        let usage: i64 = usage.trim().parse().unwrap_or(0);
        for (name, limit) in [("memory+swap", self.swap), ("memory", self.memory)] {
            if limit > 0 && limit <= usage {
                return Err(Error::setup(
                    Kind::InvalidArgument,
                    format!(
                        "linux.resources.memory: rejecting {name} limit {limit} <= usage {usage}"
                    ),
                ));
            }
        }
        Ok(())
    }
}

impl From<FieldError> for Error {
    fn from(error: FieldError) -> Self {
        Self::spec(format!("linux.resources.{}", error.field), error.problem)
    }
}

impl From<WriteError> for Error {
    fn from(error: WriteError) -> Self {
        let problem = match error.source.kind() {
            io::ErrorKind::NotFound => "the guest's kernel has no such limit".to_owned(),
            _ => errno_text(errno_of(&error.source)),
        };
        Self::setup(Kind::InvalidArgument, format!("{error}: {problem}"))
    }
}

/// In runc's order.
#[derive(Debug, Default)]
struct Settings(Vec<Setting>);

impl Settings {
    fn text(&mut self, field: &str, file: impl Into<String>, text: impl Into<String>) {
        self.0.push(Setting::text(field, file, text));
    }

    /// What is nothing to limit where the kernel has no such file.
    fn text_if_there(&mut self, field: &str, file: impl Into<String>, text: impl Into<String>) {
        self.0
            .push(Setting::text(field, file, text).unless(Unset::PassOver));
    }

    fn pids(&mut self, resources: &LinuxResources) {
        // 0 is what clients write that mean nothing by it.
        if let Some(pids) = resources.pids()
            && pids.limit() != 0
        {
            self.text("pids.limit", "pids.max", limit_or_max(pids.limit()));
        }
    }

    fn memory(&mut self, memory: &LinuxMemory) -> Result<()> {
        let limit = memory.limit().filter(|&limit| limit != 0);
        if let Some(swap) = swap_limit(memory.swap().unwrap_or(0), limit)? {
            // Without CONFIG_SWAP there is neither a file nor swap to limit.
            self.text_if_there("memory.swap", "memory.swap.max", swap);
        }
        if let Some(limit) = limit {
            self.text("memory.limit", "memory.max", limit_or_max(limit));
        }
        if let Some(reservation) = memory.reservation().filter(|&value| value != 0) {
            self.text(
                "memory.reservation",
                "memory.low",
                limit_or_max(reservation),
            );
        }
        Ok(())
    }

    fn huge_pages(&mut self, resources: &LinuxResources) -> Result<()> {
        for (index, limit) in resources.hugepage_limits().iter().flatten().enumerate() {
            let field = format!("hugepageLimits[{index}]");
            let size = limit.page_size();
            if !is_page_size(size) {
                return Err(Error::spec(
                    format!("linux.resources.{field}.pageSize"),
                    format!("{size:?} is not a size like 64KB, 2MB or 1GB"),
                ));
            }
            let value = limit.limit().to_string();
            self.text(&field, format!("hugetlb.{size}.max"), value.clone());
            let reserved = format!("hugetlb.{size}.rsvd.max");
            self.text_if_there(&field, reserved, value);
        }
        Ok(())
    }

    fn rdma(&mut self, resources: &LinuxResources) -> Result<()> {
        for (device, limits) in resources.rdma().iter().flatten() {
            let field = format!("rdma[{device:?}]");
            if device.is_empty() || device.contains(char::is_whitespace) {
                return Err(Error::spec(
                    format!("linux.resources.{field}"),
                    "not the name of a device",
                ));
            }
            let mut value = device.clone();
            for (key, limit) in [
                ("hca_handle", limits.hca_handles()),
                ("hca_object", limits.hca_objects()),
            ] {
                if let Some(limit) = limit {
                    value.push_str(&format!(" {key}={limit}"));
                }
            }
            self.text(&field, "rdma.max", value);
        }
        Ok(())
    }

    /// Last, so that these win over what the v1 terms say.
    fn unified(&mut self, resources: &LinuxResources) -> Result<()> {
        /// Of the files that every cgroup has, those that limit something.
        const CORE: [&str; 2] = ["cgroup.max.depth", "cgroup.max.descendants"];
        for (file, value) in resources.unified().iter().flatten() {
            let field = format!("unified[{file:?}]");
            let plain = file.contains('.') && !file.contains('/') && !file.starts_with('.');
            if !plain || file.starts_with("cgroup.") && !CORE.contains(&file.as_str()) {
                return Err(Error::spec(
                    format!("linux.resources.{field}"),
                    "not the name of a controller's file",
                ));
            }
            self.text(&field, file.clone(), value.clone());
        }
        Ok(())
    }
}

/// The spec's `swap` is memory and swap together; cgroup v2 counts swap alone. 0 says nothing, and unlimited memory
/// means unlimited swap then, as in v1.
fn swap_limit(swap: i64, memory: Option<i64>) -> Result<Option<String>> {
    let field = "linux.resources.memory.swap";
    if swap == 0 {
        return Ok(memory.filter(|&limit| limit < 0).map(limit_or_max));
    }
    if swap < 0 {
        return Ok(Some(limit_or_max(swap)));
    }
    let memory = memory.filter(|&limit| limit > 0).ok_or_else(|| {
        Error::spec(
            field,
            "needs linux.resources.memory.limit, which it includes",
        )
    })?;
    match swap.checked_sub(memory) {
        Some(swap) if swap >= 0 => Ok(Some(swap.to_string())),
        _ => Err(Error::spec(
            field,
            "must not be less than linux.resources.memory.limit, which it includes",
        )),
    }
}

fn is_page_size(text: &str) -> bool {
    ["KB", "MB", "GB"]
        .iter()
        .find_map(|unit| text.strip_suffix(unit))
        .is_some_and(|number| {
            number
                .parse::<u32>()
                .is_ok_and(|size| size.is_power_of_two())
                && !number.starts_with(['0', '+'])
        })
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::limits::Value;
    use serde_json::{Value as Json, json};

    use super::*;

    fn limits(json: Json) -> Result<Limits> {
        Limits::for_update(&serde_json::from_value(json).unwrap())
    }

    /// A folder with these files, as they are after the limits are written.
    fn written(json: Json, files: &[(&str, &str)]) -> Result<Vec<(String, String)>> {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in files {
            fs::write(dir.path().join(file), text).unwrap();
        }
        limits(json)?.write(dir.path())?;
        let read = |(file, _): &(&str, &str)| {
            let text = fs::read_to_string(dir.path().join(file)).unwrap();
            ((*file).to_owned(), text)
        };
        Ok(files.iter().map(read).collect())
    }

    fn settings(json: Json) -> Vec<(String, String)> {
        let text = |setting: Setting| match setting.value {
            Value::Text(text) => (setting.file, text),
            other => panic!("{other:?}"),
        };
        limits(json)
            .unwrap()
            .settings
            .into_iter()
            .map(text)
            .collect()
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter()
            .map(|&(file, value)| (file.to_owned(), value.to_owned()))
            .collect()
    }

    #[test]
    fn limits_are_translated_as_runc_translates_them() {
        let json = json!({
            "memory": {"limit": 1_000_000, "swap": 1_500_000, "reservation": 500_000},
            "cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "burst": 5, "idle": 1, "cpus": "0-1", "mems": "0"},
            "pids": {"limit": 100},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4_194_304}],
            "rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10_000}},
            "unified": {"memory.high": "900000"}
        });
        assert_eq!(
            settings(json),
            pairs(&[
                ("pids.max", "100"),
                ("memory.swap.max", "500000"),
                ("memory.max", "1000000"),
                ("memory.low", "500000"),
                ("cpu.idle", "0"),
                ("cpu.weight", "39"),
                ("cpu.idle", "1"),
                ("cpu.max.burst", "5"),
                ("cpu.max", "50000 100000"),
                ("cpu.max.burst", "5"),
                ("cpuset.cpus", "0-1"),
                ("cpuset.mems", "0"),
                ("hugetlb.2MB.max", "4194304"),
                ("hugetlb.2MB.rsvd.max", "4194304"),
                ("rdma.max", "mlx5_1 hca_handle=3 hca_object=10000"),
                ("memory.high", "900000")
            ])
        );
    }

    #[test]
    fn unlimited_is_max() {
        let json = json!({
            "memory": {"limit": -1, "swap": -1}, "cpu": {"quota": -1}, "pids": {"limit": -1}
        });
        assert_eq!(
            settings(json),
            pairs(&[
                ("pids.max", "max"),
                ("memory.swap.max", "max"),
                ("memory.max", "max"),
                ("cpu.max", "max")
            ])
        );
    }

    #[test]
    fn what_is_0_or_not_named_stays() {
        let json = json!({
            "memory": {"limit": 0, "swap": 0, "reservation": 0},
            "cpu": {"shares": 0, "quota": 0, "period": 0, "cpus": ""}, "pids": {"limit": 0},
            "blockIO": {"weight": 0}, "hugepageLimits": [],
            "network": {"classID": 5}, "devices": [{"allow": true}]
        });
        let nothing = limits(json).unwrap();
        assert_eq!((nothing.settings, nothing.devices), (Vec::new(), None));
    }

    #[test]
    fn unlimited_memory_means_unlimited_swap_unless_that_is_said() {
        assert_eq!(
            settings(json!({"memory": {"limit": -1}})),
            pairs(&[("memory.swap.max", "max"), ("memory.max", "max")])
        );
        assert_eq!(
            settings(json!({"memory": {"limit": 5, "swap": 5}})),
            pairs(&[("memory.swap.max", "0"), ("memory.max", "5")])
        );
    }

    #[test]
    fn a_limit_below_what_is_used_is_refused_if_that_is_to_be_checked() {
        let used = [("memory.current", "1000\n"), ("memory.max", "max\n")];
        let json = |check: bool| json!({"memory": {"limit": 1000, "checkBeforeUpdate": check}});
        assert_eq!(
            written(json(true), &used).unwrap_err().to_string(),
            "linux.resources.memory: rejecting memory limit 1000 <= usage 1000"
        );
        assert!(written(json(false), &used).is_ok());
    }

    #[test]
    fn limits_that_the_kernel_has_not_are_named_unless_there_is_nothing_to_limit() {
        let error = written(json!({"pids": {"limit": 5}}), &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "linux.resources.pids.limit: cannot set pids.max to \"5\": the guest's kernel has no such limit"
        );
        assert!(
            written(
                json!({"memory": {"swap": -1}, "blockIO": {"weight": 10}}),
                &[]
            )
            .is_ok()
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_the_name_of_its_field() {
        for (json, field) in [
            (json!({"memory": {"swap": 5}}), "memory.swap"),
            (json!({"memory": {"swap": 5, "limit": 6}}), "memory.swap"),
            (json!({"cpu": {"cpus": "0-"}}), "cpu.cpus"),
            (json!({"cpu": {"mems": "3-1"}}), "cpu.mems"),
            (json!({"blockIO": {"weight": 5}}), "blockIO.weight"),
            (
                json!({"hugepageLimits": [{"pageSize": "../../x", "limit": 1}]}),
                "hugepageLimits[0].pageSize",
            ),
            (json!({"rdma": {"a b": {}}}), "rdma[\"a b\"]"),
            (
                json!({"unified": {"cgroup.procs": "1"}}),
                "unified[\"cgroup.procs\"]",
            ),
            (
                json!({"unified": {"../memory.max": "1"}}),
                "unified[\"../memory.max\"]",
            ),
            (json!({"unified": {".x": "1"}}), "unified[\".x\"]"),
            (json!({"unified": {"procs": "1"}}), "unified[\"procs\"]"),
        ] {
            let error = limits(json).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("linux.resources.{field}: ")),
                "{field}: {error}"
            );
        }
        assert!(limits(json!({"unified": {"cgroup.max.depth": "3"}})).is_ok());
    }
}

//! Control groups: one leaf of the unified hierarchy for each container.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, chown};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use oci_spec::runtime::LinuxResources;
use tokio::io::Interest;

use crate::device_filter::DeviceFilter;
use crate::error::{Context, Error, Kind, Result, errno_of};

/// What a cgroup limits: values to write to its files, translated from the spec's v1 terms as runc does, and the
/// devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    files: Vec<(String, String)>,
    devices: DeviceFilter,
}

impl Limits {
    /// Translates `linux.resources`; refuses what is not done.
    pub fn from_spec(resources: Option<&LinuxResources>) -> Result<Self> {
        let devices = resources.and_then(|resources| resources.devices().as_deref());
        Ok(Self {
            files: resources.map(files).transpose()?.unwrap_or_default(),
            devices: DeviceFilter::from_spec(devices.unwrap_or_default())?,
        })
    }
}

fn files(resources: &LinuxResources) -> Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    let mut set = |file: &str, value: String| files.push((file.to_owned(), value));

    if let Some(memory) = resources.memory() {
        let limit = memory.limit();
        if let Some(limit) = limit {
            set("memory.max", limit_or_max(limit));
        }
        if let Some(swap) = memory.swap() {
            set("memory.swap.max", swap_limit(swap, limit)?);
        }
        if let Some(reservation) = memory.reservation() {
            set("memory.low", limit_or_max(reservation));
        }
    }
    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|&shares| shares != 0) {
            set("cpu.weight", weight_of_shares(shares).to_string());
        }
        let quota = cpu.quota().filter(|&quota| quota != 0);
        if quota.is_some() || cpu.period().is_some() {
            let quota = quota.map_or_else(|| "max".to_owned(), limit_or_max);
            let period = cpu
                .period()
                .filter(|&period| period != 0)
                .unwrap_or(100_000);
            set("cpu.max", format!("{quota} {period}"));
        }
        if let Some(burst) = cpu.burst() {
            set("cpu.max.burst", burst.to_string());
        }
        if let Some(idle) = cpu.idle() {
            set("cpu.idle", idle.to_string());
        }
        if cpu.realtime_runtime().is_some_and(|value| value != 0)
            || cpu.realtime_period().is_some_and(|value| value != 0)
        {
            return Err(Error::spec(
                "linux.resources.cpu.realtimeRuntime",
                "cgroup v2 has no realtime limits",
            ));
        }
        for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
                set(file, list.clone());
            }
        }
    }
    if let Some(pids) = resources.pids() {
        // 0 is what clients write that mean "unlimited".
        if pids.limit() != 0 {
            set("pids.max", limit_or_max(pids.limit()));
        }
    }
    refuse_what_is_not_done(resources)?;
    for (file, value) in resources.unified().iter().flatten() {
        let plain = file.contains('.') && !file.contains('/') && !file.starts_with('.');
        if !plain || file.starts_with("cgroup.") {
            return Err(Error::spec(
                format!("linux.resources.unified[{file:?}]"),
                "not the name of a controller's file",
            ));
        }
        set(file, value.clone());
    }
    Ok(files)
}

fn refuse_what_is_not_done(resources: &LinuxResources) -> Result<()> {
    let refused = [
        (
            "linux.resources.blockIO",
            resources.block_io().as_ref().is_some_and(|io| {
                let listed =
                    |list: &Option<Vec<_>>| list.as_ref().is_some_and(|list| !list.is_empty());
                io.weight().is_some_and(|weight| weight != 0)
                    || io.leaf_weight().is_some_and(|weight| weight != 0)
                    || io
                        .weight_device()
                        .as_ref()
                        .is_some_and(|list| !list.is_empty())
                    || listed(io.throttle_read_bps_device())
                    || listed(io.throttle_write_bps_device())
                    || listed(io.throttle_read_iops_device())
                    || listed(io.throttle_write_iops_device())
            }),
        ),
        (
            "linux.resources.hugepageLimits",
            resources
                .hugepage_limits()
                .as_ref()
                .is_some_and(|limits| !limits.is_empty()),
        ),
        (
            "linux.resources.rdma",
            resources
                .rdma()
                .as_ref()
                .is_some_and(|limits| !limits.is_empty()),
        ),
        (
            "linux.resources.network",
            resources.network().as_ref().is_some_and(|network| {
                network.class_id().is_some_and(|class| class != 0)
                    || network
                        .priorities()
                        .as_ref()
                        .is_some_and(|list| !list.is_empty())
            }),
        ),
    ];
    match refused.into_iter().find(|(_, present)| *present) {
        Some((field, _)) => Err(Error::spec(field, "not supported yet; remove it")),
        None => Ok(()),
    }
}

fn limit_or_max(limit: i64) -> String {
    if limit < 0 {
        "max".to_owned()
    } else {
        limit.to_string()
    }
}

/// The spec's `swap` is memory and swap together; cgroup v2 counts swap alone.
fn swap_limit(swap: i64, memory: Option<i64>) -> Result<String> {
    let field = "linux.resources.memory.swap";
    if swap <= 0 {
        return Ok(limit_or_max(if swap == 0 { -1 } else { swap }));
    }
    let memory = memory.filter(|&limit| limit > 0).ok_or_else(|| {
        Error::spec(
            field,
            "needs linux.resources.memory.limit, which it includes",
        )
    })?;
    match swap.checked_sub(memory) {
        Some(swap) if swap >= 0 => Ok(swap.to_string()),
        _ => Err(Error::spec(
            field,
            "must not be less than linux.resources.memory.limit, which it includes",
        )),
    }
}

/// runc's linear map of 2..=262144 shares to a weight of 1..=10000.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

/// What a kernel without /sys/kernel/cgroup/delegate lets a user own (cgroups(7), "Delegating").
const DELEGATED: &str = "cgroup.procs\ncgroup.subtree_control\ncgroup.threads\n";

/// Where containers' cgroups are.
#[derive(Debug)]
pub struct Hierarchy {
    root: PathBuf,
}

impl Hierarchy {
    /// Enables every controller for the children of the cgroup at `root`.
    ///
    /// The agent stays in the root cgroup, which may hold processes beside children: moving it to a leaf would
    /// cost an RCU grace period at boot, and there is nothing to limit it with. Containers are direct children: a
    /// level in between would double the work for each controller.
    pub fn set_up(root: &Path) -> io::Result<Self> {
        let available = fs::read_to_string(root.join("cgroup.controllers"))?;
        let mut enable = String::with_capacity(2 * available.len());
        for controller in available.split_ascii_whitespace() {
            enable.push('+');
            enable.push_str(controller);
            enable.push(' ');
        }
        if !enable.is_empty() {
            write_file(&root.join("cgroup.subtree_control"), &enable)?;
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// Makes the cgroup of a container and sets its limits.
    pub fn make(&self, id: &str, limits: &Limits) -> Result<Cgroup> {
        // The prefix keeps ids and the kernel's own files apart.
        let path = self.root.join(format!("container-{id}"));
        fs::create_dir(&path).what(|| "cannot make the container's cgroup")?;
        let dir = open(&path, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .what(|| "cannot open the container's cgroup");
        let cgroup = match dir {
            Ok(dir) => Cgroup { path, dir },
            Err(error) => {
                let _ = fs::remove_dir(&path);
                return Err(error);
            }
        };
        // Dropping the cgroup on a failure removes it.
        for (file, value) in &limits.files {
            cgroup.limit(file, value)?;
        }
        limits.devices.attach(cgroup.dir())?;
        Ok(cgroup)
    }
}

fn write_file(path: &Path, value: &str) -> io::Result<()> {
    // Not `fs::write`, which would create a file where the kernel has none.
    File::options()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

/// The cgroup of one container; removed when this is dropped, if not before.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    dir: OwnedFd,
}

impl Cgroup {
    fn limit(&self, file: &str, value: &str) -> Result<()> {
        write_file(&self.path.join(file), value)
            .map_err(|error| {
                let problem = match error.kind() {
                    // The guest has no swap to limit, and so no file for it.
                    io::ErrorKind::NotFound if file == "memory.swap.max" => return None,
                    io::ErrorKind::NotFound => "the guest's kernel has no such limit".to_owned(),
                    _ => crate::error::errno_text(errno_of(&error)),
                };
                Some(Error::setup(
                    Kind::InvalidArgument,
                    format!("linux.resources: cannot set {file} to {value:?}: {problem}"),
                ))
            })
            .or_else(|error| error.map_or(Ok(()), Err))
    }

    /// The directory, to fork into.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Lets a user divide it: gives it away, and those of its files that the kernel says belong to that.
    pub fn give_to(&self, owner: u32) -> Result<()> {
        let what = || "cannot give the container its cgroup";
        let files = fs::read_to_string("/sys/kernel/cgroup/delegate");
        let files = files.as_deref().unwrap_or(DELEGATED);
        chown(&self.path, Some(owner), None).what(what)?;
        for file in files.lines() {
            match chown(self.path.join(file), Some(owner), None) {
                // A file of a controller that the cgroup has not.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result.what(what)?,
            }
        }
        Ok(())
    }

    /// Kills every process in it.
    pub fn kill(&self) -> Result<()> {
        write_file(&self.path.join("cgroup.kill"), "1")
            .what(|| "cannot kill the container's processes")
    }

    /// The processes in it and below it: a container may divide its cgroup.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let what = || "cannot list the container's processes";
        let mut processes = Vec::new();
        for cgroup in self.subtree().what(what)? {
            match fs::read_to_string(cgroup.join("cgroup.procs")) {
                Ok(list) => {
                    processes.extend(list.lines().filter_map(|line| line.parse::<i32>().ok()))
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).what(what),
            }
        }
        Ok(processes)
    }

    /// Removes it with everything below, which must be empty of processes.
    pub fn remove(&self) -> Result<()> {
        let what = || "cannot remove the container's cgroup";
        for cgroup in self.subtree().what(what)?.iter().rev() {
            match fs::remove_dir(cgroup) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).what(what);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// It and the cgroups below it, parents before children. None if it is gone.
    fn subtree(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = vec![self.path.clone()];
        let mut next = 0;
        while let Some(cgroup) = found.get(next) {
            let entries = match fs::read_dir(cgroup) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                entries => entries?,
            };
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    found.push(entry.path());
                }
            }
            next += 1;
        }
        Ok(found)
    }

    /// Waits until the last process has left it.
    ///
    /// The kernel announces changes of `cgroup.events` as exceptional conditions, so that nothing polls.
    pub async fn emptied(&self) -> io::Result<()> {
        let file = crate::sys::watch_fd(
            File::open(self.path.join("cgroup.events"))?,
            Interest::PRIORITY,
        )?;
        let mut buffer = [0u8; 128];
        loop {
            // A read of this very file re-arms its notification, so the order is: read, then wait.
            let length = file.get_ref().read_at(&mut buffer, 0)?;
            let mut lines = buffer
                .get(..length)
                .unwrap_or_default()
                .split(|&byte| byte == b'\n');
            if lines.any(|line| line == b"populated 0") {
                return Ok(());
            }
            file.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!(cgroup = %self.path.display(), %error, "cannot remove a container's cgroup");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(json: serde_json::Value) -> Result<Vec<(String, String)>> {
        let resources: LinuxResources = serde_json::from_value(json).unwrap();
        Limits::from_spec(Some(&resources)).map(|limits| limits.files)
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter()
            .map(|&(file, value)| (file.to_owned(), value.to_owned()))
            .collect()
    }

    #[test]
    fn limits_are_translated_as_runc_translates_them() {
        let json = serde_json::json!({
            "memory": {"limit": 1_000_000, "swap": 1_500_000, "reservation": 500_000},
            "cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "cpus": "0-1"},
            "pids": {"limit": 100}
        });
        assert_eq!(
            limits(json).unwrap(),
            pairs(&[
                ("memory.max", "1000000"),
                ("memory.swap.max", "500000"),
                ("memory.low", "500000"),
                ("cpu.weight", "39"),
                ("cpu.max", "50000 100000"),
                ("cpuset.cpus", "0-1"),
                ("pids.max", "100")
            ])
        );
    }

    #[test]
    fn unlimited_is_max() {
        let json = serde_json::json!({
            "memory": {"limit": -1, "swap": -1}, "cpu": {"quota": -1}, "pids": {"limit": -1}
        });
        assert_eq!(
            limits(json).unwrap(),
            pairs(&[
                ("memory.max", "max"),
                ("memory.swap.max", "max"),
                ("cpu.max", "max 100000"),
                ("pids.max", "max")
            ])
        );
    }

    #[test]
    fn the_shares_of_the_spec_span_the_weights_of_the_kernel() {
        for (shares, weight) in [
            (2, 1),
            (1024, 39),
            (262_144, 10_000),
            (1, 1),
            (u64::MAX, 10_000),
        ] {
            assert_eq!(weight_of_shares(shares), weight);
        }
    }

    #[test]
    fn swap_without_or_below_memory_is_refused() {
        for memory in [
            serde_json::json!({"swap": 5}),
            serde_json::json!({"swap": 5, "limit": 6}),
        ] {
            let error = limits(serde_json::json!({"memory": memory})).unwrap_err();
            assert!(
                error
                    .to_string()
                    .starts_with("linux.resources.memory.swap: ")
            );
        }
    }

    #[test]
    fn files_outside_the_controllers_are_refused() {
        for file in ["cgroup.procs", "../memory.max", ".x", "procs"] {
            assert!(
                limits(serde_json::json!({"unified": {file: "1"}})).is_err(),
                "{file}"
            );
        }
        assert!(limits(serde_json::json!({"unified": {"memory.high": "1"}})).is_ok());
    }

    #[test]
    fn what_is_not_done_is_refused_and_its_empty_form_is_not() {
        assert!(limits(serde_json::json!({"blockIO": {"weight": 10}})).is_err());
        assert!(
            limits(serde_json::json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 1}]}))
                .is_err()
        );
        assert_eq!(
            limits(serde_json::json!({"blockIO": {}, "hugepageLimits": []})).unwrap(),
            []
        );
    }
}

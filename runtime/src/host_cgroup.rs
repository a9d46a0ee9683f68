//! The host's cgroup of a sandbox: at the spec's `cgroupsPath`, holding its server, its VMM and the processes that stand for
//! the container's, so that readers of host cgroups see true numbers and the host's limits bound the whole VM.
//!
//! Only cgroup v2; a host without it gets none. The guest enforces each container's limits inside. Whoever makes the cgroup, the
//! limits are written to its files. What is done here may take its time: moves a grace period of the kernel, removal the end of
//! processes, systemd's answers as long as D-Bus.

mod properties;
mod systemd;
mod tree;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};

use bulkhead_protocol::limits::{self, FieldError, Setting};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use oci_spec::runtime::{LinuxResources, Spec};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::ContainerId;
use crate::sizing::{FILE_BYTES, most_files};
use systemd::{SystemdError, Unit};

/// Where cgroup v2 is mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// Memory of server, VMM and proxies beside the guest's and its files', in bytes: what the host's limit is above them.
const OVERHEAD: u64 = 64 << 20;

/// What went wrong with the host's cgroup.
#[derive(Debug, Error)]
pub enum HostCgroupError {
    /// The path is no path of a cgroup.
    #[error("config.json: `linux.cgroupsPath` {0:?} {1}")]
    Path(PathBuf, &'static str),
    /// An annotation is no property of a unit of systemd.
    #[error("config.json: `annotations[{0:?}]` is {1:?}: {right}", right = properties::RIGHT)]
    Property(String, String),
    /// A limit makes no sense.
    #[error(transparent)]
    Limit(#[from] FieldError),
    /// Somebody else is in it.
    #[error("the cgroup {} is not empty: remove its processes or name another `linux.cgroupsPath`", .0.display())]
    Occupied(PathBuf),
    /// systemd has it for somebody else.
    #[error("systemd runs a unit {0} already: stop it or name another `linux.cgroupsPath`")]
    Taken(String),
    /// An operation failed.
    #[error("cannot {what} the host's cgroup {}: {message}", path.display())]
    Failed {
        /// The operation.
        what: &'static str,
        /// On which cgroup.
        path: PathBuf,
        /// What went wrong.
        message: String,
    },
}

/// Which cgroup it is: enough to find it again from the state directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCgroup {
    /// Below the mount.
    path: PathBuf,
    /// The scope, if systemd makes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<Unit>,
    /// The container's name, for who looks at the scope.
    name: String,
    /// The annotations that give the scope properties. Once it is made, systemd has them.
    #[serde(skip)]
    properties: BTreeMap<String, String>,
}

impl HostCgroup {
    /// The cgroup of a container; `None` where the host has no cgroup v2.
    pub fn of(
        spec: &Spec,
        id: &ContainerId,
        systemd: bool,
    ) -> Result<Option<Self>, HostCgroupError> {
        let linux = spec.linux().as_ref();
        if let Some(resources) = linux.and_then(|linux| linux.resources().as_ref()) {
            check(resources)?;
        }
        if !statfs(ROOT).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC) {
            return Ok(None);
        }
        let given = linux
            .and_then(|linux| linux.cgroups_path().clone())
            .filter(|path| !path.as_os_str().is_empty());
        let unit = systemd
            .then(|| {
                let given = given.clone().unwrap_or(format!(":bulkhead:{id}").into());
                // What is no text has no colons either.
                let text = given.to_str().unwrap_or_default();
                Unit::parse(text).map_err(|problem| HostCgroupError::Path(given.clone(), problem))
            })
            .transpose()?;
        let path = match (&unit, given) {
            (Some(unit), _) => unit.path(),
            (None, Some(path)) => {
                check_path(&path)?;
                if path.is_absolute() {
                    path
                } else {
                    beside_own().join(path)
                }
            }
            (None, None) => beside_own().join(id),
        };
        let annotations = match unit {
            Some(_) => spec.annotations().clone().unwrap_or_default(),
            None => HashMap::new(),
        };
        let mut properties = BTreeMap::new();
        for (name, text) in annotations {
            match properties::of(&name, &text) {
                None => {}
                Some(None) => return Err(HostCgroupError::Property(name, text)),
                Some(Some(_)) => drop(properties.insert(name, text)),
            }
        }
        Ok(Some(Self {
            path,
            unit,
            name: id.as_str().to_owned(),
            properties,
        }))
    }

    /// Refuses a cgroup in which somebody is, and one that can't be made here. To be asked before it goes on record as ours, since
    /// what is on record is emptied by whoever cleans up.
    pub fn require_free(&self) -> Result<(), HostCgroupError> {
        let directory = self.directory();
        if tree::is_populated(&directory).unwrap_or_default() {
            return Err(HostCgroupError::Occupied(directory));
        }
        match &self.unit {
            Some(unit) => self.asked("make", unit.require_free()),
            None => Ok(()),
        }
    }

    /// Makes it, with a process in it. [`HostCgroupError::Taken`] says that it is another's; whatever else fails, part of it may be made.
    pub fn make(&self, pid: u32) -> Result<(), HostCgroupError> {
        if let Some(unit) = &self.unit {
            let description = format!("Bulkhead container {}", self.name);
            let properties = self.properties.iter();
            let properties = properties.filter_map(|(name, text)| properties::of(name, text)?);
            return self.asked("make", unit.start(&description, pid, properties.collect()));
        }
        tree::make(Path::new(ROOT), &self.path).map_err(|e| self.failed("make", &e))?;
        self.add(pid)
    }

    /// Puts a further process into it.
    pub fn add(&self, pid: u32) -> Result<(), HostCgroupError> {
        tree::enter(&self.directory(), pid).map_err(|e| self.failed("enter", &e))
    }

    /// Applies what of a container's resources is the host's to enforce: processors, I/O, and the memory of a guest of that
    /// size.
    pub fn apply(&self, resources: &LinuxResources, guest_mib: u64) -> Result<(), HostCgroupError> {
        let directory = self.directory();
        for setting in of_host(resources, guest_mib)? {
            setting
                .write(&directory)
                .map_err(|e| self.failed("limit", &format!("{e}: {}", e.source)))?;
        }
        match &self.unit {
            Some(unit) => self.asked("limit", unit.keep(&directory)),
            None => Ok(()),
        }
    }

    /// Kills what is in it, and removes it with whatever cgroups somebody has made in it, as runc does. The caller must not be in it.
    pub fn remove(&self) -> Result<(), HostCgroupError> {
        let directory = self.directory();
        tree::end_processes(&directory).map_err(|e| self.failed("empty", &e))?;
        if let Some(unit) = &self.unit {
            self.asked("remove", unit.stop())?;
        }
        tree::remove(&directory).map_err(|e| self.failed("remove", &e))
    }

    /// Its directory.
    fn directory(&self) -> PathBuf {
        Path::new(ROOT).join(self.path.strip_prefix("/").unwrap_or(&self.path))
    }

    fn asked(
        &self,
        what: &'static str,
        answer: Result<(), SystemdError>,
    ) -> Result<(), HostCgroupError> {
        answer.map_err(|error| match (error, &self.unit) {
            (SystemdError::Exists, Some(unit)) => HostCgroupError::Taken(unit.name().to_owned()),
            (error, _) => self.failed(what, &error),
        })
    }

    fn failed(&self, what: &'static str, error: &dyn std::fmt::Display) -> HostCgroupError {
        HostCgroupError::Failed {
            what,
            path: self.path.clone(),
            message: error.to_string(),
        }
    }
}

/// Refuses limits that make no sense on any host.
pub fn check(resources: &LinuxResources) -> Result<(), HostCgroupError> {
    of_host(resources, 0)?;
    Ok(())
}

/// Refuses a path that is not below the mount, or is the mount itself.
fn check_path(path: &Path) -> Result<(), HostCgroupError> {
    let wrong = |problem| Err(HostCgroupError::Path(path.to_path_buf(), problem));
    if path.components().any(|part| part == Component::ParentDir) {
        return wrong("must not contain \"..\"");
    }
    if !path
        .components()
        .any(|part| matches!(part, Component::Normal(_)))
    {
        return wrong("is no cgroup of the container's own: give it a name");
    }
    Ok(())
}

/// Moves a process out of whatever cgroup it is in, to `directory`, or to the root if that is no more.
pub fn move_to(directory: &Path, pid: u32) -> io::Result<()> {
    tree::enter(directory, pid).or_else(|_| tree::enter(Path::new(ROOT), pid))
}

/// This process's own cgroup.
pub fn own() -> PathBuf {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = text.lines().find_map(|line| line.strip_prefix("0::/"));
    Path::new(ROOT).join(own.unwrap_or_default())
}

/// Where a process writes that it enters this process's cgroup, as it is now, or the root; nothing where there is no cgroup v2.
pub fn ways_back() -> Vec<File> {
    let open = |directory: PathBuf| {
        let procs = directory.join("cgroup.procs");
        File::options().write(true).open(procs).ok()
    };
    let all = [own(), ROOT.into()];
    all.into_iter().filter_map(open).collect()
}

/// Where runc puts a container without a path of its own: beside the caller's cgroup, since processes and children don't go
/// together in cgroup v2.
fn beside_own() -> PathBuf {
    let own = own();
    let below = own.strip_prefix(ROOT).unwrap_or(Path::new(""));
    Path::new("/").join(below.parent().unwrap_or(Path::new("")))
}

/// The host's part of a container's resources, for a guest of that size.
fn of_host(resources: &LinuxResources, guest_mib: u64) -> Result<Vec<Setting>, FieldError> {
    let files = u64::from(most_files(guest_mib)) * FILE_BYTES;
    let memory = (guest_mib << 20).saturating_add(OVERHEAD + files);
    let mut settings = vec![Setting::text(
        "memory.limit",
        "memory.max",
        memory.to_string(),
    )];
    if let Some(cpu) = resources.cpu() {
        settings.extend(limits::cpu(cpu)?);
    }
    if let Some(io) = resources.block_io() {
        settings.extend(limits::io(io)?);
    }
    // Last, so that these win.
    for (file, value) in resources.unified().iter().flatten() {
        let controllers = ["cpu.", "cpuset.", "io."];
        let of_host = controllers
            .iter()
            .any(|controller| file.starts_with(controller));
        // What leads out of the cgroup the guest refuses.
        if of_host && !file.contains('/') {
            let field = format!("unified[{file:?}]");
            settings.push(Setting::text(&field, file, value));
        }
    }
    Ok(settings)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::share;

    #[test]
    fn a_path_names_a_cgroup_below_the_mount() {
        for (path, expected) in [
            ("/a/../../b", "must not contain"),
            ("..", "must not contain"),
            ("/", "give it a name"),
            ("/./", "give it a name"),
            (".", "give it a name"),
        ] {
            let message = check_path(Path::new(path)).unwrap_err().to_string();
            assert!(message.contains(expected), "{path}: {message}");
        }
        for path in ["/a", "a/b", "/a/./b"] {
            check_path(Path::new(path)).unwrap();
        }
    }

    fn settings(resources: &str) -> Vec<(String, limits::Value)> {
        let resources = serde_json::from_str(resources).unwrap();
        let settings = of_host(&resources, 128).unwrap().into_iter();
        settings
            .map(|setting| (setting.file, setting.value))
            .collect()
    }

    fn texts(files: &[(&str, &str)]) -> Vec<(String, limits::Value)> {
        let text =
            |&(file, text): &(&str, &str)| (file.to_owned(), limits::Value::Text(text.to_owned()));
        files.iter().map(text).collect()
    }

    // A guest of 128 MiB, 64 MiB for the host's programs, and as many for the smallest number of files.
    #[test]
    fn the_host_bounds_memory_by_the_guests_size_and_leaves_the_containers_limits_to_the_guest() {
        let resources = r#"{"memory":{"limit":1048576,"swap":2097152},"pids":{"limit":3},"cpu":{"quota":5000,"period":10000},
               "unified":{"memory.high":"1","cpu.max":"500000 1000000","io.x/../../y":"1"},"devices":[{"allow":false,"access":"rwm"}]}"#;
        assert_eq!(
            settings(resources),
            texts(&[
                ("memory.max", "268435456"),
                ("cpu.max", "5000 10000"),
                ("cpu.max", "500000 1000000")
            ])
        );
    }

    #[test]
    fn what_version_1_had_and_what_is_0_or_empty_is_passed_over() {
        for resources in [
            r#"{"cpu":{"realtimeRuntime":5000,"realtimePeriod":10000}}"#,
            r#"{"cpu":{"shares":0,"quota":0,"period":0,"realtimeRuntime":0,"realtimePeriod":0,"cpus":"","mems":""},
                "memory":{"limit":0,"reservation":0,"swap":0},"blockIO":{"weight":0}}"#,
            r#"{"blockIO":{"leafWeight":500,"weightDevice":[{"major":8,"minor":0,"leafWeight":500}]}}"#,
        ] {
            assert_eq!(settings(resources), texts(&[("memory.max", "268435456")]));
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_before_anything_is_made() {
        let spec = r#"{"ociVersion":"1.0.2","linux":{"resources":{"cpu":{"cpus":"3-1"}}}}"#;
        let spec = serde_json::from_str(spec).unwrap();
        let refused = HostCgroup::of(&spec, &ContainerId::new("c1").unwrap(), false);
        assert_eq!(
            refused.unwrap_err().to_string(),
            "linux.resources.cpu.cpus: is not a list like 0-3,7"
        );
    }

    /// A mount namespace with a hierarchy of cgroup v2 where it belongs, which hosts of version 1 have elsewhere.
    pub(crate) fn with_cgroups(test: impl FnOnce() + Send) {
        share::tests::in_namespace(|| {
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(None::<&str>, ROOT, Some("cgroup2"), flags, None::<&str>).unwrap();
            test();
        });
    }

    /// That of a bundle with the path `path`.
    pub(crate) fn at(path: &str, systemd: bool) -> HostCgroup {
        let spec = serde_json::json!({"ociVersion": "1.0.2", "linux": {"cgroupsPath": path}});
        let spec = serde_json::from_value(spec).unwrap();
        let of = HostCgroup::of(&spec, &ContainerId::new("c1").unwrap(), systemd);
        of.unwrap().unwrap()
    }

    #[test]
    fn a_cgroup_is_removed_with_those_that_somebody_has_made_in_it() {
        with_cgroups(|| {
            let cgroup = at(&format!("/bulkhead-test-{}", std::process::id()), false);
            let directory = cgroup.directory();
            fs::create_dir_all(directory.join("a/b")).unwrap();
            fs::create_dir(directory.join("c")).unwrap();
            let mut process = std::process::Command::new("sleep")
                .arg("1000")
                .spawn()
                .unwrap();
            fs::write(directory.join("a/b/cgroup.procs"), process.id().to_string()).unwrap();
            let occupied = cgroup.require_free();
            let removed = cgroup.remove();
            process.kill().unwrap();
            process.wait().unwrap();
            let left = directory.exists();
            for path in ["a/b", "a", "c", ""] {
                let _ = fs::remove_dir(directory.join(path));
            }
            removed.unwrap();
            assert!(matches!(occupied, Err(HostCgroupError::Occupied(_))));
            assert!(!left);
            cgroup.remove().unwrap();
            cgroup.require_free().unwrap();
        });
    }

    #[test]
    fn annotations_for_systemd_are_looked_at_where_that_makes_the_cgroup() {
        with_cgroups(|| {
            let of = |value: &str, systemd| {
                let annotations = serde_json::json!({"org.systemd.property.KillSignal": value});
                let spec = serde_json::json!({"ociVersion": "1.0.2", "annotations": annotations});
                let spec = serde_json::from_value(spec).unwrap();
                HostCgroup::of(&spec, &ContainerId::new("c1").unwrap(), systemd)
            };
            let properties = |of: Result<Option<HostCgroup>, _>| of.unwrap().unwrap().properties;
            assert_eq!(properties(of("15", true)).len(), 1);
            assert!(properties(of("15", false)).is_empty());
            assert!(properties(of("TERM", false)).is_empty());
            let message = of("TERM", true).unwrap_err().to_string();
            let named = r#"`annotations["org.systemd.property.KillSignal"]` is "TERM": give"#;
            assert!(message.contains(named), "{message}");
        });
    }

    #[test]
    fn a_scope_is_on_record_by_its_name() {
        with_cgroups(|| {
            let cgroup = at("a-b.slice:e2e:x", true);
            assert_eq!(
                cgroup.directory(),
                Path::new("/sys/fs/cgroup/a.slice/a-b.slice/e2e-x.scope")
            );
            let record = serde_json::to_string(&cgroup).unwrap();
            assert_eq!(serde_json::from_str::<HostCgroup>(&record).unwrap(), cgroup);
        });
    }
}

//! The host's cgroup of a sandbox: at the spec's `cgroupsPath`, holding its server, its VMM and the processes that stand for
//! the container's, so that readers of host cgroups see true numbers and the host's limits bound the whole VM.
//!
//! Only cgroup v2; a host without it gets none. The guest enforces each container's limits inside.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use bulkhead_protocol::io_weight;
use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager,
};
use libcgroups_nix::unistd::Pid;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use oci_spec::runtime::{LinuxMemory, LinuxResources, LinuxResourcesBuilder, Spec};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::ContainerId;
use crate::sizing::{FILE_BYTES, most_files};

/// Where cgroup v2 is mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// Memory of server, VMM and proxies beside the guest's and its files', in bytes: what the host's limit is above them.
const OVERHEAD: u64 = 64 << 20;

/// How long the processes of a cgroup may take to be gone once they are killed, in milliseconds.
const KILL_TIMEOUT_MS: u16 = 10_000;

/// What went wrong with the host's cgroup.
#[derive(Debug, Error)]
pub enum HostCgroupError {
    /// The path is no path of a cgroup.
    #[error("config.json: `linux.cgroupsPath` {0:?} {1}")]
    Path(PathBuf, &'static str),
    /// Somebody else is in it.
    #[error("the cgroup {} is not empty: remove its processes or name another `linux.cgroupsPath`", .0.display())]
    Occupied(PathBuf),
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
    /// As the driver wants it: a path below the mount, or systemd's `slice:prefix:name`.
    path: PathBuf,
    /// Whether systemd makes it.
    systemd: bool,
    /// The container's name, by which systemd names a unit whose path says none.
    name: String,
}

impl HostCgroup {
    /// The cgroup of a container; `None` where the host has no cgroup v2.
    pub fn of(
        spec: &Spec,
        id: &ContainerId,
        systemd: bool,
    ) -> Result<Option<Self>, HostCgroupError> {
        if !statfs(ROOT).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC) {
            return Ok(None);
        }
        let given = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.cgroups_path().clone())
            .filter(|path| !path.as_os_str().is_empty());
        let path = match given {
            Some(path) if systemd => {
                if path.to_string_lossy().split(':').count() != 3 {
                    return Err(HostCgroupError::Path(
                        path,
                        "must be \"slice:prefix:name\" with --systemd-cgroup",
                    ));
                }
                path
            }
            Some(path) => {
                check_path(&path)?;
                if path.is_absolute() {
                    path
                } else {
                    beside_own().join(path)
                }
            }
            None if systemd => format!(":bulkhead:{id}").into(),
            None => beside_own().join(id),
        };
        Ok(Some(Self {
            path,
            systemd,
            name: id.as_str().to_owned(),
        }))
    }

    /// Refuses a cgroup in which somebody is. To be asked before it goes on record as ours, since what is on record is emptied
    /// by whoever cleans up.
    pub fn require_empty(&self) -> Result<(), HostCgroupError> {
        if let Some(directory) = self.directory()
            && populated(&directory).is_ok_and(|populated| populated)
        {
            return Err(HostCgroupError::Occupied(directory));
        }
        Ok(())
    }

    /// Refuses what its driver can't make, before anything is made.
    pub fn require_driver(&self) -> Result<(), HostCgroupError> {
        self.manager().map(drop)
    }

    /// Puts a process into it.
    pub fn add(&self, pid: u32) -> Result<(), HostCgroupError> {
        let pid = i32::try_from(pid).map_err(|e| self.failed("enter", &e))?;
        let manager = self.manager()?;
        manager
            .add_task(Pid::from_raw(pid))
            .map_err(|e| self.failed("enter", &e))
    }

    /// Applies what of a container's resources is the host's to enforce: processors, I/O, and the memory of a guest of that
    /// size.
    pub fn apply(&self, resources: &LinuxResources, guest_mib: u64) -> Result<(), HostCgroupError> {
        let mut resources = of_host(resources, guest_mib).map_err(|e| self.failed("limit", &e))?;
        if self.systemd {
            // libcgroups takes a weight for shares and a quota for one of a second there. The guest holds them.
            resources.set_unified(None);
        }
        let weight = self
            .directory()
            .and_then(|directory| Some((directory, take_io_weight(&mut resources)?)));
        let options = ControllerOpt {
            resources: &resources,
            disable_oom_killer: false,
            oom_score_adj: None,
            freezer_state: None,
        };
        self.manager()?
            .apply(&options)
            .map_err(|e| self.failed("limit", &e))?;
        weight.map_or(Ok(()), |(directory, weight)| {
            set_io_weight(&directory, weight).map_err(|e| self.failed("limit", &e))
        })
    }

    /// Kills what is in it, and removes it with whatever cgroups somebody has made in it, as runc does. The caller must not be in it.
    pub fn remove(&self) -> Result<(), HostCgroupError> {
        if self.systemd {
            // Stopping the unit ends what is in it.
            return self
                .manager()?
                .remove()
                .map_err(|e| self.failed("remove", &e));
        }
        let Some(directory) = self.directory().filter(|directory| directory.exists()) else {
            return Ok(());
        };
        end_processes(&directory).map_err(|e| self.failed("empty", &e))?;
        remove_tree(&directory).map_err(|e| self.failed("remove", &e))
    }

    /// Its directory. systemd alone knows where its units are.
    pub fn directory(&self) -> Option<PathBuf> {
        if self.systemd {
            return None;
        }
        let below = self.path.strip_prefix("/").unwrap_or(&self.path);
        Some(Path::new(ROOT).join(below))
    }

    fn manager(&self) -> Result<AnyCgroupManager, HostCgroupError> {
        create_cgroup_manager(CgroupConfig {
            cgroup_path: self.path.clone(),
            systemd_cgroup: self.systemd,
            container_name: self.name.clone(),
        })
        .map_err(|e| self.failed("find", &e))
    }

    fn failed(&self, what: &'static str, error: &dyn std::fmt::Display) -> HostCgroupError {
        HostCgroupError::Failed {
            what,
            path: self.path.clone(),
            message: error.to_string(),
        }
    }
}

/// Refuses a path that is not below the mount, or is the mount itself.
fn check_path(path: &Path) -> Result<(), HostCgroupError> {
    use std::path::Component;
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
    let pid = pid.to_string();
    fs::write(directory.join("cgroup.procs"), &pid)
        .or_else(|_| fs::write(Path::new(ROOT).join("cgroup.procs"), &pid))
}

/// This process's own cgroup.
pub fn own() -> PathBuf {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = text.lines().find_map(|line| line.strip_prefix("0::/"));
    Path::new(ROOT).join(own.unwrap_or_default())
}

/// Where runc puts a container without a path of its own: beside the caller's cgroup, since processes and children don't go
/// together in cgroup v2.
fn beside_own() -> PathBuf {
    let own = own();
    let below = own.strip_prefix(ROOT).unwrap_or(Path::new(""));
    Path::new("/").join(below.parent().unwrap_or(Path::new("")))
}

/// The host's part of a container's resources.
fn of_host(resources: &LinuxResources, guest_mib: u64) -> Result<LinuxResources, String> {
    let files = u64::from(most_files(guest_mib)) * FILE_BYTES;
    let limit = (guest_mib << 20).saturating_add(OVERHEAD + files);
    let mut memory = LinuxMemory::default();
    memory.set_limit(i64::try_from(limit).ok());
    let mut host = LinuxResourcesBuilder::default()
        .memory(memory)
        .build()
        .map_err(|e| e.to_string())?;
    host.set_devices(None);
    let mut cpu = resources.cpu().clone();
    if let Some(cpu) = &mut cpu {
        // cgroup v2 has none, and runc passes them over there.
        cpu.set_realtime_runtime(None).set_realtime_period(None);
    }
    host.set_cpu(cpu);
    host.set_block_io(resources.block_io().clone());
    let mut unified = resources.unified().clone().unwrap_or_default();
    unified.retain(|file, _| {
        let controllers = ["cpu.", "cpuset.", "io."];
        // What leads out of the cgroup the guest refuses.
        !file.contains('/')
            && controllers
                .iter()
                .any(|controller| file.starts_with(controller))
    });
    host.set_unified(Some(unified).filter(|unified| !unified.is_empty()));
    Ok(host)
}

/// Takes the weight of block I/O out, which libcgroups calculates with too few bits.
fn take_io_weight(resources: &mut LinuxResources) -> Option<u16> {
    let block_io = resources.block_io_mut().as_mut()?;
    let weight = block_io.weight().filter(|weight| *weight > 0);
    block_io.set_weight(None);
    weight
}

/// Sets the weight of block I/O, 10 to 1000: for BFQ, which has that range, or else in that of cgroup v2.
fn set_io_weight(directory: &Path, weight: u16) -> io::Result<()> {
    let bfq = directory.join("io.bfq.weight");
    if bfq.exists() {
        return fs::write(bfq, weight.to_string());
    }
    fs::write(directory.join("io.weight"), io_weight(weight).to_string())
}

fn populated(directory: &Path) -> io::Result<bool> {
    let events = fs::read_to_string(directory.join("cgroup.events"))?;
    Ok(events.lines().any(|line| line == "populated 1"))
}

/// Kills every process of a cgroup and waits until the last one is gone. The kernel marks `cgroup.events` with POLLPRI when
/// it changes (Documentation/admin-guide/cgroup-v2.rst).
fn end_processes(directory: &Path) -> io::Result<()> {
    let events = fs::File::open(directory.join("cgroup.events"))?;
    let read = || fs::read_to_string(directory.join("cgroup.events"));
    // The first read arms the notification of the open file.
    io::Read::read_to_string(&mut &events, &mut String::new())?;
    if read()?.contains("populated 1") {
        fs::write(directory.join("cgroup.kill"), "1")?;
    }
    while read()?.contains("populated 1") {
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        if poll(&mut fds, PollTimeout::from(KILL_TIMEOUT_MS))? == 0 {
            let mut left = OsString::from("processes of it do not end: ");
            left.push(fs::read_to_string(directory.join("cgroup.procs"))?.replace('\n', " "));
            return Err(io::Error::other(left.to_string_lossy().into_owned()));
        }
        io::Seek::rewind(&mut &events)?;
        io::Read::read_to_string(&mut &events, &mut String::new())?;
    }
    Ok(())
}

/// Removes a cgroup, those in it first. They have files that can't be removed and need not be.
fn remove_tree(directory: &Path) -> io::Result<()> {
    let gone = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) => return gone(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(directory).or_else(gone)
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

    #[test]
    fn the_weight_of_block_io_is_bfqs_own_or_has_the_range_of_cgroup_v2() {
        let mut resources: LinuxResources =
            serde_json::from_str(r#"{"blockIO":{"weight":100}}"#).unwrap();
        assert_eq!(take_io_weight(&mut resources), Some(100));
        assert_eq!(take_io_weight(&mut resources), None);
        let directory = tempfile::tempdir().unwrap();
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        set_io_weight(directory.path(), 17).unwrap();
        assert_eq!(read("io.weight"), "71");
        fs::write(directory.path().join("io.bfq.weight"), "").unwrap();
        set_io_weight(directory.path(), 100).unwrap();
        assert_eq!(read("io.bfq.weight"), "100");
    }

    #[test]
    fn the_host_bounds_memory_by_the_guests_size_and_leaves_the_containers_limits_to_the_guest() {
        let resources: LinuxResources = serde_json::from_str(
            r#"{"memory":{"limit":1048576,"swap":2097152},"pids":{"limit":3},"cpu":{"quota":5000,"period":10000},
               "unified":{"memory.high":"1","cpu.max":"500000 1000000","io.x/../../y":"1"},"devices":[{"allow":false,"access":"rwm"}]}"#,
        )
        .unwrap();
        let host = of_host(&resources, 128).unwrap();
        let memory = host.memory().as_ref().unwrap();
        // 64 MiB for the host's programs, and as many for the smallest number of files.
        assert_eq!(memory.limit(), Some((128 + 64 + 64) << 20));
        assert_eq!(memory.swap(), None);
        assert_eq!(host.cpu(), resources.cpu());
        let files: Vec<_> = host.unified().iter().flatten().collect();
        assert_eq!(
            files,
            [(&"cpu.max".to_owned(), &"500000 1000000".to_owned())]
        );
        assert!(host.pids().is_none() && host.devices().is_none());
    }

    #[test]
    fn a_realtime_quota_is_passed_over() {
        let resources: LinuxResources = serde_json::from_str(
            r#"{"cpu":{"realtimeRuntime":5000,"realtimePeriod":10000,"shares":512}}"#,
        )
        .unwrap();
        let cpu = of_host(&resources, 128).unwrap().cpu().clone().unwrap();
        assert_eq!(
            (cpu.realtime_runtime(), cpu.realtime_period()),
            (None, None)
        );
        assert_eq!(cpu.shares(), Some(512));
    }

    /// A mount namespace with a hierarchy of cgroup v2 where it belongs, which hosts of version 1 have elsewhere.
    pub(crate) fn with_cgroups(test: impl FnOnce() + Send) {
        share::tests::in_namespace(|| {
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(None::<&str>, ROOT, Some("cgroup2"), flags, None::<&str>).unwrap();
            test();
        });
    }

    #[test]
    fn a_cgroup_is_removed_with_those_that_somebody_has_made_in_it() {
        with_cgroups(|| {
            let name = format!("bulkhead-test-{}", std::process::id());
            let cgroup = HostCgroup {
                path: Path::new("/").join(&name),
                systemd: false,
                name,
            };
            let directory = cgroup.directory().unwrap();
            fs::create_dir_all(directory.join("a/b")).unwrap();
            fs::create_dir(directory.join("c")).unwrap();
            let mut process = std::process::Command::new("sleep")
                .arg("1000")
                .spawn()
                .unwrap();
            fs::write(directory.join("a/b/cgroup.procs"), process.id().to_string()).unwrap();
            let removed = cgroup.remove();
            process.kill().unwrap();
            process.wait().unwrap();
            let left = directory.exists();
            for path in ["a/b", "a", "c", ""] {
                let _ = fs::remove_dir(directory.join(path));
            }
            removed.unwrap();
            assert!(!left);
            cgroup.remove().unwrap();
        });
    }
}

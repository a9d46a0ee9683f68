//! From the OCI spec to a plan: what a container's init has to do, with every field checked.
//!
//! What the spec can hold and the agent can't do is refused here, with the field's name, before anything is made.
//! `docs/oci-spec.md` has the table of all fields.

mod devices;
mod hooks;
mod ids;
mod mounts;
mod namespaces;
mod parse;
mod process;
mod scheduling;
mod sysctl;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_protocol::agent::MountBelow;
use oci_spec::runtime as oci;

use crate::cgroup::Limits;
use crate::error::{Error, Result};
use crate::mount_options::{MountOptions, rootfs_propagation};
use crate::seccomp::Filter;
use crate::sys::attr;

pub use devices::Device;
pub use hooks::{Hook, StartHooks};
pub use ids::{IdMap, IdMaps};
pub use mounts::{Mount, MountIds};
pub use namespaces::{CLONE_NEWTIME, Joins, flag as namespace_flag};
pub use parse::parse_resources;
pub use process::{Capabilities, Process};
pub use scheduling::Scheduler;

/// Everything that a container's init does, in checked form.
#[derive(Debug)]
pub struct Plan {
    /// `CLONE_NEW*` of the namespaces in which the container differs from the guest.
    pub namespaces: u64,
    /// Those of them that are other containers', and joined.
    pub joined: u64,
    /// `linux.uidMappings` and `gidMappings`: there if the container has a user namespace.
    pub id_maps: Option<IdMaps>,
    /// `linux.timeOffsets`.
    pub time_offsets: Option<String>,
    /// The root filesystem.
    pub root: PathBuf,
    /// `root.readonly`.
    pub root_readonly: bool,
    /// What the root filesystem's mount has of the host's.
    pub root_options: MountOptions,
    /// `linux.rootfsPropagation`, if given.
    pub propagation: Option<(libc::c_ulong, bool)>,
    /// `mounts`, in their order.
    pub mounts: Vec<Mount>,
    /// `linux.devices`.
    pub devices: Vec<Device>,
    /// `linux.maskedPaths`.
    pub masked_paths: Vec<PathBuf>,
    /// `linux.readonlyPaths`.
    pub readonly_paths: Vec<PathBuf>,
    /// `hostname`.
    pub hostname: Option<String>,
    /// `domainname`.
    pub domainname: Option<String>,
    /// `linux.sysctl`: name and value.
    pub sysctl: Vec<(String, String)>,
    /// `linux.personality`.
    pub personality: Option<libc::c_ulong>,
    /// `linux.resources`.
    pub limits: Limits,
    /// `linux.seccomp`, for every process of the container, those that join it later too.
    pub seccomp: Option<Arc<Filter>>,
    /// `hooks.startContainer`.
    pub hooks: StartHooks,
    /// `process`.
    pub process: Process,
}

impl Plan {
    /// Parses and checks a spec.
    pub fn from_json(json: &[u8], joins: &Joins) -> Result<Self> {
        Self::from_spec(&parse::parse(json)?, joins)
    }

    /// Checks a parsed spec.
    pub fn from_spec(spec: &oci::Spec, joins: &Joins) -> Result<Self> {
        let root = spec
            .root()
            .as_ref()
            .ok_or_else(|| Error::spec("root", "is missing"))?;
        if !root.path().is_absolute() {
            return Err(Error::spec(
                "root.path",
                "must be an absolute path of the guest",
            ));
        }
        let process = spec
            .process()
            .as_ref()
            .ok_or_else(|| Error::spec("process", "is missing"))?;
        let linux = spec
            .linux()
            .as_ref()
            .ok_or_else(|| Error::spec("linux", "is missing"))?;
        refuse_what_is_not_done(linux, process)?;

        let namespaces = namespaces::from_spec(linux, joins)?;
        let new_uts = namespaces.all & libc::CLONE_NEWUTS as u64 != 0;
        for (field, value) in [
            ("hostname", spec.hostname()),
            ("domainname", spec.domainname()),
        ] {
            if value.as_ref().is_some_and(|name| !name.is_empty()) && !new_uts {
                return Err(Error::spec(
                    field,
                    format!("unable to set {field} without a private UTS namespace"),
                ));
            }
        }
        let named = |name: &Option<String>| name.clone().filter(|name| !name.is_empty());

        let id_maps = namespaces::id_maps(linux, namespaces, joins)?;
        let planned_process = Process::from_spec(process)?;
        if let Some(maps) = &id_maps {
            planned_process.check_mapped(maps)?;
        }

        Ok(Self {
            namespaces: namespaces.all,
            joined: namespaces.joined,
            time_offsets: namespaces::time_offsets(linux, namespaces.made())?,
            root: root.path().clone(),
            root_readonly: root.readonly().unwrap_or(false),
            root_options: MountOptions::default(),
            propagation: match linux.rootfs_propagation().as_deref() {
                None | Some("") => None,
                Some(value) => Some(rootfs_propagation(value)?),
            },
            mounts: mounts::from_spec(
                spec.mounts().as_deref().unwrap_or_default(),
                id_maps.as_ref(),
            )?,
            devices: devices::from_spec(linux.devices().as_deref().unwrap_or_default())?,
            masked_paths: from_root(linux.masked_paths().as_deref()),
            readonly_paths: from_root(linux.readonly_paths().as_deref()),
            hostname: named(spec.hostname()),
            domainname: named(spec.domainname()),
            sysctl: sysctl::from_spec(
                linux.sysctl().as_ref(),
                namespaces.all,
                spec.hostname().is_some(),
            )?,
            personality: linux.personality().as_ref().map(personality),
            limits: Limits::from_spec(linux.resources().as_ref())?,
            hooks: StartHooks::from_spec(spec)?,
            process: planned_process,
            id_maps,
            seccomp: linux
                .seccomp()
                .as_ref()
                .map(Filter::from_spec)
                .transpose()?
                .map(Arc::new),
        })
    }
}

impl Plan {
    /// Adds what the container's mounts have of the host's: the attributes of those that the root filesystem and the bind mounts are
    /// of, and the mounts that recursive ones bring along.
    pub fn inherit(&mut self, root: &[String], below: &[MountBelow]) -> Result<()> {
        let locked = self.id_maps.is_some();
        if self.root_readonly {
            // runc makes it so by a remount, which takes the other attributes away; here it becomes so at the end.
            self.root_options.set |= attr::RDONLY;
        }
        self.root_options
            .inherit(&MountOptions::parse(root), locked);
        if self.root_readonly {
            self.root_options.set &= !attr::RDONLY;
        }
        mounts::add_below(&mut self.mounts, below, locked)
    }

    /// `CLONE_NEW*` of the namespaces to make.
    pub fn made(&self) -> u64 {
        self.namespaces & !self.joined
    }

    /// Whether its scheduling has to wait for hooks, which the process to be scheduled forks.
    pub fn is_scheduled_late(&self) -> bool {
        self.process.scheduler.is_some() && !self.hooks.list.is_empty()
    }

    /// The guest's user who is to own the container's cgroup: the process's, where it has a cgroup namespace and may
    /// write to its cgroup. As with runc, and of no effect for the guest's root.
    pub fn cgroup_owner(&self) -> Option<u32> {
        let own = self.made() & libc::CLONE_NEWCGROUP as u64 != 0;
        let writable = self.mounts.iter().any(|mount| {
            matches!(mount.fs.as_str(), "cgroup" | "cgroup2")
                && mount
                    .destination
                    .components()
                    .eq(Path::new("/sys/fs/cgroup").components())
                && mount.options.set & attr::RDONLY == 0
        });
        let user = self.process.uid;
        let owner = match &self.id_maps {
            None => Some(user),
            Some(maps) => maps.uids.outside(user),
        };
        owner.filter(|&owner| own && writable && owner != 0)
    }
}

/// The spec wants absolute paths; relative ones begin at the container's root, as under runc.
fn from_root(paths: Option<&[String]>) -> Vec<PathBuf> {
    let paths = paths.unwrap_or_default().iter();
    paths.map(|path| Path::new("/").join(path)).collect()
}

fn refuse_what_is_not_done(linux: &oci::Linux, process: &oci::Process) -> Result<()> {
    fn mapped<K, V>(map: &Option<HashMap<K, V>>) -> bool {
        map.as_ref().is_some_and(|map| !map.is_empty())
    }
    fn named(text: &Option<String>) -> bool {
        text.as_ref().is_some_and(|text| !text.is_empty())
    }
    let no_lsm = "the guest's kernel has no such security module; remove it";
    let refused = [
        (
            "linux.netDevices",
            mapped(linux.net_devices()),
            "the guest has no such device; remove it",
        ),
        (
            "linux.intelRdt",
            linux.intel_rdt().is_some(),
            "not available in a guest; remove it",
        ),
        ("linux.mountLabel", named(linux.mount_label()), no_lsm),
    ];
    match refused.into_iter().find(|(_, present, _)| *present) {
        Some((field, _, why)) => Err(Error::spec(field, why)),
        None => process::refuse_what_is_not_done(process),
    }
}

fn personality(personality: &oci::LinuxPersonality) -> libc::c_ulong {
    // The spec defines none; runc warns and goes on.
    if let Some(flags) = personality
        .flags()
        .as_ref()
        .filter(|flags| !flags.is_empty())
    {
        tracing::warn!(count = flags.len(), "linux.personality.flags: ignored");
    }
    const PER_LINUX: libc::c_ulong = 0;
    const PER_LINUX32: libc::c_ulong = 8;
    match personality.domain() {
        oci::LinuxPersonalityDomain::PerLinux => PER_LINUX,
        oci::LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
    }
}

#[cfg(test)]
mod tests {
    use caps::CapsHashSet;
    use serde_json::{Value, json};

    use super::*;

    fn spec() -> Value {
        json!({
            "ociVersion": "1.0.2-dev",
            "root": {"path": "/share/rootfs"},
            "process": {"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["true"]},
            "linux": {"namespaces": [
                {"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "cgroup"}
            ]}
        })
    }

    /// The spec with the value at a JSON pointer's place replaced; missing objects on the way are made.
    fn with(pointer: &str, value: Value) -> Value {
        let mut spec = spec();
        let mut place = &mut spec;
        for part in pointer.split('/').skip(1) {
            place = &mut place[part];
        }
        *place = value;
        spec
    }

    fn plan(spec: &Value) -> Result<Plan> {
        Plan::from_json(&serde_json::to_vec(spec).unwrap(), &Joins::default())
    }

    #[test]
    fn a_small_spec_becomes_a_plan() {
        let plan = plan(&spec()).unwrap();
        assert_eq!(plan.root, Path::new("/share/rootfs"));
        assert_eq!(plan.process.umask, 0o022);
        assert_eq!(plan.process.capabilities, Capabilities::default());
        assert_eq!(plan.namespaces & libc::CLONE_NEWNET as u64, 0);
    }

    #[test]
    fn what_is_wrong_or_not_done_is_refused_by_the_name_of_its_field() {
        let mapping = json!([{"hostID": 0, "containerID": 0, "size": 1}]);
        let hook = json!([{"path": "/bin/true"}]);
        let table = [
            ("/root", Value::Null, "root"),
            ("/root/path", json!("rootfs"), "root.path"),
            ("/process", Value::Null, "process"),
            ("/process/args", json!([]), "process.args"),
            ("/process/args", Value::Null, "process.args"),
            ("/process/args", json!(["a\0b"]), "process.args[0]"),
            ("/process/cwd", json!(""), "process.cwd"),
            ("/process/cwd", json!("x"), "process.cwd"),
            ("/process/env", json!(["A=1", "novalue"]), "process.env[1]"),
            ("/process/env", json!(["=1"]), "process.env[0]"),
            ("/process/env", json!([7]), "process.env[0]"),
            ("/process/user/uid", json!("root"), "process.user.uid"),
            ("/process/user/uid", json!(u32::MAX), "process.user.uid"),
            ("/process/user/gid", json!(1u32 << 31), "process.user.gid"),
            (
                "/process/user/additionalGids",
                json!([1, u32::MAX]),
                "process.user.additionalGids[1]",
            ),
            (
                "/process/rlimits",
                json!([{"type": "RLIMIT_X", "soft": 1, "hard": 1}]),
                "process.rlimits[0].type",
            ),
            (
                "/process/rlimits",
                json!([{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}]),
                "process.rlimits[0]",
            ),
            (
                "/process/rlimits",
                json!([{"type": "RLIMIT_CPU", "soft": 1, "hard": 1}, {"type": "RLIMIT_CPU", "soft": 1, "hard": 1}]),
                "process.rlimits[1]",
            ),
            ("/process/oomScoreAdj", json!(1001), "process.oomScoreAdj"),
            (
                "/process/apparmorProfile",
                json!("docker-default"),
                "process.apparmorProfile",
            ),
            ("/process/selinuxLabel", json!("x"), "process.selinuxLabel"),
            (
                "/process/scheduler",
                json!({"policy": "SCHED_BATCH", "nice": -21}),
                "process.scheduler.nice",
            ),
            (
                "/process/ioPriority",
                json!({"class": "IOPRIO_CLASS_BE", "priority": 8}),
                "process.ioPriority.priority",
            ),
            ("/linux", Value::Null, "linux"),
            (
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
                "linux.seccomp.defaultAction",
            ),
            ("/linux/uidMappings", mapping.clone(), "linux.gidMappings"),
            ("/linux/gidMappings", mapping.clone(), "linux.uidMappings"),
            (
                "/linux/timeOffsets",
                json!({"monotonic": {"secs": 1}}),
                "linux.timeOffsets",
            ),
            ("/linux/intelRdt", json!({}), "linux.intelRdt"),
            ("/linux/mountLabel", json!("x"), "linux.mountLabel"),
            (
                "/linux/rootfsPropagation",
                json!("sharing"),
                "linux.rootfsPropagation",
            ),
            ("/linux/namespaces", json!([]), "linux.namespaces"),
            (
                "/linux/namespaces",
                json!([{"type": "mount"}, {"type": "user"}]),
                "linux.uidMappings",
            ),
            (
                "/linux/namespaces",
                json!([{"type": "mnt"}]),
                "linux.namespaces[0].type",
            ),
            (
                "/linux/namespaces",
                json!([{"type": "pid"}, {"type": "pid"}]),
                "linux.namespaces[1]",
            ),
            (
                "/linux/namespaces",
                json!([{"type": "ipc", "path": "/proc/1/ns/ipc"}]),
                "linux.namespaces[0].path",
            ),
            (
                "/linux/devices",
                json!([{"path": "/dev/x", "type": "a"}]),
                "linux.devices[0].type",
            ),
            (
                "/linux/devices",
                json!([{"path": "dev/x", "type": "c"}]),
                "linux.devices[0].path",
            ),
            (
                "/linux/devices",
                json!([{"path": "/dev/x", "type": "c", "major": -1}]),
                "linux.devices[0].major",
            ),
            (
                "/linux/sysctl",
                json!({"kernel.panic": "1"}),
                "linux.sysctl[\"kernel.panic\"]",
            ),
            (
                "/linux/sysctl",
                json!({"net/../../x": "1"}),
                "linux.sysctl[\"net/../../x\"]",
            ),
            (
                "/linux/resources",
                json!({"blockIO": {"weight": 9}}),
                "linux.resources.blockIO.weight",
            ),
            (
                "/hooks",
                json!({"startContainer": [{"path": "bin/true"}]}),
                "hooks.startContainer[0].path",
            ),
            (
                "/hooks",
                json!({"startContainer": [{"path": "/bin/true", "timeout": 0}]}),
                "hooks.startContainer[0].timeout",
            ),
            (
                "/hooks",
                json!({"startContainer": [{"path": "/bin/true", "env": ["A=1", "x"]}]}),
                "hooks.startContainer[0].env[1]",
            ),
            ("/hooks", json!({"prestart": hook}), "hooks.prestart"),
            (
                "/mounts",
                json!([{"destination": ""}]),
                "mounts[0].destination",
            ),
            (
                "/mounts",
                json!([{"destination": "/.", "type": "tmpfs"}]),
                "mounts[0].destination",
            ),
            ("/mounts", json!([{"destination": "/x"}]), "mounts[0].type"),
            (
                "/mounts",
                json!([{"destination": "/x", "options": ["bind"]}]),
                "mounts[0].source",
            ),
            (
                "/mounts",
                json!([{"destination": "/x", "type": "bind", "source": "a"}]),
                "mounts[0].source",
            ),
            (
                "/mounts",
                json!([{"destination": "/x", "type": "bind", "source": "/y", "options": ["idmap"]}]),
                "mounts[0].uidMappings",
            ),
            (
                "/mounts",
                json!([{"destination": "/x", "type": "tmpfs", "uidMappings": mapping, "gidMappings": mapping}]),
                "mounts[0].uidMappings",
            ),
        ];
        for (pointer, value, field) in table {
            let error = plan(&with(pointer, value)).map(drop).expect_err(field);
            let text = error.to_string();
            assert_eq!(error.kind(), crate::error::Kind::InvalidArgument, "{text}");
            assert!(
                text.starts_with(&format!("{field}: ")),
                "{field}: got {text:?}"
            );
        }
    }

    #[test]
    fn names_of_scheduler_flags_are_those_of_the_spec() {
        let flags = json!([
            "SCHED_FLAG_RESET_ON_FORK",
            "SCHED_FLAG_RECLAIM",
            "SCHED_FLAG_DL_OVERRUN",
            "SCHED_FLAG_KEEP_POLICY",
            "SCHED_FLAG_KEEP_PARAMS",
            "SCHED_FLAG_UTIL_CLAMP_MIN",
            "SCHED_FLAG_UTIL_CLAMP_MAX",
            "SCHED_FLAG_RECLAIM"
        ]);
        let scheduler = json!({"policy": "SCHED_DEADLINE", "flags": flags});
        let plan = plan(&with("/process/scheduler", scheduler)).unwrap();
        assert_eq!(plan.process.scheduler.unwrap().flags, 0x7f);
        let scheduler = json!({"policy": "SCHED_IDLE", "flags": ["SCHED_FLAG_X"]});
        let error = super::Plan::from_json(
            &serde_json::to_vec(&with("/process/scheduler", scheduler)).unwrap(),
            &Joins::default(),
        );
        assert!(
            error
                .unwrap_err()
                .to_string()
                .starts_with("process.scheduler.flags[0]: ")
        );
    }

    #[test]
    fn what_runc_does_not_know_is_ignored() {
        for (pointer, value) in [
            (
                "/linux/memoryPolicy",
                json!({"mode": "MPOL_LOCAL", "nodes": "0"}),
            ),
            (
                "/linux/personality",
                json!({"domain": "LINUX32", "flags": ["x"]}),
            ),
            ("/linux/nosuch", json!({})),
        ] {
            plan(&with(pointer, value)).expect(pointer);
        }
    }

    #[test]
    fn namespaces_to_join_take_the_place_of_new_ones() {
        let flags = |flags: &[libc::c_int]| flags.iter().fold(0, |all, &flag| all | flag as u64);
        let joining = |spec: &Value, asked: u64, guests: u64| {
            let joins = Joins {
                asked,
                guests,
                id_maps: None,
            };
            Plan::from_json(&serde_json::to_vec(spec).unwrap(), &joins)
        };
        let spec = with(
            "/linux/namespaces",
            json!([
                {"type": "mount"}, {"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "ipc"}, {"type": "uts"}
            ]),
        );
        let (pid, ipc) = (flags(&[libc::CLONE_NEWPID]), flags(&[libc::CLONE_NEWIPC]));
        let plan = joining(&spec, pid | ipc, 0).unwrap();
        assert_eq!(plan.joined, pid | ipc);
        assert_eq!(plan.made(), flags(&[libc::CLONE_NEWNS, libc::CLONE_NEWUTS]));
        // What the other one shares with the guest is shared with both.
        let plan = joining(&spec, pid | ipc, ipc).unwrap();
        assert_eq!((plan.joined, plan.namespaces & ipc), (pid, 0));
        for (asked, field) in [
            (ipc, "linux.namespaces[1].path: "),
            (pid | flags(&[libc::CLONE_NEWNET]), "linux.namespaces: "),
            (pid | flags(&[libc::CLONE_NEWNS]), "linux.namespaces: "),
        ] {
            let error = joining(&spec, asked, 0).unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }

    #[test]
    fn a_hostname_needs_a_uts_namespace() {
        let mut spec = with("/linux/namespaces", json!([{"type": "mount"}]));
        spec["hostname"] = json!("box");
        assert!(
            plan(&spec)
                .unwrap_err()
                .to_string()
                .starts_with("hostname: ")
        );
    }

    #[test]
    fn messages_never_hold_the_environment() {
        let error = plan(&with("/process/env", json!(["SECRETVALUE"]))).unwrap_err();
        assert!(!error.to_string().contains("SECRET"));
    }

    #[test]
    fn what_should_be_a_list_of_strings_and_is_not_is_told_without_its_content() {
        let hook =
            |name: &str, value: Value| json!({"poststart": [{"path": "/bin/true", name: value}]});
        for (pointer, value, field) in [
            ("/process/env", json!("PASSWORD=x"), "process.env"),
            ("/process/env", json!(["A=b", 4711]), "process.env[1]"),
            ("/process/args", json!("PASSWORD=x"), "process.args"),
            (
                "/hooks",
                hook("env", json!("PASSWORD=x")),
                "hooks.poststart[0].env",
            ),
            (
                "/hooks",
                hook("args", json!([4711])),
                "hooks.poststart[0].args[0]",
            ),
        ] {
            let message = plan(&with(pointer, value)).unwrap_err().to_string();
            assert_eq!(message, format!("{field}: must hold strings"));
        }
        let process =
            json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["x"], "env": "PASSWORD=x"});
        let error = super::parse::parse_process(process.to_string().as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "process.env: must hold strings");
    }

    #[test]
    fn the_last_of_two_equal_variables_counts() {
        let plan = plan(&with("/process/env", json!(["A=1", "B=2", "A=3", "C="]))).unwrap();
        let pairs: Vec<_> = plan
            .process
            .env
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        assert_eq!(pairs, ["A=3", "B=2", "C="]);
    }

    #[test]
    fn capabilities_are_known_by_name_and_unknown_ones_are_dropped() {
        let names = json!(["CAP_NET_ADMIN", "CAP_CHECKPOINT_RESTORE", "CAP_NO_SUCH"]);
        let plan = plan(&with("/process/capabilities", json!({"bounding": names}))).unwrap();
        let expected: CapsHashSet = [
            caps::Capability::CAP_NET_ADMIN,
            caps::Capability::CAP_CHECKPOINT_RESTORE,
        ]
        .into_iter()
        .collect();
        assert_eq!(plan.process.capabilities.bounding, expected);
        assert!(plan.process.capabilities.effective.is_empty());
    }

    #[test]
    fn every_capability_of_the_spec_has_its_number() {
        let all: Vec<String> = caps::all()
            .iter()
            .map(|capability| capability.to_string())
            .collect();
        let plan = plan(&with("/process/capabilities", json!({"permitted": all}))).unwrap();
        assert_eq!(plan.process.capabilities.permitted, caps::all());
    }

    #[test]
    fn sysctls_of_own_namespaces_are_allowed() {
        let names =
            json!({"net.ipv4.ip_forward": "1", "kernel.shmmax": "1", "fs.mqueue.msg_max": "5"});
        let mut plan = plan(&with("/linux/sysctl", names)).unwrap();
        plan.sysctl.sort();
        let paths: Vec<_> = plan.sysctl.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(
            paths,
            ["fs/mqueue/msg_max", "kernel/shmmax", "net/ipv4/ip_forward"]
        );
    }
}

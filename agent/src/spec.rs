//! From the OCI spec to a plan: what a container's init has to do, with every field checked.
//!
//! What the spec can hold and the agent can't do is refused here, with the field's name, before anything is made.
//! `agent/OCI.md` has the table of all fields.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use caps::CapsHashSet;
use nix::sys::resource::Resource;
use oci_spec::runtime as oci;

use crate::cgroup::Limits;
use crate::error::{Error, Result};
use crate::json_path;
use crate::mount_options::{MountOptions, rootfs_propagation};
use crate::seccomp::Filter;

/// Everything that a container's init does, in checked form.
#[derive(Debug)]
pub struct Plan {
    /// `CLONE_NEW*` of the namespaces to make.
    pub namespaces: u64,
    /// The root filesystem.
    pub root: PathBuf,
    /// `root.readonly`.
    pub root_readonly: bool,
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
    /// `process`.
    pub process: Process,
}

/// One of `mounts`.
#[derive(Debug, PartialEq, Eq)]
pub struct Mount {
    /// `mounts[2] (/dev/shm)`: how messages name it.
    pub field: String,
    /// Where, inside the container.
    pub destination: PathBuf,
    /// Type of file system; of no meaning for a bind mount.
    pub fs: String,
    /// What to mount.
    pub source: Option<PathBuf>,
    /// The options, told apart.
    pub options: MountOptions,
}

/// One of `linux.devices`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Path inside the container.
    pub path: PathBuf,
    /// File type bits of `mknod`.
    pub kind: libc::mode_t,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits.
    pub mode: libc::mode_t,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// The spec's `process`.
#[derive(Debug)]
pub struct Process {
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Arguments; the first is the program. Never empty.
    pub args: Vec<CString>,
    /// Environment, the last of equal names, in order.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: PathBuf,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// `user.umask`, or runc's default.
    pub umask: u32,
    /// Capability sets.
    pub capabilities: Capabilities,
    /// Resource limits.
    pub rlimits: Vec<(Resource, u64, u64)>,
    /// `noNewPrivileges`.
    pub no_new_privileges: bool,
    /// `oomScoreAdj`.
    pub oom_score_adj: Option<i32>,
    /// Class and level of `ioPriority`.
    pub io_priority: Option<(u16, u16)>,
}

/// The five sets. Absent ones are empty, as in runc.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Bounding set.
    pub bounding: CapsHashSet,
    /// Effective set.
    pub effective: CapsHashSet,
    /// Inheritable set.
    pub inheritable: CapsHashSet,
    /// Permitted set.
    pub permitted: CapsHashSet,
    /// Ambient set.
    pub ambient: CapsHashSet,
}

impl Plan {
    /// Parses and checks a spec.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        Self::from_spec(&parse(json)?)
    }

    /// Checks a parsed spec.
    pub fn from_spec(spec: &oci::Spec) -> Result<Self> {
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
        refuse_what_is_not_done(spec, linux, process)?;

        let namespaces = namespaces(linux)?;
        let new_uts = namespaces & libc::CLONE_NEWUTS as u64 != 0;
        for (field, value) in [
            ("hostname", spec.hostname()),
            ("domainname", spec.domainname()),
        ] {
            if value.as_ref().is_some_and(|name| !name.is_empty()) && !new_uts {
                return Err(Error::spec(
                    field,
                    "can't be set without a new uts namespace in linux.namespaces",
                ));
            }
        }
        let named = |name: &Option<String>| name.clone().filter(|name| !name.is_empty());

        Ok(Self {
            namespaces,
            root: root.path().clone(),
            root_readonly: root.readonly().unwrap_or(false),
            propagation: match linux.rootfs_propagation().as_deref() {
                None | Some("") => None,
                Some(value) => Some(rootfs_propagation(value)?),
            },
            mounts: mounts(spec.mounts().as_deref().unwrap_or_default())?,
            devices: devices(linux.devices().as_deref().unwrap_or_default())?,
            masked_paths: absolute_paths(linux.masked_paths().as_deref(), "linux.maskedPaths")?,
            readonly_paths: absolute_paths(
                linux.readonly_paths().as_deref(),
                "linux.readonlyPaths",
            )?,
            hostname: named(spec.hostname()),
            domainname: named(spec.domainname()),
            sysctl: sysctl(
                linux.sysctl().as_ref(),
                namespaces,
                spec.hostname().is_some(),
            )?,
            personality: linux.personality().as_ref().map(personality).transpose()?,
            limits: Limits::from_spec(linux.resources().as_ref())?,
            process: Process::from_spec(process)?,
            seccomp: linux
                .seccomp()
                .as_ref()
                .map(Filter::from_spec)
                .transpose()?
                .map(Arc::new),
        })
    }
}

/// Parses config.json. Capabilities that nobody knows are dropped with a warning, as the spec asks
/// (config.md, "Linux process": "Runtimes SHOULD NOT fail").
fn parse(json: &[u8]) -> Result<oci::Spec> {
    let error = match serde_json::from_slice(json) {
        Ok(spec) => return Ok(spec),
        Err(error) => error,
    };
    if error.is_data()
        && json
            .windows(CAPABILITY.len())
            .any(|window| window == CAPABILITY)
    {
        // Perhaps an unknown capability; the slow way, taken for such specs only.
        let mut value = serde_json::from_slice(json).map_err(|error| broken(json, &error))?;
        drop_unknown_capabilities(&mut value);
        let cleaned = value.to_string();
        return serde_json::from_str(&cleaned).map_err(|error| broken(cleaned.as_bytes(), &error));
    }
    Err(broken(json, &error))
}

const CAPABILITY: &[u8] = b"\"CAP_";

fn broken(json: &[u8], error: &serde_json::Error) -> Error {
    if !error.is_data() {
        return Error::Request(format!("spec_json is not JSON: {error}"));
    }
    let field = json_path::path_at(json, error.line(), error.column());
    // Without the position, which means nothing to somebody who wrote another file than this one.
    let text = error.to_string();
    let problem = text
        .rsplit_once(" at line ")
        .map_or(text.as_str(), |(problem, _)| problem);
    Error::spec(
        if field.is_empty() {
            "config.json"
        } else {
            &field
        },
        problem,
    )
}

fn drop_unknown_capabilities(spec: &mut serde_json::Value) {
    let Some(sets) = spec
        .pointer_mut("/process/capabilities")
        .and_then(|sets| sets.as_object_mut())
    else {
        return;
    };
    for names in sets.values_mut().filter_map(|names| names.as_array_mut()) {
        names.retain(|name| {
            let known = serde_json::from_value::<oci::Capability>(name.clone()).is_ok();
            if !known {
                tracing::warn!(%name, "process.capabilities: ignoring an unknown capability");
            }
            known
        });
    }
}

fn refuse_what_is_not_done(
    spec: &oci::Spec,
    linux: &oci::Linux,
    process: &oci::Process,
) -> Result<()> {
    fn listed<T>(list: &Option<Vec<T>>) -> bool {
        list.as_ref().is_some_and(|list| !list.is_empty())
    }
    fn mapped<K, V>(map: &Option<HashMap<K, V>>) -> bool {
        map.as_ref().is_some_and(|map| !map.is_empty())
    }
    fn named(text: &Option<String>) -> bool {
        text.as_ref().is_some_and(|text| !text.is_empty())
    }
    let not_yet = "not supported yet; remove it";
    let hooks = spec.hooks().as_ref();
    #[allow(deprecated)]
    let hook_lists = hooks.map(|hooks| {
        [
            ("hooks.prestart", listed(hooks.prestart())),
            ("hooks.createRuntime", listed(hooks.create_runtime())),
            ("hooks.createContainer", listed(hooks.create_container())),
            ("hooks.startContainer", listed(hooks.start_container())),
            ("hooks.poststart", listed(hooks.poststart())),
            ("hooks.poststop", listed(hooks.poststop())),
        ]
    });
    let hook = hook_lists
        .into_iter()
        .flatten()
        .find(|(_, present)| *present);
    if let Some((field, _)) = hook {
        return Err(Error::spec(
            field,
            "hooks don't run in the guest; remove it",
        ));
    }
    let no_lsm = "the guest's kernel has no such security module; remove it";
    let refused = [
        ("linux.uidMappings", listed(linux.uid_mappings()), not_yet),
        ("linux.gidMappings", listed(linux.gid_mappings()), not_yet),
        ("linux.timeOffsets", mapped(linux.time_offsets()), not_yet),
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
        (
            "linux.memoryPolicy",
            linux.memory_policy().is_some(),
            not_yet,
        ),
        ("linux.mountLabel", named(linux.mount_label()), no_lsm),
        (
            "process.selinuxLabel",
            named(process.selinux_label()),
            no_lsm,
        ),
        (
            "process.apparmorProfile",
            process
                .apparmor_profile()
                .as_deref()
                .is_some_and(|name| !name.is_empty() && name != "unconfined"),
            no_lsm,
        ),
        ("process.scheduler", process.scheduler().is_some(), not_yet),
        (
            "process.execCPUAffinity",
            process
                .exec_cpu_affinity()
                .as_ref()
                .is_some_and(|affinity| {
                    named(affinity.initial()) || named(affinity.cpu_affinity_final())
                }),
            not_yet,
        ),
    ];
    match refused.into_iter().find(|(_, present, _)| *present) {
        Some((field, _, why)) => Err(Error::spec(field, why)),
        None => Ok(()),
    }
}

fn namespaces(linux: &oci::Linux) -> Result<u64> {
    let mut flags = 0;
    for (index, namespace) in linux.namespaces().iter().flatten().enumerate() {
        let field = format!("linux.namespaces[{index}]");
        if namespace
            .path()
            .as_ref()
            .is_some_and(|path| !path.as_os_str().is_empty())
        {
            return Err(Error::spec(
                format!("{field}.path"),
                "joining a namespace is not supported yet; remove it",
            ));
        }
        let kind = namespace.typ();
        let flag = match kind {
            oci::LinuxNamespaceType::Mount => libc::CLONE_NEWNS,
            oci::LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
            oci::LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
            oci::LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
            oci::LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
            oci::LinuxNamespaceType::Network => libc::CLONE_NEWNET,
            oci::LinuxNamespaceType::User | oci::LinuxNamespaceType::Time => {
                return Err(Error::spec(
                    format!("{field}.type"),
                    format!("a new {kind} namespace is not supported yet; remove it"),
                ));
            }
        };
        if flags & flag as u64 != 0 {
            return Err(Error::spec(field, format!("a second {kind} namespace")));
        }
        flags |= flag as u64;
    }
    if flags & libc::CLONE_NEWNS as u64 == 0 {
        return Err(Error::spec(
            "linux.namespaces",
            "must have a new mount namespace",
        ));
    }
    Ok(flags)
}

fn mounts(mounts: &[oci::Mount]) -> Result<Vec<Mount>> {
    mounts
        .iter()
        .enumerate()
        .map(|(index, mount)| planned_mount(index, mount))
        .collect()
}

fn planned_mount(index: usize, mount: &oci::Mount) -> Result<Mount> {
    let field = format!("mounts[{index}]");
    let destination = mount.destination().clone();
    if destination.as_os_str().is_empty() {
        return Err(Error::spec(format!("{field}.destination"), "is missing"));
    }
    if !destination
        .components()
        .any(|part| matches!(part, Component::Normal(_)))
    {
        return Err(Error::spec(
            format!("{field}.destination"),
            "must not be the root itself",
        ));
    }
    let mapped = |list: &Option<Vec<_>>| {
        list.as_ref()
            .is_some_and(|list: &Vec<oci::LinuxIdMapping>| !list.is_empty())
    };
    if mapped(mount.uid_mappings()) || mapped(mount.gid_mappings()) {
        return Err(Error::spec(
            format!("{field}.uidMappings"),
            "not supported yet: ids are not mapped in the guest; remove it",
        ));
    }
    let mut options = MountOptions::parse(mount.options().as_deref().unwrap_or_default(), &field)?;
    let fs = mount.typ().clone().unwrap_or_default();
    // `type: bind` means a bind mount to runc even where the options don't say so.
    options.bind |= fs == "bind";
    let source = mount
        .source()
        .clone()
        .filter(|source| !source.as_os_str().is_empty());
    if options.bind {
        match &source {
            None => {
                return Err(Error::spec(
                    format!("{field}.source"),
                    "a bind mount needs a source",
                ));
            }
            Some(source) if !source.is_absolute() => {
                return Err(Error::spec(
                    format!("{field}.source"),
                    "must be an absolute path of the guest",
                ));
            }
            Some(_) => {}
        }
    } else if fs.is_empty() || fs == "none" {
        // Without a type it can only change the propagation of what is there.
        if options.propagation.is_empty() {
            return Err(Error::spec(format!("{field}.type"), "is missing"));
        }
    }
    Ok(Mount {
        field: format!("{field} ({})", destination.display()),
        destination,
        fs,
        source,
        options,
    })
}

fn devices(devices: &[oci::LinuxDevice]) -> Result<Vec<Device>> {
    devices
        .iter()
        .enumerate()
        .map(|(index, device)| {
            let field = format!("linux.devices[{index}]");
            let kind = match device.typ() {
                oci::LinuxDeviceType::B => libc::S_IFBLK,
                oci::LinuxDeviceType::C | oci::LinuxDeviceType::U => libc::S_IFCHR,
                oci::LinuxDeviceType::P => libc::S_IFIFO,
                oci::LinuxDeviceType::A => {
                    return Err(Error::spec(
                        format!("{field}.type"),
                        "must be one of b, c, u, p",
                    ));
                }
            };
            if !device.path().is_absolute() {
                return Err(Error::spec(format!("{field}.path"), "must be absolute"));
            }
            let number = |name: &str, value: i64| {
                if kind == libc::S_IFIFO {
                    return Ok(0);
                }
                u32::try_from(value)
                    .map_err(|_| Error::spec(format!("{field}.{name}"), "out of range"))
            };
            Ok(Device {
                path: device.path().clone(),
                kind,
                major: number("major", device.major())?,
                minor: number("minor", device.minor())?,
                mode: device.file_mode().unwrap_or(0o666) & 0o7777,
                uid: device.uid().unwrap_or(0),
                gid: device.gid().unwrap_or(0),
            })
        })
        .collect()
}

fn absolute_paths(paths: Option<&[String]>, field: &str) -> Result<Vec<PathBuf>> {
    let paths = paths.unwrap_or_default();
    match paths.iter().position(|path| !Path::new(path).is_absolute()) {
        Some(index) => Err(Error::spec(format!("{field}[{index}]"), "must be absolute")),
        None => Ok(paths.iter().map(PathBuf::from).collect()),
    }
}

/// Allows what belongs to a namespace of the container, as runc does, and `net.*` also where the container shares
/// the guest's network namespace: the guest is the container's own.
fn sysctl(
    sysctl: Option<&HashMap<String, String>>,
    namespaces: u64,
    has_hostname: bool,
) -> Result<Vec<(String, String)>> {
    const IPC: &[&str] = &[
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    let new = |flag: libc::c_int| namespaces & flag as u64 != 0;
    let mut checked = Vec::new();
    for (name, value) in sysctl.into_iter().flatten() {
        // Both `net.ipv4.ip_forward` and `net/ipv4/ip_forward` are in use.
        let path = if name.contains('/') {
            name.clone()
        } else {
            name.replace('.', "/")
        };
        let dotted = path.replace('/', ".");
        let refuse = |problem: &str| Err(Error::spec(format!("linux.sysctl[{name:?}]"), problem));
        if path.split('/').any(|part| part.is_empty() || part == "..") {
            return refuse("not the name of a sysctl");
        }
        if IPC.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.") {
            if !new(libc::CLONE_NEWIPC) {
                return refuse("can't be set without a new ipc namespace in linux.namespaces");
            }
        } else if dotted == "kernel.domainname" {
            if !new(libc::CLONE_NEWUTS) {
                return refuse("can't be set without a new uts namespace in linux.namespaces");
            }
        } else if dotted == "kernel.hostname" {
            if has_hostname {
                return refuse("conflicts with the field hostname");
            }
            if !new(libc::CLONE_NEWUTS) {
                return refuse("can't be set without a new uts namespace in linux.namespaces");
            }
        } else if !dotted.starts_with("net.") {
            return refuse("is not in a separate kernel namespace");
        }
        checked.push((path, value.clone()));
    }
    Ok(checked)
}

fn personality(personality: &oci::LinuxPersonality) -> Result<libc::c_ulong> {
    if personality
        .flags()
        .as_ref()
        .is_some_and(|flags| !flags.is_empty())
    {
        return Err(Error::spec(
            "linux.personality.flags",
            "not supported; remove it",
        ));
    }
    const PER_LINUX: libc::c_ulong = 0;
    const PER_LINUX32: libc::c_ulong = 8;
    Ok(match personality.domain() {
        oci::LinuxPersonalityDomain::PerLinux => PER_LINUX,
        oci::LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
    })
}

impl Process {
    /// Checks a process, of a container or of an exec in it.
    pub fn from_spec(process: &oci::Process) -> Result<Self> {
        let args = process.args().as_deref().unwrap_or_default();
        if args.is_empty() {
            return Err(Error::spec("process.args", "must not be empty"));
        }
        let args = args
            .iter()
            .enumerate()
            .map(|(index, arg)| {
                CString::new(arg.as_bytes()).map_err(|_| {
                    Error::spec(
                        format!("process.args[{index}]"),
                        "must not hold a null byte",
                    )
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let cwd = process.cwd().clone();
        if cwd.as_os_str().is_empty() {
            return Err(Error::spec("process.cwd", "must not be empty"));
        }
        if !cwd.is_absolute() {
            return Err(Error::spec("process.cwd", "must be an absolute path"));
        }
        if cwd.as_os_str().as_bytes().contains(&0) {
            return Err(Error::spec("process.cwd", "must not hold a null byte"));
        }
        let user = process.user();
        Ok(Self {
            terminal: process.terminal().unwrap_or(false),
            args,
            env: environment(process.env().as_deref().unwrap_or_default())?,
            cwd,
            uid: user.uid(),
            gid: user.gid(),
            groups: user.additional_gids().clone().unwrap_or_default(),
            umask: user.umask().unwrap_or(0o022) & 0o777,
            capabilities: process
                .capabilities()
                .as_ref()
                .map(Capabilities::from_spec)
                .unwrap_or_default(),
            rlimits: rlimits(process.rlimits().as_deref().unwrap_or_default())?,
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            oom_score_adj: match process.oom_score_adj() {
                Some(value) if !(-1000..=1000).contains(&value) => {
                    return Err(Error::spec(
                        "process.oomScoreAdj",
                        "must be from -1000 to 1000",
                    ));
                }
                value => value,
            },
            io_priority: process
                .io_priority()
                .as_ref()
                .map(io_priority)
                .transpose()?,
        })
    }
}

/// Checks `NAME=value` pairs. Of equal names the last one counts, as with `setenv`. Messages hold positions only.
fn environment(env: &[String]) -> Result<Vec<(String, String)>> {
    let mut pairs: Vec<(String, String)> = Vec::with_capacity(env.len() + 1);
    let mut places: HashMap<String, usize> = HashMap::with_capacity(env.len());
    for (index, pair) in env.iter().enumerate() {
        let refuse = |problem: &str| Error::spec(format!("process.env[{index}]"), problem);
        let (name, value) = pair
            .split_once('=')
            .ok_or_else(|| refuse("must have the form NAME=value"))?;
        if name.is_empty() {
            return Err(refuse("the name must not be empty"));
        }
        if pair.contains('\0') {
            return Err(refuse("must not hold a null byte"));
        }
        match places.get(name).and_then(|&place| pairs.get_mut(place)) {
            Some(known) => value.clone_into(&mut known.1),
            None => {
                places.insert(name.to_owned(), pairs.len());
                pairs.push((name.to_owned(), value.to_owned()));
            }
        }
    }
    Ok(pairs)
}

fn rlimits(rlimits: &[oci::PosixRlimit]) -> Result<Vec<(Resource, u64, u64)>> {
    use oci::PosixRlimitType as Type;
    let mut checked: Vec<(Resource, u64, u64)> = Vec::with_capacity(rlimits.len());
    for (index, limit) in rlimits.iter().enumerate() {
        let resource = match limit.typ() {
            Type::RlimitCpu => Resource::RLIMIT_CPU,
            Type::RlimitFsize => Resource::RLIMIT_FSIZE,
            Type::RlimitData => Resource::RLIMIT_DATA,
            Type::RlimitStack => Resource::RLIMIT_STACK,
            Type::RlimitCore => Resource::RLIMIT_CORE,
            Type::RlimitRss => Resource::RLIMIT_RSS,
            Type::RlimitNproc => Resource::RLIMIT_NPROC,
            Type::RlimitNofile => Resource::RLIMIT_NOFILE,
            Type::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
            Type::RlimitAs => Resource::RLIMIT_AS,
            Type::RlimitLocks => Resource::RLIMIT_LOCKS,
            Type::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
            Type::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
            Type::RlimitNice => Resource::RLIMIT_NICE,
            Type::RlimitRtprio => Resource::RLIMIT_RTPRIO,
            Type::RlimitRttime => Resource::RLIMIT_RTTIME,
        };
        let field = format!("process.rlimits[{index}]");
        if checked.iter().any(|(known, ..)| *known == resource) {
            return Err(Error::spec(field, format!("a second {}", limit.typ())));
        }
        if limit.soft() > limit.hard() {
            return Err(Error::spec(
                field,
                "the soft limit must not exceed the hard limit",
            ));
        }
        checked.push((resource, limit.soft(), limit.hard()));
    }
    Ok(checked)
}

fn io_priority(priority: &oci::LinuxIOPriority) -> Result<(u16, u16)> {
    let class = match priority.class() {
        oci::IOPriorityClass::IoprioClassRt => 1,
        oci::IOPriorityClass::IoprioClassBe => 2,
        oci::IOPriorityClass::IoprioClassIdle => 3,
    };
    match u16::try_from(priority.priority()) {
        Ok(level) if level <= 7 => Ok((class, level)),
        _ => Err(Error::spec(
            "process.ioPriority.priority",
            "must be from 0 to 7",
        )),
    }
}

impl Capabilities {
    fn from_spec(sets: &oci::LinuxCapabilities) -> Self {
        let set = |names: &Option<oci::Capabilities>| -> CapsHashSet {
            names.iter().flatten().filter_map(capability).collect()
        };
        Self {
            bounding: set(sets.bounding()),
            effective: set(sets.effective()),
            inheritable: set(sets.inheritable()),
            permitted: set(sets.permitted()),
            ambient: set(sets.ambient()),
        }
    }
}

fn capability(capability: &oci::Capability) -> Option<caps::Capability> {
    format!("CAP_{capability}").parse().ok()
}

#[cfg(test)]
mod tests {
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
        Plan::from_json(&serde_json::to_vec(spec).unwrap())
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
                json!({"policy": "SCHED_BATCH"}),
                "process.scheduler",
            ),
            (
                "/process/ioPriority",
                json!({"class": "IOPRIO_CLASS_BE", "priority": 8}),
                "process.ioPriority.priority",
            ),
            (
                "/process/execCPUAffinity",
                json!({"initial": "0"}),
                "process.execCPUAffinity",
            ),
            ("/linux", Value::Null, "linux"),
            (
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
                "linux.seccomp.defaultAction",
            ),
            ("/linux/uidMappings", mapping.clone(), "linux.uidMappings"),
            ("/linux/gidMappings", mapping.clone(), "linux.gidMappings"),
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
            (
                "/linux/maskedPaths",
                json!(["proc/kcore"]),
                "linux.maskedPaths[0]",
            ),
            ("/linux/namespaces", json!([]), "linux.namespaces"),
            (
                "/linux/namespaces",
                json!([{"type": "user"}]),
                "linux.namespaces[0].type",
            ),
            (
                "/linux/namespaces",
                json!([{"type": "time"}]),
                "linux.namespaces[0].type",
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
                "/linux/personality",
                json!({"domain": "LINUX", "flags": ["x"]}),
                "linux.personality.flags",
            ),
            (
                "/linux/resources",
                json!({"blockIO": {"weight": 10}}),
                "linux.resources.blockIO",
            ),
            (
                "/hooks",
                json!({"startContainer": hook}),
                "hooks.startContainer",
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
                json!([{"destination": "/x", "type": "tmpfs", "options": ["remount"]}]),
                "mounts[0].options",
            ),
            (
                "/mounts",
                json!([{"destination": "/x", "type": "tmpfs", "uidMappings": mapping}]),
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

//! `process`, of a container or of an exec in it.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use caps::CapsHashSet;
use nix::sys::resource::Resource;
use oci_spec::runtime as oci;

use super::parse;
use crate::error::{Error, Result};
use crate::spec::{IdMaps, Scheduler};
use crate::terminal::Size;

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
    /// `scheduler`.
    pub scheduler: Option<Scheduler>,
    /// `consoleSize`: of a terminal that nobody gave a size.
    pub console_size: Size,
}

/// The five sets. Absent ones are empty, as in runc.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
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

impl Process {
    /// Parses and checks the process of an exec. What it does not say is as in the container's own process, as runc
    /// has it for capabilities and `oomScoreAdj`; `noNewPrivileges` is its own to say.
    pub fn for_exec(json: &[u8], container: &Self) -> Result<Self> {
        let spec = parse::parse_process(json)?;
        refuse_what_is_not_done(&spec)?;
        let mut process = Self::from_spec(&spec)?;
        if spec.capabilities().is_none() {
            process.capabilities = container.capabilities.clone();
        }
        if process.rlimits.is_empty() {
            process.rlimits.clone_from(&container.rlimits);
        }
        if spec.user().umask().is_none() {
            process.umask = container.umask;
        }
        process.oom_score_adj = process.oom_score_adj.or(container.oom_score_adj);
        process.io_priority = process.io_priority.or(container.io_priority);
        process.scheduler = process.scheduler.or(container.scheduler);
        Ok(process)
    }

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
        let groups = user.additional_gids().clone().unwrap_or_default();
        check_id("process.user.uid", user.uid())?;
        check_id("process.user.gid", user.gid())?;
        for (index, gid) in groups.iter().enumerate() {
            check_id(&format!("process.user.additionalGids[{index}]"), *gid)?;
        }
        Ok(Self {
            terminal: process.terminal().unwrap_or(false),
            args,
            env: environment(process.env().as_deref().unwrap_or_default(), "process.env")?,
            cwd,
            uid: user.uid(),
            gid: user.gid(),
            groups,
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
            scheduler: process
                .scheduler()
                .as_ref()
                .map(Scheduler::from_spec)
                .transpose()?,
            console_size: process.console_size().map_or_else(Size::default, |size| {
                let bounded = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
                Size::bounded(bounded(size.width()), bounded(size.height()))
            }),
        })
    }
}

/// Checks that a number may be a user's or a group's: runc's range. The largest one of 32 bits would be none at all to the kernel, and the
/// process would stay root.
fn check_id(field: &str, id: u32) -> Result<()> {
    if i32::try_from(id).is_err() {
        return Err(Error::spec(
            field,
            "must be in the range of users and groups, 0 to 2147483647",
        ));
    }
    Ok(())
}

impl Process {
    /// Checks that the user and the groups exist in a user namespace.
    pub fn check_mapped(&self, maps: &IdMaps) -> Result<()> {
        if maps.uids.outside(self.uid).is_none() {
            return Err(Error::spec(
                "process.user.uid",
                "cannot set uid to unmapped user in user namespace",
            ));
        }
        if maps.gids.outside(self.gid).is_none() {
            return Err(Error::spec(
                "process.user.gid",
                "cannot set gid to unmapped user in user namespace",
            ));
        }
        match self
            .groups
            .iter()
            .find(|&&group| maps.gids.outside(group).is_none())
        {
            None => Ok(()),
            Some(group) => Err(Error::spec(
                "process.user.additionalGids",
                format!("cannot set group {group}, which is unmapped in the user namespace"),
            )),
        }
    }
}

/// Refuses what a process may ask and the agent can't do.
pub(super) fn refuse_what_is_not_done(process: &oci::Process) -> Result<()> {
    fn named(text: &Option<String>) -> bool {
        text.as_ref().is_some_and(|text| !text.is_empty())
    }
    let no_lsm = "the guest's kernel has no such security module; remove it";
    let refused = [
        (
            "process.selinuxLabel",
            named(process.selinux_label()),
            "selinux label is specified in config, but selinux is disabled or not supported",
        ),
        (
            "process.apparmorProfile",
            process
                .apparmor_profile()
                .as_deref()
                .is_some_and(|name| !name.is_empty() && name != "unconfined"),
            no_lsm,
        ),
    ];
    match refused.into_iter().find(|(_, present, _)| *present) {
        Some((field, _, why)) => Err(Error::spec(field, why)),
        None => Ok(()),
    }
}

/// Checks `NAME=value` pairs. Of equal names the last one counts, as with `setenv`. Messages hold positions only.
pub(super) fn environment(env: &[String], field: &str) -> Result<Vec<(String, String)>> {
    let mut pairs: Vec<(String, String)> = Vec::with_capacity(env.len() + 1);
    let mut places: HashMap<String, usize> = HashMap::with_capacity(env.len());
    for (index, pair) in env.iter().enumerate() {
        let refuse = |problem: &str| Error::spec(format!("{field}[{index}]"), problem);
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
        let (inheritable, permitted) = (set(sets.inheritable()), set(sets.permitted()));
        Self {
            bounding: set(sets.bounding()),
            effective: set(sets.effective()),
            // Those that the kernel would refuse (capabilities(7)) are left out, as by runc: its own default spec has some.
            ambient: set(sets.ambient())
                .into_iter()
                .filter(|cap| inheritable.contains(cap) && permitted.contains(cap))
                .collect(),
            inheritable,
            permitted,
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

    fn container() -> Process {
        let spec = json!({
            "cwd": "/", "args": ["init"], "user": {"uid": 5, "gid": 5, "umask": 0o077}, "noNewPrivileges": true,
            "oomScoreAdj": 7, "rlimits": [{"type": "RLIMIT_CORE", "soft": 1, "hard": 2}],
            "capabilities": {"bounding": ["CAP_KILL"]}, "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 3}
        });
        Process::from_spec(&serde_json::from_value(spec).unwrap()).unwrap()
    }

    fn exec(json: &Value) -> Result<Process> {
        Process::for_exec(&serde_json::to_vec(json).unwrap(), &container())
    }

    #[test]
    fn what_an_exec_does_not_say_is_the_containers() {
        let container = container();
        let process =
            exec(&json!({"cwd": "/", "args": ["x"], "user": {"uid": 0, "gid": 0}})).unwrap();
        assert_eq!(process.capabilities, container.capabilities);
        assert_eq!(process.rlimits, container.rlimits);
        assert_eq!(
            (process.umask, process.oom_score_adj, process.io_priority),
            (0o077, Some(7), Some((2, 3)))
        );
        // Its own to say, and who it is.
        assert!(!process.no_new_privileges);
        assert_eq!((process.uid, process.gid), (0, 0));
    }

    #[test]
    fn what_an_exec_says_counts() {
        let process = exec(&json!({
            "cwd": "/", "args": ["x"], "user": {"uid": 0, "gid": 0, "umask": 0}, "noNewPrivileges": true,
            "oomScoreAdj": 0, "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 3, "hard": 4}], "capabilities": {},
            "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 0}
        }))
        .unwrap();
        assert_eq!(process.capabilities, Capabilities::default());
        assert_eq!(process.rlimits, [(Resource::RLIMIT_NOFILE, 3, 4)]);
        assert_eq!(
            (process.umask, process.oom_score_adj, process.io_priority),
            (0, Some(0), Some((3, 0)))
        );
        assert!(process.no_new_privileges);
    }

    #[test]
    fn errors_of_an_exec_name_the_field() {
        let user = json!({"uid": 0, "gid": 0});
        for (process, message) in [
            (
                json!({"cwd": "/", "args": [], "user": user}),
                "process.args: must not be empty",
            ),
            (
                json!({"cwd": "x", "args": ["x"], "user": user}),
                "process.cwd: must be an absolute path",
            ),
            (
                json!({"cwd": "/", "args": "x", "user": user}),
                "process.args: ",
            ),
            (
                json!({"args": ["x"], "user": user}),
                "process: missing field `cwd`",
            ),
            (
                json!({"cwd": "/", "args": ["x"], "user": user, "apparmorProfile": "mine"}),
                "process.apparmorProfile: ",
            ),
        ] {
            let error = exec(&process).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        let unknown = json!({"cwd": "/", "args": ["x"], "user": user, "capabilities": {"bounding": ["CAP_NEW", "CAP_KILL"]}});
        assert_eq!(
            exec(&unknown).unwrap().capabilities,
            container().capabilities
        );
        let error = Process::for_exec(b"{", &container()).unwrap_err();
        assert!(
            error.to_string().starts_with("process_json is not JSON: "),
            "{error}"
        );
    }
}

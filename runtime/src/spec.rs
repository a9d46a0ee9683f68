//! Loading a bundle: `config.json` and root filesystem, and the refusal of everything that a guest can't honour.
//!
//! All of this happens before anything is started. The agent checks the parts that only it can know.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_protocol::{cleaned, scheduler_flag};
use oci_spec::runtime::{
    Capability, Hooks, Linux, LinuxNamespace, LinuxNamespaceType, Process, Spec,
};
use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::annotations::Overrides;
use crate::id::ContainerId;

/// File name of a bundle's configuration (runtime-spec, bundle.md).
pub const CONFIG_FILE: &str = "config.json";

/// Least memory limit of a container. Below, programs don't end but crawl, each page fetched from the host again and again.
const LEAST_MEMORY: i64 = 2 << 20;

/// A bundle whose spec this version can run.
#[derive(Debug)]
pub struct Bundle {
    /// The bundle's directory, absolute.
    pub dir: PathBuf,
    /// Its spec.
    pub spec: Spec,
    /// The root filesystem on the host, absolute.
    pub rootfs: PathBuf,
    /// The namespaces of other containers that it joins.
    pub joins: Vec<Join>,
}

/// A namespace of another container of the same sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Join {
    /// Its kind, by the spec's name.
    pub namespace: &'static str,
    /// Whose it is.
    pub container: ContainerId,
}

/// Why a bundle is refused. Messages name the file or field, the problem and the next step.
#[derive(Debug, Error)]
pub enum SpecError {
    /// No bundle, or no `config.json` in it.
    #[error(
        "{} not found: a bundle is a directory with a config.json and a root filesystem; name it with --bundle",
        .0.display()
    )]
    Missing(PathBuf),
    /// The file cannot be read.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        cause: io::Error,
    },
    /// The file is not a spec.
    #[error("{} is not a valid runtime spec: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Which field, and what is wrong with it.
        message: String,
    },
    /// A field's value is wrong.
    #[error("config.json: `{field}` {problem}")]
    Field {
        /// The field, as a path from the root.
        field: String,
        /// What is wrong with it and what is right.
        problem: String,
    },
    /// A field asks for what this runtime can't do.
    #[error("config.json: `{field}` is not supported: {reason}")]
    Unsupported {
        /// The field, as a path from the root.
        field: String,
        /// Why, and what to do.
        reason: String,
    },
}

impl SpecError {
    pub(crate) fn field(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Field {
            field: field.into(),
            problem: problem.into(),
        }
    }

    fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported {
            field: field.into(),
            reason: reason.into(),
        }
    }
}

impl Bundle {
    /// Loads the bundle in `dir` and checks it.
    pub fn load(dir: &Path) -> Result<Self, SpecError> {
        Self::load_beside(dir, |_| None)
    }

    /// Loads the bundle of a container that may join others' namespaces: `container_of` tells which container of the sandbox a process
    /// of the host stands for.
    pub fn load_beside(
        dir: &Path,
        container_of: impl Fn(u32) -> Option<ContainerId>,
    ) -> Result<Self, SpecError> {
        let dir = fs::canonicalize(dir).map_err(|cause| missing_or(dir, cause))?;
        let path = dir.join(CONFIG_FILE);
        let text = fs::read(&path).map_err(|cause| missing_or(&path, cause))?;
        let spec = parse(&text).map_err(|message| SpecError::Parse {
            path: path.clone(),
            message,
        })?;
        validate(&spec)?;
        let joins = joins(&spec, container_of)?;
        let rootfs = rootfs(&dir, &spec)?;
        Ok(Self {
            dir,
            spec,
            rootfs,
            joins,
        })
    }
}

fn missing_or(path: &Path, cause: io::Error) -> SpecError {
    let path = path.to_path_buf();
    match cause.kind() {
        io::ErrorKind::NotFound => SpecError::Missing(path),
        _ => SpecError::Read { path, cause },
    }
}

/// Parses a spec; the error names the field by its path. Capabilities that nobody knows are dropped, as the spec asks
/// (config.md, "Linux Process": "Runtimes SHOULD NOT fail").
fn parse(text: &[u8]) -> Result<Spec, String> {
    let mut value: Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    drop_unknown_capabilities(value.pointer_mut("/process/capabilities"));
    rename_scheduler_flags(value.pointer_mut("/process/scheduler/flags"));
    if let Some(Value::Object(process)) = value.pointer_mut("/process") {
        fill_in_user(process);
    }
    drop_empty_seccomp(value.pointer_mut("/linux"));
    serde_path_to_error::deserialize(value).map_err(|error| {
        let field = error.path().to_string();
        // serde quotes the offending value, and arguments and environment, of hooks too, are nobody's business.
        let mut names = field.split(['.', '[']);
        if names.any(|name| name == "args" || name == "env") {
            return format!("`{field}` must hold strings");
        }
        match field.as_str() {
            "." | "" => error.inner().to_string(),
            _ => format!("`{field}`: {}", error.inner()),
        }
    })
}

/// Drops from a process's `capabilities` what nobody knows, and says so. Names are as in capabilities(7): what else might be meant
/// by another spelling is not given, as under runc.
pub fn drop_unknown_capabilities(sets: Option<&mut Value>) {
    let known = |name: &Value| {
        let spelling = name.as_str().is_some_and(|name| {
            name.starts_with("CAP_") && !name.bytes().any(|byte| byte.is_ascii_lowercase())
        });
        spelling && serde_json::from_value::<Capability>(name.clone()).is_ok()
    };
    let sets = sets.and_then(Value::as_object_mut).into_iter();
    let mut unknown = BTreeSet::new();
    for names in sets
        .flat_map(|sets| sets.values_mut())
        .filter_map(Value::as_array_mut)
    {
        names.retain(|name| {
            let known = known(name);
            if !known {
                unknown.insert(name.as_str().unwrap_or_default().to_owned());
            }
            known
        });
    }
    if !unknown.is_empty() {
        let unknown = Vec::from_iter(unknown).join(" ");
        // runc's words, for which test suites look.
        tracing::warn!("ignoring unknown or unavailable capabilities: [{unknown}]");
    }
}

/// A process whose user, or its id or group, is not given is root's, as under runc.
pub fn fill_in_user(process: &mut Map<String, Value>) {
    let user = process.entry("user").or_insert(Value::Null);
    if user.is_null() {
        *user = json!({});
    }
    for id in ["uid", "gid"] {
        if let Some(user) = user.as_object_mut() {
            user.entry(id).or_insert_with(|| json!(0));
        }
    }
}

/// A profile with neither a default action nor rules is none, as under runc.
fn drop_empty_seccomp(linux: Option<&mut Value>) {
    let Some(linux) = linux.and_then(Value::as_object_mut) else {
        return;
    };
    // What is malformed is not empty.
    let is_empty = |profile: &Value| {
        profile.is_object()
            && [json!(null), json!("")].contains(&profile["defaultAction"])
            && [json!(null), json!([])].contains(&profile["syscalls"])
    };
    if linux.get("seccomp").is_some_and(is_empty) {
        linux.remove("seccomp");
    }
}

fn rename_scheduler_flags(flags: Option<&mut Value>) {
    for flag in flags.and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(name) = flag.as_str() {
            *flag = scheduler_flag(name).into();
        }
    }
}

/// Refuses a spec that is wrong or asks for what can't be done.
fn validate(spec: &Spec) -> Result<(), SpecError> {
    version(spec.version())?;
    let Some(process) = spec.process() else {
        return Err(SpecError::field(
            "process",
            "is missing: say which program to run",
        ));
    };
    validate_process(process)?;
    Overrides::of(spec)?;
    if let Some(hooks) = spec.hooks() {
        validate_hooks(hooks)?;
    }
    if spec.vm().is_some() {
        return Err(SpecError::unsupported(
            "vm",
            "hypervisor, kernel and image are the runtime's own",
        ));
    }
    let Some(linux) = spec.linux() else {
        return Err(SpecError::field(
            "linux",
            "is missing: it has to list the container's namespaces",
        ));
    };
    let has_hostname = spec
        .hostname()
        .as_ref()
        .is_some_and(|name| !name.is_empty());
    validate_namespaces(linux, has_hostname)?;
    validate_linux(linux)?;
    Ok(())
}

/// Spec versions are SemVer; every 1.x is compatible (runtime-spec, config.md, "Specification version").
fn version(version: &str) -> Result<(), SpecError> {
    let major = version.split('.').next().unwrap_or_default();
    if version.split('.').count() >= 3 && major == "1" {
        return Ok(());
    }
    Err(SpecError::field(
        "ociVersion",
        format!("is {version:?}: this runtime implements 1.x.y"),
    ))
}

fn validate_process(process: &Process) -> Result<(), SpecError> {
    let args = process.args().as_deref().unwrap_or_default();
    if args.is_empty() {
        return Err(SpecError::field(
            "process.args",
            "must not be empty: say which program to run",
        ));
    }
    let env = process.env().as_deref().unwrap_or_default();
    for (field, values) in [("process.args", args), ("process.env", env)] {
        if let Some(n) = values.iter().position(|value| value.contains('\0')) {
            return Err(SpecError::field(
                format!("{field}[{n}]"),
                "holds a NUL byte, which no program can be given",
            ));
        }
    }
    if !process.cwd().is_absolute() {
        return Err(SpecError::field(
            "process.cwd",
            format!("is {:?}: give an absolute path", process.cwd()),
        ));
    }
    let present = |value: &Option<String>| value.as_deref().is_some_and(|v| !v.is_empty());
    if process
        .apparmor_profile()
        .as_deref()
        .is_some_and(|profile| !is_default_profile(profile))
    {
        return Err(SpecError::unsupported(
            "process.apparmorProfile",
            "the guest's kernel has no AppArmor; remove it",
        ));
    }
    if present(process.selinux_label()) {
        return Err(SpecError::unsupported(
            "process.selinuxLabel",
            "the guest's kernel has no SELinux; remove it",
        ));
    }
    Ok(())
}

/// Whether an AppArmor profile is none, or the one that an engine puts around every container of a host with AppArmor: what
/// those profiles keep from a container of the host's kernel, a container in a VM has not got.
pub fn is_default_profile(profile: &str) -> bool {
    matches!(
        profile,
        "" | "unconfined" | "docker-default" | "cri-containerd.apparmor.d"
    ) || profile.starts_with("containers-default-")
        || profile.starts_with("crio-default")
}

/// Hooks are programs of the host, but for startContainer's, which are the container's.
fn validate_hooks(hooks: &Hooks) -> Result<(), SpecError> {
    #[allow(deprecated)]
    let prestart = hooks.prestart();
    for (field, hooks) in [
        ("hooks.prestart", prestart),
        ("hooks.createRuntime", hooks.create_runtime()),
        ("hooks.createContainer", hooks.create_container()),
        ("hooks.startContainer", hooks.start_container()),
        ("hooks.poststart", hooks.poststart()),
        ("hooks.poststop", hooks.poststop()),
    ] {
        for (n, hook) in hooks.iter().flatten().enumerate() {
            if !hook.path().is_absolute() {
                return Err(SpecError::field(
                    format!("{field}[{n}].path"),
                    format!("is {:?}: give an absolute path", hook.path()),
                ));
            }
            if hook.timeout().is_some_and(|timeout| timeout <= 0) {
                return Err(SpecError::field(
                    format!("{field}[{n}].timeout"),
                    "must be more than zero seconds",
                ));
            }
        }
    }
    Ok(())
}

/// A container that names no namespace of a kind would share the host's, which a guest can't.
fn validate_namespaces(linux: &Linux, has_hostname: bool) -> Result<(), SpecError> {
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let mut seen: Vec<LinuxNamespaceType> = Vec::new();
    for (n, namespace) in namespaces.iter().enumerate() {
        let field = format!("linux.namespaces[{n}]");
        if seen.contains(&namespace.typ()) {
            return Err(SpecError::field(
                field,
                format!(
                    "is a second {:?} namespace: list each once",
                    name(namespace.typ())
                ),
            ));
        }
        seen.push(namespace.typ());
    }
    for required in [
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Network,
        LinuxNamespaceType::Ipc,
    ] {
        if !seen.contains(&required) {
            let name = name(required);
            return Err(SpecError::unsupported(
                "linux.namespaces",
                format!(
                    "without a {name:?} entry the container would share the host's, which a VM cannot; \
                     add {{\"type\": {name:?}}}"
                ),
            ));
        }
    }
    if has_hostname && !seen.contains(&LinuxNamespaceType::Uts) {
        return Err(SpecError::field(
            "hostname",
            "needs a \"uts\" entry in linux.namespaces",
        ));
    }
    Ok(())
}

/// The namespaces that are to be joined: those of processes that stand for containers of the sandbox. All others are the host's.
fn joins(
    spec: &Spec,
    container_of: impl Fn(u32) -> Option<ContainerId>,
) -> Result<Vec<Join>, SpecError> {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    let mut joins = Vec::new();
    for (n, namespace) in namespaces.into_iter().flatten().enumerate() {
        let Some(path) = path_of(namespace) else {
            continue;
        };
        let (typ, field) = (namespace.typ(), format!("linux.namespaces[{n}].path"));
        if typ == LinuxNamespaceType::Mount {
            return Err(SpecError::unsupported(
                field,
                "each container in a VM has a mount namespace of its own; remove the path",
            ));
        }
        let container = process_of(path, typ).and_then(&container_of);
        let Some(container) = container else {
            return Err(SpecError::unsupported(
                field,
                format!(
                    "a container in a VM cannot join a {:?} namespace of the host; remove the path",
                    name(typ)
                ),
            ));
        };
        joins.push(Join {
            namespace: name(typ),
            container,
        });
    }
    Ok(joins)
}

/// The path of a namespace that is not to be a new one.
pub fn path_of(namespace: &LinuxNamespace) -> Option<&Path> {
    let path = namespace.path().as_deref();
    path.filter(|path| !path.as_os_str().is_empty())
}

/// Whose namespace a path of procfs names, if it is one of that kind.
fn process_of(path: &Path, typ: LinuxNamespaceType) -> Option<u32> {
    let file = match typ {
        LinuxNamespaceType::Network => "net",
        typ => name(typ),
    };
    let (pid, rest) = path.to_str()?.strip_prefix("/proc/")?.split_once('/')?;
    let rest = rest.strip_prefix("ns/")?;
    let is_number = pid.bytes().all(|byte| byte.is_ascii_digit());
    (rest == file && is_number)
        .then(|| pid.parse().ok())
        .flatten()
}

/// The namespace's name in a spec.
fn name(typ: LinuxNamespaceType) -> &'static str {
    match typ {
        LinuxNamespaceType::Mount => "mount",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "network",
        LinuxNamespaceType::Time => "time",
    }
}

fn validate_linux(linux: &Linux) -> Result<(), SpecError> {
    if linux.net_devices().as_ref().is_some_and(|m| !m.is_empty()) {
        return Err(SpecError::unsupported(
            "linux.netDevices",
            "a network interface of the host can't move into a VM; remove it",
        ));
    }
    for (field, there) in [
        ("linux.intelRdt", linux.intel_rdt().is_some()),
        ("linux.memoryPolicy", linux.memory_policy().is_some()),
    ] {
        if there {
            return Err(SpecError::unsupported(
                field,
                "it is about the host's processors and memory, which a guest does not see",
            ));
        }
    }
    if linux
        .mount_label()
        .as_deref()
        .is_some_and(|l| !l.is_empty())
    {
        return Err(SpecError::unsupported(
            "linux.mountLabel",
            "the guest's kernel has no SELinux; remove it",
        ));
    }
    let limit = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.memory().as_ref()?.limit());
    if let Some(limit @ 1..LEAST_MEMORY) = limit {
        return Err(SpecError::field(
            "linux.resources.memory.limit",
            format!("is {limit} bytes, too low for a process: give at least {LEAST_MEMORY}"),
        ));
    }
    Ok(())
}

/// The root filesystem: `root.path`, relative to the bundle (runtime-spec, config.md, "Root"). As under runc no part of it may be a link,
/// which in a bundle from elsewhere could name anything of the host.
fn rootfs(dir: &Path, spec: &Spec) -> Result<PathBuf, SpecError> {
    let path = match spec.root() {
        Some(root) if !root.path().as_os_str().is_empty() => cleaned(&dir.join(root.path())),
        _ => {
            return Err(SpecError::field(
                "root.path",
                "is missing: say where the root filesystem is",
            ));
        }
    };
    let invalid = |problem: String| {
        let shown = path.display();
        SpecError::field(
            "root.path",
            format!("names an invalid rootfs: {shown}: {problem}"),
        )
    };
    const PUT: &str = "put the container's root filesystem there";
    let unreadable = |error: io::Error| invalid(format!("{error}; {PUT}"));
    let real = fs::canonicalize(&path).map_err(unreadable)?;
    if !fs::metadata(&real).map_err(unreadable)?.is_dir() {
        return Err(invalid(format!("not a directory; {PUT}")));
    }
    if real != path {
        return Err(invalid(format!(
            "a symlink, or behind one; name {}, which it leads to, if that is meant",
            real.display()
        )));
    }
    Ok(path)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A spec that is fine.
    pub(crate) fn good() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "env": ["A=b"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "hostname": "h",
            "linux": {"namespaces": [
                {"type": "mount"}, {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}
            ]}
        })
    }

    /// A bundle of `config` and an empty rootfs.
    pub(crate) fn bundle(config: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        fs::write(dir.path().join(CONFIG_FILE), config).unwrap();
        dir
    }

    #[test]
    fn a_plain_bundle_loads() {
        let dir = bundle(&good().to_string());
        let loaded = Bundle::load(dir.path()).unwrap();
        assert_eq!(loaded.rootfs, loaded.dir.join("rootfs"));
    }

    #[test]
    fn a_rootfs_that_is_a_link_or_behind_one_is_refused() {
        let loaded = |dir: &Path, path: &str| {
            let mut config = good();
            config["root"]["path"] = json!(path);
            fs::write(dir.join(CONFIG_FILE), config.to_string()).unwrap();
            Bundle::load(dir).map_err(|error| error.to_string())
        };
        let dir = bundle("");
        fs::create_dir(dir.path().join("rootfs/inner")).unwrap();
        let link = |to: &str, name: &str| symlink(to, dir.path().join(name)).unwrap();
        link("/", "host");
        link("rootfs", "link");
        for path in ["host", "link", "link/inner", "host/usr", "rootfs/../link"] {
            let message = loaded(dir.path(), path).unwrap_err();
            assert!(message.contains("a symlink, or behind one"), "{message}");
        }
        // Of the path as it is written, links that `..` takes back are no part.
        for path in ["./rootfs/", "link/../rootfs", "rootfs/inner/.."] {
            let rootfs = loaded(dir.path(), path).unwrap().rootfs;
            assert!(rootfs.ends_with("rootfs"), "{}", rootfs.display());
        }
        // Where the bundle is, is its user's word.
        let elsewhere = tempfile::tempdir().unwrap();
        let bundle = elsewhere.path().join("bundle");
        symlink(dir.path(), &bundle).unwrap();
        loaded(&bundle, "rootfs").unwrap();
    }

    #[test]
    fn a_bundle_without_config_json_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let message = Bundle::load(dir.path()).unwrap_err().to_string();
        assert!(message.contains("config.json not found"), "{message}");
        let message = Bundle::load(Path::new("/nonexistent/bundle"))
            .unwrap_err()
            .to_string();
        assert!(
            message.starts_with("/nonexistent/bundle not found"),
            "{message}"
        );
    }

    #[test]
    fn unknown_capabilities_are_ignored() {
        let mut config = good();
        config["process"]["capabilities"] =
            json!({"bounding": ["CAP_KILL", "CAP_BOGUS", "SYS_ADMIN", "cap_chown"]});
        let loaded = Bundle::load(bundle(&config.to_string()).path()).unwrap();
        let spec = serde_json::to_value(&loaded.spec).unwrap();
        assert_eq!(
            spec["process"]["capabilities"]["bounding"],
            json!(["CAP_KILL"])
        );
    }

    #[test]
    fn only_namespaces_of_the_sandboxs_own_containers_are_joined() {
        let first = ContainerId::new("first").unwrap();
        let joins = |kind: &str, path: &str| {
            let mut config = good();
            let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != kind);
            namespaces.push(json!({"type": kind, "path": path}));
            let dir = bundle(&config.to_string());
            Bundle::load_beside(dir.path(), |pid| (pid == 7).then(|| first.clone()))
                .map(|bundle| bundle.joins)
                .map_err(|error| error.to_string())
        };
        for (kind, path) in [
            ("ipc", "/proc/7/ns/ipc"),
            ("network", "/proc/7/ns/net"),
            ("user", "/proc/7/ns/user"),
        ] {
            let join = Join {
                namespace: LinuxNamespaceType::try_from(kind).map(name).unwrap(),
                container: first.clone(),
            };
            assert_eq!(join.namespace, kind);
            assert_eq!(joins(kind, path), Ok(vec![join]));
        }
        assert_eq!(joins("ipc", ""), Ok(vec![]));
        for (kind, path) in [
            ("ipc", "/proc/8/ns/ipc"),
            ("ipc", "/proc/7/ns/net"),
            ("ipc", "/proc/7/ns/ipc/"),
            ("ipc", "/proc/x/ns/ipc"),
            ("ipc", "/proc/+7/ns/ipc"),
            ("network", "/run/netns/7"),
        ] {
            let refused = joins(kind, path).unwrap_err();
            assert!(refused.contains("namespace of the host"), "{refused}");
        }
        let refused = joins("mount", "/proc/7/ns/mnt").unwrap_err();
        assert!(refused.contains("of its own"), "{refused}");
    }

    #[test]
    fn what_runc_does_without_may_be_missing() {
        let mut config = good();
        config["process"]["user"] = json!({"gid": 5});
        config["linux"]["seccomp"] = json!({"architectures": ["SCMP_ARCH_X86_64"], "syscalls": []});
        let load = |config: &Value| {
            Bundle::load(bundle(&config.to_string()).path()).map(|loaded| loaded.spec)
        };
        let spec = load(&config).unwrap();
        let user = |spec: &Spec| {
            let user = spec.process().as_ref().unwrap().user().clone();
            (user.uid(), user.gid())
        };
        assert_eq!(user(&spec), (0, 5));
        assert!(spec.linux().as_ref().unwrap().seccomp().is_none());
        config["process"]["user"] = json!(null);
        assert_eq!(user(&load(&config).unwrap()), (0, 0));
        config["process"].as_object_mut().unwrap().remove("user");
        assert_eq!(user(&load(&config).unwrap()), (0, 0));
        for seccomp in [
            json!({"syscalls": [{"names": ["kill"], "action": "SCMP_ACT_ERRNO"}]}),
            json!({"syscalls": {"names": ["kill"], "action": "SCMP_ACT_ERRNO"}}),
            json!({"defaultAction": 1}),
            json!("none"),
        ] {
            config["linux"]["seccomp"] = seccomp;
            assert!(load(&config).is_err(), "{config}");
        }
    }

    #[test]
    fn flags_of_a_scheduler_have_the_names_of_the_spec_and_come_through_to_the_guest() {
        let flags = json!([
            "SCHED_FLAG_RESET_ON_FORK",
            "SCHED_FLAG_RECLAIM",
            "SCHED_FLAG_DL_OVERRUN",
            "SCHED_FLAG_KEEP_POLICY",
            "SCHED_FLAG_KEEP_PARAMS",
            "SCHED_FLAG_UTIL_CLAMP_MIN",
            "SCHED_FLAG_UTIL_CLAMP_MAX"
        ]);
        let mut config = good();
        config["process"]["scheduler"] = json!({"policy": "SCHED_DEADLINE", "flags": flags});
        let loaded = Bundle::load(bundle(&config.to_string()).path()).unwrap();
        let spec = serde_json::to_vec(&loaded.spec).unwrap();
        let spec: Spec = serde_json::from_slice(&spec).unwrap();
        let process = spec.process().as_ref().unwrap();
        let flags = process.scheduler().as_ref().unwrap().flags();
        assert_eq!(flags.as_ref().unwrap().len(), 7);
    }

    #[test]
    fn a_hostname_that_names_nothing_needs_no_namespace() {
        let mut config = good();
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "uts");
        for (hostname, taken) in [("", true), ("h", false)] {
            config["hostname"] = json!(hostname);
            let loaded = Bundle::load(bundle(&config.to_string()).path());
            assert_eq!(loaded.is_ok(), taken, "{hostname:?}");
        }
    }

    #[test]
    fn text_that_is_no_spec_is_refused() {
        for (text, expected) in [
            ("", "EOF while parsing"),
            ("{", "EOF while parsing"),
            ("5", "invalid type"),
            ("nonsense", "expected"),
            ("{}x", "trailing characters"),
        ] {
            let dir = bundle(text);
            let message = Bundle::load(dir.path()).unwrap_err().to_string();
            assert!(
                message.contains("config.json is not a valid runtime spec"),
                "{message}"
            );
            assert!(message.contains(expected), "{text:?}: {message}");
        }
    }

    /// Sets the value at a JSON pointer, making objects on the way.
    fn set(config: &mut Value, pointer: &str, value: Value) {
        let mut at = config;
        for key in pointer.split('/').skip(1) {
            at = match key.parse::<usize>() {
                Ok(n) => &mut at[n],
                Err(_) => &mut at[key],
            };
        }
        *at = value;
    }

    #[test]
    fn what_is_wrong_or_not_supported_is_refused_by_the_name_of_its_field() {
        for (pointer, value, expected) in [
            ("/ociVersion", json!(""), "`ociVersion` is \"\""),
            ("/ociVersion", json!("2.0.0"), "`ociVersion` is \"2.0.0\""),
            ("/ociVersion", json!("1.0"), "`ociVersion`"),
            ("/process", Value::Null, "`process` is missing"),
            (
                "/process/args",
                json!([]),
                "`process.args` must not be empty",
            ),
            (
                "/process/args",
                Value::Null,
                "`process.args` must not be empty",
            ),
            (
                "/process/args",
                json!("secret"),
                "`process.args` must hold strings",
            ),
            (
                "/process/args",
                json!(["a", "b\u{0}"]),
                "`process.args[1]` holds a NUL",
            ),
            (
                "/process/env",
                json!([5]),
                "`process.env[0]` must hold strings",
            ),
            ("/process/cwd", json!("tmp"), "`process.cwd` is \"tmp\""),
            (
                "/process/user/uid",
                json!(-1),
                "`process.user.uid`: invalid value",
            ),
            (
                "/process/user/uid",
                json!("root"),
                "`process.user.uid`: invalid type",
            ),
            (
                "/process/apparmorProfile",
                json!("x"),
                "`process.apparmorProfile`",
            ),
            (
                "/process/apparmorProfile",
                json!("docker-custom"),
                "`process.apparmorProfile`",
            ),
            (
                "/process/selinuxLabel",
                json!("x"),
                "`process.selinuxLabel`",
            ),
            ("/root", Value::Null, "`root.path` is missing"),
            ("/root/path", json!(""), "`root.path` is missing"),
            (
                "/root/path",
                json!("nope"),
                "`root.path` names an invalid rootfs",
            ),
            ("/root/path", json!("config.json"), "not a directory"),
            (
                "/hooks",
                json!({"prestart": [{"path": "bin/true"}]}),
                "`hooks.prestart[0].path` is \"bin/true\"",
            ),
            (
                "/hooks",
                json!({"poststop": [{"path": "/bin/true", "timeout": 0}]}),
                "`hooks.poststop[0].timeout`",
            ),
            (
                "/annotations",
                json!({"io.bulkhead.color": "red"}),
                "`annotations[\"io.bulkhead.color\"]` is unknown",
            ),
            ("/vm", json!({"kernel": {"path": "/k"}}), "`vm`"),
            ("/linux", Value::Null, "`linux` is missing"),
            ("/linux/namespaces", json!([]), "\"mount\" entry"),
            (
                "/linux/namespaces/2",
                json!({"type": "cgroup"}),
                "\"network\" entry",
            ),
            (
                "/linux/namespaces/4",
                json!({"type": "cgroup"}),
                "`hostname` needs",
            ),
            (
                "/linux/namespaces/1",
                json!({"type": "mount"}),
                "`linux.namespaces[1]` is a second",
            ),
            (
                "/linux/namespaces/1",
                json!({"type": "bogus"}),
                "`linux.namespaces[1].type`",
            ),
            (
                "/linux/namespaces/2/path",
                json!("/proc/1/ns/net"),
                "`linux.namespaces[2].path` is not supported",
            ),
            ("/linux/intelRdt", json!({}), "`linux.intelRdt`"),
            ("/linux/mountLabel", json!("x"), "`linux.mountLabel`"),
        ] {
            let mut config = good();
            set(&mut config, pointer, value);
            let dir = bundle(&config.to_string());
            let message = Bundle::load(dir.path()).unwrap_err().to_string();
            assert!(message.contains(expected), "{pointer}: {message}");
            assert!(message.contains("config.json"), "{pointer}: {message}");
            assert!(!message.contains("secret"), "{message}");
        }
    }
}

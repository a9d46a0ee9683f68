//! From the bundle's spec to the guest's: what the host binds into the share, and the spec with the guest's paths.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use bulkhead_protocol::{DEFAULT_DEVICES, GUEST_SHARE};
use nix::sys::stat::makedev;
use nix::unistd::gethostname;
use oci_spec::runtime::{Hooks, LinuxNamespaceType, LinuxResources, Mount, Spec};

use crate::mounts_below::{Inherited, MountBelow, Mounts};
use crate::share::Part;
use crate::spec::{Bundle, SpecError, path_of};

/// Name of the root filesystem in a container's part of the share.
const ROOTFS: &str = "rootfs";

/// Name of the directory of bind mounts' sources in a container's part of the share.
pub const MOUNTS: &str = "mounts";

/// How much of a bind is read-only on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadOnly {
    /// Nothing.
    No,
    /// The top mount.
    Top,
    /// Every mount below it too (`rro`).
    Recursive,
}

/// One thing that the host binds into a container's part of the share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostBind {
    /// What is bound.
    pub source: PathBuf,
    /// Where, relative to the container's part of the share.
    pub name: PathBuf,
    /// Whether `source` is a directory; otherwise a regular file.
    pub directory: bool,
    /// Whether mounts below `source` come along.
    pub recursive: bool,
    /// What is read-only on the host, whatever the guest does.
    pub read_only: ReadOnly,
    /// Whether what the host mounts below `source` later is to be seen.
    pub follows_host: bool,
}

/// A bundle made ready for a guest.
#[derive(Debug)]
pub struct Adapted {
    /// The spec as the guest is to apply it.
    pub spec: Spec,
    /// What the host binds.
    pub binds: Vec<HostBind>,
    /// What they inherit of the mounts that they are of, and the mounts that come along with recursive ones.
    pub inherited: Inherited,
}

/// Adapts `bundle` for a container with that part of the share. Nothing is mounted yet; what is missing on the host is an error now.
pub fn adapt(bundle: &Bundle, part: Part) -> Result<Adapted, SpecError> {
    let mut spec = bundle.spec.clone();
    let guest_dir = Path::new(GUEST_SHARE).join(part.directory());
    // The guest applies `root.readonly` itself, after it has made the mount points.
    let mut binds = vec![HostBind {
        source: bundle.rootfs.clone(),
        name: ROOTFS.into(),
        directory: true,
        recursive: true,
        read_only: ReadOnly::No,
        follows_host: root_follows_host(&spec),
    }];
    if let Some(root) = spec.root_mut() {
        root.set_path(guest_dir.join(ROOTFS));
    }
    let names = |source: &Path, error: io::Error| format!("names {}: {error}", source.display());
    let root_error = |error| SpecError::field("root.path", names(&bundle.rootfs, error));
    let mounts = Mounts::now().map_err(root_error)?;
    let mut inherited = Inherited {
        root: mounts.options_of(&bundle.rootfs).map_err(root_error)?,
        binds: Vec::new(),
    };
    for (n, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        if is_bind(mount) {
            let field = format!("mounts[{n}].source");
            let (source, metadata) = source_of(mount, &field, &bundle.dir)?;
            let bind = host_bind(mount, n, &source, &metadata);
            let in_guest = match (&bind, default_device(&metadata)) {
                (Some(bind), _) => guest_dir.join(&bind.name),
                (None, Some(device)) => device.into(),
                // The VMM opens no special file of the host for its guest.
                (None, None) => {
                    let why = "neither a directory, nor a regular file, nor one of the devices that every container has";
                    let why = format!(
                        "names {}, which is {why}: a guest can't share it",
                        source.display()
                    );
                    return Err(SpecError::field(field, why));
                }
            };
            mount.set_source(Some(in_guest));
            let recursive = bind
                .as_ref()
                .is_some_and(|bind| bind.recursive && bind.directory);
            let found = mounts_of(&mounts, n, &source, recursive)
                .map_err(|error| SpecError::field(field, names(&source, error)))?;
            inherited.binds.extend(found);
            binds.extend(bind);
        }
    }
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    let new_uts = namespaces.into_iter().flatten().any(|namespace| {
        namespace.typ() == LinuxNamespaceType::Uts && path_of(namespace).is_none()
    });
    let sysctls = spec.linux().as_ref().and_then(|l| l.sysctl().as_ref());
    let by_sysctl = sysctls
        .into_iter()
        .flatten()
        .any(|(name, _)| name == "kernel.hostname" || name == "kernel/hostname");
    let by_name = spec.hostname().as_deref().is_some_and(|n| !n.is_empty());
    if new_uts && !by_name && !by_sysctl {
        // A new UTS namespace begins as a copy, under runc of the host's.
        spec.set_hostname(gethostname().ok().and_then(|name| name.into_string().ok()));
    }
    if let Some(linux) = spec.linux_mut() {
        // The host's cgroup is the host's matter; the guest has its own tree.
        linux.set_cgroups_path(None);
        if let Some(resources) = linux.resources_mut().take() {
            linux.set_resources(Some(guest_resources(resources)));
        }
    }
    // The others run on the host.
    let start_container = spec
        .hooks()
        .as_ref()
        .and_then(|hooks| hooks.start_container().clone());
    spec.set_hooks(start_container.map(|list| {
        let mut hooks = Hooks::default();
        hooks.set_start_container(Some(list));
        hooks
    }));
    if let Some(process) = spec.process_mut() {
        // An engine's default profile at most ([`crate::spec::is_default_profile`]): the guest has no AppArmor.
        process.set_apparmor_profile(None);
    }
    Ok(Adapted {
        spec,
        binds,
        inherited,
    })
}

/// The guest's part of a container's resources: not which processors and memory nodes of the host it runs on (the guest has just as
/// many processors), and not what it may ask of the host's block devices.
pub fn guest_resources(mut resources: LinuxResources) -> LinuxResources {
    if let Some(cpu) = resources.cpu_mut() {
        cpu.set_cpus(None);
        cpu.set_mems(None);
    }
    resources.set_block_io(None);
    if let Some(unified) = resources.unified_mut() {
        unified.retain(|file, _| !file.starts_with("cpuset.") && !file.starts_with("io."));
    }
    resources
}

/// runc's rule: the type, or an option, says bind.
pub(crate) fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || options(mount).any(|option| option == "bind" || option == "rbind")
}

fn options(mount: &Mount) -> impl DoubleEndedIterator<Item = &str> {
    mount.options().iter().flatten().map(String::as_str)
}

/// The mount that bind mount number `n` is of, then those that come along.
fn mounts_of(
    mounts: &Mounts,
    n: usize,
    source: &Path,
    recursive: bool,
) -> io::Result<Vec<MountBelow>> {
    let mut found = vec![MountBelow {
        mount: n,
        path: PathBuf::new(),
        options: mounts.options_of(source)?,
    }];
    if recursive {
        found.extend(mounts.below(n, source)?);
    }
    Ok(found)
}

pub(crate) fn source_of(
    mount: &Mount,
    field: &str,
    bundle: &Path,
) -> Result<(PathBuf, Metadata), SpecError> {
    let source = match mount.source() {
        Some(source) if !source.as_os_str().is_empty() => bundle.join(source),
        _ => return Err(SpecError::field(field, "is empty: say what to bind")),
    };
    let metadata = fs::metadata(&source)
        .map_err(|error| SpecError::field(field, format!("names {}: {error}", source.display())))?;
    Ok((source, metadata))
}

/// Where the guest has the same device of its own, if every container has it.
fn default_device(metadata: &Metadata) -> Option<&'static str> {
    if !metadata.file_type().is_char_device() {
        return None;
    }
    let number = metadata.rdev();
    DEFAULT_DEVICES
        .iter()
        .find(|(_, major, minor)| makedev((*major).into(), (*minor).into()) == number)
        .map(|(path, ..)| *path)
}

/// What the host binds: a directory or a regular file.
pub(crate) fn host_bind(
    mount: &Mount,
    n: usize,
    source: &Path,
    metadata: &Metadata,
) -> Option<HostBind> {
    if !metadata.is_dir() && !metadata.is_file() {
        return None;
    }
    // The last of contradicting options counts, and the recursive forms win, as in the guest.
    let last = |some: [&str; 2]| options(mount).rev().find(|option| some.contains(option));
    let read_only = match (last(["rro", "rrw"]), last(["ro", "rw"])) {
        (Some("rro"), _) => ReadOnly::Recursive,
        (None, Some("ro")) => ReadOnly::Top,
        _ => ReadOnly::No,
    };
    Some(HostBind {
        source: source.to_path_buf(),
        name: share_name(n, source),
        directory: metadata.is_dir(),
        recursive: options(mount).any(|option| option == "rbind"),
        read_only,
        follows_host: options(mount)
            .rev()
            .find_map(follows_host)
            .unwrap_or_default(),
    })
}

/// Whether what the host mounts below the root file system later is to be seen.
pub(crate) fn root_follows_host(spec: &Spec) -> bool {
    let linux = spec.linux().as_ref();
    let propagation = linux.and_then(|linux| linux.rootfs_propagation().as_deref());
    propagation.and_then(follows_host).unwrap_or_default()
}

/// What a propagation type says of that. Nothing of a guest's can propagate to the host, so that "shared" has one direction.
fn follows_host(option: &str) -> Option<bool> {
    match option {
        "slave" | "rslave" | "shared" | "rshared" => Some(true),
        "private" | "rprivate" | "unbindable" | "runbindable" => Some(false),
        _ => None,
    }
}

/// Where a bind is in the container's part of the share: in a directory of its own, by its own name, which the container then
/// sees in `/proc/self/mountinfo` as it would under runc.
fn share_name(n: usize, source: &Path) -> PathBuf {
    // `/` has no name, nor has what ends in `..`.
    let name = source.file_name().unwrap_or_else(|| "root".as_ref());
    Path::new(MOUNTS).join(n.to_string()).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::{bundle, good};
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use serde_json::{Value, json};
    use std::os::unix::net::UnixListener;

    fn adapted(mounts: Value) -> Result<(PathBuf, Adapted), String> {
        let mut config = good();
        config["mounts"] = mounts;
        config["linux"]["cgroupsPath"] = json!("/pod/x");
        config["annotations"] = json!({"a": "b"});
        let dir = bundle(&config.to_string());
        fs::write(dir.path().join("file"), "x").unwrap();
        mkfifo(&dir.path().join("fifo"), Mode::S_IRUSR).unwrap();
        UnixListener::bind(dir.path().join("socket")).unwrap();
        let loaded = Bundle::load(dir.path()).map_err(|e| e.to_string())?;
        let adapted = adapt(&loaded, Part(3)).map_err(|e| e.to_string())?;
        Ok((loaded.dir, adapted))
    }

    #[test]
    fn the_guest_gets_paths_of_the_share_and_nothing_of_the_hosts() {
        let (dir, adapted) = adapted(json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/data", "type": "bind", "source": "rootfs", "options": ["rbind", "ro"]},
            {"destination": "/f", "type": "none", "source": "file", "options": ["bind", "ro", "rw"]},
            {"destination": "/g", "source": "file", "options": ["bind", "rro"]},
        ]))
        .unwrap();
        let spec = serde_json::to_value(&adapted.spec).unwrap();
        let share = "/run/bulkhead/share/3";
        assert_eq!(spec["root"]["path"], format!("{share}/rootfs"));
        assert_eq!(spec["mounts"][0]["source"], "proc");
        assert_eq!(
            spec["mounts"][1]["source"],
            format!("{share}/mounts/1/rootfs")
        );
        assert_eq!(spec["mounts"][1]["options"], json!(["rbind", "ro"]));
        assert_eq!(
            spec["mounts"][3]["source"],
            format!("{share}/mounts/3/file")
        );
        assert_eq!(spec["annotations"], json!({"a": "b"}));
        assert!(spec["linux"].get("cgroupsPath").is_none());
        assert!(!spec.to_string().contains(dir.to_str().unwrap()));

        let bind = |source: PathBuf, name: &str, directory, recursive, read_only| HostBind {
            source,
            name: name.into(),
            directory,
            recursive,
            read_only,
            follows_host: false,
        };
        assert_eq!(
            adapted.binds,
            [
                bind(dir.join("rootfs"), "rootfs", true, true, ReadOnly::No),
                bind(
                    dir.join("rootfs"),
                    "mounts/1/rootfs",
                    true,
                    true,
                    ReadOnly::Top
                ),
                bind(
                    dir.join("file"),
                    "mounts/2/file",
                    false,
                    false,
                    ReadOnly::No
                ),
                bind(
                    dir.join("file"),
                    "mounts/3/file",
                    false,
                    false,
                    ReadOnly::Recursive
                ),
            ]
        );
    }

    #[test]
    fn binds_keep_the_names_of_their_sources_and_stay_within_their_folders() {
        for (source, name) in [
            ("/etc", "mounts/0/etc"),
            ("/etc/", "mounts/0/etc"),
            ("/etc/.", "mounts/0/etc"),
            ("/etc/..", "mounts/0/root"),
            ("/", "mounts/0/root"),
        ] {
            assert_eq!(
                share_name(0, Path::new(source)),
                Path::new(name),
                "{source}"
            );
        }
    }

    #[test]
    fn bind_mounts_of_what_every_container_has_are_of_the_guests_own() {
        let mounts = DEFAULT_DEVICES.iter().map(|(path, ..)| {
            json!({"destination": "/hidden", "source": path, "options": ["bind", "ro"]})
        });
        let (_, adapted) = adapted(mounts.collect()).unwrap();
        let mounts = adapted.spec.mounts().as_deref().unwrap();
        let sources = mounts.iter().map(|mount| mount.source().clone().unwrap());
        let expected = DEFAULT_DEVICES.iter().map(|(path, ..)| PathBuf::from(path));
        assert!(sources.eq(expected));
        assert_eq!(adapted.binds.len(), 1, "the root alone");
        assert_eq!(adapted.inherited.binds.len(), mounts.len());
    }

    #[test]
    fn the_guest_is_told_the_attributes_of_every_mount() {
        let (_, adapted) = adapted(json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/proc/x", "source": "/proc", "options": ["bind"]},
        ]))
        .unwrap();
        assert!(!adapted.inherited.root.is_empty());
        let [proc] = &adapted.inherited.binds[..] else {
            panic!("{:?}", adapted.inherited.binds);
        };
        assert_eq!((proc.mount, &*proc.path), (1, Path::new("")));
        assert!(!proc.options.is_empty());
    }

    #[test]
    fn later_mounts_of_the_host_are_for_who_asks_for_them() {
        for (options, expected) in [
            (&["rbind"][..], false),
            (&["rprivate", "rslave"], true),
            (&["shared", "ro"], true),
            (&["rshared", "private"], false),
            (&["slave", "runbindable"], false),
        ] {
            let mount = json!([{"destination": "/d", "type": "bind", "source": "/etc", "options": options}]);
            let (_, adapted) = adapted(mount).unwrap();
            assert!(!adapted.binds[0].follows_host, "the root");
            assert_eq!(adapted.binds[1].follows_host, expected, "{options:?}");
        }
        let mut spec = good();
        spec["linux"]["rootfsPropagation"] = json!("rslave");
        assert!(root_follows_host(&serde_json::from_value(spec).unwrap()));
    }

    #[test]
    fn recursive_options_say_what_is_read_only() {
        for (options, expected) in [
            (&["ro", "rw"][..], ReadOnly::No),
            (&["rw", "ro"], ReadOnly::Top),
            (&["rro", "rw"], ReadOnly::Recursive),
            (&["rrw", "ro"], ReadOnly::No),
        ] {
            let mount = json!([{"destination": "/d", "type": "bind", "source": "/etc", "options": options}]);
            let (_, adapted) = adapted(mount).unwrap();
            assert_eq!(adapted.binds[1].read_only, expected, "{options:?}");
        }
    }

    #[test]
    fn sources_that_cannot_be_shared_are_refused_by_the_name_of_their_field() {
        for (source, expected) in [
            (json!(""), "`mounts[0].source` is empty"),
            (Value::Null, "`mounts[0].source` is empty"),
            (
                json!("/nonexistent"),
                "`mounts[0].source` names /nonexistent: No such file",
            ),
            (json!("fifo"), "neither a directory, nor a regular file"),
            (json!("socket"), "neither a directory, nor a regular file"),
            (json!("/dev/ptmx"), "names /dev/ptmx, which is neither"),
        ] {
            let mount = json!([{"destination": "/d", "type": "bind", "source": source}]);
            let message = adapted(mount).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn what_names_processors_and_devices_of_the_host_stays_there() {
        let mut config = good();
        config["linux"]["resources"] = json!({
            "cpu": {"cpus": "6-7", "mems": "1", "quota": 5},
            "blockIO": {"weight": 500},
            "unified": {"cpuset.cpus": "6-7", "cpuset.mems": "1", "io.max": "8:0 rbps=1", "io.weight": "5",
                "pids.max": "7", "memory.high": "8"}
        });
        let dir = bundle(&config.to_string());
        let adapted = adapt(&Bundle::load(dir.path()).unwrap(), Part(0)).unwrap();
        let spec = serde_json::to_value(&adapted.spec).unwrap();
        let resources = &spec["linux"]["resources"];
        assert_eq!(resources["cpu"], json!({"quota": 5}));
        assert!(resources.get("blockIO").is_none());
        let unified = json!({"pids.max": "7", "memory.high": "8"});
        assert_eq!(resources["unified"], unified);
    }
}

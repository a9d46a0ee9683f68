//! `linux.namespaces`, and what belongs to single kinds of them.

use oci_spec::runtime as oci;

use crate::error::{Error, Result};
use crate::spec::IdMaps;

/// `CLONE_NEWTIME`, which the C library's binding has not as a plain number.
pub const CLONE_NEWTIME: u64 = 0x80;

/// `CLONE_NEW*` of the namespaces to make.
pub(super) fn from_spec(linux: &oci::Linux) -> Result<u64> {
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
            oci::LinuxNamespaceType::Mount => libc::CLONE_NEWNS as u64,
            oci::LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP as u64,
            oci::LinuxNamespaceType::Uts => libc::CLONE_NEWUTS as u64,
            oci::LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC as u64,
            oci::LinuxNamespaceType::Pid => libc::CLONE_NEWPID as u64,
            oci::LinuxNamespaceType::Network => libc::CLONE_NEWNET as u64,
            oci::LinuxNamespaceType::User => libc::CLONE_NEWUSER as u64,
            oci::LinuxNamespaceType::Time => CLONE_NEWTIME,
        };
        if flags & flag != 0 {
            return Err(Error::spec(field, format!("a second {kind} namespace")));
        }
        flags |= flag;
    }
    if flags & libc::CLONE_NEWNS as u64 == 0 {
        return Err(Error::spec(
            "linux.namespaces",
            "must have a new mount namespace",
        ));
    }
    Ok(flags)
}

/// `linux.uidMappings` and `gidMappings` of a new user namespace. Its root sets up the container, so it must be
/// somebody.
pub(super) fn id_maps(linux: &oci::Linux, namespaces: u64) -> Result<Option<IdMaps>> {
    let maps = IdMaps::from_spec(
        linux.uid_mappings().as_deref(),
        linux.gid_mappings().as_deref(),
        "linux",
    )?;
    let new = namespaces & libc::CLONE_NEWUSER as u64 != 0;
    match &maps {
        Some(_) if !new => Err(Error::spec(
            "linux.uidMappings",
            "needs a new user namespace in linux.namespaces",
        )),
        None if new => Err(Error::spec(
            "linux.uidMappings",
            "is missing: a new user namespace needs it",
        )),
        Some(maps) if maps.uids.outside(0).is_none() => Err(Error::spec(
            "linux.uidMappings",
            "must map user 0 of the container",
        )),
        Some(maps) if maps.gids.outside(0).is_none() => Err(Error::spec(
            "linux.gidMappings",
            "must map group 0 of the container",
        )),
        _ => Ok(maps),
    }
}

/// `linux.timeOffsets`, as the text of `/proc/PID/timens_offsets` (time_namespaces(7)).
pub(super) fn time_offsets(linux: &oci::Linux, namespaces: u64) -> Result<Option<String>> {
    let Some(offsets) = linux.time_offsets().as_ref().filter(|map| !map.is_empty()) else {
        return Ok(None);
    };
    if namespaces & CLONE_NEWTIME == 0 {
        return Err(Error::spec(
            "linux.timeOffsets",
            "needs a new time namespace in linux.namespaces",
        ));
    }
    let mut lines = Vec::with_capacity(offsets.len());
    for (clock, offset) in offsets {
        if !matches!(clock.as_str(), "monotonic" | "boottime") {
            return Err(Error::spec(
                format!("linux.timeOffsets[{clock:?}]"),
                "only the clocks monotonic and boottime have offsets",
            ));
        }
        let nanoseconds = offset.nanosecs().unwrap_or_default();
        if nanoseconds >= 1_000_000_000 {
            return Err(Error::spec(
                format!("linux.timeOffsets.{clock}.nanosecs"),
                "must be less than a second",
            ));
        }
        lines.push(format!(
            "{clock} {} {nanoseconds}\n",
            offset.secs().unwrap_or_default()
        ));
    }
    lines.sort();
    Ok(Some(lines.concat()))
}

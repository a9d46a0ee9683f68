//! `linux.namespaces`, and what belongs to single kinds of them.

use std::path::Path;

use oci_spec::runtime as oci;

use crate::error::{Error, Result};
use crate::spec::IdMaps;

/// `CLONE_NEWTIME`, which the C library's binding has not as a plain number.
pub const CLONE_NEWTIME: u64 = 0x80;

/// What the request says of namespaces of other containers.
#[derive(Debug, Default)]
pub struct Joins {
    /// `CLONE_NEW*` of the namespaces to join.
    pub asked: u64,
    /// Those of them that the other container shares with the guest: there is nothing to join.
    pub guests: u64,
    /// The maps of the user namespace to join.
    pub id_maps: Option<IdMaps>,
}

/// The namespaces of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Namespaces {
    /// `CLONE_NEW*` of those in which it differs from the guest.
    pub all: u64,
    /// Those of them that it joins.
    pub joined: u64,
}

impl Namespaces {
    /// Those that are to be made.
    pub fn made(self) -> u64 {
        self.all & !self.joined
    }
}

/// `CLONE_NEW*` of the spec's name for a kind of namespace.
pub fn flag(kind: oci::LinuxNamespaceType) -> u64 {
    match kind {
        oci::LinuxNamespaceType::Mount => libc::CLONE_NEWNS as u64,
        oci::LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP as u64,
        oci::LinuxNamespaceType::Uts => libc::CLONE_NEWUTS as u64,
        oci::LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC as u64,
        oci::LinuxNamespaceType::Pid => libc::CLONE_NEWPID as u64,
        oci::LinuxNamespaceType::Network => libc::CLONE_NEWNET as u64,
        oci::LinuxNamespaceType::User => libc::CLONE_NEWUSER as u64,
        oci::LinuxNamespaceType::Time => CLONE_NEWTIME,
    }
}

/// `linux.namespaces`, with what the request wants joined.
pub(super) fn from_spec(linux: &oci::Linux, joins: &Joins) -> Result<Namespaces> {
    let (mut seen, mut all, mut joined) = (0, 0, 0);
    for (index, namespace) in linux.namespaces().iter().flatten().enumerate() {
        let field = format!("linux.namespaces[{index}]");
        let kind = namespace.typ();
        let flag = flag(kind);
        if seen & flag != 0 {
            return Err(Error::spec(field, format!("a second {kind} namespace")));
        }
        seen |= flag;
        if joins.asked & flag == 0 {
            let path = namespace.path().as_deref().unwrap_or(Path::new(""));
            if !path.as_os_str().is_empty() {
                return Err(Error::spec(
                    format!("{field}.path"),
                    "leads to a namespace outside of the guest, which a container in it can't join; remove it",
                ));
            }
            all |= flag;
        } else if joins.guests & flag == 0 {
            all |= flag;
            joined |= flag;
        }
    }
    if joins.asked & !seen != 0 {
        return Err(Error::spec(
            "linux.namespaces",
            "has no namespace of a type that the request wants joined",
        ));
    }
    let mount = libc::CLONE_NEWNS as u64;
    if all & mount == 0 || joined & mount != 0 {
        return Err(Error::spec(
            "linux.namespaces",
            "must have a new mount namespace",
        ));
    }
    Ok(Namespaces { all, joined })
}

/// `linux.uidMappings` and `gidMappings` of a new user namespace, or those of the one that is joined. Its root sets up
/// the container, so it must be somebody.
pub(super) fn id_maps(
    linux: &oci::Linux,
    namespaces: Namespaces,
    joins: &Joins,
) -> Result<Option<IdMaps>> {
    let maps = IdMaps::from_spec(
        linux.uid_mappings().as_deref(),
        linux.gid_mappings().as_deref(),
        "linux",
    )?;
    let user = libc::CLONE_NEWUSER as u64;
    if namespaces.joined & user != 0 {
        return match maps {
            Some(_) if maps != joins.id_maps => Err(Error::spec(
                "linux.uidMappings",
                "is not that of the user namespace to join",
            )),
            _ => Ok(joins.id_maps.clone()),
        };
    }
    let new = namespaces.made() & user != 0;
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

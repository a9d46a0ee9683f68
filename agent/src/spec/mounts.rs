//! `mounts`.

use std::path::{Component, PathBuf};

use oci_spec::runtime as oci;

use crate::error::{Error, Result};
use crate::mount_options::MountOptions;

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

pub(super) fn from_spec(mounts: &[oci::Mount]) -> Result<Vec<Mount>> {
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

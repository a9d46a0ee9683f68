//! `mounts`.

use std::path::{Component, PathBuf};

use oci_spec::runtime as oci;

use crate::error::{Error, Result};
use crate::mount_options::MountOptions;
use crate::spec::IdMaps;

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
    /// How the ids of its files are mapped.
    pub ids: Option<MountIds>,
}

/// An id-mapped mount's maps.
#[derive(Debug, PartialEq, Eq)]
pub struct MountIds {
    /// From the ids that the files have to those that are seen.
    pub maps: IdMaps,
    /// `ridmap`: for the mounts below too.
    pub recursive: bool,
}

/// Checks `mounts`; `id_maps` are those of the container's user namespace, which `idmap` without maps of its own means.
pub(super) fn from_spec(mounts: &[oci::Mount], id_maps: Option<&IdMaps>) -> Result<Vec<Mount>> {
    mounts
        .iter()
        .enumerate()
        .map(|(index, mount)| planned_mount(index, mount, id_maps))
        .collect()
}

fn planned_mount(index: usize, mount: &oci::Mount, id_maps: Option<&IdMaps>) -> Result<Mount> {
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
    let mut options = MountOptions::parse(mount.options().as_deref().unwrap_or_default());
    let fs = mount.typ().clone().unwrap_or_default();
    // `type: bind` means a bind mount to runc even where the options don't say so.
    options.bind |= fs == "bind";
    let source = mount
        .source()
        .clone()
        .filter(|source| !source.as_os_str().is_empty());
    let wrong_source = |problem| Err(Error::spec(format!("{field}.source"), problem));
    if options.remount {
        // Of what is there: neither source nor type count.
    } else if options.bind {
        match &source {
            None => return wrong_source("a bind mount needs a source"),
            Some(source) if !source.is_absolute() => {
                return wrong_source("must be an absolute path of the guest");
            }
            Some(_) => {}
        }
    } else if fs.is_empty() || fs == "none" {
        // Without a type it can only change the propagation of what is there.
        if options.propagation.is_empty() {
            return Err(Error::spec(format!("{field}.type"), "is missing"));
        }
    }
    let ids = mount_ids(mount, &options, id_maps, &field)?;
    Ok(Mount {
        field: format!("{field} ({})", destination.display()),
        destination,
        fs,
        source,
        options,
        ids,
    })
}

/// As runc 1.2, the first that knows them: both maps or none, bind mounts only, not recursive unless `ridmap` says so.
fn mount_ids(
    mount: &oci::Mount,
    options: &MountOptions,
    id_maps: Option<&IdMaps>,
    field: &str,
) -> Result<Option<MountIds>> {
    let own = IdMaps::from_spec(
        mount.uid_mappings().as_deref(),
        mount.gid_mappings().as_deref(),
        field,
    )?;
    if own.is_none() && options.map_ids.is_none() {
        return Ok(None);
    }
    let maps = own.or_else(|| id_maps.cloned()).ok_or_else(|| {
        Error::spec(
            format!("{field}.uidMappings"),
            "is missing: idmap needs it where the container has no user namespace",
        )
    })?;
    if !options.bind || options.remount {
        return Err(Error::spec(
            format!("{field}.uidMappings"),
            "id-mapped mounts are only supported for bind-mounts",
        ));
    }
    Ok(Some(MountIds {
        maps,
        recursive: options.map_ids.unwrap_or(false),
    }))
}

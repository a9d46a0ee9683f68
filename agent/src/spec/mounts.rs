//! `mounts`.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use bulkhead_protocol::agent::MountBelow;
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
    /// Of what a recursive bind mount brings along: where it is below the source.
    pub below: Option<PathBuf>,
    /// The options, told apart.
    pub options: MountOptions,
    /// How the ids of its files are mapped.
    pub ids: Option<MountIds>,
}

/// An id-mapped mount's maps.
#[derive(Debug, Clone, PartialEq, Eq)]
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
        below: None,
        options,
        ids,
    })
}

/// Gives bind mounts what they inherit of the mounts that they are of (whose path is empty), and puts what is mounted below their
/// sources behind them, with attributes of its own and with what the bind mounts say of everything below them.
pub(super) fn add_below(mounts: &mut Vec<Mount>, below: &[MountBelow], locked: bool) -> Result<()> {
    let mut added: Vec<Vec<Mount>> = mounts.iter().map(|_| Vec::new()).collect();
    for below in below {
        let index = below.mount as usize;
        let path = Path::new(OsStr::from_bytes(&below.path));
        let inside = path
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        let (Some(above), Some(added)) = (mounts.get_mut(index), added.get_mut(index)) else {
            return Err(Error::spec("mounts_below", "names no mount"));
        };
        let Some(source) = above.source.as_ref().filter(|_| inside) else {
            return Err(Error::spec("mounts_below", "is not below its mount"));
        };
        let mut options = MountOptions::parse(&below.options);
        if path.as_os_str().is_empty() {
            // A remount is of what is there, whatever its source.
            if !above.options.remount {
                above.options.inherit(&options, locked);
            }
            continue;
        }
        options.bind = true;
        // What holds for everything below wins over the mount's own.
        let (set, clear) = (above.options.set_recursive, above.options.clear_recursive);
        options.set = (options.set & !(set | clear)) | set;
        options.clear = (options.clear & !(set | clear)) | clear;
        let propagation = above.options.propagation.iter();
        options.propagation = propagation.copied().filter(|(_, below)| *below).collect();
        let ids = above.ids.clone().filter(|ids| ids.recursive);
        added.push(Mount {
            field: above.field.clone(),
            destination: above.destination.join(path),
            fs: above.fs.clone(),
            source: Some(source.clone()),
            below: Some(path.to_owned()),
            options,
            ids,
        });
    }
    let all = std::mem::take(mounts).into_iter().zip(added);
    mounts.extend(all.flat_map(|(mount, added)| std::iter::once(mount).chain(added)));
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(options: &[&str]) -> Mount {
        let options = options.iter().map(|option| (*option).to_owned());
        Mount {
            field: "mounts[0] (/volume)".to_owned(),
            destination: "/volume".into(),
            fs: "none".to_owned(),
            source: Some("/share/volume".into()),
            below: None,
            options: MountOptions::parse(&options.collect::<Vec<_>>()),
            ids: None,
        }
    }

    fn below(mount: u32, path: &str) -> MountBelow {
        MountBelow {
            mount,
            path: path.into(),
            options: vec!["noexec".to_owned()],
            ..Default::default()
        }
    }

    #[test]
    fn mounts_below_come_behind_theirs_with_what_is_recursive_of_it() {
        let mut mounts = vec![
            bind(&["rbind", "ro", "rnosuid", "rprivate", "slave"]),
            bind(&["bind"]),
        ];
        add_below(&mut mounts, &[below(0, "a"), below(0, "a/b")], false).unwrap();
        let places: Vec<_> = mounts
            .iter()
            .map(|mount| mount.destination.to_str())
            .collect();
        let expected = ["/volume", "/volume/a", "/volume/a/b", "/volume"];
        assert_eq!(places, expected.map(Some));
        let options = ["bind", "noexec", "nosuid", "rprivate"].map(str::to_owned);
        let options = MountOptions::parse(&options);
        assert_eq!(mounts[2].options, options);
        assert_eq!(mounts[2].source, Some("/share/volume".into()));
        assert_eq!(mounts[2].below, Some("a/b".into()));
    }

    #[test]
    fn an_empty_path_is_the_mount_that_a_bind_mount_is_of() {
        let mut mounts = vec![bind(&["rbind"]), bind(&["bind", "remount", "ro"])];
        add_below(&mut mounts, &[below(0, ""), below(1, "")], false).unwrap();
        let options = |names: &[&str]| bind(names).options;
        let found: Vec<_> = mounts.into_iter().map(|mount| mount.options).collect();
        let expected = [&["rbind", "noexec"][..], &["bind", "remount", "ro"]];
        assert_eq!(found, expected.map(options));
    }

    #[test]
    fn mounts_below_that_lead_elsewhere_are_refused() {
        for wrong in [below(1, "a"), below(0, "../a"), below(0, "/a")] {
            assert!(add_below(&mut vec![bind(&["rbind"])], &[wrong], false).is_err());
        }
    }
}

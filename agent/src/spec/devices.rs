//! `linux.devices`.

use std::path::PathBuf;

use oci_spec::runtime as oci;

use crate::error::{Error, Result};

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

pub(super) fn from_spec(devices: &[oci::LinuxDevice]) -> Result<Vec<Device>> {
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

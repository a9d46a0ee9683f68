//! Devices that arrive while the guest runs.
//!
//! The VMM has spare virtio-mmio slots, which the kernel command line names. At boot such a slot reads as "no
//! device", so the driver's probe declines it; once it is filled, the platform device is bound by hand.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use crate::error::{Context, Error, Kind, Result};

const DEVICES: &str = "/sys/bus/platform/devices";
const BIND: &str = "/sys/bus/platform/drivers/virtio-mmio/bind";

/// Binds the slot at this guest physical address and returns the name of its virtio device. A slot that is bound
/// already is fine.
pub fn bind(mmio_base: u64) -> Result<String> {
    let iomem = fs::read_to_string("/proc/iomem").what(|| "/proc/iomem")?;
    let name = platform_device(&iomem, mmio_base).ok_or_else(|| {
        Error::setup(
            Kind::NotFound,
            format!("mmio_base: the guest has no virtio-mmio slot at {mmio_base:#x}"),
        )
    })?;
    let device = Path::new(DEVICES).join(name);
    if let Some(virtio) = virtio_device(&device) {
        return Ok(virtio);
    }
    let bound = File::options()
        .write(true)
        .open(BIND)
        .and_then(|mut bind| bind.write_all(name.as_bytes()));
    match bound {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
            return Err(Error::State(format!(
                "the slot at {mmio_base:#x} reads as no device"
            )));
        }
        Err(error) => return Err(error).what(|| format!("cannot bind {name}")),
    }
    virtio_device(&device)
        .ok_or_else(|| Error::setup(Kind::Internal, format!("{name} has no virtio device")))
}

/// The name of the platform device whose window begins at `base`, from /proc/iomem:
/// `d0000000-d0000fff : virtio-mmio.3`.
fn platform_device(iomem: &str, base: u64) -> Option<&str> {
    iomem.lines().find_map(|line| {
        let (range, owner) = line.trim_start().split_once(" : ")?;
        let (start, _) = range.split_once('-')?;
        let name = owner.split_ascii_whitespace().next()?;
        let found =
            u64::from_str_radix(start, 16).ok()? == base && name.starts_with("virtio-mmio.");
        found.then_some(name)
    })
}

fn virtio_device(device: &Path) -> Option<String> {
    let names = fs::read_dir(device).ok()?;
    names
        .filter_map(io::Result::ok)
        .filter_map(|entry| entry.file_name().into_string().ok())
        .find(|name| {
            name.strip_prefix("virtio").is_some_and(|number| {
                !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
            })
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_platform_device_is_found_by_its_window() {
        let iomem = "00000000-00000fff : Reserved\n\
                     d0000000-d0000fff : virtio-mmio.0\n  d0000000-d0000fff : virtio-mmio.0 virtio-mmio.0\n\
                     d0001000-d0001fff : virtio-mmio.1\nfee00000-fee00fff : Local APIC\n";
        assert_eq!(platform_device(iomem, 0xd000_1000), Some("virtio-mmio.1"));
        assert_eq!(platform_device(iomem, 0xd000_0000), Some("virtio-mmio.0"));
        assert_eq!(platform_device(iomem, 0xd000_0001), None);
        assert_eq!(platform_device(iomem, 0xfee0_0000), None);
    }
}

//! The cheap checks before a start, with the descriptors that the VMM is given.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::Config;

/// The device that guests run on.
pub const KVM: &str = "/dev/kvm";

/// Why this host can't start a guest. Each message names the remedy.
#[derive(Debug, Error)]
pub enum PreflightError {
    /// Not root.
    #[error("must run as root, and the effective user id is {0}: try sudo")]
    NotRoot(u32),
    /// No `/dev/kvm`.
    #[error(
        "cannot open /dev/kvm: {0}: switch on virtualization in the firmware or the hypervisor and load \
         kvm_intel or kvm_amd; `bulkhead check` says more"
    )]
    Kvm(io::Error),
    /// A guest file or program is missing.
    #[error(
        "cannot open the {what} {}: {cause}: install it there or set `{key}` in the configuration file",
        path.display()
    )]
    File {
        /// What the file is.
        what: &'static str,
        /// The configuration key that names it.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What went wrong.
        cause: io::Error,
    },
}

/// What a VMM needs opened for it.
#[derive(Debug)]
pub struct GuestFiles {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The kernel.
    pub kernel: OwnedFd,
    /// The initramfs.
    pub initramfs: OwnedFd,
}

/// Refuses everybody but root.
pub fn require_root() -> Result<(), PreflightError> {
    let uid = nix::unistd::geteuid();
    if uid.is_root() {
        return Ok(());
    }
    Err(PreflightError::NotRoot(uid.as_raw()))
}

/// Opens the guest's files and checks that the VMM is there.
pub fn open_guest_files(config: &Config) -> Result<GuestFiles, PreflightError> {
    let kvm = open_kvm()?;
    let kernel = open("guest kernel", "kernel", &config.kernel)?;
    let initramfs = open("guest initramfs", "initramfs", &config.initramfs)?;
    require_program("VMM", "vmm", &config.vmm)?;
    Ok(GuestFiles {
        kvm,
        kernel,
        initramfs,
    })
}

/// Opens `/dev/kvm`.
pub fn open_kvm() -> Result<OwnedFd, PreflightError> {
    File::options()
        .read(true)
        .write(true)
        .open(KVM)
        .map(OwnedFd::from)
        .map_err(PreflightError::Kvm)
}

/// Checks that a program is there and executable.
pub fn require_program(
    what: &'static str,
    key: &'static str,
    path: &Path,
) -> Result<(), PreflightError> {
    nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).map_err(|errno| {
        PreflightError::File {
            what,
            key,
            path: path.to_path_buf(),
            cause: errno.into(),
        }
    })
}

/// Opens a regular file for reading.
pub fn open(what: &'static str, key: &'static str, path: &Path) -> Result<OwnedFd, PreflightError> {
    let opened = File::open(path).and_then(|file| {
        if file.metadata()?.is_file() {
            return Ok(file);
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ))
    });
    opened
        .map(OwnedFd::from)
        .map_err(|cause| PreflightError::File {
            what,
            key,
            path: path.to_path_buf(),
            cause,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_named_with_its_key() {
        for (path, problem) in [
            ("/nonexistent", "No such file"),
            ("/etc", "not a regular file"),
        ] {
            let error = open("guest kernel", "kernel", Path::new(path)).unwrap_err();
            let message = error.to_string();
            assert!(
                message.contains(&format!("guest kernel {path}: {problem}")),
                "{message}"
            );
            assert!(message.contains("set `kernel`"), "{message}");
        }
        let error = require_program("VMM", "vmm", Path::new("/etc/passwd")).unwrap_err();
        assert!(error.to_string().contains("Permission denied"), "{error}");
    }
}

//! `linux.namespaces`.

use oci_spec::runtime as oci;

use crate::error::{Error, Result};

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
            oci::LinuxNamespaceType::Mount => libc::CLONE_NEWNS,
            oci::LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
            oci::LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
            oci::LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
            oci::LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
            oci::LinuxNamespaceType::Network => libc::CLONE_NEWNET,
            oci::LinuxNamespaceType::User | oci::LinuxNamespaceType::Time => {
                return Err(Error::spec(
                    format!("{field}.type"),
                    format!("a new {kind} namespace is not supported yet; remove it"),
                ));
            }
        };
        if flags & flag as u64 != 0 {
            return Err(Error::spec(field, format!("a second {kind} namespace")));
        }
        flags |= flag as u64;
    }
    if flags & libc::CLONE_NEWNS as u64 == 0 {
        return Err(Error::spec(
            "linux.namespaces",
            "must have a new mount namespace",
        ));
    }
    Ok(flags)
}

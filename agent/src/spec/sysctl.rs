//! `linux.sysctl`.

use std::collections::HashMap;

use crate::error::{Error, Result};

/// Allows what belongs to a namespace of the container, as runc does, and `net.*` also where the container shares
/// the guest's network namespace: the guest is the container's own.
pub(super) fn from_spec(
    sysctl: Option<&HashMap<String, String>>,
    namespaces: u64,
    has_hostname: bool,
) -> Result<Vec<(String, String)>> {
    const IPC: &[&str] = &[
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    let new = |flag: libc::c_int| namespaces & flag as u64 != 0;
    let mut checked = Vec::new();
    for (name, value) in sysctl.into_iter().flatten() {
        // Both `net.ipv4.ip_forward` and `net/ipv4/ip_forward` are in use.
        let path = if name.contains('/') {
            name.clone()
        } else {
            name.replace('.', "/")
        };
        let dotted = path.replace('/', ".");
        let refuse = |problem: &str| Err(Error::spec(format!("linux.sysctl[{name:?}]"), problem));
        if path.split('/').any(|part| part.is_empty() || part == "..") {
            return refuse("not the name of a sysctl");
        }
        if IPC.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.") {
            if !new(libc::CLONE_NEWIPC) {
                return refuse("can't be set without a new ipc namespace in linux.namespaces");
            }
        } else if dotted == "kernel.domainname" {
            if !new(libc::CLONE_NEWUTS) {
                return refuse("can't be set without a new uts namespace in linux.namespaces");
            }
        } else if dotted == "kernel.hostname" {
            if has_hostname {
                return refuse("conflicts with the field hostname");
            }
            if !new(libc::CLONE_NEWUTS) {
                return refuse("can't be set without a new uts namespace in linux.namespaces");
            }
        } else if !dotted.starts_with("net.") {
            return refuse("is not in a separate kernel namespace");
        }
        checked.push((path, value.clone()));
    }
    Ok(checked)
}

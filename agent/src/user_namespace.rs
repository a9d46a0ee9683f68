//! What the agent does from outside for a container's init in a new user namespace.
//!
//! The init is born with every capability in that namespace and none outside, so the agent, which has all, writes its
//! id maps and sets what may need privileges of the guest. Meanwhile the init waits ([`crate::handshake`]).

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use nix::fcntl::{OFlag, open};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Pid, Uid, fchown, setgroups, setresgid, setresuid};

use crate::error::{Context, Result};
use crate::process;
use crate::spec::{IdMaps, Plan};
use crate::streams::BorrowedEnds;
use crate::sys::{self, Fork};

/// Lets an init in: maps, where the namespace is new, limits, score. The rest it does itself.
pub fn admit(pid: Pid, plan: &Plan, maps: &IdMaps) -> Result<()> {
    if plan.made() & libc::CLONE_NEWUSER as u64 != 0 {
        write_maps(pid, maps, "linux")?;
    }
    for (resource, soft, hard) in process::limits(&plan.process)? {
        sys::set_limit_of(pid, resource, soft, hard)
            .what(|| format!("process.rlimits ({resource:?})"))?;
    }
    if let Some(value) = plan.process.oom_score_adj {
        process::write_proc(&format!("/proc/{pid}/oom_score_adj"), &value.to_string())
            .what(|| "process.oomScoreAdj")?;
    }
    Ok(())
}

fn write_maps(pid: Pid, maps: &IdMaps, field: &str) -> Result<()> {
    for (file, name, map) in [
        ("uid_map", "uidMappings", &maps.uids),
        ("gid_map", "gidMappings", &maps.gids),
    ] {
        process::write_proc(&format!("/proc/{pid}/{file}"), &map.text())
            .what(|| format!("{field}.{name}"))?;
    }
    Ok(())
}

/// Gives the streams to the namespace's root, so that the init can give them to the user: outside of the namespace
/// nobody's files are its own.
pub fn give_streams(ends: &BorrowedEnds<'_>, maps: &IdMaps) -> Result<()> {
    let owner = maps.uids.outside(0).map(Uid::from_raw);
    let group = maps.gids.outside(0).map(Gid::from_raw);
    for stream in ends.all().flatten() {
        fchown(stream, owner, group).what(|| "cannot give the container its streams")?;
    }
    Ok(())
}

/// In the init: becomes root of the namespace, once there is such a user.
pub fn become_root() -> Result<()> {
    let what = || "cannot become root of the user namespace";
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid).what(what)?;
    setgroups(&[]).what(what)?;
    setresuid(uid, uid, uid).what(what)
}

/// A user namespace with these maps and nobody in it: what an id-mapped mount takes its map from.
pub fn make_for_mount(maps: &IdMaps, field: &str) -> Result<OwnedFd> {
    let what = || format!("{field}: cannot make a user namespace");
    // SAFETY: the agent has one thread, and the child does nothing but wait for its end.
    match unsafe { sys::fork_aside(libc::CLONE_NEWUSER as u64) }.what(what)? {
        Fork::Child => loop {
            // SAFETY: touches no memory.
            unsafe { libc::pause() };
        },
        Fork::Parent { pid, pidfd } => {
            let made = write_maps(pid, maps, field).and_then(|()| {
                let path = PathBuf::from(format!("/proc/{pid}/ns/user"));
                open(&path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).what(what)
            });
            let _ = sys::signal_process(pidfd.as_fd(), Signal::SIGKILL as i32);
            made
        }
    }
}

//! Whom of a sandbox the host's OOM killer takes: the VMM as it would take the container, and the server not before anything else, as
//! containerd's shims are protected. A server that is killed can clean up nothing.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::OnceLock;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

/// What containerd's shims have when it runs as a service.
const PROTECTED: i32 = -998;

const OWN: &str = "/proc/self/oom_score_adj";

/// What this process had before it was protected: its caller's.
static CALLERS: OnceLock<i32> = OnceLock::new();

/// Protects this process. What it starts from now on must be given a score of its own.
pub fn protect() {
    let callers = fs::read_to_string(OWN)
        .ok()
        .and_then(|score| score.trim().parse().ok());
    let Some(callers) = callers else {
        return;
    };
    let _ = CALLERS.set(callers);
    if callers > PROTECTED
        && let Err(error) = fs::write(OWN, PROTECTED.to_string())
    {
        // Lowering it takes CAP_SYS_RESOURCE, which root need not have in a container.
        tracing::debug!(%error, "the server is as good for the OOM killer as others");
    }
}

/// Gives `score` to the VMM or a stand-in, or else, as runc leaves it, the caller's. `is_alive` tells whether that process has not ended.
pub fn set(pid: u32, score: Option<i32>, is_alive: impl FnOnce() -> bool) -> io::Result<()> {
    let Some(score) = score.or(CALLERS.get().copied()) else {
        return Ok(());
    };
    let path = format!("/proc/{pid}/oom_score_adj");
    let mut file = File::options().write(true).open(path)?;
    // What is open is that process's, and its number may be another's only after its end.
    if !is_alive() {
        return Err(nix::Error::ESRCH.into());
    }
    file.write_all(score.to_string().as_bytes())
}

/// Gives the caller's score to what is to be started.
pub fn unprotect(command: &mut Command) -> io::Result<()> {
    let Some(callers) = CALLERS.get() else {
        return Ok(());
    };
    let (path, score) = (CString::new(OWN)?, callers.to_string());
    // SAFETY: between fork and exec, three system calls on what was made before.
    unsafe {
        command.pre_exec(move || {
            let file = open(path.as_c_str(), OFlag::O_WRONLY, Mode::empty())?;
            nix::unistd::write(&file, score.as_bytes())?;
            Ok(())
        });
    }
    Ok(())
}

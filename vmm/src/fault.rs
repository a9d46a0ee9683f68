//! Fault points: in builds with debug assertions a process of the host is killed, as by `kill -9`, at the step that the environment
//! names, so that tests can see what it leaves. Other builds have none of it.
//!
//! `BULKHEAD_FAULT` is a step's whole name, `vmm: kernel loaded` say: whoever starts other processes hands it on, so the name says
//! whose step it is. With `children at ` before the name the process that comes there stays, and those that it has started are killed.
//! The step is then appended to the file that `BULKHEAD_FAULT_LOG` names, if it does: a test has to know that it was reached.

use std::fmt::Display;
use std::os::fd::RawFd;

/// This process has come to `step`.
#[cfg(debug_assertions)]
pub fn point(step: impl Display) {
    use std::io::Write;

    let Ok(fault) = std::env::var("BULKHEAD_FAULT") else {
        return;
    };
    let step = step.to_string();
    let own = fault == step;
    if !own && fault.strip_prefix("children at ") != Some(&step) {
        return;
    }
    if let Some(mut log) = log() {
        let _ = writeln!(log, "{fault}");
    }
    if own {
        // SAFETY: a system call on a number.
        unsafe { libc::raise(libc::SIGKILL) };
    } else {
        children().for_each(kill);
    }
}

/// This process has come to `step`.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn point(_step: impl Display) {}

/// The file to append to, which is opened at the first step: a process may leave the place where it has its path.
#[cfg(debug_assertions)]
fn log() -> Option<&'static std::fs::File> {
    static LOG: std::sync::OnceLock<Option<std::fs::File>> = std::sync::OnceLock::new();
    let open = || {
        let path = std::env::var_os("BULKHEAD_FAULT_LOG")?;
        let mut options = std::fs::File::options();
        options.append(true).create(true).open(path).ok()
    };
    LOG.get_or_init(open).as_ref()
}

/// The descriptor of that file, which a process that closes what it does not know has to keep open.
#[cfg(debug_assertions)]
pub fn descriptor() -> Option<RawFd> {
    log().map(std::os::fd::AsRawFd::as_raw_fd)
}

/// The descriptor of that file: there is none.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn descriptor() -> Option<RawFd> {
    None
}

/// The processes that this one has started, and not waited for.
#[cfg(debug_assertions)]
fn children() -> impl Iterator<Item = libc::pid_t> {
    let own = std::process::id().to_string();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(move |process| {
        let stat = std::fs::read_to_string(process.path().join("stat")).ok()?;
        // The name before may hold anything: state and parent come after its last parenthesis.
        let (_, rest) = stat.rsplit_once(") ")?;
        let parent = rest.split(' ').nth(1)?;
        (parent == own).then(|| process.file_name().to_str()?.parse().ok())?
    })
}

/// Kills a child and returns when it is dead, which is left for others to see.
#[cfg(debug_assertions)]
fn kill(child: libc::pid_t) {
    // SAFETY: `siginfo_t` is plain data, which the call fills.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let id = child.cast_unsigned();
        libc::waitid(libc::P_PID, id, &mut info, libc::WEXITED | libc::WNOWAIT);
    }
}

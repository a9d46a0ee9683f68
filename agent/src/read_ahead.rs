//! Reading a container's program before it is started: its pages come from the host, each batch at the price of a round trip, and
//! between a container's creation and its start the guest has nothing to do. Runs in the init.
//!
//! Nothing is lost where it fails: the exec reads what it needs.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};

use crate::process;
use crate::spec::Process;

/// How much of a program is read: shells and their like, and of great programs the beginning.
const LENGTH: i64 = 4 << 20;

/// The kernel takes no more of a virtio-fs in one request than its read-ahead, which is this in the guest.
const STEP: usize = 1 << 20;

/// Begins to read the program of `process`, in whose root this process is; does not wait. To be called before the container's
/// system call filter is in force, which may know nothing of these calls.
pub fn program(process: &Process) {
    let Ok(program) = process::find(process) else {
        return;
    };
    let program = process.cwd.join(OsStr::from_bytes(program.to_bytes()));
    if !program.is_file() {
        return;
    }
    // It may be something else by now, whose opening must do nothing.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let opened = File::options()
        .read(true)
        .custom_flags(flags.bits())
        .open(program);
    let Ok(file) = opened else {
        return;
    };
    for start in (0..LENGTH).step_by(STEP) {
        let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
        let _ = posix_fadvise(&file, start, STEP as i64, advice);
    }
}

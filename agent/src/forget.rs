//! Forgetting files. The host holds each file of the share that the guest's kernel has cached, and the kernel caches as long as it has
//! memory, whether anybody uses the file or not.

use nix::errno::Errno;

use crate::error::{Context, Result};
use crate::launch;
use crate::process::write_proc;
use crate::reaper::{Reaper, exited};
use crate::sys::{self, Fork};

/// Where the kernel is told to (Documentation/admin-guide/sysctl/vm.rst).
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

/// Names and inodes. What is cached of a file's content goes with its inode on a virtio-fs, and stays elsewhere.
const NAMES_AND_INODES: &str = "2";

/// Has the kernel forget the files that nothing uses; returns when it has. It takes a while, which the agent, with its one thread, has not:
/// a child does it.
pub async fn unused_files(reaper: &Reaper) -> Result<()> {
    let what = || "cannot forget files that are not used";
    // SAFETY: the agent has one thread, and the child ends here.
    match unsafe { sys::fork_aside(0) }.what(what)? {
        Fork::Child => {
            // What the agent closes meanwhile is to be closed.
            // SAFETY: this process ends without going back to any owner.
            let done = unsafe { sys::close_from(0, &mut []) }
                .and_then(|()| write_proc(DROP_CACHES, NAMES_AND_INODES));
            launch::end(done.map_or_else(|errno| errno as i32, |()| 0))
        }
        Fork::Parent { pid, .. } => {
            let exit = exited(&mut reaper.watch(pid)).await;
            match exit.and_then(|exit| i32::try_from(exit.code).ok()) {
                Some(0) => Ok(()),
                errno => Err(errno.map_or(Errno::EIO, Errno::from_raw)).what(what),
            }
        }
    }
}

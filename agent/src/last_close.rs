//! Who closes last what may take long to close. The kernel hangs a terminal up, and takes a mount namespace with all its file systems
//! down, in the process that closes them last, and waits there for what a container may hold up: a page fault of one that writes to the
//! terminal, a server that a file system is from. The agent has one thread for all containers, so that a child does it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{pipe2, read};
use tokio::io::Interest;

use crate::launch;
use crate::sys::{self, Fork};

/// Descriptors are open in a child until this is dropped and that has closed them, however long it takes.
#[derive(Debug)]
#[must_use]
pub struct Elsewhere {
    /// The child's sign to end.
    sign: OwnedFd,
    child: OwnedFd,
}

impl Elsewhere {
    /// Has a child hold these descriptors too.
    pub fn hold(descriptors: &[BorrowedFd<'_>]) -> nix::Result<Self> {
        let (end, sign) = pipe2(OFlag::O_CLOEXEC)?;
        let mut held: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        held.push(end.as_raw_fd());
        // SAFETY: the child makes system calls on memory that was there before, and ends here.
        match unsafe { sys::fork_aside(0) }? {
            Fork::Child => {
                // What the agent closes otherwise is to be closed.
                // SAFETY: this process ends without going back to any owner.
                let alone = unsafe { sys::close_from(0, &mut held) };
                while alone.is_ok() && read(end.as_fd(), &mut [0]) == Err(Errno::EINTR) {}
                launch::end(0)
            }
            Fork::Parent { pidfd, .. } => Ok(Self { sign, child: pidfd }),
        }
    }

    /// Lets the child close them, and waits until it has.
    pub async fn closed(self) -> io::Result<()> {
        drop(self.sign);
        let ended = sys::watch_fd(self.child, Interest::READABLE)?;
        ended.readable().await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_elsewhere_is_open_until_it_is_let_go() {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        let (other, closed) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        let held = Elsewhere::hold(&[writer.as_fd()]).unwrap();
        drop((writer, closed));
        assert_eq!(read(&reader, &mut [0]), Err(Errno::EAGAIN));
        drop(held);
        for end in [reader, other] {
            let mut ended = [nix::poll::PollFd::new(
                end.as_fd(),
                nix::poll::PollFlags::POLLIN,
            )];
            nix::poll::poll(&mut ended, nix::poll::PollTimeout::NONE).unwrap();
            assert_eq!(read(&end, &mut [0]), Ok(0));
        }
    }
}

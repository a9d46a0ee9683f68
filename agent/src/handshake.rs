//! What a new process of a container and the agent say to each other until the user's program runs.
//!
//! One SOCK_SEQPACKET pair, both ends close-on-exec. A container's init reports the `Terminal` that it has made, `Ready`
//! when all but the exec is done, waits for the start byte, and then either vanishes into the exec (end of file:
//! success) or reports its error. One whose scheduling has to wait for its hooks reports `Hooked` in between, and waits again.
//! A child that copies mounts for an init reports each `Tree`.
//! Where namespaces are joined first, the process that joined them reports the one that it forked as `Forked` and
//! ends; the rest is that one's to say.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    recvmsg, send, sendmsg, socketpair,
};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Error, Kind};

const READY: u8 = 0;
const FAILED: u8 = 1;
const FORKED: u8 = 2;
const TERMINAL: u8 = 3;
const HOOKED: u8 = 4;
const TREE: u8 = 5;
const START: u8 = 1;
const ADMITTED: u8 = 2;

/// Longest report; the rest of a message is cut off.
const MAX_REPORT: usize = 4096;

/// What the init reports.
#[derive(Debug)]
pub enum Report {
    /// It has made its terminal: the master.
    Terminal(OwnedFd),
    /// Set up.
    Ready,
    /// Started, and has run its hooks; it waits for its scheduling, and then once more for the start.
    Hooked,
    /// A copy of a mount, attached nowhere: the next of those that were wanted.
    Tree(OwnedFd),
    /// A process was forked that goes on; a child of the agent.
    Forked {
        /// Its pid, in the agent's pid namespace.
        pid: Pid,
        /// A descriptor for it.
        pidfd: OwnedFd,
        /// Master of its terminal, if it has one.
        terminal: Option<OwnedFd>,
    },
    /// It failed, and has ended or is about to.
    Failed(Error),
    /// It is gone, or has become the user's program.
    End,
}

/// The two ends: the agent's, and the init's.
pub fn pair() -> nix::Result<(OwnedFd, OwnedFd)> {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
}

/// The agent's end.
#[derive(Debug)]
pub struct Agent(AsyncFd<OwnedFd>);

impl Agent {
    /// Takes over the agent's end.
    pub fn new(socket: OwnedFd) -> std::io::Result<Self> {
        crate::sys::watch_fd(socket, Interest::READABLE).map(Self)
    }

    /// The next report.
    pub async fn report(&self) -> nix::Result<Report> {
        loop {
            let mut guard = self.0.readable().await.map_err(|_| Errno::EIO)?;
            match receive(self.0.get_ref().as_fd()) {
                Err(Errno::EAGAIN) => guard.clear_ready(),
                // A peer that ended without hearing the last word leaves the second, before what it said itself.
                Err(Errno::EINTR | Errno::ECONNRESET) => {}
                other => return other,
            }
        }
    }

    /// Lets an init go on that waits for its user namespace.
    pub fn admit(&self) -> nix::Result<()> {
        self.say(ADMITTED)
    }

    /// Lets the init execute the user's program.
    pub fn start(&self) -> nix::Result<()> {
        self.say(START)
    }

    fn say(&self, word: u8) -> nix::Result<()> {
        send(
            self.0.get_ref().as_raw_fd(),
            &[word],
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
        )
        .map(drop)
    }
}

fn receive(socket: BorrowedFd<'_>) -> nix::Result<Report> {
    let mut buffer = [0u8; MAX_REPORT];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 2]);
    let (length, mut fds) = {
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let message = recvmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &mut slices,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
        )?;
        let mut owned = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: the kernel has just made these descriptors for us.
                owned.extend(fds.iter().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        (message.bytes, owned.into_iter())
    };
    Ok(match buffer.get(..length).unwrap_or_default() {
        [] => Report::End,
        [READY] => Report::Ready,
        [HOOKED] => Report::Hooked,
        [TERMINAL] => fds.next().map_or_else(nonsense, Report::Terminal),
        [TREE] => fds.next().map_or_else(nonsense, Report::Tree),
        [FORKED, pid @ ..] => match (<[u8; 4]>::try_from(pid), fds.next()) {
            (Ok(pid), Some(pidfd)) => Report::Forked {
                pid: Pid::from_raw(i32::from_ne_bytes(pid)),
                pidfd,
                terminal: fds.next(),
            },
            _ => nonsense(),
        },
        [FAILED, kind, message @ ..] => Report::Failed(Error::setup(
            Kind::from_number(*kind),
            String::from_utf8_lossy(message),
        )),
        _ => nonsense(),
    })
}

fn nonsense() -> Report {
    Report::Failed(Error::setup(
        Kind::Internal,
        "the container's new process sent nonsense",
    ))
}

fn send_with(
    socket: BorrowedFd<'_>,
    message: &[u8],
    fds: &[std::os::fd::RawFd],
) -> nix::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &[IoSlice::new(message)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .map(drop)
}

/// Init: the master of its terminal.
pub fn send_terminal(socket: BorrowedFd<'_>, master: BorrowedFd<'_>) -> nix::Result<()> {
    send_with(socket, &[TERMINAL], &[master.as_raw_fd()])
}

/// A copy of a mount.
pub fn send_tree(socket: BorrowedFd<'_>, tree: BorrowedFd<'_>) -> nix::Result<()> {
    send_with(socket, &[TREE], &[tree.as_raw_fd()])
}

/// Init: everything but the exec is done.
pub fn send_ready(socket: BorrowedFd<'_>) -> nix::Result<()> {
    // Here and below not `send` and `recv`: this process may be under a seccomp profile that refuses them, and every
    // program needs `read` and `write` of it.
    nix::unistd::write(socket, &[READY]).map(drop)
}

/// Init: its hooks have run.
pub fn send_hooked(socket: BorrowedFd<'_>) -> nix::Result<()> {
    nix::unistd::write(socket, &[HOOKED]).map(drop)
}

/// Joiner: it has forked the process that goes on.
pub fn send_forked(
    socket: BorrowedFd<'_>,
    pid: Pid,
    pidfd: BorrowedFd<'_>,
    terminal: Option<BorrowedFd<'_>>,
) -> nix::Result<()> {
    let mut message = vec![FORKED];
    message.extend_from_slice(&pid.as_raw().to_ne_bytes());
    let fds: Vec<_> = std::iter::once(pidfd)
        .chain(terminal)
        .map(|fd| fd.as_raw_fd())
        .collect();
    send_with(socket, &message, &fds)
}

/// It failed. Nothing can be done if the agent can't be told.
pub fn send_failure(socket: BorrowedFd<'_>, error: &Error) {
    let mut message = vec![FAILED, error.kind() as u8];
    message.extend_from_slice(error.to_string().as_bytes());
    message.truncate(MAX_REPORT);
    let _ = nix::unistd::write(socket, &message);
}

/// Init: waits until the agent has mapped the ids of its user namespace. False if it never will.
pub fn wait_for_admission(socket: BorrowedFd<'_>) -> bool {
    wait_for(socket, ADMITTED)
}

/// Waits for the agent's word. False if it will never come.
pub fn wait_for_start(socket: BorrowedFd<'_>) -> bool {
    wait_for(socket, START)
}

fn wait_for(socket: BorrowedFd<'_>, word: u8) -> bool {
    let mut byte = [0u8; 1];
    loop {
        match nix::unistd::read(socket, &mut byte) {
            Err(Errno::EINTR) => {}
            result => return result == Ok(1) && byte == [word],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_arrive_as_they_were_sent() {
        let (agent, init) = pair().unwrap();
        send_terminal(init.as_fd(), init.as_fd()).unwrap();
        assert!(matches!(receive(agent.as_fd()), Ok(Report::Terminal(_))));
        send_tree(init.as_fd(), init.as_fd()).unwrap();
        assert!(matches!(receive(agent.as_fd()), Ok(Report::Tree(_))));
        send_ready(init.as_fd()).unwrap();
        assert!(matches!(receive(agent.as_fd()), Ok(Report::Ready)));
        send_hooked(init.as_fd()).unwrap();
        assert!(matches!(receive(agent.as_fd()), Ok(Report::Hooked)));
        for terminal in [None, Some(init.as_fd())] {
            send_forked(init.as_fd(), Pid::from_raw(77), init.as_fd(), terminal).unwrap();
            let Report::Forked {
                pid, terminal: got, ..
            } = receive(agent.as_fd()).unwrap()
            else {
                panic!("not forked")
            };
            assert_eq!((pid.as_raw(), got.is_some()), (77, terminal.is_some()));
        }
        let error = Error::setup(
            Kind::NotFound,
            "exec: \"x\": executable file not found in $PATH",
        );
        send_failure(init.as_fd(), &error);
        let Report::Failed(received) = receive(agent.as_fd()).unwrap() else {
            panic!("not a failure")
        };
        assert_eq!(received, error);
        drop(init);
        assert!(matches!(receive(agent.as_fd()), Ok(Report::End)));
    }

    #[tokio::test]
    async fn a_failure_is_heard_of_one_that_did_not_listen() {
        let (mine, init) = pair().unwrap();
        let agent = Agent::new(mine).unwrap();
        let error = Error::setup(Kind::NotFound, "why");
        send_failure(init.as_fd(), &error);
        agent.start().unwrap();
        drop(init);
        let Ok(Report::Failed(received)) = agent.report().await else {
            panic!("not a failure")
        };
        assert_eq!(received, error);
        assert!(matches!(agent.report().await, Ok(Report::End)));
    }

    #[test]
    fn a_long_message_is_cut() {
        let (agent, init) = pair().unwrap();
        send_failure(
            init.as_fd(),
            &Error::setup(Kind::Internal, "x".repeat(100_000)),
        );
        let Report::Failed(received) = receive(agent.as_fd()).unwrap() else {
            panic!("not a failure")
        };
        assert_eq!(received.to_string().len(), MAX_REPORT - 2);
    }

    #[test]
    fn start_is_one_byte_and_its_absence_is_an_end() {
        let (agent, init) = pair().unwrap();
        send(agent.as_raw_fd(), &[START], MsgFlags::empty()).unwrap();
        assert!(wait_for_start(init.as_fd()));
        drop(agent);
        assert!(!wait_for_start(init.as_fd()));
    }
}

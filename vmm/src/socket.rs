//! Packets of the control socket: JSON messages and file descriptors over `SOCK_SEQPACKET`, for both ends.
//!
//! Every function here makes one system call and blocks or not as the socket does, so that both a plain thread and an event loop can use
//! them: with a non-blocking socket they fail with `WouldBlock`.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control::{MAX_MESSAGE, Message, Request};

/// Most descriptors in one packet.
pub const MAX_FDS: usize = 8;

/// Why a packet could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The system call failed; `WouldBlock` on a non-blocking socket that is not ready.
    #[error("the control socket failed")]
    Io(#[source] io::Error),
    /// The other end is gone.
    #[error("the other end of the control socket is closed")]
    Closed,
    /// Longer than a packet may be, or more descriptors.
    #[error("a control message is too long or has too many descriptors")]
    TooLong,
    /// Not the JSON expected.
    #[error("a control message is malformed")]
    Malformed(#[source] serde_json::Error),
}

impl SocketError {
    /// Whether the socket is non-blocking and was not ready.
    pub fn is_would_block(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

impl From<Errno> for SocketError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN => Self::Closed,
            other => Self::Io(other.into()),
        }
    }
}

/// A connected pair of control sockets, both close-on-exec and blocking.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?)
}

/// Sends a request with its descriptors (the client's side).
pub fn send_request(
    socket: impl AsFd,
    request: &Request,
    fds: &[BorrowedFd],
) -> Result<(), SocketError> {
    send(socket, request, fds)
}

/// Receives an answer or event (the client's side).
pub fn recv_message(socket: impl AsFd) -> Result<Message, SocketError> {
    Ok(recv(socket)?.0)
}

/// Sends an answer or event (the VMM's side).
pub fn send_message(socket: impl AsFd, message: &Message) -> Result<(), SocketError> {
    send(socket, message, &[])
}

/// Receives a request and its descriptors (the VMM's side).
pub fn recv_request(socket: impl AsFd) -> Result<(Request, Vec<OwnedFd>), SocketError> {
    recv(socket)
}

fn send<T: Serialize>(
    socket: impl AsFd,
    message: &T,
    fds: &[BorrowedFd],
) -> Result<(), SocketError> {
    let bytes = serde_json::to_vec(message).map_err(SocketError::Malformed)?;
    if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(SocketError::TooLong);
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights };
    sendmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &[IoSlice::new(&bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

fn recv<T: DeserializeOwned>(socket: impl AsFd) -> Result<(T, Vec<OwnedFd>), SocketError> {
    match recv_once(&socket) {
        // Said once of an end that closed before it had read all of ours (ECONNRESET); what it said before is still there.
        Err(SocketError::Closed) => recv_once(&socket),
        result => result,
    }
}

fn recv_once<T: DeserializeOwned>(socket: impl AsFd) -> Result<(T, Vec<OwnedFd>), SocketError> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut fds = Vec::new();
    let (length, flags) = {
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let received = recvmsg::<()>(
            socket.as_fd().as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        // Own every descriptor before anything can fail.
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                // SAFETY: the kernel has just made these descriptors for this process, and nobody else knows of them.
                fds.extend(
                    raw.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        (received.bytes, received.flags)
    };
    // Every message is JSON: an empty packet is none, and what recvmsg returns at the end of the stream.
    if length == 0 {
        return Err(SocketError::Closed);
    }
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(SocketError::TooLong);
    }
    let message = serde_json::from_slice(&buffer[..length]).map_err(SocketError::Malformed)?;
    Ok((message, fds))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    use super::*;
    use crate::control::{
        AttachConfig, BootConfig, Event, Info, Response, ShareConfig, TimelineEntry, VmState,
    };

    fn boot_config() -> BootConfig {
        BootConfig {
            vcpus: 2,
            memory_mib: 128,
            cmdline: "quiet \"quoted\"".into(),
            vsock_path: "/run/x/vsock".into(),
            share: Some(ShareConfig {
                tag: "bulkhead".into(),
                directory: "/run/x/share".into(),
                queues: 2,
                files: 1000,
            }),
            spare_slots: 4,
            serial: true,
            save_template: false,
        }
    }

    /// The JSON of a value after it went through a socket.
    fn through<T: Serialize + DeserializeOwned>(value: &T) -> String {
        let (a, b) = pair().unwrap();
        send(&a, value, &[]).unwrap();
        let (received, fds): (T, _) = recv(&b).unwrap();
        assert!(fds.is_empty());
        serde_json::to_string(&received).unwrap()
    }

    #[test]
    fn every_request_survives_the_socket() {
        let share = boot_config().share.unwrap();
        for request in [
            Request::Boot(boot_config()),
            Request::Pause,
            Request::Resume,
            Request::Info,
            Request::Attach(AttachConfig::Rng),
            Request::Attach(AttachConfig::Fs(share)),
            Request::Shutdown,
        ] {
            assert_eq!(through(&request), serde_json::to_string(&request).unwrap());
        }
    }

    #[test]
    fn every_message_survives_the_socket() {
        let timeline = vec![TimelineEntry {
            name: "init started".into(),
            at_ns: u64::MAX,
        }];
        for message in [
            Message::Response(Response::Ok),
            Message::Response(Response::Info(Info {
                pid: 7,
                state: VmState::Paused,
                vcpus: 32,
                memory_mib: 1 << 22,
                timeline: timeline.clone(),
            })),
            Message::Response(Response::Attached {
                mmio_base: 0xd000_0600,
            }),
            Message::Response(Response::Error {
                message: "vcpus is 0".into(),
            }),
            Message::Event(Event::ManyFiles),
            Message::Event(Event::Ended {
                exit_code: 11,
                reason: "vcpu 0: triple fault".into(),
                timeline,
            }),
        ] {
            assert_eq!(through(&message), serde_json::to_string(&message).unwrap());
        }
    }

    #[test]
    fn descriptors_arrive_in_order_and_close_on_exec() {
        let (a, b) = pair().unwrap();
        let files: Vec<File> = (0..3)
            .map(|i| {
                let mut file = tempfile::tempfile().unwrap();
                write!(file, "{i}").unwrap();
                file.rewind().unwrap();
                file
            })
            .collect();
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        send_request(&a, &Request::Info, &fds).unwrap();
        let (_, received) = recv_request(&b).unwrap();
        assert_eq!(received.len(), 3);
        for (i, fd) in received.into_iter().enumerate() {
            // SAFETY: asks for the flags of a valid descriptor.
            let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) };
            assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
            let mut text = String::new();
            File::from(fd).read_to_string(&mut text).unwrap();
            assert_eq!(text, i.to_string());
        }
    }

    #[test]
    fn what_is_not_a_message_is_refused() {
        let table: [&[u8]; 6] = [
            b"{",
            b"{\"request\":\"dance\"}",
            b"{\"request\":\"boot\"}",
            b"\xff\xff",
            b"[]",
            b"{\"request\":\"attach\",\"device\":\"fs\",\"tag\":\"a\",\"directory\":\"/\",\"queues\":1,\"x\":1}",
        ];
        for bytes in table {
            let (a, b) = pair().unwrap();
            nix::unistd::write(&a, bytes).unwrap();
            assert!(
                matches!(recv_request(&b), Err(SocketError::Malformed(_))),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn a_closed_end_is_told_apart_from_an_error() {
        let (a, b) = pair().unwrap();
        drop(a);
        assert!(matches!(recv_message(&b), Err(SocketError::Closed)));
        assert!(matches!(
            send_request(&b, &Request::Info, &[]),
            Err(SocketError::Closed)
        ));
    }

    #[test]
    fn the_last_word_is_heard_although_the_other_end_closed_without_hearing_ours() {
        let (a, b) = pair().unwrap();
        let last = Message::Response(Response::Ok);
        send_message(&a, &last).unwrap();
        send_request(&b, &Request::Shutdown, &[]).unwrap();
        drop(a);
        assert!(matches!(
            recv_message(&b),
            Ok(Message::Response(Response::Ok))
        ));
        assert!(matches!(recv_message(&b), Err(SocketError::Closed)));
    }

    #[test]
    fn a_non_blocking_socket_says_that_it_would_block() {
        let (_a, b) = pair().unwrap();
        nix::fcntl::fcntl(
            &b,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )
        .unwrap();
        assert!(recv_message(&b).unwrap_err().is_would_block());
    }

    #[test]
    fn packets_beyond_the_limits_are_refused() {
        let (a, b) = pair().unwrap();
        let mut config = boot_config();
        config.cmdline = "x".repeat(MAX_MESSAGE);
        assert!(matches!(
            send_request(&a, &Request::Boot(config), &[]),
            Err(SocketError::TooLong)
        ));
        nix::unistd::write(&a, &vec![b' '; MAX_MESSAGE + 1]).unwrap();
        assert!(matches!(recv_request(&b), Err(SocketError::TooLong)));
    }
}

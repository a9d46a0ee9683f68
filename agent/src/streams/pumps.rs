//! What moves the bytes of one stream between its two ends.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::sync::{oneshot, watch};

use super::Outstanding;
use crate::last_close::Elsewhere;
use crate::transport::Connection;

/// As much as a pipe usually holds: one read empties it.
const BUFFER: usize = 64 * 1024;

/// What a pipe for output holds, and one read of it takes. A writer and the agent then take turns a quarter as often, and a connection
/// sends all of it at once.
pub const OUTPUT_BUFFER: usize = 256 * 1024;

/// What a terminal may hold of a process's output beyond what it counts: the kernel passes it on from one buffer to another, of 12 KiB
/// together (pty.c, n_tty.c).
const TERMINAL_HOLDS: usize = 64 * 1024;

/// The agent's end of a stream: of a pipe, a socket, or a terminal's master.
pub struct End(AsyncFd<OwnedFd>);

impl End {
    /// Makes the descriptor one that does not block.
    pub fn new(fd: OwnedFd, interest: Interest) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        crate::sys::watch_fd(fd, interest).map(Self)
    }

    async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0
            .async_io(Interest::READABLE, |fd| Ok(nix::unistd::read(fd, buffer)?))
            .await
    }

    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self
                .0
                .async_io(Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd, bytes)?))
                .await?;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    /// How many bytes there are to read, as far as the kernel counts them. If it does not, there is no bound.
    fn held(&self) -> usize {
        crate::sys::readable_bytes(self.as_fd()).unwrap_or(usize::MAX)
    }

    /// Ends directions of a socket. One whose other end is gone needs no word.
    fn shutdown(&self, how: Shutdown) {
        let how = match how {
            Shutdown::Read => nix::sys::socket::Shutdown::Read,
            Shutdown::Write => nix::sys::socket::Shutdown::Write,
            Shutdown::Both => nix::sys::socket::Shutdown::Both,
        };
        let _ = nix::sys::socket::shutdown(self.0.get_ref().as_raw_fd(), how);
    }
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl std::fmt::Debug for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("End")
            .field(&self.0.get_ref().as_raw_fd())
            .finish()
    }
}

/// From the host to the process. End of file, a broken connection and a process that reads no more all end in the same way: the
/// pipe's and the connection's other sides see it closed.
pub async fn input(connection: oneshot::Receiver<Connection>, end: End) {
    if let Ok(mut connection) = connection.await {
        pass_in(&mut connection, &end).await;
    }
}

/// From the process to the host.
pub async fn output(
    connection: oneshot::Receiver<Connection>,
    end: End,
    guard: Outstanding,
    mut ended: watch::Receiver<bool>,
) {
    let Ok(mut connection) = connection.await else {
        return;
    };
    if pass_out(&end, &mut connection, &mut ended, 0).await {
        drop(end);
        finish(connection, guard).await;
    }
}

/// Both ways over a socket, each direction with an end of its own.
pub async fn both(
    connection: oneshot::Receiver<Connection>,
    end: End,
    guard: Outstanding,
    mut ended: watch::Receiver<bool>,
) {
    let Ok(connection) = connection.await else {
        return;
    };
    let (mut from_host, mut to_host) = tokio::io::split(connection);
    let outward = async {
        let whole = pass_out(&end, &mut to_host, &mut ended, 0).await;
        // What the process has left in the background has lost its peer, as with pipes.
        let process_ended = *ended.borrow();
        end.shutdown(if process_ended {
            Shutdown::Both
        } else {
            Shutdown::Read
        });
        if whole && to_host.shutdown().await.is_ok() {
            drop(guard);
            return Ok(());
        }
        Err(())
    };
    let inward = async {
        pass_in(&mut from_host, &end).await;
        end.shutdown(Shutdown::Write);
        Ok(())
    };
    // Until the host has closed, or the process, which neither writes nor reads any more.
    let _ = tokio::try_join!(outward, inward);
}

/// Moves bytes until the host's end of file, or until nobody takes them.
async fn pass_in(connection: &mut (impl AsyncRead + Unpin), end: &End) {
    let mut buffer = vec![0; BUFFER];
    while let Ok(length @ 1..) = connection.read(&mut buffer).await {
        let bytes = buffer.get(..length).unwrap_or_default();
        if end.write_all(bytes).await.is_err() {
            return;
        }
    }
}

/// Moves bytes until the process's end, or that of what it writes. False if the host does not take them. What `end` can't count of
/// what it holds is `uncounted` bytes at most.
async fn pass_out(
    end: &End,
    connection: &mut (impl AsyncWrite + Unpin),
    ended: &mut watch::Receiver<bool>,
    uncounted: usize,
) -> bool {
    let mut buffer = vec![0; OUTPUT_BUFFER];
    // Once the process has ended: how much of what is there can be its own.
    let mut rest = None;
    loop {
        let length = if *ended.borrow_and_update() {
            let rest = rest.get_or_insert_with(|| end.held().saturating_add(uncounted));
            let most = buffer.len().min(*rest);
            // Not through the runtime, whose knowledge of the pipe may be older than the end of the process.
            match nix::unistd::read(end, buffer.get_mut(..most).unwrap_or_default()) {
                Ok(length) => {
                    *rest -= length;
                    Ok(length)
                }
                Err(Errno::EINTR) => continue,
                // All that the process wrote is handed over; what it left in the background has lost its reader, as under
                // conmon and containerd's shim. Without an end here the host could not tell that this was all.
                Err(Errno::EAGAIN) => return true,
                Err(errno) => Err(errno.into()),
            }
        } else {
            tokio::select! {
                length = end.read(&mut buffer) => length,
                Ok(()) = ended.changed() => continue,
            }
        };
        let Ok(length @ 1..) = length else {
            return true;
        };
        let bytes = buffer.get(..length).unwrap_or_default();
        if connection.write_all(bytes).await.is_err() {
            return false;
        }
    }
}

/// Ends the sending half, then waits for the host to close: a full close from here could overtake data that the
/// host has not read yet.
async fn finish(mut connection: Connection, guard: Outstanding) {
    if connection.shutdown().await.is_err() {
        return;
    }
    drop(guard);
    let mut byte = [0; 1];
    while let Ok(1..) = connection.read(&mut byte).await {}
}

/// A terminal's both ends. While its slave is open, the container may close the terminal everywhere and open it again; without it the
/// master would be at its end (EIO), and stay ready to say so.
pub struct Terminal {
    master: Arc<End>,
    _slave: OwnedFd,
    // From here on in the order in which they go.
    elsewhere: Option<Elsewhere>,
}

impl Terminal {
    /// The ends of one.
    pub fn new(master: Arc<End>, slave: OwnedFd) -> Self {
        Self {
            master,
            _slave: slave,
            elsewhere: None,
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        match Elsewhere::hold(&[self.master.as_fd()]) {
            Ok(elsewhere) => self.elsewhere = Some(elsewhere),
            Err(errno) => tracing::warn!(%errno, "a terminal is closed by the agent itself"),
        }
    }
}

/// A terminal's: what is typed and what is shown.
pub async fn terminal(
    connection: oneshot::Receiver<Connection>,
    terminal: Terminal,
    guard: Outstanding,
    mut ended: watch::Receiver<bool>,
) {
    let Ok(connection) = connection.await else {
        return;
    };
    let (mut from_host, mut to_host) = tokio::io::split(connection);
    let typed = async {
        let mut buffer = vec![0; 4096];
        while let Ok(length @ 1..) = from_host.read(&mut buffer).await {
            if terminal
                .master
                .write_all(buffer.get(..length).unwrap_or_default())
                .await
                .is_err()
            {
                break;
            }
        }
        // The end of the typing is not the end of the terminal.
        std::future::pending::<()>().await;
    };
    let drained = tokio::select! {
        drained = pass_out(&terminal.master, &mut to_host, &mut ended, TERMINAL_HOLDS) => drained,
        () = typed => false,
    };
    drop(terminal);
    if drained {
        finish(from_host.unsplit(to_host), guard).await;
    }
}

//! The standard streams of a process: pipes (or a terminal) on one side, connections of the host on the other.
//!
//! A connection takes the place that its [`StreamHeader`] names. Each direction has one bounded buffer, so a slow
//! reader slows the writer; end of file passes on as a shutdown of one half. An output counts as drained when the
//! process has ended, or its end of the pipe is closed everywhere, and the last byte was handed to the connection.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bulkhead_protocol::MAX_STREAM_HEADER;
use bulkhead_protocol::agent::{Stdio, StreamHeader, StreamKind};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use protobuf::Message;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

use crate::error::{Context, Error, Kind, Result};
use crate::terminal::Size;
use crate::transport::Connection;

/// As much as a pipe holds: one read empties it.
const BUFFER: usize = 64 * 1024;

/// Why a stream's header was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The connection broke.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Too long.
    #[error("is {0} bytes long, more than {MAX_STREAM_HEADER}")]
    TooLong(u32),
    /// Not the message.
    #[error("cannot be parsed: {0}")]
    Malformed(#[from] protobuf::Error),
}

/// Reads the header that every stream connection begins with, and not one byte more.
pub async fn read_header(
    connection: &mut (impl AsyncRead + Unpin),
) -> Result<StreamHeader, HeaderError> {
    let length = connection.read_u32().await?;
    if length > MAX_STREAM_HEADER {
        return Err(HeaderError::TooLong(length));
    }
    let mut header = vec![0; length as usize];
    connection.read_exact(&mut header).await?;
    Ok(StreamHeader::parse_from_bytes(&header)?)
}

/// The process's ends of its standard streams; `None` is the null device.
#[derive(Debug, Default)]
pub struct ProcessEnds([Option<OwnedFd>; 3]);

impl ProcessEnds {
    /// In the order of their numbers.
    pub fn borrow(&self) -> [Option<BorrowedFd<'_>>; 3] {
        let [stdin, stdout, stderr] = &self.0;
        [stdin, stdout, stderr].map(|end| end.as_ref().map(AsFd::as_fd))
    }
}

/// The agent's ends.
#[derive(Debug)]
pub struct Streams {
    places: Mutex<Places>,
    /// Outputs not drained yet.
    outstanding: Arc<watch::Sender<usize>>,
    /// Whether the process has ended.
    ended: watch::Sender<bool>,
    /// The terminal, for as long as its stream has it open.
    terminal: Mutex<Weak<Pty>>,
}

#[derive(Debug, Default)]
struct Places {
    waiting: Vec<(StreamKind, oneshot::Sender<Connection>)>,
    inputs: Vec<AbortHandle>,
    outputs: Vec<AbortHandle>,
}

/// Counts one output as outstanding while it lives, however its task ends.
struct Outstanding(Arc<watch::Sender<usize>>);

impl Outstanding {
    fn new(count: &Arc<watch::Sender<usize>>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(Arc::clone(count))
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl Streams {
    /// Makes the pipes that `stdio` asks for. A terminal's place is made by [`Streams::add_terminal`].
    pub fn open(stdio: &Stdio) -> Result<(Self, ProcessEnds)> {
        let streams = Self {
            places: Mutex::default(),
            outstanding: Arc::new(watch::Sender::new(0)),
            ended: watch::Sender::new(false),
            terminal: Mutex::default(),
        };
        let mut ends = ProcessEnds::default();
        if stdio.terminal {
            return Ok((streams, ends));
        }
        let what = || "cannot make the container's pipes";
        let [stdin, stdout, stderr] = &mut ends.0;
        if stdio.stdin {
            let (read, write) = pipe2(OFlag::O_CLOEXEC).what(what)?;
            let sender = pipe::Sender::from_owned_fd(write).what(what)?;
            streams.add_input(StreamKind::STDIN, |connection| input(connection, sender));
            *stdin = Some(read);
        }
        for (wanted, kind, end) in [
            (stdio.stdout, StreamKind::STDOUT, stdout),
            (stdio.stderr, StreamKind::STDERR, stderr),
        ] {
            if wanted {
                let (read, write) = pipe2(OFlag::O_CLOEXEC).what(what)?;
                let receiver = pipe::Receiver::from_owned_fd(read).what(what)?;
                let ended = streams.ended.subscribe();
                streams.add_output(kind, |connection, guard| {
                    output(connection, receiver, guard, ended)
                });
                *end = Some(write);
            }
        }
        Ok((streams, ends))
    }

    /// Makes the place of a terminal.
    pub fn add_terminal(&self, master: OwnedFd) -> Result<()> {
        let master = Arc::new(Pty::new(master).what(|| "cannot use the container's terminal")?);
        *self.terminal.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&master);
        self.add_output(StreamKind::TERMINAL, |connection, guard| {
            terminal(connection, master, guard)
        });
        Ok(())
    }

    fn add_input<F>(&self, kind: StreamKind, pump: impl FnOnce(oneshot::Receiver<Connection>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let task = tokio::spawn(pump(receiver)).abort_handle();
        let mut places = self.places();
        places.waiting.push((kind, sender));
        places.inputs.push(task);
    }

    fn add_output<F>(
        &self,
        kind: StreamKind,
        pump: impl FnOnce(oneshot::Receiver<Connection>, Outstanding) -> F,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let guard = Outstanding::new(&self.outstanding);
        let task = tokio::spawn(pump(receiver, guard)).abort_handle();
        let mut places = self.places();
        places.waiting.push((kind, sender));
        places.outputs.push(task);
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        // Nothing panics while it is held.
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a connection its place. Refused if the process has no such stream, or it is taken.
    pub fn attach(&self, kind: StreamKind, connection: Connection) -> Result<()> {
        let mut places = self.places();
        let place = places
            .waiting
            .iter()
            .position(|(waiting, _)| *waiting == kind);
        let refused = || Error::setup(Kind::NotFound, format!("no free {kind:?} stream"));
        let (_, place) = places.waiting.swap_remove(place.ok_or_else(refused)?);
        // Fails for the input of a process that has ended: the connection, closed, says so.
        let _ = place.send(connection);
        Ok(())
    }

    /// Sets the size of the terminal; the kernel tells the processes at it.
    pub fn resize(&self, size: Size) -> Result<()> {
        let master = self
            .terminal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .upgrade()
            .ok_or_else(|| Error::State("the process has no terminal".to_owned()))?;
        crate::sys::set_terminal_size(master.0.get_ref().as_fd(), size.columns, size.rows)
            .what(|| "cannot set the terminal's size")
    }

    /// The process is gone: nobody reads its input any more.
    pub fn process_ended(&self) {
        self.ended.send_replace(true);
        let mut places = self.places();
        places.inputs.drain(..).for_each(|task| task.abort());
    }

    /// Waits until every output has been handed to its connection, or was given up.
    pub async fn drained(&self) {
        // Fails only without a sender, and `self` is one.
        let _ = self
            .outstanding
            .subscribe()
            .wait_for(|&count| count == 0)
            .await;
    }

    /// Gives up all of it.
    pub fn close(&self) {
        self.process_ended();
        let mut places = self.places();
        places.waiting.clear();
        places.outputs.drain(..).for_each(|task| task.abort());
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.close();
    }
}

async fn input(connection: oneshot::Receiver<Connection>, mut pipe: pipe::Sender) {
    let Ok(mut connection) = connection.await else {
        return;
    };
    let mut buffer = vec![0; BUFFER];
    // End of file, a broken connection and a process that reads no more all end in the same way: the pipe's and the
    // connection's other sides see it closed.
    while let Ok(length @ 1..) = connection.read(&mut buffer).await {
        if pipe
            .write_all(buffer.get(..length).unwrap_or_default())
            .await
            .is_err()
        {
            return;
        }
    }
}

async fn output(
    connection: oneshot::Receiver<Connection>,
    mut pipe: pipe::Receiver,
    guard: Outstanding,
    mut ended: watch::Receiver<bool>,
) {
    let Ok(mut connection) = connection.await else {
        return;
    };
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = if *ended.borrow_and_update() {
            // Not through the runtime, whose knowledge of the pipe may be older than the end of the process.
            match nix::unistd::read(pipe.as_fd(), &mut buffer) {
                Ok(length) => Ok(length),
                Err(Errno::EINTR) => continue,
                // All that the process wrote is handed over; what it left in the background has lost its reader, as under
                // conmon and containerd's shim. Without an end here the host could not tell that this was all.
                Err(Errno::EAGAIN) => break,
                Err(errno) => Err(errno.into()),
            }
        } else {
            tokio::select! {
                length = pipe.read(&mut buffer) => length,
                Ok(()) = ended.changed() => continue,
            }
        };
        let Ok(length @ 1..) = length else {
            break;
        };
        if connection
            .write_all(buffer.get(..length).unwrap_or_default())
            .await
            .is_err()
        {
            return;
        }
    }
    drop((pipe, buffer));
    finish(connection, guard).await;
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

async fn terminal(connection: oneshot::Receiver<Connection>, master: Arc<Pty>, guard: Outstanding) {
    let Ok(connection) = connection.await else {
        return;
    };
    let (mut from_host, mut to_host) = tokio::io::split(connection);
    let typed = async {
        let mut buffer = vec![0; 4096];
        while let Ok(length @ 1..) = from_host.read(&mut buffer).await {
            if master
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
    let shown = async {
        let mut buffer = vec![0; BUFFER];
        // A read fails (EIO) once nobody has the other side open.
        while let Ok(length @ 1..) = master.read(&mut buffer).await {
            if to_host
                .write_all(buffer.get(..length).unwrap_or_default())
                .await
                .is_err()
            {
                return false;
            }
        }
        true
    };
    let drained = tokio::select! {
        drained = shown => drained,
        () = typed => false,
    };
    drop(master);
    if drained {
        finish(from_host.unsplit(to_host), guard).await;
    }
}

/// A terminal's master.
struct Pty(AsyncFd<OwnedFd>);

impl Pty {
    /// The descriptor must not block, and was opened so.
    fn new(master: OwnedFd) -> io::Result<Self> {
        crate::sys::watch_fd(master, Interest::READABLE | Interest::WRITABLE).map(Self)
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
}

impl std::fmt::Debug for Pty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Pty")
            .field(&self.0.get_ref().as_raw_fd())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(header: &StreamHeader) -> Vec<u8> {
        let message = header.write_to_bytes().unwrap();
        let mut bytes = u32::try_from(message.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend(message);
        bytes
    }

    #[tokio::test]
    async fn a_header_is_read_and_nothing_behind_it() {
        let header = StreamHeader {
            container_id: "c1".into(),
            kind: StreamKind::STDIN.into(),
            ..Default::default()
        };
        let mut bytes = encoded(&header);
        bytes.extend(b"data");
        let mut reader = &bytes[..];
        assert_eq!(read_header(&mut reader).await.unwrap(), header);
        assert_eq!(reader, b"data");
    }

    #[tokio::test]
    async fn bad_headers_are_refused() {
        let too_long = 1025u32.to_be_bytes();
        assert!(matches!(
            read_header(&mut &too_long[..]).await,
            Err(HeaderError::TooLong(1025))
        ));
        let huge = [0xff; 8];
        assert!(matches!(
            read_header(&mut &huge[..]).await,
            Err(HeaderError::TooLong(_))
        ));
        assert!(matches!(
            read_header(&mut &[0, 0][..]).await,
            Err(HeaderError::Io(_))
        ));
        assert!(matches!(
            read_header(&mut &[0, 0, 0, 9, 1][..]).await,
            Err(HeaderError::Io(_))
        ));
        assert!(matches!(
            read_header(&mut &[0, 0, 0, 2, 0xff, 0xff][..]).await,
            Err(HeaderError::Malformed(_))
        ));
    }

    async fn host_side(streams: &Streams, kind: StreamKind) -> tokio::net::UnixStream {
        let (host, guest) = tokio::net::UnixStream::pair().unwrap();
        streams.attach(kind, Connection::Unix(guest)).unwrap();
        host
    }

    #[tokio::test]
    async fn output_arrives_whole_and_then_ends() {
        let stdio = Stdio {
            stdout: true,
            ..Default::default()
        };
        let (streams, ends) = Streams::open(&stdio).unwrap();
        let mut host = host_side(&streams, StreamKind::STDOUT).await;
        let [_, stdout, _] = ends.0;
        let writer = std::thread::spawn(move || {
            use std::io::Write;
            let mut stdout = std::fs::File::from(stdout.unwrap());
            let data: Vec<u8> = (0..1_000_000u32).map(|number| number as u8).collect();
            stdout.write_all(&data).unwrap();
        });
        let mut received = Vec::new();
        host.read_to_end(&mut received).await.unwrap();
        writer.join().unwrap();
        assert_eq!(received.len(), 1_000_000);
        assert!(
            received
                .iter()
                .enumerate()
                .all(|(index, &byte)| byte == index as u8)
        );
        streams.drained().await;
    }

    #[tokio::test]
    async fn an_output_that_nobody_attaches_is_outstanding_until_it_is_closed() {
        let stdio = Stdio {
            stdout: true,
            stderr: true,
            ..Default::default()
        };
        let (streams, ends) = Streams::open(&stdio).unwrap();
        drop(ends);
        streams.process_ended();
        let waiting =
            tokio::time::timeout(std::time::Duration::from_millis(50), streams.drained()).await;
        assert!(waiting.is_err());
        streams.close();
        streams.drained().await;
    }

    #[tokio::test]
    async fn a_stream_is_attached_once_and_only_if_it_was_asked_for() {
        let stdio = Stdio {
            stdin: true,
            ..Default::default()
        };
        let (streams, _ends) = Streams::open(&stdio).unwrap();
        let _host = host_side(&streams, StreamKind::STDIN).await;
        for kind in [
            StreamKind::STDIN,
            StreamKind::STDOUT,
            StreamKind::STREAM_KIND_UNSPECIFIED,
        ] {
            let (_, guest) = tokio::net::UnixStream::pair().unwrap();
            assert!(streams.attach(kind, Connection::Unix(guest)).is_err());
        }
    }

    #[tokio::test]
    async fn the_end_of_the_hosts_input_closes_the_pipe() {
        let stdio = Stdio {
            stdin: true,
            ..Default::default()
        };
        let (streams, ends) = Streams::open(&stdio).unwrap();
        let mut host = host_side(&streams, StreamKind::STDIN).await;
        host.write_all(b"hello").await.unwrap();
        host.shutdown().await.unwrap();
        let [stdin, ..] = ends.0;
        let mut stdin = pipe::Receiver::from_owned_fd(stdin.unwrap()).unwrap();
        let mut received = Vec::new();
        stdin.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"hello");
    }
}

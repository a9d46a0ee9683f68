//! The streams of a process: pipes, sockets or a terminal on one side, connections of the host on the other.
//!
//! A connection takes the place that its [`StreamHeader`] names. Each direction has one bounded buffer, so a slow
//! reader slows the writer; end of file passes on as a shutdown of one half. An output counts as drained when the
//! process has ended, or its end of the pipe is closed everywhere, and the last byte was handed to the connection. Of a
//! terminal, which may be closed and opened again, the process's end alone counts.

mod pumps;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bulkhead_protocol::agent::{Flow, Stdio, StreamHeader, StreamKind};
use bulkhead_protocol::{FIRST_DESCRIPTOR, MAX_DESCRIPTORS, MAX_STREAM_HEADER};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::pipe2;
use protobuf::Message;
use tokio::io::{AsyncRead, AsyncReadExt, Interest};
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

use crate::error::{Context, Error, Kind, Result};
use crate::terminal::Size;
use crate::transport::Connection;
use pumps::End;

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

/// The process's ends of its streams, the standard ones first; `None` is the null device.
#[derive(Debug, Default)]
pub struct ProcessEnds {
    standard: [Option<OwnedFd>; 3],
    further: Vec<Option<OwnedFd>>,
}

/// The same, borrowed.
#[derive(Debug)]
pub struct BorrowedEnds<'a> {
    /// Standard input, output and error.
    pub standard: [Option<BorrowedFd<'a>>; 3],
    /// Those from 3 on.
    pub further: Vec<Option<BorrowedFd<'a>>>,
}

impl ProcessEnds {
    /// For a child.
    pub fn borrow(&self) -> BorrowedEnds<'_> {
        fn borrow(end: &Option<OwnedFd>) -> Option<BorrowedFd<'_>> {
            end.as_ref().map(AsFd::as_fd)
        }
        BorrowedEnds {
            standard: self.standard.each_ref().map(borrow),
            further: self.further.iter().map(borrow).collect(),
        }
    }
}

impl<'a> BorrowedEnds<'a> {
    /// In the order of their numbers.
    pub fn all(&self) -> impl Iterator<Item = Option<BorrowedFd<'a>>> {
        self.standard.iter().chain(&self.further).copied()
    }
}

/// Where a connection goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    kind: StreamKind,
    /// The number of a [`StreamKind::DESCRIPTOR`].
    descriptor: u32,
}

impl From<StreamKind> for Place {
    fn from(kind: StreamKind) -> Self {
        Self {
            kind,
            descriptor: 0,
        }
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
    terminal: Mutex<Weak<End>>,
}

#[derive(Debug, Default)]
struct Places {
    waiting: Vec<(Place, oneshot::Sender<Connection>)>,
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
    /// Makes the pipes and sockets that `stdio` asks for. A terminal's place is made by [`Streams::add_terminal`].
    pub fn open(stdio: &Stdio) -> Result<(Self, ProcessEnds)> {
        if stdio.descriptors.len() > MAX_DESCRIPTORS {
            return Err(Error::Request(format!(
                "stdio.descriptors: more than {MAX_DESCRIPTORS}"
            )));
        }
        let streams = Self {
            places: Mutex::default(),
            outstanding: Arc::new(watch::Sender::new(0)),
            ended: watch::Sender::new(false),
            terminal: Mutex::default(),
        };
        let mut ends = ProcessEnds::default();
        let wanted = [
            (stdio.stdin, StreamKind::STDIN, Flow::INWARD),
            (stdio.stdout, StreamKind::STDOUT, Flow::OUTWARD),
            (stdio.stderr, StreamKind::STDERR, Flow::OUTWARD),
        ];
        for (end, (wanted, kind, flow)) in ends.standard.iter_mut().zip(wanted) {
            if wanted && !stdio.terminal {
                *end = streams.make(kind.into(), flow)?;
            }
        }
        for (descriptor, flow) in (FIRST_DESCRIPTOR..).zip(&stdio.descriptors) {
            let flow = flow.enum_value().map_err(|number| {
                Error::Request(format!("stdio.descriptors: {number} is no flow"))
            })?;
            let place = Place {
                kind: StreamKind::DESCRIPTOR,
                descriptor,
            };
            ends.further.push(streams.make(place, flow)?);
        }
        Ok((streams, ends))
    }

    /// Makes one stream and its place; returns the process's end.
    fn make(&self, place: Place, flow: Flow) -> Result<Option<OwnedFd>> {
        let what = || "cannot make the container's streams";
        let theirs = match flow {
            Flow::NOWHERE => return Ok(None),
            Flow::INWARD => {
                let (theirs, ours) = pipe2(OFlag::O_CLOEXEC).what(what)?;
                let end = End::new(ours, Interest::WRITABLE).what(what)?;
                self.add_input(place, |connection| pumps::input(connection, end));
                theirs
            }
            Flow::OUTWARD => {
                let (ours, theirs) = pipe2(OFlag::O_CLOEXEC).what(what)?;
                // Smaller is slower, and no failure.
                let _ = fcntl(&ours, FcntlArg::F_SETPIPE_SZ(pumps::OUTPUT_BUFFER as i32));
                let end = End::new(ours, Interest::READABLE).what(what)?;
                let ended = self.ended.subscribe();
                self.add_output(place, |connection, guard| {
                    pumps::output(connection, end, guard, ended)
                });
                theirs
            }
            Flow::BOTH_WAYS => {
                let (ours, theirs) = socketpair(
                    AddressFamily::Unix,
                    SockType::Stream,
                    None,
                    SockFlag::SOCK_CLOEXEC,
                )
                .what(what)?;
                let end = End::new(ours, Interest::READABLE | Interest::WRITABLE).what(what)?;
                let ended = self.ended.subscribe();
                self.add_output(place, |connection, guard| {
                    pumps::both(connection, end, guard, ended)
                });
                theirs
            }
        };
        Ok(Some(theirs))
    }

    /// Makes the place of a terminal.
    pub fn add_terminal(&self, master: OwnedFd) -> Result<()> {
        let what = || "cannot use the container's terminal";
        let slave = crate::sys::open_pty_peer(master.as_fd()).what(what)?;
        let master = End::new(master, Interest::READABLE | Interest::WRITABLE).what(what)?;
        let master = Arc::new(master);
        *self.terminal.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&master);
        let ended = self.ended.subscribe();
        self.add_output(StreamKind::TERMINAL.into(), |connection, guard| {
            pumps::terminal(
                connection,
                pumps::Terminal::new(master, slave),
                guard,
                ended,
            )
        });
        Ok(())
    }

    fn add_input<F>(&self, place: Place, pump: impl FnOnce(oneshot::Receiver<Connection>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let task = tokio::spawn(pump(receiver)).abort_handle();
        let mut places = self.places();
        places.waiting.push((place, sender));
        places.inputs.push(task);
    }

    fn add_output<F>(
        &self,
        place: Place,
        pump: impl FnOnce(oneshot::Receiver<Connection>, Outstanding) -> F,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let guard = Outstanding::new(&self.outstanding);
        let task = tokio::spawn(pump(receiver, guard)).abort_handle();
        let mut places = self.places();
        places.waiting.push((place, sender));
        places.outputs.push(task);
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        // Nothing panics while it is held.
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a connection its place. Refused if the process has no such stream, or it is taken.
    pub fn attach(&self, header: &StreamHeader, connection: Connection) -> Result<()> {
        let wanted = Place {
            kind: header.kind.enum_value_or_default(),
            descriptor: header.descriptor,
        };
        let mut places = self.places();
        let index = places
            .waiting
            .iter()
            .position(|(waiting, _)| *waiting == wanted);
        let refused = || Error::setup(Kind::NotFound, format!("no free stream {wanted:?}"));
        let (_, place) = places.waiting.swap_remove(index.ok_or_else(refused)?);
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
        crate::sys::set_terminal_size(master.as_fd(), size.columns, size.rows)
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

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;
    use tokio::net::unix::pipe;

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
        attached(streams, kind, 0).await
    }

    async fn attached(
        streams: &Streams,
        kind: StreamKind,
        descriptor: u32,
    ) -> tokio::net::UnixStream {
        let (host, guest) = tokio::net::UnixStream::pair().unwrap();
        let header = StreamHeader {
            kind: kind.into(),
            descriptor,
            ..Default::default()
        };
        streams.attach(&header, Connection::Unix(guest)).unwrap();
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
        let [_, stdout, _] = ends.standard;
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
    async fn a_writer_is_a_quarter_of_a_megabyte_ahead_of_its_reader() {
        let stdio = Stdio {
            stdout: true,
            ..Default::default()
        };
        let (streams, ends) = Streams::open(&stdio).unwrap();
        let [_, stdout, _] = ends.standard;
        let stdout = stdout.unwrap();
        fcntl(&stdout, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let data = vec![7; 2 * pumps::OUTPUT_BUFFER];
        let written = nix::unistd::write(&stdout, &data).unwrap();
        assert_eq!(written, pumps::OUTPUT_BUFFER);

        let mut host = host_side(&streams, StreamKind::STDOUT).await;
        drop(stdout);
        let mut received = Vec::new();
        host.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, data[..written]);
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
            let header = StreamHeader {
                kind: kind.into(),
                ..Default::default()
            };
            assert!(streams.attach(&header, Connection::Unix(guest)).is_err());
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
        let [stdin, ..] = ends.standard;
        let mut stdin = pipe::Receiver::from_owned_fd(stdin.unwrap()).unwrap();
        let mut received = Vec::new();
        stdin.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"hello");
    }

    #[tokio::test]
    async fn each_direction_of_a_socket_ends_by_itself() {
        let stdio = Stdio {
            descriptors: vec![Flow::BOTH_WAYS.into()],
            ..Default::default()
        };
        for process_first in [true, false] {
            let (streams, mut ends) = Streams::open(&stdio).unwrap();
            let mut host = attached(&streams, StreamKind::DESCRIPTOR, 3).await;
            let end = std::os::unix::net::UnixStream::from(ends.further.remove(0).unwrap());
            end.set_nonblocking(true).unwrap();
            let mut process = tokio::net::UnixStream::from_std(end).unwrap();
            let (first, second) = if process_first {
                (&mut process, &mut host)
            } else {
                (&mut host, &mut process)
            };
            first.write_all(b"question").await.unwrap();
            first.shutdown().await.unwrap();
            let mut received = String::new();
            second.read_to_string(&mut received).await.unwrap();
            assert_eq!(received, "question");
            second.write_all(b"answer").await.unwrap();
            second.shutdown().await.unwrap();
            let mut received = String::new();
            first.read_to_string(&mut received).await.unwrap();
            assert_eq!(received, "answer");
            streams.drained().await;
        }
    }

    #[tokio::test]
    async fn the_peer_of_a_socket_that_the_process_has_closed_is_told() {
        let stdio = Stdio {
            descriptors: vec![Flow::BOTH_WAYS.into()],
            ..Default::default()
        };
        let (streams, ends) = Streams::open(&stdio).unwrap();
        let mut host = attached(&streams, StreamKind::DESCRIPTOR, 3).await;
        drop(ends);
        assert_eq!(host.read(&mut [0; 1]).await.unwrap(), 0);
        while host.write_all(&[0; 4096]).await.is_ok() {}
    }

    #[tokio::test]
    async fn what_a_process_leaves_in_the_background_loses_its_socket() {
        let stdio = Stdio {
            descriptors: vec![Flow::BOTH_WAYS.into()],
            ..Default::default()
        };
        let (streams, mut ends) = Streams::open(&stdio).unwrap();
        let mut host = attached(&streams, StreamKind::DESCRIPTOR, 3).await;
        let mut left = std::os::unix::net::UnixStream::from(ends.further.remove(0).unwrap());
        std::io::Write::write_all(&mut left, b"last").unwrap();
        streams.process_ended();
        let mut received = String::new();
        host.read_to_string(&mut received).await.unwrap();
        assert_eq!(received, "last");
        streams.drained().await;
        let error = std::io::Write::write_all(&mut left, b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn descriptors_are_bounded_and_of_a_known_kind() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let _context = runtime.enter();
        let of = |flow: i32, count| Stdio {
            descriptors: vec![protobuf::EnumOrUnknown::from_i32(flow); count],
            ..Default::default()
        };
        assert!(Streams::open(&of(1, MAX_DESCRIPTORS)).is_ok());
        assert!(Streams::open(&of(0, MAX_DESCRIPTORS + 1)).is_err());
        assert!(Streams::open(&of(9, 1)).is_err());
    }
}

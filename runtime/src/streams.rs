//! Streams of a process: each is a vsock connection of its own, with back-pressure and half-close.
//!
//! A client connects to the VMM's hybrid vsock socket, asks for the agent's stream port, says which stream it wants and
//! then moves bytes. The pumps block and are meant for a thread each: descriptors that are inherited are shared
//! with strangers, so they can't be switched to non-blocking mode.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use bulkhead_protocol::agent::{StreamHeader, StreamKind};
use bulkhead_protocol::{MAX_STREAM_HEADER, STREAM_PORT};
use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{SFlag, fstat};
use protobuf::Message;

use crate::sock;

/// Bytes moved at once.
const CHUNK: usize = 128 * 1024;

/// Longest answer to `CONNECT`: `OK `, a port number, a newline.
const MAX_ANSWER: usize = 32;

/// One stream of one process.
#[derive(Debug, Clone)]
pub struct Stream<'a> {
    /// The container.
    pub container_id: &'a str,
    /// The exec'd process; empty for the container's init.
    pub exec_id: &'a str,
    /// Which of its streams.
    pub kind: StreamKind,
    /// The number of a [`StreamKind::DESCRIPTOR`] in the process; 0 for others.
    pub descriptor: u32,
}

/// Connects to the guest's end of `stream` through the VMM's socket at `vsock`.
pub fn attach(vsock: &Path, stream: &Stream) -> io::Result<UnixStream> {
    let mut socket = sock::connect(vsock)?;
    socket.write_all(format!("CONNECT {STREAM_PORT}\n").as_bytes())?;
    read_answer(&mut socket)?;
    socket.write_all(&header(stream)?)?;
    Ok(socket)
}

/// Reads `OK <port>\n` and not a byte more: what follows belongs to the stream.
fn read_answer(socket: &mut UnixStream) -> io::Result<()> {
    let mut answer = Vec::with_capacity(MAX_ANSWER);
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        if answer.len() == MAX_ANSWER || socket.read(&mut byte)? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                "the guest does not accept streams",
            ));
        }
        answer.push(byte[0]);
    }
    if answer.starts_with(b"OK ") {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        "the VMM's vsock socket gave no OK",
    ))
}

/// The first bytes of a stream connection: the header's length and the header.
fn header(stream: &Stream) -> io::Result<Vec<u8>> {
    let message = StreamHeader {
        container_id: stream.container_id.to_owned(),
        exec_id: stream.exec_id.to_owned(),
        kind: stream.kind.into(),
        descriptor: stream.descriptor,
        ..Default::default()
    };
    let body = message.write_to_bytes().map_err(io::Error::other)?;
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    if length > MAX_STREAM_HEADER {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the stream's header is too long",
        ));
    }
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend(body);
    Ok(bytes)
}

/// Moves `input` into the guest until its end, and then closes the sending half.
pub fn pump_in(input: BorrowedFd, socket: &UnixStream) -> io::Result<u64> {
    socket.set_nonblocking(true)?;
    let result = pump(input, socket.as_fd());
    // The guest may have closed the connection already.
    let _ = socket.shutdown(Shutdown::Write);
    result
}

/// Moves what the guest writes into `output` until its end. When nobody reads `output` any more the connection is closed,
/// so that the writer in the guest learns of it.
pub fn pump_out(socket: &UnixStream, output: BorrowedFd) -> io::Result<u64> {
    socket.set_nonblocking(true)?;
    let result = pump(socket.as_fd(), output);
    if result.is_err() {
        let _ = socket.shutdown(Shutdown::Both);
    }
    result
}

/// Moves bytes until the end of `from`; in the kernel where one end is a pipe. `splice` holds the pipe's lock while it waits
/// for the other end, and with it everybody else who uses the pipe, even a reader of what is in it already: so it must never
/// wait, and the one of the two ends that is ours, the socket, is non-blocking.
fn pump(from: BorrowedFd, to: BorrowedFd) -> io::Result<u64> {
    let mut total = 0;
    if is_pipe(from) || is_pipe(to) {
        loop {
            match splice(from, None, to, None, CHUNK, SpliceFFlags::SPLICE_F_NONBLOCK) {
                Ok(0) => return Ok(total),
                Ok(n) => total += n as u64,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => wait_for_either(from, to)?,
                // Files opened for appending, and some devices, can't be spliced.
                Err(Errno::EINVAL) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    let mut buffer = vec![0; CHUNK];
    loop {
        let n = match nix::unistd::read(from, &mut buffer) {
            Ok(0) => return Ok(total),
            Ok(n) => n,
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => {
                wait(from, PollFlags::POLLIN)?;
                continue;
            }
            Err(errno) => return Err(errno.into()),
        };
        write_all(to, buffer.get(..n).unwrap_or_default())?;
        total += n as u64;
    }
}

fn write_all(to: BorrowedFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match nix::unistd::write(to, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait(to, PollFlags::POLLOUT)?,
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// `splice` doesn't tell which end would block; it is the one that isn't ready.
fn wait_for_either(from: BorrowedFd, to: BorrowedFd) -> io::Result<()> {
    wait(from, PollFlags::POLLIN)?;
    wait(to, PollFlags::POLLOUT)
}

fn wait(fd: BorrowedFd, events: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::new(fd, events)], PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn is_pipe(fd: BorrowedFd) -> bool {
    fstat(fd)
        .is_ok_and(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFIFO)
}

/// Whether `fd` is `/dev/null`: such a stream is not worth a connection.
pub fn is_null(fd: BorrowedFd) -> bool {
    fstat(fd).is_ok_and(|stat| {
        SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR
            && stat.st_rdev == nix::sys::stat::makedev(1, 3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::BufRead;
    use std::thread;

    const STREAM: Stream = Stream {
        container_id: "c",
        exec_id: "e",
        kind: StreamKind::STDOUT,
        descriptor: 0,
    };

    /// A VMM's socket whose guest is `guest`, called with the connection after the header.
    fn peer<T: Send + 'static>(
        answer: &'static [u8],
        guest: impl FnOnce(UnixStream, StreamHeader) -> T + Send + 'static,
    ) -> (tempfile::TempDir, thread::JoinHandle<Option<T>>) {
        let dir = tempfile::tempdir().unwrap();
        let listener = sock::bind(&dir.path().join("vsock")).unwrap();
        let thread = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            // A buffer of one byte takes nothing that belongs to the header.
            io::BufReader::with_capacity(1, &stream)
                .read_line(&mut line)
                .unwrap();
            assert_eq!(line, "CONNECT 1025\n");
            stream.write_all(answer).unwrap();
            let mut length = [0; 4];
            stream.read_exact(&mut length).ok()?;
            let mut body = vec![0; u32::from_be_bytes(length) as usize];
            stream.read_exact(&mut body).unwrap();
            Some(guest(
                stream,
                StreamHeader::parse_from_bytes(&body).unwrap(),
            ))
        });
        (dir, thread)
    }

    fn bytes(n: usize) -> Vec<u8> {
        (0..n).map(|i| (i % 251) as u8).collect()
    }

    #[test]
    fn the_header_names_the_stream_and_no_byte_after_the_answer_is_lost() {
        let (dir, guest) = peer(b"OK 5\n", |mut stream, header| {
            stream.write_all(b"data").unwrap();
            header
        });
        let mut socket = attach(&dir.path().join("vsock"), &STREAM).unwrap();
        let mut data = String::new();
        socket.read_to_string(&mut data).unwrap();
        assert_eq!(data, "data");
        let header = guest.join().unwrap().unwrap();
        assert_eq!(
            (header.container_id.as_str(), header.exec_id.as_str()),
            ("c", "e")
        );
        assert_eq!(header.kind.enum_value(), Ok(StreamKind::STDOUT));
    }

    #[test]
    fn a_peer_that_does_not_say_ok_is_an_error() {
        for answer in [
            &b"NO\n"[..],
            b"\n",
            b"OK 11111111111111111111111111111111111\n",
        ] {
            let (dir, _guest) = peer(answer, |_, _| ());
            assert!(
                attach(&dir.path().join("vsock"), &STREAM).is_err(),
                "{answer:?}"
            );
        }
    }

    #[test]
    fn a_header_that_is_too_long_is_refused() {
        let long = "x".repeat(2000);
        let stream = Stream {
            container_id: &long,
            ..STREAM
        };
        assert!(header(&stream).is_err());
    }

    #[test]
    fn input_arrives_whole_and_its_end_is_a_half_close() {
        for file in [true, false] {
            let data = bytes(1_000_000);
            let expected = data.clone();
            let (here, mut there) = UnixStream::pair().unwrap();
            let guest = thread::spawn(move || {
                let mut data = Vec::new();
                there.read_to_end(&mut data).unwrap();
                there.write_all(b"still open").unwrap();
                data
            });
            if file {
                let mut input = tempfile::tempfile().unwrap();
                input.write_all(&data).unwrap();
                io::Seek::rewind(&mut input).unwrap();
                assert_eq!(pump_in(input.as_fd(), &here).unwrap(), 1_000_000);
            } else {
                let (input, mut writer) = io::pipe().unwrap();
                let feeder = thread::spawn(move || writer.write_all(&data).unwrap());
                assert_eq!(pump_in(input.as_fd(), &here).unwrap(), 1_000_000);
                feeder.join().unwrap();
            }
            assert!(guest.join().unwrap() == expected);
            let mut rest = String::new();
            (&here).read_to_string(&mut rest).unwrap();
            assert_eq!(rest, "still open");
        }
    }

    #[test]
    fn output_arrives_whole_in_pipes_files_and_files_opened_for_appending() {
        for kind in ["pipe", "file", "append"] {
            let data = bytes(1_000_000);
            let expected = data.clone();
            let (here, mut there) = UnixStream::pair().unwrap();
            let guest = thread::spawn(move || there.write_all(&data).unwrap());
            let received = if kind == "pipe" {
                let (mut reader, output) = io::pipe().unwrap();
                let drain = thread::spawn(move || {
                    let mut data = Vec::new();
                    reader.read_to_end(&mut data).unwrap();
                    data
                });
                pump_out(&here, output.as_fd()).unwrap();
                drop(output);
                guest.join().unwrap();
                drain.join().unwrap()
            } else {
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("out");
                let output = File::options()
                    .create(true)
                    .append(kind == "append")
                    .write(true)
                    .open(&path)
                    .unwrap();
                pump_out(&here, output.as_fd()).unwrap();
                guest.join().unwrap();
                std::fs::read(path).unwrap()
            };
            assert!(received == expected, "{kind}");
        }
    }

    #[test]
    fn what_has_arrived_can_be_read_while_the_pump_waits_for_more() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let (mut reader, output) = io::pipe().unwrap();
        let pump = thread::spawn(move || pump_out(&here, output.as_fd()));
        for line in [b"one\n", b"two\n"] {
            there.write_all(line).unwrap();
            let mut seen = [0; 4];
            reader.read_exact(&mut seen).unwrap();
            assert_eq!(&seen, line);
        }
        drop(there);
        assert_eq!(pump.join().unwrap().unwrap(), 8);
    }

    #[test]
    fn a_reader_that_goes_away_closes_the_guests_end() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let (reader, output) = io::pipe().unwrap();
        drop(reader);
        there.write_all(b"x").unwrap();
        assert!(pump_out(&here, output.as_fd()).is_err());
        let error = loop {
            if let Err(error) = there.write_all(b"x") {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn only_dev_null_is_null() {
        assert!(is_null(File::open("/dev/null").unwrap().as_fd()));
        assert!(!is_null(File::open("/dev/zero").unwrap().as_fd()));
        assert!(!is_null(tempfile::tempfile().unwrap().as_fd()));
    }
}

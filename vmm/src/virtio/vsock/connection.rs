//! One connection between a port of the guest and a unix socket of the host: its life, its two byte streams and their credit.
//!
//! The connection knows neither epoll nor virtqueues. The worker tells it what happened (a packet, readiness of the socket) and asks
//! it what to do next: [`Connection::next`] names the packet that the guest should get, [`Connection::fate`] says when it is over.
//!
//! Flow control (virtio 1.2, 5.10.6.3): each side announces the size of its receive buffer and how much it has taken out of it so
//! far. The host's side of the buffer exists only while its unix socket is full; otherwise data goes straight from guest
//! memory into the socket and back.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use super::packet::{
    Buffer, HOST_CID, Header, MAX_PAYLOAD, SHUTDOWN_RCV, SHUTDOWN_SEND, TYPE_STREAM, op,
};
use super::ring::ByteRing;

/// The receive buffer announced to the guest for each connection: the most a guest can make the VMM hold for it.
pub const BUF_ALLOC: u32 = 256 * 1024;

/// Consumed bytes that are worth a packet of their own to tell the guest. Half of the buffer: a guest that the host keeps up with
/// has two more of its longest packets to send meanwhile.
const UPDATE_STEP: u32 = BUF_ALLOC / 2;

/// Longest greeting: `CONNECT 4294967295\n` and some space.
const MAX_GREETING: usize = 32;

/// The two ports that identify a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Port on the host's side.
    pub host_port: u32,
    /// Port on the guest's side.
    pub guest_port: u32,
}

/// Where a connection stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// A host program has connected and not yet said which port it wants.
    Greeting,
    /// The guest is (`sent`), or is to be, asked to accept.
    Requested {
        /// Whether the guest has been asked.
        sent: bool,
    },
    /// Data may flow.
    Established,
    /// The guest has forgotten the connection; what it sent before is still on its way to the host program.
    Draining,
}

/// What the guest should be told next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// A packet without payload.
    Control {
        /// Its operation.
        op: u16,
        /// Its flags.
        flags: u32,
    },
    /// Data, at most this many bytes.
    Data {
        /// The guest's credit.
        credit: usize,
    },
}

/// Whether a connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It does.
    Alive,
    /// It is over, and the guest is to be told by an `RST`.
    Reset,
    /// It is over, and the guest knows.
    Gone,
}

/// What came of reading a greeting.
#[derive(Debug, PartialEq, Eq)]
pub enum Greeting {
    /// Not complete yet.
    Incomplete,
    /// The host program wants this port.
    Connect(u32),
    /// The host program broke the protocol or left.
    Invalid,
}

/// What came of reading data for the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// This many bytes, at least one.
    Data(usize),
    /// Nothing now.
    Nothing,
    /// Nothing ever again.
    End,
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    key: Key,
    stream: UnixStream,
    phase: Phase,
    /// The worker waits for room in the socket.
    watched_for_room: bool,

    /// Data from the guest that the socket had no room for.
    buffer: ByteRing,
    /// Bytes of the guest's that left for the host program, and what the guest knows of that.
    fwd_cnt: u32,
    fwd_cnt_told: u32,
    /// The guest will not send any more.
    guest_done: bool,
    /// The host program does not receive any more.
    host_deaf: bool,
    /// The host program has been told that no more comes.
    host_told: bool,

    /// The socket may have something to read.
    readable: bool,
    /// The host program will not send any more, and all it sent has been passed on.
    host_done: bool,
    /// The guest does not receive any more.
    guest_deaf: bool,
    /// Bytes sent to the guest, its receive buffer, and what it has taken out of it.
    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,

    respond: bool,
    credit_wanted: bool,
    credit_update: bool,
    /// Flags of the last `SHUTDOWN` sent.
    shutdown_told: u32,
}

impl Connection {
    /// A connection that a host program opened: it has yet to say where to.
    pub fn from_host(stream: UnixStream) -> Self {
        Self::new(
            stream,
            Key {
                host_port: 0,
                guest_port: 0,
            },
            Phase::Greeting,
        )
    }

    /// A connection that the guest asked for and the host program's socket has accepted.
    pub fn from_guest(stream: UnixStream, key: Key, request: &Header) -> Self {
        let mut connection = Self::new(stream, key, Phase::Established);
        connection.update_credit(request);
        connection.respond = true;
        connection
    }

    fn new(stream: UnixStream, key: Key, phase: Phase) -> Self {
        Self {
            key,
            stream,
            phase,
            watched_for_room: false,
            buffer: ByteRing::default(),
            fwd_cnt: 0,
            fwd_cnt_told: 0,
            guest_done: false,
            host_deaf: false,
            host_told: false,
            readable: true,
            host_done: false,
            guest_deaf: false,
            sent: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            respond: false,
            credit_wanted: false,
            credit_update: false,
            shutdown_told: 0,
        }
    }

    /// The ports; meaningless in [`Phase::Greeting`].
    pub fn key(&self) -> Key {
        self.key
    }

    /// The phase.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The unix socket, for epoll.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Whether the worker should wait for room in the socket, and does not, or the reverse.
    pub fn watch_changed(&self) -> bool {
        self.watched_for_room != self.wants_room()
    }

    /// Notes that the worker now waits for room in the socket if it should; returns whether.
    pub fn note_watch(&mut self) -> bool {
        self.watched_for_room = self.wants_room();
        self.watched_for_room
    }

    fn wants_room(&self) -> bool {
        !self.buffer.is_empty() && !self.host_deaf
    }

    /// Reads the host program's greeting. Nothing beyond its newline is taken: that is the guest's already.
    pub fn read_greeting(&mut self) -> Greeting {
        let mut bytes = [0u8; MAX_GREETING];
        let peeked = loop {
            // SAFETY: the pointer and length describe `bytes`, which outlives the call.
            let n = unsafe {
                libc::recv(
                    self.fd(),
                    bytes.as_mut_ptr().cast(),
                    bytes.len(),
                    libc::MSG_PEEK | libc::MSG_DONTWAIT,
                )
            };
            match usize::try_from(n) {
                Ok(0) => return Greeting::Invalid,
                Ok(n) => break &bytes[..n],
                Err(_) => match io::Error::last_os_error().kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => return Greeting::Incomplete,
                    _ => return Greeting::Invalid,
                },
            }
        };
        let Some(newline) = peeked.iter().position(|byte| *byte == b'\n') else {
            return if peeked.len() < MAX_GREETING {
                Greeting::Incomplete
            } else {
                Greeting::Invalid
            };
        };
        let port = parse_greeting(&peeked[..newline]);
        let mut taken = [0u8; MAX_GREETING];
        match (port, (&self.stream).read_exact(&mut taken[..=newline])) {
            (Some(port), Ok(())) => Greeting::Connect(port),
            _ => Greeting::Invalid,
        }
    }

    /// Makes the guest be asked for the connection.
    pub fn request(&mut self, key: Key) {
        self.key = key;
        self.phase = Phase::Requested { sent: false };
    }

    /// The guest accepted: the host program is told, and data may flow. False if the host program could not be told.
    pub fn accepted(&mut self, response: &Header) -> bool {
        self.update_credit(response);
        self.phase = Phase::Established;
        self.readable = true;
        // The socket's buffer is empty, so a short line always fits.
        let line = format!("OK {}\n", self.key.host_port);
        self.send(&[iovec(line.as_bytes())]) == line.len()
    }

    /// The socket has something to read, or will never have again.
    pub fn on_readable(&mut self) {
        self.readable = true;
    }

    /// The host program has closed its end: it reads nothing any more, and what it wrote is still to be read.
    pub fn on_hang_up(&mut self) {
        self.readable = true;
        self.deafen_host();
    }

    /// Takes over what every packet of the guest says of its receive buffer.
    pub fn update_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_wanted = false;
        }
    }

    /// How much the guest can take. A guest that claims nonsense only stalls itself.
    fn credit(&self) -> u32 {
        self.peer_buf_alloc
            .saturating_sub(self.sent.wrapping_sub(self.peer_fwd_cnt))
    }

    /// The guest asks how much may be sent.
    pub fn on_credit_request(&mut self) {
        self.credit_update = true;
    }

    /// The guest has shut down one or both directions.
    pub fn on_shutdown(&mut self, flags: u32) {
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_done = true;
            self.tell_host_the_end();
        }
        if flags & SHUTDOWN_RCV != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            // The host program's writes fail from here on, as they would on a socket of its own machine.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
    }

    /// The guest has forgotten the connection.
    pub fn on_reset(&mut self) {
        self.phase = Phase::Draining;
        self.guest_done = true;
        self.guest_deaf = true;
    }

    /// Data from the guest. False if the guest had no credit for it, or had said that there would be none.
    pub fn on_data(&mut self, payload: Buffer<'_>) -> bool {
        let len = payload.len();
        if self.guest_done || self.buffer.len() + len > BUF_ALLOC as usize {
            return false;
        }
        let mut written = 0;
        if !self.host_deaf && self.buffer.is_empty() && len > 0 {
            let mut iovecs = Vec::with_capacity(4);
            payload.append_iovecs(&mut iovecs);
            written = self.send(&iovecs);
        }
        if self.host_deaf {
            // Nobody will read it. It counts as consumed, so that the guest's writer fails by SHUTDOWN and does not hang.
            written = len;
        } else if written < len
            && let Ok((_, rest)) = payload.split_at(written)
        {
            self.buffer.push(&rest);
        }
        self.forwarded(written);
        true
    }

    /// The socket may have room again.
    pub fn flush(&mut self) {
        while !self.buffer.is_empty() && !self.host_deaf {
            let (first, second) = self.buffer.as_slices();
            let iovecs = [iovec(first), iovec(second)];
            let written = self.send(&iovecs);
            if written == 0 {
                break;
            }
            self.buffer.consume(written);
            self.forwarded(written);
        }
        self.tell_host_the_end();
    }

    /// Reads data for the guest straight into its buffers.
    pub fn receive(&mut self, iovecs: &[libc::iovec]) -> Received {
        loop {
            // SAFETY: the list describes guest memory that is mapped for as long as the caller holds it; the kernel writes only
            // there, and no Rust reference to guest memory exists.
            let n = unsafe { libc::readv(self.fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) };
            match usize::try_from(n) {
                Ok(0) => break,
                Ok(n) => {
                    self.sent = self.sent.wrapping_add(n as u32);
                    return Received::Data(n);
                }
                Err(_) => match io::Error::last_os_error().kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => {
                        self.readable = false;
                        return Received::Nothing;
                    }
                    // The host program closed with data of the guest unread: all it wrote has been read.
                    _ => {
                        self.deafen_host();
                        break;
                    }
                },
            }
        }
        self.host_done = true;
        Received::End
    }

    /// What the guest should be told next, if anything.
    pub fn next(&self) -> Option<Next> {
        let control = |op, flags| Some(Next::Control { op, flags });
        match self.phase {
            Phase::Requested { sent: false } => return control(op::REQUEST, 0),
            Phase::Established => {}
            Phase::Greeting | Phase::Requested { sent: true } | Phase::Draining => return None,
        }
        if self.respond {
            return control(op::RESPONSE, 0);
        }
        let shutdown = self.shutdown_flags();
        if shutdown & !self.shutdown_told != 0 {
            return control(op::SHUTDOWN, shutdown);
        }
        if self.readable && !self.host_done && !self.guest_deaf {
            let credit = self.credit();
            if credit > 0 {
                return Some(Next::Data {
                    credit: credit as usize,
                });
            }
            if !self.credit_wanted {
                return control(op::CREDIT_REQUEST, 0);
            }
        }
        if self.credit_update {
            return control(op::CREDIT_UPDATE, 0);
        }
        None
    }

    /// The header of a packet to the guest, which counts as sent by this.
    pub fn header(&mut self, guest_cid: u64, op: u16, flags: u32, len: u32) -> Header {
        match op {
            op::REQUEST => self.phase = Phase::Requested { sent: true },
            op::RESPONSE => self.respond = false,
            op::SHUTDOWN => self.shutdown_told |= flags,
            op::CREDIT_REQUEST => self.credit_wanted = true,
            _ => {}
        }
        // Every header carries the counters, so each one is a credit update.
        self.credit_update = false;
        self.fwd_cnt_told = self.fwd_cnt;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.fwd_cnt,
        }
    }

    /// Whether the connection is over. It is once both directions have ended, everything that was sent has been passed on, and
    /// the guest has been told of the host program's part. A guest that closes a socket waits for the `RST`.
    pub fn fate(&self) -> Fate {
        let host_has_all = self.host_deaf || (self.guest_done && self.buffer.is_empty());
        match self.phase {
            Phase::Established => {
                let guest_has_all = self.host_done || self.guest_deaf;
                let told = self.shutdown_flags() & !self.shutdown_told == 0 && !self.respond;
                if host_has_all && guest_has_all && told {
                    Fate::Reset
                } else {
                    Fate::Alive
                }
            }
            Phase::Draining if host_has_all => Fate::Gone,
            _ => Fate::Alive,
        }
    }

    /// Closes the socket. What the host program wrote and nobody will read is taken out first, or the kernel would turn the end of
    /// the guest's data into an error at the reader.
    pub fn close(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        let mut scratch = [0u8; 4096];
        // After the shutdown nothing can be added, so this ends with what the socket's buffer held.
        while let Ok(1..) = (&self.stream).read(&mut scratch) {}
    }

    /// The directions that the host program has ended and the guest has not.
    fn shutdown_flags(&self) -> u32 {
        let mut flags = 0;
        if self.host_deaf && !self.guest_done {
            flags |= SHUTDOWN_RCV;
        }
        if self.host_done && !self.guest_deaf {
            flags |= SHUTDOWN_SEND;
        }
        flags
    }

    fn deafen_host(&mut self) {
        self.host_deaf = true;
        self.forwarded(self.buffer.len());
        self.buffer.clear();
    }

    fn tell_host_the_end(&mut self) {
        if self.guest_done && self.buffer.is_empty() && !self.host_told {
            self.host_told = true;
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    fn forwarded(&mut self, count: usize) {
        self.fwd_cnt = self.fwd_cnt.wrapping_add(count as u32);
        if self.fwd_cnt.wrapping_sub(self.fwd_cnt_told) >= UPDATE_STEP {
            self.credit_update = true;
        }
    }

    /// Writes to the socket as much as it takes. Notes when the host program does not receive any more.
    fn send(&mut self, iovecs: &[libc::iovec]) -> usize {
        let message = libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: iovecs.as_ptr().cast_mut(),
            msg_iovlen: iovecs.len(),
            msg_control: std::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        };
        loop {
            // SAFETY: the list describes memory that the caller holds for the length of the call: its own, or mapped guest
            // memory. The kernel only reads it.
            let n = unsafe {
                libc::sendmsg(
                    self.fd(),
                    &raw const message,
                    libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
                )
            };
            if let Ok(n) = usize::try_from(n) {
                return n;
            }
            match io::Error::last_os_error().kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => return 0,
                _ => {
                    self.deafen_host();
                    return 0;
                }
            }
        }
    }
}

fn iovec(bytes: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}

/// `CONNECT <port>`, as a line without its end.
fn parse_greeting(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?.trim_end();
    let mut words = line.split_ascii_whitespace();
    match (words.next(), words.next(), words.next()) {
        (Some(verb), Some(port), None) if verb.eq_ignore_ascii_case("connect") => {
            port.bytes()
                .all(|byte| byte.is_ascii_digit())
                .then_some(())?;
            port.parse().ok()
        }
        _ => None,
    }
}

/// Most bytes that one batch of packets to the guest carries.
pub const MAX_BATCH: usize = MAX_PAYLOAD;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greetings_are_parsed_strictly() {
        let cases: &[(&[u8], Option<u32>)] = &[
            (b"CONNECT 1024", Some(1024)),
            (b"connect 1024", Some(1024)),
            (b"CONNECT 4294967295\r", Some(u32::MAX)),
            (b"CONNECT 4294967296", None),
            (b"CONNECT -1", None),
            (b"CONNECT +1", None),
            (b"CONNECT", None),
            (b"CONNECT 1 2", None),
            (b"GET / HTTP/1.1", None),
            (b"", None),
            (b"\xff\xfe", None),
        ];
        for (line, port) in cases {
            assert_eq!(
                parse_greeting(line),
                *port,
                "{:?}",
                String::from_utf8_lossy(line)
            );
        }
    }

    #[test]
    fn a_guest_that_claims_nonsense_gets_no_credit() {
        let (stream, _peer) = UnixStream::pair().unwrap();
        let mut header = Header {
            buf_alloc: 1000,
            ..Header::default()
        };
        let mut connection = Connection::from_guest(
            stream,
            Key {
                host_port: 1,
                guest_port: 2,
            },
            &header,
        );
        assert_eq!(connection.credit(), 1000);
        connection.sent = 600;
        assert_eq!(connection.credit(), 400);
        // More consumed than was ever sent.
        header.fwd_cnt = 601;
        connection.update_credit(&header);
        assert_eq!(connection.credit(), 0);
        // A buffer that shrank below what is in flight.
        header.fwd_cnt = 0;
        header.buf_alloc = 10;
        connection.update_credit(&header);
        assert_eq!(connection.credit(), 0);
        // The counters wrap.
        connection.sent = 5;
        header.fwd_cnt = u32::MAX - 4;
        header.buf_alloc = 100;
        connection.update_credit(&header);
        assert_eq!(connection.credit(), 90);
    }
}

//! The device against a mock driver, in both directions, with honest and hostile guests.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::connection::BUF_ALLOC;
use super::packet::{
    HEADER_LEN, HOST_CID, Header, MAX_PAYLOAD, SHUTDOWN_RCV, SHUTDOWN_SEND, TYPE_STREAM, op,
};
use super::table::MAX_CONNECTIONS;
use super::*;
use crate::virtio::Memory;
use crate::virtio::mock_driver::{self, Line, PATIENCE, Piece, Random, Ring};

const CID: u64 = 42;
const RING: u16 = 256;
const RX_RING: u64 = 0;
const TX_RING: u64 = RX_RING + Ring::footprint(RING);
const EVENT_RING: u64 = TX_RING + Ring::footprint(RING);
const RX_BUFFERS: u64 = 0x10_0000;
const RX_BUFFER: u64 = 0x2000;
const RX_DATA: usize = 4096;
const TX_BUFFERS: u64 = 0x40_0000;
const MEMORY: usize = 0x80_0000;

struct Guest {
    memory: Memory,
    line: Line,
    rx: Ring,
    tx: Ring,
    /// Whether used receive buffers go back to the device.
    refill: bool,
    /// Receive buffers by chain.
    buffers: std::collections::HashMap<u16, u64>,
    device: Vsock,
    dir: TempDir,
}

impl Guest {
    fn new() -> Self {
        Self::with_rx_buffers(100)
    }

    fn with_rx_buffers(count: u64) -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let memory = mock_driver::memory(MEMORY);
        let line = Line::new();
        let mut guest = Self {
            rx: Ring::new(&memory, RX_RING, RING),
            tx: Ring::new(&memory, TX_RING, RING),
            refill: true,
            buffers: Default::default(),
            device: Vsock::new(CID, listener, path),
            memory,
            line,
            dir,
        };
        for i in 0..count {
            guest.post_rx(RX_BUFFERS + i * RX_BUFFER);
        }
        let event = Ring::new(&guest.memory, EVENT_RING, 16);
        guest
            .device
            .activate(Activation {
                memory: guest.memory.clone(),
                features: guest.device.features(),
                queues: vec![guest.rx.active(), guest.tx.active(), event.active()],
                interrupt: guest.line.interrupt.clone(),
            })
            .unwrap();
        guest
    }

    fn post_rx(&mut self, addr: u64) {
        let pieces = [
            Piece::write(addr, HEADER_LEN),
            Piece::write(addr + 64, RX_DATA),
        ];
        let head = self.rx.post(&pieces).unwrap();
        self.buffers.insert(head, addr);
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("vsock")
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("vsock_{port}"))).unwrap()
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        self.send_raw(header, payload, &[HEADER_LEN, payload.len()]);
    }

    /// Sends header and payload, cut into descriptors of these lengths.
    fn send_raw(&mut self, header: Header, payload: &[u8], cuts: &[usize]) {
        let bytes = [header.to_bytes().as_slice(), payload].concat();
        self.memory
            .memory()
            .write_slice(&bytes, GuestAddress(TX_BUFFERS))
            .unwrap();
        let mut at = TX_BUFFERS;
        let mut pieces = Vec::new();
        for cut in cuts.iter().filter(|cut| **cut > 0) {
            pieces.push(Piece::read(at, *cut));
            at += *cut as u64;
        }
        let posted = self.tx.post(&pieces).unwrap();
        self.tx.notify();
        let (head, _) = self.tx.wait(&self.line);
        assert_eq!(head, posted);
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        self.receive_for(PATIENCE).expect("no packet came")
    }

    fn receive_for(&mut self, timeout: Duration) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.rx.wait_for(&self.line, timeout)?;
        let addr = self.buffers.remove(&head).unwrap();
        let mut bytes = [0; HEADER_LEN];
        let memory = self.memory.memory();
        memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        let header = Header::from_bytes(&bytes);
        assert_eq!(len as usize, HEADER_LEN + header.len as usize);
        let mut payload = vec![0; header.len as usize];
        memory
            .read_slice(&mut payload, GuestAddress(addr + 64))
            .unwrap();
        assert_eq!(header.dst_cid, CID);
        // A packet to another host is refused in that one's name.
        assert!(header.src_cid == HOST_CID || header.op == op::RST);
        if self.refill {
            self.post_rx(addr);
            self.rx.notify();
        }
        Some((header, payload))
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, payload) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        assert!(payload.is_empty());
        header
    }

    /// Nothing more comes for the guest. Shown by a packet that is answered, not by waiting.
    fn expect_silence(&mut self) {
        self.send(request(60_000, 60_000), &[]);
        let header = self.expect(op::RST);
        assert_eq!((header.src_port, header.dst_port), (60_000, 60_000));
    }

    /// A connection that the guest opened.
    fn connect(&mut self, listener: &UnixListener, host_port: u32, guest_port: u32) -> UnixStream {
        self.send(request(host_port, guest_port), &[]);
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let header = self.expect(op::RESPONSE);
        assert_eq!((header.src_port, header.dst_port), (host_port, guest_port));
        assert_eq!(header.buf_alloc, BUF_ALLOC);
        stream
    }
}

fn packet(op: u16, host_port: u32, guest_port: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: TYPE_STREAM,
        op,
        buf_alloc: 256 * 1024,
        ..Header::default()
    }
}

fn request(host_port: u32, guest_port: u32) -> Header {
    packet(op::REQUEST, host_port, guest_port)
}

fn data(host_port: u32, guest_port: u32, len: usize) -> Header {
    Header {
        len: len as u32,
        ..packet(op::RW, host_port, guest_port)
    }
}

fn shutdown(host_port: u32, guest_port: u32, flags: u32) -> Header {
    Header {
        flags,
        ..packet(op::SHUTDOWN, host_port, guest_port)
    }
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i + seed) % 251) as u8).collect()
}

fn read_exactly(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn the_configuration_space_holds_the_guests_cid() {
    let guest = Guest::new();
    assert_eq!(guest.device.config(), [42, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn the_guest_connects_to_a_host_program_and_both_talk() {
    let mut guest = Guest::new();
    let listener = guest.listen(1024);
    let mut host = guest.connect(&listener, 1024, 5000);
    guest.send(data(1024, 5000, 5), b"hello");
    assert_eq!(read_exactly(&mut host, 5), b"hello");
    host.write_all(b"world").unwrap();
    let (header, payload) = guest.receive();
    assert_eq!(header.op, op::RW);
    assert_eq!(header.fwd_cnt, 5);
    assert_eq!(payload, b"world");
}

#[test]
fn a_guests_connection_is_refused_where_nobody_listens() {
    let mut guest = Guest::new();
    guest.send(request(1025, 5000), &[]);
    let header = guest.expect(op::RST);
    assert_eq!((header.src_port, header.dst_port), (1025, 5000));
}

#[test]
fn a_host_program_connects_to_the_guest_with_a_greeting_in_pieces() {
    let mut guest = Guest::new();
    let mut host = UnixStream::connect(guest.path()).unwrap();
    host.set_read_timeout(Some(PATIENCE)).unwrap();
    for piece in [b"CON".as_slice(), b"NECT 7", b"7"] {
        host.write_all(piece).unwrap();
        guest.expect_silence();
    }
    // Data right behind the greeting belongs to the guest.
    host.write_all(b"7\nearly").unwrap();
    let header = guest.expect(op::REQUEST);
    assert_eq!(header.dst_port, 777);
    guest.send(packet(op::RESPONSE, header.src_port, 777), &[]);
    let line = format!("OK {}\n", header.src_port);
    assert_eq!(read_exactly(&mut host, line.len()), line.as_bytes());
    let (header, payload) = guest.receive();
    assert_eq!(
        (header.op, payload.as_slice()),
        (op::RW, b"early".as_slice())
    );
    guest.send(data(header.src_port, 777, 2), b"hi");
    assert_eq!(read_exactly(&mut host, 2), b"hi");
}

#[test]
fn a_host_program_is_refused_where_the_guest_does_not_listen() {
    let mut guest = Guest::new();
    let mut host = UnixStream::connect(guest.path()).unwrap();
    host.write_all(b"CONNECT 9\n").unwrap();
    let header = guest.expect(op::REQUEST);
    guest.send(packet(op::RST, header.src_port, 9), &[]);
    let mut bytes = Vec::new();
    host.read_to_end(&mut bytes).unwrap();
    assert!(bytes.is_empty());
    guest.expect_silence();
}

#[test]
fn bad_greetings_close_the_connection() {
    let mut guest = Guest::new();
    for greeting in [
        "HELLO\n".to_owned(),
        "CONNECT x\n".to_owned(),
        "CONNECT 99999999999\n".to_owned(),
        "C".repeat(40),
    ] {
        let mut host = UnixStream::connect(guest.path()).unwrap();
        host.set_read_timeout(Some(PATIENCE)).unwrap();
        host.write_all(greeting.as_bytes()).unwrap();
        let mut bytes = Vec::new();
        // Unread bytes at close turn the end into an error: both mean refused.
        let _ = host.read_to_end(&mut bytes);
        assert!(bytes.is_empty(), "{greeting:?}");
    }
    guest.expect_silence();
}

#[test]
fn a_host_program_that_leaves_before_the_answer_resets_the_request() {
    let mut guest = Guest::new();
    let mut host = UnixStream::connect(guest.path()).unwrap();
    host.write_all(b"CONNECT 9\n").unwrap();
    let header = guest.expect(op::REQUEST);
    drop(host);
    let reset = guest.expect(op::RST);
    assert_eq!((reset.src_port, reset.dst_port), (header.src_port, 9));
}

#[test]
fn connections_made_before_the_driver_is_ready_wait_for_it() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("vsock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut early = UnixStream::connect(&path).unwrap();
    early.write_all(b"CONNECT 5\n").unwrap();

    let memory = mock_driver::memory(MEMORY);
    let line = Line::new();
    let mut rx = Ring::new(&memory, RX_RING, RING);
    let tx = Ring::new(&memory, TX_RING, RING);
    rx.post(&[Piece::write(RX_BUFFERS, HEADER_LEN + RX_DATA)])
        .unwrap();
    let mut device = Vsock::new(CID, listener, path);
    device
        .activate(Activation {
            memory: memory.clone(),
            features: device.features(),
            queues: vec![rx.active(), tx.active()],
            interrupt: line.interrupt.clone(),
        })
        .unwrap();
    rx.wait(&line);
    let mut bytes = [0; HEADER_LEN];
    memory
        .memory()
        .read_slice(&mut bytes, GuestAddress(RX_BUFFERS))
        .unwrap();
    let header = Header::from_bytes(&bytes);
    assert_eq!((header.op, header.dst_port), (op::REQUEST, 5));
}

#[test]
fn more_than_the_credit_flows_from_the_guest_to_a_slow_reader() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    let mut host = guest.connect(&listener, 1, 2);
    let total = 4 << 20;
    let bytes = pattern(total, 7);
    let expected = bytes.clone();
    let reader = std::thread::spawn(move || read_exactly(&mut host, total) == expected);

    let (mut sent, mut forwarded) = (0usize, 0u32);
    while sent < total {
        let credit = BUF_ALLOC - (sent as u32).wrapping_sub(forwarded);
        if credit == 0 {
            let (header, _) = guest.receive();
            assert_eq!(header.op, op::CREDIT_UPDATE);
            forwarded = header.fwd_cnt;
            continue;
        }
        let len = (credit as usize).min(MAX_PAYLOAD).min(total - sent);
        guest.send(data(1, 2, len), &bytes[sent..sent + len]);
        sent += len;
    }
    assert!(reader.join().unwrap());
}

#[test]
fn more_than_the_credit_flows_to_a_slow_guest() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    guest.send(
        Header {
            buf_alloc: 10_000,
            ..request(1, 2)
        },
        &[],
    );
    let (mut host, _) = listener.accept().unwrap();
    guest.expect(op::RESPONSE);
    let total = 1 << 20;
    let bytes = pattern(total, 3);
    let expected = bytes.clone();
    let writer = std::thread::spawn(move || host.write_all(&bytes).map(|()| host));

    let mut received = Vec::new();
    let mut told = 0;
    while received.len() < total {
        let (header, payload) = guest.receive();
        match header.op {
            op::RW => received.extend(payload),
            // The device is out of credit and asks: everything has been consumed.
            op::CREDIT_REQUEST => {
                assert_eq!(received.len() - told, 10_000, "asked too early");
                told = received.len();
                let update = Header {
                    buf_alloc: 10_000,
                    fwd_cnt: told as u32,
                    ..packet(op::CREDIT_UPDATE, 1, 2)
                };
                guest.send(update, &[]);
            }
            other => panic!("unexpected op {other}"),
        }
        assert!(received.len() - told <= 10_000, "more than the credit");
    }
    assert_eq!(received, expected);
    drop(writer.join().unwrap().unwrap());
}

#[test]
fn payloads_may_be_spread_over_descriptors_in_any_way() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    let mut host = guest.connect(&listener, 1, 2);
    let bytes = pattern(1000, 1);
    for cuts in [
        vec![1044],
        vec![10, 34, 1000],
        vec![43, 2, 999],
        vec![50, 1, 1, 992],
    ] {
        guest.send_raw(data(1, 2, 1000), &bytes, &cuts);
        assert_eq!(read_exactly(&mut host, 1000), bytes, "{cuts:?}");
    }
}

#[test]
fn a_host_programs_half_close_is_an_end_of_file_for_the_guest_which_can_still_send() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    let mut host = guest.connect(&listener, 1, 2);
    host.write_all(b"last words").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let (header, payload) = guest.receive();
    assert_eq!(
        (header.op, payload.as_slice()),
        (op::RW, b"last words".as_slice())
    );
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_SEND);
    guest.send(data(1, 2, 5), b"reply");
    assert_eq!(read_exactly(&mut host, 5), b"reply");
    // The guest closes; everything has arrived, so the reset is prompt.
    guest.send(shutdown(1, 2, SHUTDOWN_RCV | SHUTDOWN_SEND), &[]);
    guest.expect(op::RST);
    assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_guests_half_close_is_an_end_of_file_for_the_host_program_which_can_still_send() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    let mut host = guest.connect(&listener, 1, 2);
    guest.send(data(1, 2, 4), b"done");
    guest.send(shutdown(1, 2, SHUTDOWN_SEND), &[]);
    let mut bytes = Vec::new();
    host.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"done");
    host.write_all(b"answer").unwrap();
    let (header, payload) = guest.receive();
    assert_eq!(
        (header.op, payload.as_slice()),
        (op::RW, b"answer".as_slice())
    );
    drop(host);
    // The host program's end, and with it the connection's.
    assert_eq!(
        guest.expect(op::SHUTDOWN).flags & SHUTDOWN_SEND,
        SHUTDOWN_SEND
    );
    guest.expect(op::RST);
}

#[test]
fn a_host_program_that_closes_leaves_its_data_to_the_guest() {
    // Little credit, so that most of the data is still in the socket when it is closed.
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    guest.send(
        Header {
            buf_alloc: 5000,
            ..request(1, 2)
        },
        &[],
    );
    let (mut host, _) = listener.accept().unwrap();
    guest.expect(op::RESPONSE);
    let bytes = pattern(20_000, 9);
    host.write_all(&bytes).unwrap();
    drop(host);
    let mut received = Vec::new();
    let mut flags = 0;
    loop {
        let (header, payload) = guest.receive();
        match header.op {
            op::RW => received.extend(payload),
            op::CREDIT_REQUEST => guest.send(
                Header {
                    buf_alloc: 5000,
                    fwd_cnt: received.len() as u32,
                    ..packet(op::CREDIT_UPDATE, 1, 2)
                },
                &[],
            ),
            op::SHUTDOWN => flags |= header.flags,
            op::RST => break,
            other => panic!("unexpected op {other}"),
        }
    }
    assert_eq!(received, bytes);
    assert_eq!(flags, SHUTDOWN_RCV | SHUTDOWN_SEND);
}

#[test]
fn what_a_guest_sent_before_closing_or_resetting_reaches_a_slow_reader() {
    for reset in [false, true] {
        let mut guest = Guest::new();
        let listener = guest.listen(1);
        let mut host = guest.connect(&listener, 1, 2);
        // More than a unix socket holds, so that part of it is in the device's buffer.
        let bytes = pattern(BUF_ALLOC as usize, 5);
        let mut sent = 0;
        let mut forwarded = 0;
        while sent < bytes.len() {
            let len = MAX_PAYLOAD.min(bytes.len() - sent);
            guest.send(data(1, 2, len), &bytes[sent..sent + len]);
            sent += len;
        }
        while let Some((header, _)) = guest.receive_for(Duration::ZERO) {
            forwarded = header.fwd_cnt;
        }
        // Fill what has been forwarded to the socket meanwhile.
        let more = pattern(forwarded as usize, 6);
        for chunk in more.chunks(MAX_PAYLOAD) {
            guest.send(data(1, 2, chunk.len()), chunk);
        }
        if reset {
            guest.send(packet(op::RST, 1, 2), &[]);
            // The ports are free at once, though the old connection still drains.
            let _second = guest.connect_ignoring_updates(&listener, 1, 2);
        } else {
            guest.send(shutdown(1, 2, SHUTDOWN_RCV | SHUTDOWN_SEND), &[]);
        }
        let mut received = Vec::new();
        host.read_to_end(&mut received).unwrap();
        assert_eq!(received.len(), bytes.len() + more.len());
        assert!(received == [bytes, more].concat());
        if !reset {
            while guest.receive().0.op != op::RST {}
        }
    }
}

impl Guest {
    fn connect_ignoring_updates(
        &mut self,
        listener: &UnixListener,
        host_port: u32,
        guest_port: u32,
    ) -> UnixStream {
        self.send(request(host_port, guest_port), &[]);
        let (stream, _) = listener.accept().unwrap();
        while self.receive().0.op != op::RESPONSE {}
        stream
    }
}

#[test]
fn a_guest_that_stops_receiving_makes_the_host_programs_writes_fail() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    let mut host = guest.connect(&listener, 1, 2);
    guest.send(shutdown(1, 2, SHUTDOWN_RCV), &[]);
    guest.expect_silence();
    assert_eq!(
        host.write_all(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    guest.send(data(1, 2, 2), b"ok");
    assert_eq!(read_exactly(&mut host, 2), b"ok");
}

#[test]
fn a_host_program_that_stops_receiving_is_announced_to_the_guest() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    let mut host = guest.connect(&listener, 1, 2);
    host.shutdown(Shutdown::Read).unwrap();
    guest.send(data(1, 2, 2), b"no");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_RCV);
    host.write_all(b"but").unwrap();
    assert_eq!(guest.receive().1, b"but");
}

#[test]
fn data_waits_for_receive_buffers_and_goes_on_when_they_come() {
    let mut guest = Guest::with_rx_buffers(0);
    guest.refill = false;
    let listener = guest.listen(1);
    guest.send(request(1, 2), &[]);
    let (mut host, _) = listener.accept().unwrap();
    host.write_all(&pattern(10_000, 0)).unwrap();
    // One buffer at a time: each must wake the device, which had run out.
    let mut received = Vec::new();
    for round in 0..4 {
        guest.post_rx(RX_BUFFERS);
        assert!(
            guest.rx.notify(),
            "round {round}: a starved device must ask for notifications"
        );
        let (header, payload) = guest.receive();
        if round == 0 {
            assert_eq!(header.op, op::RESPONSE);
        } else {
            assert_eq!(header.op, op::RW);
            received.extend(payload);
        }
    }
    assert_eq!(received, pattern(10_000, 0));
}

#[test]
fn refusals_wait_for_receive_buffers_and_hold_the_guests_packets_back() {
    let mut guest = Guest::with_rx_buffers(0);
    guest.refill = false;
    let total = 1000u32;
    let mut posted = 0u32;
    let mut done = 0u32;
    let mut post = |guest: &mut Guest, patience: Duration| {
        while posted < total {
            if posted >= done + 128 {
                break;
            }
            let addr = TX_BUFFERS + u64::from(posted % 128) * 64;
            let bytes = packet(op::RW, 7, posted).to_bytes();
            guest
                .memory
                .memory()
                .write_slice(&bytes, GuestAddress(addr))
                .unwrap();
            guest.tx.post(&[Piece::read(addr, HEADER_LEN)]).unwrap();
            posted += 1;
        }
        guest.tx.notify();
        while guest.tx.wait_for(&guest.line, patience).is_some() {
            done += 1;
        }
        done
    };
    let mut last = 0;
    loop {
        let now = post(&mut guest, Duration::from_millis(50));
        if now == last {
            break;
        }
        last = now;
    }
    assert_eq!(
        last, 256,
        "the device takes no more packets than it can answer"
    );
    let mut seen = 0;
    while seen < total {
        guest.post_rx(RX_BUFFERS);
        guest.rx.notify();
        let header = guest.expect(op::RST);
        assert_eq!(header.dst_port, seen);
        seen += 1;
        post(&mut guest, Duration::ZERO);
    }
}

#[test]
fn hostile_packets_are_refused_and_harm_nobody_else() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    let mut good = guest.connect(&listener, 1, 100);

    // Unknown connections, by every operation but RST.
    for op in [
        op::RESPONSE,
        op::SHUTDOWN,
        op::RW,
        op::CREDIT_UPDATE,
        op::CREDIT_REQUEST,
        0,
        77,
    ] {
        guest.send(packet(op, 1, 999), &[]);
        guest.expect(op::RST);
    }
    guest.send(packet(op::RST, 1, 999), &[]);

    // Wrong type, wrong destination, foreign source.
    let wrong_type = Header {
        kind: 2,
        ..request(1, 3)
    };
    guest.send(wrong_type, &[]);
    assert_eq!(guest.expect(op::RST).kind, 2);
    guest.send(
        Header {
            src_cid: CID + 1,
            ..request(1, 3)
        },
        &[],
    );
    guest.expect_silence();

    // Too short for a header, no readable part, outside of memory, a length that is not there, a length beyond the limit.
    let bad = [
        vec![Piece::read(TX_BUFFERS, HEADER_LEN - 1)],
        vec![Piece::write(TX_BUFFERS, 4096)],
        vec![Piece::read(MEMORY as u64 - 4, HEADER_LEN)],
        vec![Piece::read(u64::MAX - 4, HEADER_LEN)],
        (0..60).map(|_| Piece::read(TX_BUFFERS, 1)).collect(),
    ];
    for pieces in bad {
        guest.tx.post(&pieces).unwrap();
        guest.tx.notify();
        guest.tx.wait(&guest.line);
    }
    guest.expect_silence();
    for (guest_port, claimed, real) in [
        (201, 100, 99),
        (202, u32::MAX, 10),
        (203, MAX_PAYLOAD as u32 + 1, MAX_PAYLOAD + 1),
    ] {
        let mut host = guest.connect(&listener, 1, guest_port);
        let header = Header {
            len: claimed,
            ..packet(op::RW, 1, guest_port)
        };
        guest.send(header, &vec![0; real]);
        guest.expect(op::RST);
        assert_eq!(host.read(&mut [0; 1]).unwrap(), 0, "len {claimed}");
    }

    // Unlawful operations on a living connection end that one.
    for (guest_port, op) in [(301, op::REQUEST), (302, op::RESPONSE), (303, 0), (304, 8)] {
        let mut host = guest.connect(&listener, 1, guest_port);
        guest.send(packet(op, 1, guest_port), &[]);
        guest.expect(op::RST);
        assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
    }

    // Data after the end of data.
    let _host = guest.connect(&listener, 1, 401);
    guest.send(shutdown(1, 401, SHUTDOWN_SEND), &[]);
    guest.send(data(1, 401, 1), b"x");
    guest.expect(op::RST);

    // A huge receive buffer costs nothing.
    let mut host = guest.connect(&listener, 1, 501);
    let update = Header {
        buf_alloc: u32::MAX,
        fwd_cnt: u32::MAX,
        ..packet(op::CREDIT_UPDATE, 1, 501)
    };
    guest.send(update, &[]);
    guest.send(
        Header {
            buf_alloc: u32::MAX,
            ..packet(op::CREDIT_UPDATE, 1, 501)
        },
        &[],
    );
    host.write_all(b"fine").unwrap();
    assert_eq!(guest.receive().1, b"fine");

    guest.send(data(1, 100, 4), b"good");
    assert_eq!(read_exactly(&mut good, 4), b"good");
}

#[test]
fn a_guest_that_ignores_its_credit_is_reset_and_can_not_fill_memory() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    let _host = guest.connect(&listener, 1, 2);
    let chunk = vec![7; MAX_PAYLOAD];
    // The unix socket holds some, the device's buffer 256 KiB, and then it ends.
    let mut sent = 0;
    let reset = loop {
        guest.send(data(1, 2, chunk.len()), &chunk);
        sent += chunk.len();
        match guest.receive_for(Duration::ZERO) {
            Some((header, _)) if header.op == op::RST => break true,
            _ if sent > 8 << 20 => break false,
            _ => {}
        }
    };
    assert!(reset, "{sent} bytes were taken");
}

#[test]
fn a_driver_that_breaks_its_ring_is_ignored_and_the_device_still_stops() {
    let mut guest = Guest::new();
    guest.tx.set_avail_idx(RING + 10);
    guest.tx.kick();
    guest.rx.set_avail_idx(5000);
    guest.rx.kick();
    let mut host = UnixStream::connect(guest.path()).unwrap();
    host.write_all(b"CONNECT 5\n").unwrap();
    guest.device.reset();
}

#[test]
fn three_hundred_connections_talk_at_once() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    let mut hosts = Vec::new();
    for guest_port in 0..150 {
        hosts.push((1, guest_port, guest.connect(&listener, 1, guest_port)));
    }
    for guest_port in 1000..1150 {
        let mut host = UnixStream::connect(guest.path()).unwrap();
        host.set_read_timeout(Some(PATIENCE)).unwrap();
        host.write_all(format!("CONNECT {guest_port}\n").as_bytes())
            .unwrap();
        let header = guest.expect(op::REQUEST);
        guest.send(packet(op::RESPONSE, header.src_port, guest_port), &[]);
        let line = format!("OK {}\n", header.src_port);
        assert_eq!(read_exactly(&mut host, line.len()), line.as_bytes());
        hosts.push((header.src_port, guest_port, host));
    }
    for (host_port, guest_port, host) in &mut hosts {
        guest.send(data(*host_port, *guest_port, 4), &guest_port.to_le_bytes());
        host.write_all(&guest_port.to_be_bytes()).unwrap();
    }
    let mut seen = std::collections::HashSet::new();
    while seen.len() < hosts.len() {
        let (header, payload) = guest.receive();
        assert_eq!(header.op, op::RW);
        assert_eq!(payload, header.dst_port.to_be_bytes());
        assert!(seen.insert(header.dst_port));
    }
    for (_, guest_port, host) in &mut hosts {
        assert_eq!(read_exactly(host, 4), guest_port.to_le_bytes());
    }
}

#[test]
fn the_table_is_bounded_and_places_come_free() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    let mut hosts = Vec::new();
    for guest_port in 0..MAX_CONNECTIONS as u32 {
        hosts.push(guest.connect(&listener, 1, guest_port));
    }
    guest.send(request(1, 50_000), &[]);
    guest.expect(op::RST);
    let mut late = UnixStream::connect(guest.path()).unwrap();
    late.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(late.read(&mut [0; 1]).unwrap(), 0, "closed at once");
    guest.send(packet(op::RST, 1, 0), &[]);
    hosts.push(guest.connect(&listener, 1, 50_000));
}

#[test]
fn a_host_program_that_came_when_there_was_no_descriptor_for_it_is_taken_once_there_is() {
    const ALONE: &str = "BULKHEAD_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        // In a process of its own: the limit of open files is the process's.
        let name = "virtio::vsock::tests::a_host_program_that_came_when_there_was_no_descriptor_for_it_is_taken_once_there_is";
        let ended = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ended.stdout).into_owned();
        assert!(
            ended.status.success() && said.contains("1 passed"),
            "{said}"
        );
        return;
    }
    let mut guest = Guest::new();
    let host = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    let next = File::open("/dev/null").unwrap().as_raw_fd();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, next as u64, hard).unwrap();
    let address = UnixAddr::new(&guest.path()).unwrap();
    connect(host.as_raw_fd(), &address).unwrap();
    let mut host = UnixStream::from(host);
    host.write_all(b"CONNECT 7\n").unwrap();
    guest.expect_silence();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    // No other connection ends, or comes.
    assert_eq!(guest.expect(op::REQUEST).dst_port, 7);
}

#[test]
fn a_reset_closes_every_connection_and_the_device_starts_again() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    let mut host = guest.connect(&listener, 1, 2);
    guest.device.reset();
    assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);

    guest.rx = Ring::new(&guest.memory, RX_RING, RING);
    guest.tx = Ring::new(&guest.memory, TX_RING, RING);
    guest
        .memory
        .memory()
        .write_slice(&vec![0; EVENT_RING as usize], GuestAddress(0))
        .unwrap();
    guest.buffers.clear();
    guest.post_rx(RX_BUFFERS);
    guest
        .device
        .activate(Activation {
            memory: guest.memory.clone(),
            features: guest.device.features(),
            queues: vec![guest.rx.active(), guest.tx.active()],
            interrupt: guest.line.interrupt.clone(),
        })
        .unwrap();
    let _host = guest.connect(&listener, 1, 2);
}

#[test]
fn too_few_queues_are_an_error() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("vsock");
    let mut device = Vsock::new(CID, UnixListener::bind(&path).unwrap(), path);
    let memory = mock_driver::memory(MEMORY);
    let rx = Ring::new(&memory, RX_RING, RING);
    let error = device
        .activate(Activation {
            memory,
            features: 0,
            queues: vec![rx.active()],
            interrupt: Line::new().interrupt,
        })
        .unwrap_err();
    assert!(matches!(
        error,
        ActivateError::MissingQueues { got: 1, wanted: 2 }
    ));
}

/// One random step of guest or host. Whatever they do, the device answers.
fn random_step(
    guest: &mut Guest,
    listener: &UnixListener,
    hosts: &mut Vec<UnixStream>,
    random: &mut Random,
) {
    match random.below(12) {
        0..=5 => {
            let len = random.pick(&[0, 0, 1, 100, 4096, MAX_PAYLOAD]);
            let mut header = packet(
                random.pick(&[
                    op::REQUEST,
                    op::RESPONSE,
                    op::RST,
                    op::SHUTDOWN,
                    op::RW,
                    op::RW,
                    op::RW,
                    op::CREDIT_UPDATE,
                    op::CREDIT_REQUEST,
                    0,
                    9,
                ]),
                random.pick(&[1, 1, 1, 2, 1 << 30, (1 << 30) + 1]),
                random.pick(&[1, 2, 3, 4]),
            );
            header.len = len as u32;
            header.flags = random.below(5) as u32;
            let any = random.number() as u32;
            header.fwd_cnt = random.pick(&[0, 0, 100, any]);
            header.buf_alloc = random.pick(&[256 * 1024, 256 * 1024, 0, 1, u32::MAX]);
            match random.below(20) {
                0 => header.len = random.number() as u32,
                1 => header.dst_cid = random.number(),
                2 => header.src_cid = random.number(),
                3 => header.kind = random.below(4) as u16,
                _ => {}
            }
            let payload = pattern(len, 0);
            let cut = random.below((HEADER_LEN + len) as u64) as usize;
            guest.send_raw(header, &payload, &[cut, HEADER_LEN + len - cut]);
        }
        6 => {
            let mut host = UnixStream::connect(guest.path()).unwrap();
            let greeting =
                random.pick(&["CONNECT 1\n", "CONNECT 2\nearly", "CONNECT 3", "bad\n", ""]);
            host.write_all(greeting.as_bytes()).unwrap();
            host.set_nonblocking(true).unwrap();
            hosts.push(host);
        }
        7 if !hosts.is_empty() => {
            let at = random.below(hosts.len() as u64) as usize;
            let host = &mut hosts[at];
            let _ = match random.below(5) {
                0 => host
                    .write(&pattern(random.pick(&[1, 1000, 200_000]), 1))
                    .map(drop),
                1 => host.shutdown(Shutdown::Write),
                2 => host.shutdown(Shutdown::Read),
                3 => host.read(&mut [0; 100_000]).map(drop),
                _ => {
                    hosts.swap_remove(at);
                    Ok(())
                }
            };
        }
        8 => {
            let addr = random.pick(&[TX_BUFFERS, MEMORY as u64 - 10, u64::MAX - 3]);
            let len = random.pick(&[0, 1, 43, 44, 100, u32::MAX as usize]);
            let piece = if random.below(2) == 0 {
                Piece::read(addr, len)
            } else {
                Piece::write(addr, len)
            };
            guest.tx.post(&[piece, piece]).unwrap();
            guest.tx.notify();
            guest.tx.wait(&guest.line);
        }
        _ => while guest.receive_for(Duration::ZERO).is_some() {},
    }
    listener.set_nonblocking(true).unwrap();
    while let Ok((host, _)) = listener.accept() {
        host.set_nonblocking(true).unwrap();
        hosts.push(host);
    }
    listener.set_nonblocking(false).unwrap();
}

#[test]
fn random_guests_and_host_programs_do_no_harm() {
    let seeds = std::env::var("SEEDS").map_or(20, |seeds| seeds.parse().unwrap());
    for seed in 0..seeds {
        let mut random = Random::new(seed);
        let mut guest = Guest::new();
        let listener = guest.listen(1);
        let mut hosts = Vec::new();
        let steps = std::panic::AssertUnwindSafe(|| {
            for step in 0..400 {
                random_step(&mut guest, &listener, &mut hosts, &mut random);
                if step % 20 == 0 {
                    while guest.receive_for(Duration::ZERO).is_some() {}
                }
            }
            // And the device still serves.
            drop(hosts);
            let fresh = guest.listen(77);
            guest.send(request(77, 77), &[]);
            let (mut host, _) = fresh.accept().unwrap();
            host.set_read_timeout(Some(PATIENCE)).unwrap();
            while guest.receive().0.src_port != 77 {}
            guest.send(data(77, 77, 4), b"well");
            assert_eq!(read_exactly(&mut host, 4), b"well");
            guest.device.reset();
        });
        if std::panic::catch_unwind(steps).is_err() {
            panic!("seed {seed}");
        }
    }
}

#[test]
#[ignore = "a measurement: cargo test --release -- --ignored --nocapture throughput"]
fn throughput_of_one_connection() {
    let mut guest = Guest::new();
    let listener = guest.listen(1);
    let mut host = guest.connect(&listener, 1, 2);
    let mut sink = host.try_clone().unwrap();
    let total = 1usize << 30;
    let reader = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 18];
        let mut seen = 0;
        while seen < total {
            seen += sink.read(&mut buffer).unwrap();
        }
    });
    let header = data(1, 2, MAX_PAYLOAD);
    guest
        .memory
        .memory()
        .write_slice(&header.to_bytes(), GuestAddress(TX_BUFFERS))
        .unwrap();
    let start = std::time::Instant::now();
    let (mut sent, mut forwarded, mut free) = (0usize, 0u32, 100);
    while sent < total {
        let credit = BUF_ALLOC - (sent as u32).wrapping_sub(forwarded);
        if (credit as usize) < MAX_PAYLOAD || free == 0 {
            forwarded = guest.receive().0.fwd_cnt;
        } else {
            guest
                .tx
                .post(&[
                    Piece::read(TX_BUFFERS, HEADER_LEN),
                    Piece::read(TX_BUFFERS + 4096, MAX_PAYLOAD),
                ])
                .unwrap();
            guest.tx.notify();
            free -= 1;
            sent += MAX_PAYLOAD;
        }
        while guest.tx.take().is_some() {
            free += 1;
        }
    }
    reader.join().unwrap();
    while free < 100 {
        guest.tx.wait(&guest.line);
        free += 1;
    }
    println!(
        "guest to host: {:.0} MiB/s",
        1024.0 / start.elapsed().as_secs_f64()
    );

    let start = std::time::Instant::now();
    let writer = std::thread::spawn(move || {
        let buffer = vec![1; 1 << 18];
        for _ in 0..total / buffer.len() {
            host.write_all(&buffer).unwrap();
        }
        host
    });
    let (mut received, mut told) = (0, 0);
    while received < total {
        let (header, payload) = guest.receive();
        if header.op == op::RW {
            received += payload.len();
        }
        if received - told > 128 * 1024 {
            told = received;
            let update = Header {
                fwd_cnt: told as u32,
                ..packet(op::CREDIT_UPDATE, 1, 2)
            };
            guest.send(update, &[]);
        }
    }
    drop(writer.join().unwrap());
    println!(
        "host to guest: {:.0} MiB/s",
        1024.0 / start.elapsed().as_secs_f64()
    );
}

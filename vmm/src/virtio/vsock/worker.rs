//! The device's thread: moves packets between the virtqueues and the unix sockets.
//!
//! Every source of work is an event: queue notifications, the listener, the sockets. Sockets are watched edge-triggered and each
//! connection remembers that it may have data, so that a guest out of buffers or credit costs no wake-ups. Connections
//! that have something for the guest wait in one queue and are served in turn.
//!
//! Memory that the guest can make the device hold is bounded: by the table, by each connection's buffer, and by the queue of
//! refusals, which stops the transmit queue when it is full.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::connection::{Connection, Fate, Greeting, Key, MAX_BATCH, Next, Phase, Received};
use super::packet::{
    self, BadChain, Buffer, HEADER_LEN, HOST_CID, Header, MAX_PAYLOAD, TYPE_STREAM, op,
};
use super::table::{Table, Token};
use crate::virtio::driver_queue::{Chain, DriverQueue};
use crate::virtio::{Interrupt, Memory};

/// Refusals that wait for the guest's buffers before its packets have to wait too.
const MAX_REFUSALS: usize = 256;
/// Packets handled in each direction before the other sources get their turn.
const ROUND: usize = 64;
/// Most receive buffers filled by one read from a socket.
const MAX_CHAINS: usize = 32;
/// Ports given to connections that host programs open. Beyond what programs choose themselves, as Linux's ephemeral ports are.
const FIRST_HOST_PORT: u32 = 1 << 30;

const STOP: u64 = u64::MAX;
const RX: u64 = u64::MAX - 1;
const TX: u64 = u64::MAX - 2;
const LISTENER: u64 = u64::MAX - 3;

/// What the thread works with.
#[derive(Debug)]
pub struct Worker {
    guest_cid: u64,
    path: PathBuf,
    listener: UnixListener,
    /// While no connections are taken, since that has failed.
    rest: Option<Rest>,
    /// Only held: epoll watches it.
    _stop: EventFd,
    epoll: Epoll,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    rx: DriverQueue,
    tx: DriverQueue,
    table: Table,
    /// Connections that may have something to say to the guest.
    ready: VecDeque<Token>,
    /// `RST`s for the guest.
    refusals: VecDeque<Header>,
    next_host_port: u32,
}

/// A time in which no connections of host programs are taken, because there was no descriptor or memory for one.
#[derive(Debug)]
struct Rest {
    until: Instant,
    length: Duration,
}

impl Rest {
    const SHORTEST: Duration = Duration::from_millis(10);
    const LONGEST: Duration = Duration::from_secs(1);

    /// The one after another, which was not enough.
    fn after(before: Option<Self>) -> Self {
        let length = before.map_or(Self::SHORTEST, |rest| (rest.length * 2).min(Self::LONGEST));
        Self {
            until: Instant::now() + length,
            length,
        }
    }

    fn is_over(&self) -> bool {
        self.until <= Instant::now()
    }

    /// How long to wait for events at most.
    fn timeout(&self) -> i32 {
        let left = self.until.saturating_duration_since(Instant::now());
        // Not less than what is left.
        i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
    }
}

/// What a [`Worker`] is made of.
#[derive(Debug)]
pub struct Parts {
    /// The guest's context identifier.
    pub guest_cid: u64,
    /// Where host programs connect.
    pub listener: UnixListener,
    /// Its path, and the beginning of the paths of host programs' own sockets.
    pub path: PathBuf,
    /// Ends the thread.
    pub stop: EventFd,
    /// Guest memory.
    pub memory: Memory,
    /// The device's interrupt.
    pub interrupt: Arc<Interrupt>,
    /// Packets to the guest.
    pub rx: DriverQueue,
    /// Packets from the guest.
    pub tx: DriverQueue,
}

impl Worker {
    /// Prepares the thread's work.
    pub fn new(parts: Parts) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        parts.listener.set_nonblocking(true)?;
        let watched = [
            (parts.stop.as_raw_fd(), STOP),
            (parts.rx.kick().as_raw_fd(), RX),
            (parts.tx.kick().as_raw_fd(), TX),
            (parts.listener.as_raw_fd(), LISTENER),
        ];
        for (fd, data) in watched {
            epoll.ctl(
                ControlOperation::Add,
                fd,
                EpollEvent::new(EventSet::IN, data),
            )?;
        }
        Ok(Self {
            guest_cid: parts.guest_cid,
            path: parts.path,
            listener: parts.listener,
            rest: None,
            _stop: parts.stop,
            epoll,
            memory: parts.memory,
            interrupt: parts.interrupt,
            rx: parts.rx,
            tx: parts.tx,
            table: Table::default(),
            ready: VecDeque::new(),
            refusals: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
        })
    }

    /// Works until the stop event.
    pub fn run(mut self) {
        let mut events = vec![EpollEvent::default(); 64];
        // The driver may have filled its queues before the thread was there.
        let mut more = self.pump();
        loop {
            let timeout = match &self.rest {
                _ if more => 0,
                Some(rest) => rest.timeout(),
                None => -1,
            };
            let count = match self.epoll.wait(timeout, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => {
                    tracing::error!(%error, "waiting for the vsock device's events failed");
                    return;
                }
            };
            for event in &events[..count] {
                match event.data() {
                    STOP => return,
                    RX => self.rx.drain_kick(),
                    TX => self.tx.drain_kick(),
                    LISTENER => self.accept(None),
                    token => self.on_socket(Token::from(token), event.event_set()),
                }
            }
            if let Some(rest) = self.rest.take_if(|rest| rest.is_over()) {
                self.listen(true);
                self.accept(Some(rest));
            }
            more = self.pump();
        }
    }

    /// Moves packets. True if a round was not enough.
    fn pump(&mut self) -> bool {
        let memory = self.memory.memory();
        let mem: &GuestMemoryMmap = &memory;
        let from_guest = self.pump_tx(mem);
        let to_guest = self.pump_rx(mem);
        self.tx.notify(mem, &self.interrupt);
        self.rx.notify(mem, &self.interrupt);
        // Refusals that have found buffers make room for what was held back for them.
        from_guest || to_guest
    }

    /// Handles the guest's packets.
    fn pump_tx(&mut self, mem: &GuestMemoryMmap) -> bool {
        self.tx.disarm(mem);
        for _ in 0..ROUND {
            if self.refusals.len() >= MAX_REFUSALS {
                // `pump_rx` goes on with the receive queue, and its progress brings us back here.
                return false;
            }
            let Some(chain) = self.tx.pop(mem) else {
                if self.tx.arm(mem) {
                    continue;
                }
                return false;
            };
            let head = chain.head_index();
            match packet::parse(mem, chain) {
                Ok((header, payload)) => self.on_packet(&header, payload),
                Err(BadChain) => {
                    tracing::debug!("the guest sent a vsock packet without a whole header")
                }
            }
            self.tx.complete(mem, head, 0);
        }
        true
    }

    fn on_packet(&mut self, header: &Header, payload: Result<Buffer<'_>, BadChain>) {
        if header.src_cid != self.guest_cid {
            // Not this guest's to answer for.
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            return self.refuse(header);
        }
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        let Some(token) = self.table.find(key) else {
            return match header.op {
                op::REQUEST => self.connect(key, header),
                _ => self.refuse(header),
            };
        };
        let Some(connection) = self.table.get_mut(token) else {
            return self.refuse(header);
        };
        let lawful = match (connection.phase(), header.op) {
            (_, op::RST) => {
                connection.on_reset();
                self.table.unlink(key, token);
                true
            }
            (Phase::Requested { sent: true }, op::RESPONSE) => connection.accepted(header),
            (Phase::Established, op::SHUTDOWN) => {
                connection.update_credit(header);
                connection.on_shutdown(header.flags);
                true
            }
            (Phase::Established, op::RW) => {
                connection.update_credit(header);
                payload.is_ok_and(|payload| connection.on_data(payload))
            }
            (Phase::Established, op::CREDIT_UPDATE) => {
                connection.update_credit(header);
                true
            }
            (Phase::Established, op::CREDIT_REQUEST) => {
                connection.update_credit(header);
                connection.on_credit_request();
                true
            }
            _ => false,
        };
        if lawful {
            self.settle(token);
        } else {
            tracing::debug!(?header, "an unlawful vsock packet ends its connection");
            self.remove(token);
            self.refuse(header);
        }
    }

    /// Queues the `RST` that answers a packet. An `RST` is never answered.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.refusals.push_back(header.refusal());
        }
    }

    /// The guest wants a connection to a host program.
    fn connect(&mut self, key: Key, request: &Header) {
        if self.table.is_full() {
            tracing::warn!("too many vsock connections: the guest's is refused");
            return self.refuse(request);
        }
        let token = match self.connect_to_host(key.host_port) {
            Ok(stream) => self
                .table
                .insert(Connection::from_guest(stream, key, request))
                .ok(),
            Err(error) => {
                tracing::debug!(port = key.host_port, %error, "no host program takes the guest's connection");
                None
            }
        };
        let Some(token) = token else {
            return self.refuse(request);
        };
        self.table.link(key, token);
        if self.watch(token, ControlOperation::Add).is_err() {
            self.remove(token);
            return self.refuse(request);
        }
        self.settle(token);
    }

    fn connect_to_host(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.as_os_str().as_bytes().to_vec();
        path.extend_from_slice(format!("_{port}").as_bytes());
        let address = UnixAddr::new(path.as_slice())?;
        let fd: OwnedFd = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        // On a unix socket this succeeds or fails at once; a full backlog is a refusal.
        connect(fd.as_raw_fd(), &address)?;
        Ok(UnixStream::from(fd))
    }

    /// Host programs want connections. `before` is the time of rest that was taken before, if one was.
    fn accept(&mut self, before: Option<Rest>) {
        for _ in 0..ROUND {
            // SAFETY: the listener's descriptor is valid, and no address is asked for.
            let fd = unsafe {
                libc::accept4(
                    self.listener.as_raw_fd(),
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                    libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                )
            };
            if fd < 0 {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::EAGAIN) => {}
                    Some(libc::EINTR | libc::ECONNABORTED) => continue,
                    _ => {
                        // Out of descriptors or memory. The end of a connection gives some back, and of what else does nothing tells.
                        tracing::warn!(%error, "cannot accept a vsock connection of a host program");
                        self.listen(false);
                        self.rest = Some(Rest::after(before));
                    }
                }
                return;
            }
            // SAFETY: the kernel has just made this descriptor, and nothing else owns it.
            let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
            match self.table.insert(Connection::from_host(stream)) {
                Ok(token) => {
                    if self.watch(token, ControlOperation::Add).is_err() {
                        self.remove(token);
                    }
                }
                Err(_full) => {
                    tracing::warn!("too many vsock connections: a host program's is closed")
                }
            }
        }
    }

    /// Whether the listener's events are waited for.
    fn listen(&mut self, on: bool) {
        let events = if on { EventSet::IN } else { EventSet::empty() };
        let event = EpollEvent::new(events, LISTENER);
        let done = self
            .epoll
            .ctl(ControlOperation::Modify, self.listener.as_raw_fd(), event);
        if let Err(error) = done {
            tracing::error!(%error, "cannot change whether the vsock device takes connections");
        }
    }

    /// Something happened to a connection's socket.
    fn on_socket(&mut self, token: Token, events: EventSet) {
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        match connection.phase() {
            Phase::Greeting => match connection.read_greeting() {
                Greeting::Incomplete if !hung_up => return,
                Greeting::Connect(guest_port) if !hung_up => {
                    return self.request(token, guest_port);
                }
                _ => {
                    self.remove(token);
                    return;
                }
            },
            Phase::Requested { sent } if hung_up => {
                if let Some(connection) = self.remove(token)
                    && sent
                {
                    self.reset(connection);
                }
                return;
            }
            Phase::Requested { .. } => return,
            Phase::Established | Phase::Draining => {
                if events.contains(EventSet::OUT) {
                    connection.flush();
                }
                if hung_up {
                    connection.on_hang_up();
                } else if events.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
                    connection.on_readable();
                }
            }
        }
        self.settle(token);
    }

    /// A host program has said which port it wants.
    fn request(&mut self, token: Token, guest_port: u32) {
        // Fewer connections than ports: this ends.
        let key = loop {
            let key = Key {
                host_port: self.next_host_port,
                guest_port,
            };
            self.next_host_port = self
                .next_host_port
                .checked_add(1)
                .unwrap_or(FIRST_HOST_PORT);
            if self.table.find(key).is_none() {
                break key;
            }
        };
        if let Some(connection) = self.table.get_mut(token) {
            connection.request(key);
            self.table.link(key, token);
            self.settle(token);
        }
    }

    /// Brings everything that depends on a connection's state up to date with it.
    fn settle(&mut self, token: Token) {
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        match connection.fate() {
            Fate::Alive => {
                let speaks = connection.next().is_some();
                if connection.watch_changed()
                    && self.watch(token, ControlOperation::Modify).is_err()
                {
                    // Without its events the connection would hang.
                    if let Some(connection) = self.remove(token) {
                        self.reset(connection);
                    }
                    return;
                }
                if speaks && self.table.schedule(token) {
                    self.ready.push_back(token);
                }
            }
            Fate::Reset => {
                if let Some(connection) = self.remove(token) {
                    self.reset(connection);
                }
            }
            Fate::Gone => {
                if let Some(connection) = self.remove(token) {
                    connection.close();
                }
            }
        }
    }

    /// Tells the guest that a connection is over, and closes its socket.
    fn reset(&mut self, mut connection: Connection) {
        let header = connection.header(self.guest_cid, op::RST, 0, 0);
        self.refusals.push_back(header);
        connection.close();
    }

    fn remove(&mut self, token: Token) -> Option<Connection> {
        let connection = self.table.remove(token)?;
        if let Some(rest) = &mut self.rest {
            rest.until = Instant::now();
        }
        Some(connection)
    }

    fn watch(&mut self, token: Token, operation: ControlOperation) -> io::Result<()> {
        let Some(connection) = self.table.get_mut(token) else {
            return Ok(());
        };
        let mut events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if connection.note_watch() {
            events |= EventSet::OUT;
        }
        let fd = connection.fd();
        self.epoll
            .ctl(operation, fd, EpollEvent::new(events, token.into()))
    }

    /// Gives the guest what waits for it. True if there is more, and buffers for it.
    fn pump_rx(&mut self, mem: &GuestMemoryMmap) -> bool {
        self.rx.disarm(mem);
        let stopped_tx = self.refusals.len() >= MAX_REFUSALS;
        for _ in 0..ROUND {
            let Some(token) = self.next_speaker() else {
                return stopped_tx && self.refusals.len() < MAX_REFUSALS;
            };
            let Some(chain) = self.rx.pop(mem) else {
                // Out of buffers: the one case in which a notification of this queue matters.
                if self.rx.arm(mem) {
                    continue;
                }
                return stopped_tx && self.refusals.len() < MAX_REFUSALS;
            };
            match token {
                None => {
                    let refusal = self.refusals.pop_front().unwrap_or_default();
                    if !self.put_control(mem, chain, refusal) {
                        self.refusals.push_front(refusal);
                    }
                }
                Some(token) => self.serve(mem, token, chain),
            }
        }
        true
    }

    /// Who is next to speak to the guest: the refusals (`Some(None)`), a connection, or nobody.
    fn next_speaker(&mut self) -> Option<Option<Token>> {
        if !self.refusals.is_empty() {
            return Some(None);
        }
        while let Some(token) = self.ready.pop_front() {
            self.table.unschedule(token);
            if self
                .table
                .get_mut(token)
                .is_some_and(|connection| connection.next().is_some())
            {
                self.table.schedule(token);
                self.ready.push_front(token);
                return Some(Some(token));
            }
        }
        None
    }

    /// Lets the connection at the front of the queue say one thing. `chain` is a buffer for it.
    fn serve(&mut self, mem: &GuestMemoryMmap, token: Token, chain: Chain<'_>) {
        let guest_cid = self.guest_cid;
        let Some(connection) = self.table.get_mut(token) else {
            self.rx.unpop(1);
            return;
        };
        match connection.next() {
            None => self.rx.unpop(1),
            Some(Next::Control { op, flags }) => {
                let header = connection.header(guest_cid, op, flags, 0);
                if !self.put_control(mem, chain, header) {
                    // The driver's buffer can't hold a header. It can't be used for anything, and the packet is lost.
                    tracing::debug!(
                        "a receive buffer of the vsock driver is too small for a header"
                    );
                }
            }
            Some(Next::Data { credit }) => self.put_data(mem, token, chain, credit),
        }
        // To the end of the queue, if there is more.
        self.ready.pop_front();
        self.table.unschedule(token);
        self.settle(token);
    }

    /// Puts a packet without payload into a buffer. False if that is too small.
    fn put_control(&mut self, mem: &GuestMemoryMmap, chain: Chain<'_>, header: Header) -> bool {
        let head = chain.head_index();
        match Buffer::writable(mem, chain) {
            Ok(buffer) if buffer.len() >= HEADER_LEN => {
                buffer.copy_from(&header.to_bytes());
                self.rx.complete(mem, head, HEADER_LEN as u32);
                true
            }
            _ => {
                self.rx.complete(mem, head, 0);
                false
            }
        }
    }

    /// Reads from a connection's socket into as many of the guest's buffers as there are, by one system call.
    fn put_data<'m>(
        &mut self,
        mem: &'m GuestMemoryMmap,
        token: Token,
        first: Chain<'m>,
        credit: usize,
    ) {
        struct Target<'m> {
            head: u16,
            header: Buffer<'m>,
            room: usize,
        }
        let limit = credit.min(MAX_BATCH);
        let mut targets: Vec<Target<'m>> = Vec::with_capacity(MAX_CHAINS);
        let mut iovecs = Vec::with_capacity(MAX_CHAINS);
        let mut room = 0;
        let mut next = Some(first);
        while let Some(chain) = next.take() {
            let head = chain.head_index();
            let parts = Buffer::writable(mem, chain)
                .and_then(|buffer| buffer.split_at(HEADER_LEN))
                .and_then(|(header, data)| {
                    Ok((header, data.truncate((limit - room).min(MAX_PAYLOAD))?))
                });
            match parts {
                Ok((header, data)) if data.len() > 0 => {
                    data.append_iovecs(&mut iovecs);
                    room += data.len();
                    targets.push(Target {
                        head,
                        header,
                        room: data.len(),
                    });
                }
                _ if targets.is_empty() => {
                    // No use for this buffer: back to the driver, empty.
                    self.rx.complete(mem, head, 0);
                    return;
                }
                _ => {
                    self.rx.unpop(1);
                    break;
                }
            }
            if room < limit && targets.len() < MAX_CHAINS {
                next = self.rx.pop(mem);
            }
        }

        let guest_cid = self.guest_cid;
        let Some(connection) = self.table.get_mut(token) else {
            self.rx.unpop(targets.len() as u16);
            return;
        };
        let mut left = match connection.receive(&iovecs) {
            Received::Data(count) => count,
            Received::Nothing | Received::End => 0,
        };
        let mut used = 0;
        for target in &targets {
            if left == 0 {
                break;
            }
            let len = left.min(target.room);
            left -= len;
            used += 1;
            let Some(connection) = self.table.get_mut(token) else {
                break;
            };
            let header = connection.header(guest_cid, op::RW, 0, len as u32);
            target.header.copy_from(&header.to_bytes());
            self.rx
                .complete(mem, target.head, (HEADER_LEN + len) as u32);
        }
        self.rx.unpop((targets.len() - used) as u16);
    }
}

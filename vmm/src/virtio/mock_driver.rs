//! A driver for tests of devices: it lives in guest memory as a real one does, and keeps the real rules. It notifies the device only
//! when the device asked for that, and sleeps only after asking for an interrupt, so a device that forgets to arm its
//! queues hangs here too.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{ActiveQueue, Interrupt, Memory, RegisterMemory};

/// How long anything may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Guest memory of `size` bytes at address 0.
pub fn memory(size: usize) -> Memory {
    Memory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap())
}

/// The interrupt line as both sides see it.
pub struct Line {
    /// For the device.
    pub interrupt: Arc<Interrupt>,
    event: EventFd,
}

impl Line {
    pub fn new() -> Self {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            interrupt: Arc::new(Interrupt::new(
                event.try_clone().unwrap(),
                RegisterMemory::new(1).unwrap().slot(0),
            )),
            event,
        }
    }

    /// Sleeps until an interrupt. False if none came in time.
    pub fn wait(&self, timeout: Duration) -> bool {
        let mut fd = libc::pollfd {
            fd: self.event.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, which outlives the call.
        let n = unsafe { libc::poll(&raw mut fd, 1, timeout.as_millis() as i32) };
        let _ = self.event.read();
        n == 1
    }
}

/// One part of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    pub addr: u64,
    pub len: u32,
    pub writable: bool,
}

impl Piece {
    pub fn read(addr: u64, len: usize) -> Self {
        Self {
            addr,
            len: len as u32,
            writable: false,
        }
    }

    pub fn write(addr: u64, len: usize) -> Self {
        Self {
            addr,
            len: len as u32,
            writable: true,
        }
    }
}

/// The driver's side of a split virtqueue (virtio 1.2, 2.7), with event indices.
pub struct Ring {
    memory: Memory,
    base: u64,
    size: u16,
    kick: EventFd,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
    avail: u16,
    notified: u16,
    used: u16,
}

impl Ring {
    /// Bytes that a ring of `size` takes.
    pub const fn footprint(size: u16) -> u64 {
        (16 * size as u64 + 6 + 2 * size as u64 + 8 + 6 + 8 * size as u64).next_multiple_of(4096)
    }

    pub fn new(memory: &Memory, base: u64, size: u16) -> Self {
        Self {
            memory: memory.clone(),
            base,
            size,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            avail: 0,
            notified: 0,
            used: 0,
        }
    }

    fn avail_addr(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used_addr(&self) -> u64 {
        (self.avail_addr() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    fn write<T: vm_memory::ByteValued>(&self, value: T, addr: u64) {
        self.memory
            .memory()
            .write_obj(value, GuestAddress(addr))
            .unwrap();
    }

    fn read<T: vm_memory::ByteValued>(&self, addr: u64) -> T {
        self.memory.memory().read_obj(GuestAddress(addr)).unwrap()
    }

    /// What the transport hands to the device.
    pub fn active(&self) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_size(self.size);
        queue.set_desc_table_address(Some(self.base as u32), Some((self.base >> 32) as u32));
        queue.set_avail_ring_address(
            Some(self.avail_addr() as u32),
            Some((self.avail_addr() >> 32) as u32),
        );
        queue.set_used_ring_address(
            Some(self.used_addr() as u32),
            Some((self.used_addr() >> 32) as u32),
        );
        queue.set_event_idx(true);
        queue.set_ready(true);
        ActiveQueue {
            queue,
            kick: self.kick.try_clone().unwrap(),
        }
    }

    /// Makes a chain available, without a notification. None if there are too few descriptors.
    pub fn post(&mut self, pieces: &[Piece]) -> Option<u16> {
        if self.free.len() < pieces.len() {
            return None;
        }
        let indices: Vec<u16> = pieces.iter().filter_map(|_| self.free.pop()).collect();
        for (i, piece) in pieces.iter().enumerate() {
            let mut flags = 0u16;
            let mut next = 0u16;
            if piece.writable {
                flags |= VRING_DESC_F_WRITE as u16;
            }
            if let Some(following) = indices.get(i + 1) {
                flags |= VRING_DESC_F_NEXT as u16;
                next = *following;
            }
            let at = self.base + 16 * u64::from(indices[i]);
            self.write(piece.addr, at);
            self.write(piece.len, at + 8);
            self.write(flags, at + 12);
            self.write(next, at + 14);
        }
        let head = indices[0];
        self.chains.insert(head, indices);
        self.offer(head);
        Some(head)
    }

    /// Puts any index on the available ring.
    pub fn offer(&mut self, head: u16) {
        self.write(
            head,
            self.avail_addr() + 4 + 2 * u64::from(self.avail % self.size),
        );
        fence(Ordering::SeqCst);
        self.avail = self.avail.wrapping_add(1);
        self.write(self.avail, self.avail_addr() + 2);
    }

    /// Sets the available ring's index to anything.
    pub fn set_avail_idx(&mut self, idx: u16) {
        self.avail = idx;
        self.write(idx, self.avail_addr() + 2);
    }

    /// Notifies the device if it asked for that; returns whether it did.
    pub fn notify(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let event: u16 = self.read(self.used_addr() + 4 + 8 * u64::from(self.size));
        let wanted =
            self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(self.notified);
        self.notified = self.avail;
        if wanted {
            self.kick.write(1).unwrap();
        }
        wanted
    }

    /// Notifies the device in any case.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next chain that the device is done with: its head, and how many bytes were written.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        fence(Ordering::SeqCst);
        let idx: u16 = self.read(self.used_addr() + 2);
        if idx == self.used {
            return None;
        }
        let at = self.used_addr() + 4 + 8 * u64::from(self.used % self.size);
        let head: u32 = self.read(at);
        let len: u32 = self.read(at + 4);
        self.used = self.used.wrapping_add(1);
        let indices = self.chains.remove(&(head as u16)).unwrap_or_default();
        self.free.extend(indices);
        Some((head as u16, len))
    }

    /// Asks for an interrupt at the next used chain. True if there is one already.
    pub fn arm(&mut self) -> bool {
        self.write(self.used, self.avail_addr() + 4 + 2 * u64::from(self.size));
        fence(Ordering::SeqCst);
        self.read::<u16>(self.used_addr() + 2) != self.used
    }

    /// Sleeps until the device is done with a chain.
    pub fn wait(&mut self, line: &Line) -> (u16, u32) {
        self.wait_for(line, PATIENCE)
            .expect("the device did not answer in time")
    }

    /// The same with a limit of one's own.
    pub fn wait_for(&mut self, line: &Line, timeout: Duration) -> Option<(u16, u32)> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(used) = self.take() {
                return Some(used);
            }
            if !self.arm() && !line.wait(deadline.saturating_duration_since(Instant::now())) {
                return self.take();
            }
        }
    }
}

/// Numbers that look random and are the same each time (xorshift64*): a failure names its seed and comes again.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// A number that is small, large, or at an edge.
    pub fn number(&mut self) -> u64 {
        let any = self.next();
        self.pick(&[
            0,
            1,
            4096,
            any % 100,
            any % 0x2_0000,
            u64::from(any as u32),
            any,
            u64::MAX,
            1 << 31,
            1 << 63,
        ])
    }
}

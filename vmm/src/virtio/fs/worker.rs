//! The threads that serve the request queues.
//!
//! A queue has several threads: Linux 6.1 sends every request through the first request queue, and one slow `fsync` must not hold
//! up all others. They sleep on the queue's one notification; whoever wakes takes one request at a time, and wakes the next
//! thread if there are more.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::identity;
use super::requests;
use super::share::Share;
use crate::sync::lock;
use crate::thread::{self, Kind};
use crate::virtio::driver_queue::{Chain, DriverQueue};
use crate::virtio::{Interrupt, Memory};

/// Most bytes of a request or a reply: a megabyte of data, and its headers. Longer chains are not looked at: lengths in them
/// become allocations.
const MAX_MESSAGE: usize = (1 << 20) + (64 << 10);

const STOP: u64 = u64::MAX;

/// One queue, shared by its threads.
pub struct Channel {
    queue: Mutex<DriverQueue>,
    /// The queue's notification, outside of the lock.
    kick: EventFd,
}

impl Channel {
    /// Shares a queue.
    pub fn new(queue: DriverQueue) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            kick: queue.kick().try_clone()?,
            queue: Mutex::new(queue),
        }))
    }
}

/// The end of all threads: an event that is never read, so that one write wakes them all, and a flag for those that do not sleep. A
/// guest that never stops asking must not keep the device from its reset.
pub struct Stop {
    event: EventFd,
    flag: AtomicBool,
}

impl Stop {
    /// Not yet.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            event: EventFd::new(EFD_NONBLOCK)?,
            flag: AtomicBool::new(false),
        }))
    }

    /// Now.
    pub fn set(&self) {
        self.flag.store(true, Ordering::Release);
        // The counter is far from full, so the write succeeds.
        let _ = self.event.write(1);
    }

    fn is_set(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }
}

/// One thread's work.
pub struct Worker {
    /// The queues that it serves.
    pub channels: Vec<Arc<Channel>>,
    /// Ends the thread.
    pub stop: Arc<Stop>,
    /// Guest memory.
    pub memory: Memory,
    /// The device's interrupt.
    pub interrupt: Arc<Interrupt>,
    /// The file system.
    pub share: Arc<Share>,
    /// Its FUSE server.
    pub server: Arc<Server<Arc<Share>>>,
}

impl Worker {
    /// Starts the thread. Returns once it serves, or with the reason why it can't.
    pub fn spawn(self, kind: Kind) -> io::Result<JoinHandle<()>> {
        let (tell, told) = mpsc::sync_channel(1);
        let thread = thread::spawn(kind, move || {
            let epoll = match self.prepare() {
                Ok(epoll) => epoll,
                Err(error) => return drop(tell.send(error)),
            };
            drop(tell);
            if let Err(error) = self.serve(&epoll) {
                tracing::error!(%error, "waiting for the file-system device's events failed");
            }
        })?;
        match told.recv() {
            Ok(error) => Err(error),
            // The thread has dropped its end.
            Err(mpsc::RecvError) => Ok(thread),
        }
    }

    fn prepare(&self) -> io::Result<Epoll> {
        identity::prepare_thread(self.share.proc_self_fd().as_fd())?;
        let epoll = Epoll::new()?;
        let stop = EpollEvent::new(EventSet::IN, STOP);
        epoll.ctl(ControlOperation::Add, self.stop.event.as_raw_fd(), stop)?;
        for (index, channel) in self.channels.iter().enumerate() {
            // One notification wakes one thread. Each counts by itself, so nobody has to read them.
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED | EventSet::EXCLUSIVE;
            let event = EpollEvent::new(events, index as u64);
            epoll.ctl(ControlOperation::Add, channel.kick.as_raw_fd(), event)?;
        }
        Ok(epoll)
    }

    fn serve(&self, epoll: &Epoll) -> io::Result<()> {
        // The driver may have filled its queues before the thread was there.
        for channel in &self.channels {
            self.drain(channel);
        }
        let mut events = [EpollEvent::default(); 8];
        loop {
            let count = match epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for event in &events[..count] {
                if event.data() == STOP {
                    return Ok(());
                }
            }
            for event in &events[..count] {
                if let Some(channel) = self.channels.get(event.data() as usize) {
                    self.drain(channel);
                }
            }
        }
    }

    /// Serves a queue until it is empty.
    fn drain(&self, channel: &Channel) {
        loop {
            if self.stop.is_set() {
                return;
            }
            let memory = self.memory.memory();
            let mem: &GuestMemoryMmap = &memory;
            let mut queue = lock(&channel.queue);
            let Some(chain) = queue.pop(mem) else {
                if queue.arm(mem) {
                    continue;
                }
                return;
            };
            // While this one is served, which may take long, the other threads sleep until they hear of the next.
            let more = queue.arm(mem);
            drop(queue);
            if more {
                // Nobody reads the counter, and nobody lives to see it full.
                let _ = channel.kick.write(1);
            }
            let head = chain.head_index();
            let len = self.handle(mem, chain);
            let mut queue = lock(&channel.queue);
            queue.complete(mem, head, len);
            queue.notify(mem, &self.interrupt);
        }
    }

    /// Serves one request; returns the length of the reply.
    fn handle(&self, mem: &GuestMemoryMmap, chain: Chain<'_>) -> u32 {
        let (reader, writer) = match (
            Reader::from_descriptor_chain(mem, chain.clone()),
            VirtioFsWriter::new(mem, chain),
        ) {
            (Ok(reader), Ok(writer)) => (reader, writer),
            (Err(error), _) | (_, Err(error)) => {
                tracing::debug!(%error, "a file-system request is not in guest memory");
                return 0;
            }
        };
        if reader.available_bytes() > MAX_MESSAGE || writer.available_bytes() > MAX_MESSAGE {
            tracing::debug!("a file-system request is too long");
            return 0;
        }
        if let Some(header) = requests::syncfs(&reader) {
            return requests::answer(writer, &header, self.share.sync());
        }
        let writer = Writer::VirtioFs(writer);
        match self.server.handle_message(reader, writer, None, None) {
            Ok(len) => u32::try_from(len).unwrap_or(0),
            Err(error) => {
                // A forgotten inode has no reply; nor has a request that makes no sense.
                tracing::debug!(%error, "a file-system request can't be answered");
                0
            }
        }
    }
}

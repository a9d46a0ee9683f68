//! The threads that serve the request queues.
//!
//! Each thread serves every queue: Linux 6.1 sends all requests through the first request queue, and a few that are slow (an `fsync`, a
//! file of a network that does not answer) must not hold up all others. The threads sleep on the queues' notifications; whoever
//! wakes takes one request at a time, and wakes the next thread if there are more. The last one that was free starts another before it
//! goes to work, so that a device has as many threads as it has had requests at once, and one more.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::identity;
use super::requests::{self, Request};
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
    pub fn new(queue: DriverQueue) -> io::Result<Self> {
        Ok(Self {
            kick: queue.kick().try_clone()?,
            queue: Mutex::new(queue),
        })
    }
}

/// The end of all threads: an event that is never read, so that one write wakes them all, and a flag for those that do not sleep. A
/// guest that never stops asking must not keep the device from its reset.
struct Stop {
    event: EventFd,
    flag: AtomicBool,
}

impl Stop {
    fn new() -> io::Result<Self> {
        Ok(Self {
            event: EventFd::new(EFD_NONBLOCK)?,
            flag: AtomicBool::new(false),
        })
    }

    fn set(&self) {
        self.flag.store(true, Ordering::Release);
        // The counter is far from full, so the write succeeds.
        let _ = self.event.write(1);
    }

    fn is_set(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }
}

/// Most threads of a device.
const MAX_THREADS: usize = 16;

/// The threads of a device, and what they share.
pub struct Crew {
    /// The queues, each served by every thread.
    channels: Vec<Channel>,
    stop: Stop,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    share: Arc<Share>,
    server: Server<Arc<Share>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// How many of them do not serve a request.
    free: AtomicUsize,
    /// There will be no more of them.
    complete: AtomicBool,
}

impl Crew {
    /// Starts the first thread.
    pub fn start(
        channels: Vec<Channel>,
        memory: Memory,
        interrupt: Arc<Interrupt>,
        share: Arc<Share>,
    ) -> io::Result<Arc<Self>> {
        let crew = Arc::new(Self {
            channels,
            stop: Stop::new()?,
            memory,
            interrupt,
            server: Server::new(share.clone()),
            share,
            threads: Mutex::default(),
            free: AtomicUsize::new(0),
            complete: AtomicBool::new(false),
        });
        crew.hire()?;
        Ok(crew)
    }

    /// Ends all threads, once what they are at is done.
    pub fn end(&self) {
        self.stop.set();
        // None is started from now on.
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a file-system thread had panicked");
                #[cfg(test)]
                assert!(std::thread::panicking(), "a file-system thread panicked");
            }
        }
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        lock(&self.threads).len()
    }

    /// Starts one more thread, if there may be more. Returns once it serves, or with the reason why it can't.
    fn hire(self: &Arc<Self>) -> io::Result<()> {
        if self.complete.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut threads = lock(&self.threads);
        if self.stop.is_set() || threads.len() >= MAX_THREADS {
            return Ok(());
        }
        self.free.fetch_add(1, Ordering::Relaxed);
        match self.clone().spawn(Kind::Fs(threads.len() as u8)) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                self.free.fetch_sub(1, Ordering::Relaxed);
                return Err(error);
            }
        }
        if threads.len() == MAX_THREADS {
            self.complete.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn spawn(self: Arc<Self>, kind: Kind) -> io::Result<JoinHandle<()>> {
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

    fn serve(self: &Arc<Self>, epoll: &Epoll) -> io::Result<()> {
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
    fn drain(self: &Arc<Self>, channel: &Channel) {
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
            self.set_to_work();
            let len = self.handle(mem, chain);
            self.free.fetch_add(1, Ordering::Relaxed);
            let mut queue = lock(&channel.queue);
            queue.complete(mem, head, len);
            queue.notify(mem, &self.interrupt);
        }
    }

    /// The calling thread is not free any more. If it was the last one, another is started.
    fn set_to_work(self: &Arc<Self>) {
        if self.free.fetch_sub(1, Ordering::Relaxed) == 1
            && let Err(error) = self.hire()
        {
            self.complete.store(true, Ordering::Relaxed);
            tracing::warn!(%error, "cannot start another file-system thread; slow files may hold up others");
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
        let flags = match Request::of(&reader) {
            Some(Request::SyncFs(header)) => {
                return requests::answer(writer, &header, self.share.sync());
            }
            Some(Request::SetAttribute(header, body)) => {
                let done = requests::set_attribute(&self.share, header.nodeid, body);
                return requests::answer(writer, &header, done);
            }
            Some(Request::Init(flags)) => Some(flags),
            None => None,
        };
        let reply = flags.map(|flags| (flags, writer.clone()));
        let writer = Writer::VirtioFs(writer);
        match self.server.handle_message(reader, writer, None, None) {
            Ok(len) => {
                if let Some((flags, reply)) = reply {
                    requests::correct_flags(reply, flags);
                }
                u32::try_from(len).unwrap_or(0)
            }
            Err(error) => {
                // A forgotten inode has no reply; nor has a request that makes no sense.
                tracing::debug!(%error, "a file-system request can't be answered");
                0
            }
        }
    }
}

//! One virtqueue as a device's worker uses it: [`virtio_queue::Queue`] with the driver's errors, notifications and
//! interrupts handled in one place.
//!
//! A driver that breaks the ring's rules (an index that runs away, a ring outside of memory) makes the queue *broken*: that
//! is logged once, and from then on the queue looks empty for ever. No input can make a worker spin on it.

use std::num::Wrapping;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::{ActiveQueue, Interrupt};

/// A descriptor chain that borrows guest memory.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// One virtqueue in a worker's hands.
#[derive(Debug)]
pub struct DriverQueue {
    queue: Queue,
    kick: EventFd,
    name: &'static str,
    used: bool,
    broken: bool,
}

impl DriverQueue {
    /// Takes a queue over. `features` are those that the driver accepted, `name` is for the log.
    pub fn new(active: ActiveQueue, features: u64, name: &'static str) -> Self {
        let ActiveQueue { mut queue, kick } = active;
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        Self {
            queue,
            kick,
            name,
            used: false,
            broken: false,
        }
    }

    /// The event that the driver's notifications arrive on.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Takes a pending notification back, so that a level-triggered wait sleeps again.
    pub fn drain_kick(&self) {
        // Nothing to read means nothing to take back. The descriptor may be a blocking one: this is only called
        // when it is readable.
        let _ = self.kick.read();
    }

    /// The next chain that the driver has made available.
    pub fn pop<'m>(&mut self, mem: &'m GuestMemoryMmap) -> Option<Chain<'m>> {
        if self.broken {
            return None;
        }
        match self.try_pop(mem) {
            Ok(chain) => chain,
            Err(error) => {
                self.fail(&error);
                None
            }
        }
    }

    fn try_pop<'m>(&mut self, mem: &'m GuestMemoryMmap) -> Result<Option<Chain<'m>>, Error> {
        if self.queue.avail_idx(mem, Ordering::Acquire)? == Wrapping(self.queue.next_avail()) {
            return Ok(None);
        }
        // An entry is there, so an iterator that gives none could not read it.
        self.queue
            .iter(mem)?
            .next()
            .map(Some)
            .ok_or(Error::InvalidAvailRingIndex)
    }

    /// Hands the last `count` popped chains back, as if they had not been taken. None of them may have been completed.
    pub fn unpop(&mut self, count: u16) {
        self.queue
            .set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Tells the driver that a chain is done, with `len` bytes written into it.
    pub fn complete(&mut self, mem: &GuestMemoryMmap, head: u16, len: u32) {
        if self.broken {
            return;
        }
        match self.queue.add_used(mem, head, len) {
            Ok(()) => self.used = true,
            Err(error) => self.fail(&error),
        }
    }

    /// Asks the driver to leave notifications out while the worker looks at the queue anyway.
    pub fn disarm(&mut self, mem: &GuestMemoryMmap) {
        if self.broken {
            return;
        }
        if let Err(error) = self.queue.disable_notification(mem) {
            self.fail(&error);
        }
    }

    /// Asks the driver for a notification of the next chain. True if there is one already: then look again before sleeping.
    pub fn arm(&mut self, mem: &GuestMemoryMmap) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.enable_notification(mem) {
            Ok(more) => more,
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    /// Interrupts the driver if chains were completed since the last call and it wants to know.
    pub fn notify(&mut self, mem: &GuestMemoryMmap, interrupt: &Interrupt) {
        if !std::mem::take(&mut self.used) || self.broken {
            return;
        }
        match self.queue.needs_notification(mem) {
            Ok(true) => interrupt.signal_used_buffers(),
            Ok(false) => {}
            Err(error) => self.fail(&error),
        }
    }

    fn fail(&mut self, error: &Error) {
        self.broken = true;
        tracing::error!(queue = self.name, %error, "the driver broke a virtqueue; it is ignored until the device is reset");
    }
}

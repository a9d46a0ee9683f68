//! Devices whose queues are served on the VMM's event loop: short work that needs no thread of its own.
//!
//! A queue's kick eventfd lives as long as its transport, so it is registered with the loop once. The handler behind a mutex is
//! shared with the device; while the device is not active, kicks find nothing to do.

use std::sync::{Arc, Mutex};

use event_manager::{EventOps, Events, MutEventSubscriber};
use tracing::warn;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;
use super::driver_queue::{Chain, DriverQueue};
use crate::sync::lock;

/// Most descriptor chains served for one event: other events of the loop get their turn, whatever the guest does.
const BUDGET: usize = 64;

/// Serves the queues of one device.
pub trait QueueHandler: Send {
    /// Serves queue `index`. Returns whether work was left for another turn.
    fn serve(&mut self, index: usize) -> bool;
}

/// Subscribes a handler to the kicks of its device.
pub struct QueueSubscriber {
    kicks: Vec<EventFd>,
    handler: Arc<Mutex<dyn QueueHandler>>,
}

impl QueueSubscriber {
    /// `kicks[i]` calls for service of queue `i`.
    pub fn new(kicks: Vec<EventFd>, handler: Arc<Mutex<dyn QueueHandler>>) -> Self {
        Self { kicks, handler }
    }
}

impl MutEventSubscriber for QueueSubscriber {
    fn init(&mut self, ops: &mut EventOps) {
        for (index, kick) in self.kicks.iter().enumerate() {
            let events = Events::with_data(kick, index as u32, EventSet::IN);
            if let Err(error) = ops.add(events) {
                // Its descriptor is valid and new to the loop: out of memory is what remains.
                warn!("cannot watch a virtio queue: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let index = events.data() as usize;
        let Some(kick) = self.kicks.get(index) else {
            return;
        };
        // Nothing to read means that someone else took the kick, and its work with it.
        if kick.read().is_ok() && lock(&self.handler).serve(index) {
            let _ = kick.write(1);
        }
    }
}

/// Takes up to a budget of chains from a queue, has each one served, and interrupts the driver if it wants that.
///
/// `serve` returns the number of bytes written to the chain. The result says whether chains may be left.
pub fn drain(
    queue: &mut DriverQueue,
    memory: &GuestMemoryMmap,
    interrupt: &Interrupt,
    mut serve: impl FnMut(Chain) -> u32,
) -> bool {
    let mut left = BUDGET;
    loop {
        queue.disarm(memory);
        while left > 0 {
            let Some(chain) = queue.pop(memory) else {
                break;
            };
            left -= 1;
            let head = chain.head_index();
            let written = serve(chain);
            queue.complete(memory, head, written);
        }
        if left == 0 || !queue.arm(memory) {
            break;
        }
        // A look for nothing counts too: what is said to be there may be gone each time, if the driver lays one ring over the other.
        left -= 1;
    }
    queue.notify(memory, interrupt);
    left == 0
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::virtio::ActiveQueue;
    use crate::virtio::mock_driver::{self, Line, PATIENCE};

    #[test]
    fn rings_that_lie_over_each_other_keep_nobody_busy() {
        const AVAIL: u64 = 0x2002;
        // What the device writes to turn notifications on and off is what it reads then: how much the driver has made available.
        const USED: u64 = AVAIL + 2;
        let memory = mock_driver::memory(0x1_0000);
        let mut queue = Queue::new(16).unwrap();
        queue.set_size(16);
        queue.set_desc_table_address(Some(0x1000), Some(0));
        queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_ready(true);
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut queue = DriverQueue::new(ActiveQueue { queue, kick }, 0, "test");
        memory
            .memory()
            .write_obj(16u32, GuestAddress(0x1008))
            .unwrap();
        let line = Line::new();
        let interrupt = line.interrupt.clone();
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            tell.send(drain(&mut queue, &memory.memory(), &interrupt, |_| 0))
        });
        // It is looked at again in its turn.
        assert_eq!(told.recv_timeout(PATIENCE), Ok(true));
    }
}

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
    }
    queue.notify(memory, interrupt);
    left == 0
}

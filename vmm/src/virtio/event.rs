//! Devices whose queues are served on the VMM's event loop: short work that needs no thread of its own.
//!
//! A queue's kick eventfd lives as long as its transport, so it is registered with the loop once. The handler behind a mutex is
//! shared with the device; while the device is not active, kicks find nothing to do.

use std::sync::{Arc, Mutex};

use event_manager::{EventOps, Events, MutEventSubscriber};
use tracing::warn;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::{ActiveQueue, Interrupt, Memory};
use crate::sync::lock;

/// Most descriptor chains served for one event: other events of the loop get their turn, whatever the guest does.
const BUDGET: usize = 64;

/// A chain in guest memory.
pub type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

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
/// `serve` returns the number of bytes written to the chain. The result says whether chains may be left. An error means that the driver broke
/// the ring: the queue must not be served again.
pub fn drain(
    active: &mut ActiveQueue,
    memory: &Memory,
    interrupt: &Interrupt,
    mut serve: impl FnMut(Chain) -> u32,
) -> Result<bool, virtio_queue::Error> {
    let queue: &mut Queue = &mut active.queue;
    let mut left = BUDGET;
    let mut used = false;
    loop {
        queue.disable_notification(&*memory.memory())?;
        // `iter` refuses an available index that runs more than a queue's length ahead; `pop_descriptor_chain` would only
        // return nothing, for ever.
        while left > 0 {
            let Some(chain) = queue.iter(memory.memory())?.next() else {
                break;
            };
            left -= 1;
            let head = chain.head_index();
            let written = serve(chain);
            queue.add_used(&*memory.memory(), head, written)?;
            used = true;
        }
        if left == 0 || !queue.enable_notification(&*memory.memory())? {
            break;
        }
    }
    if used && queue.needs_notification(&*memory.memory())? {
        interrupt.signal_used_buffers();
    }
    Ok(left == 0)
}

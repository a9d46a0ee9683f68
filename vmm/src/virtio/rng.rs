//! The entropy device (virtio 1.2, 5.4): fills the driver's buffers from the host's generator.

use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddressSpace};

use super::driver_queue::{Chain, DriverQueue};
use super::event::{self, QueueHandler};
use super::{ActivateError, Activation, Interrupt, Memory, VirtioDevice};
use crate::sync::lock;

/// Most bytes given for one request, whatever the size of its buffers. Linux asks for 64 or less.
const MAX_REQUEST: usize = 1024;
const QUEUE_SIZES: [u16; 1] = [16];

/// The device.
#[derive(Debug, Default)]
pub struct Rng {
    worker: Arc<Mutex<Worker>>,
}

/// Its part on the event loop.
#[derive(Debug, Default)]
struct Worker(Option<Active>);

#[derive(Debug)]
struct Active {
    queue: DriverQueue,
    memory: Memory,
    interrupt: Arc<Interrupt>,
}

impl Rng {
    /// A device, not active yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// What serves its queue.
    pub fn handler(&self) -> Arc<Mutex<dyn QueueHandler>> {
        self.worker.clone()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> &'static str {
        "rng"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queues = activation.queues.into_iter();
        let queue = queues
            .next()
            .filter(|queue| queue.queue.ready())
            .ok_or(ActivateError::MissingQueues { got: 0, wanted: 1 })?;
        // A kick that came before now was dropped: look at the queue once.
        queue.kick.write(1).map_err(ActivateError::Worker)?;
        lock(&self.worker).0 = Some(Active {
            queue: DriverQueue::new(queue, activation.features, "rng"),
            memory: activation.memory,
            interrupt: activation.interrupt,
        });
        Ok(())
    }

    fn reset(&mut self) {
        lock(&self.worker).0 = None;
    }
}

impl QueueHandler for Worker {
    fn serve(&mut self, _index: usize) -> bool {
        let Some(active) = &mut self.0 else {
            return false;
        };
        let memory = active.memory.memory();
        event::drain(&mut active.queue, &memory, &active.interrupt, fill)
    }
}

/// Fills a chain's writable buffers, as far as a request goes. Returns the bytes written.
fn fill(chain: Chain) -> u32 {
    let mut entropy = [0; MAX_REQUEST];
    let mut written = 0;
    for descriptor in chain.clone().writable() {
        let want = (descriptor.len() as usize).min(MAX_REQUEST - written);
        if want == 0 {
            break;
        }
        let bytes = &mut entropy[..want];
        if !random(bytes)
            || chain
                .memory()
                .write_slice(bytes, descriptor.addr())
                .is_err()
        {
            break;
        }
        written += want;
    }
    written as u32
}

fn random(bytes: &mut [u8]) -> bool {
    // SAFETY: the pointer and length are those of a writable slice. Requests of up to 256 bytes are never cut short; a longer
    // one may be by a signal, and then gives nothing here.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    count == bytes.len() as isize
}

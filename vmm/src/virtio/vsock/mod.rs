//! The socket device (virtio 1.2, 5.10): stream connections between host programs and the guest.
//!
//! On the host's side a connection is a unix socket (the *hybrid* protocol that Firecracker and Cloud Hypervisor speak too). A host
//! program that wants the guest's port P connects to the device's socket, writes `CONNECT P\n` and reads
//! `OK <port>\n`; a closed connection instead means that nobody listens there. When the guest connects to port P of the
//! host (context identifier 2), the device connects to the unix socket `<path>_P`, and refuses if nobody listens there.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`packet`] | packets and their buffers in guest memory |
//! | [`connection`] | one connection: its life, streams and credit |
//! | [`table`] | all connections |
//! | [`worker`] | the thread that moves packets |

mod connection;
mod packet;
mod ring;
mod table;
#[cfg(test)]
mod tests;
mod worker;

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread::JoinHandle;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::driver_queue::DriverQueue;
use super::{ActivateError, Activation, VirtioDevice};
use crate::thread;
use worker::{Parts, Worker};

/// Receive, transmit and event queue (virtio 1.2, 5.10.2). Linux posts buffers of a page with a descriptor for each header, so
/// half as many as the queue is long: 512 KiB of guest memory.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// The event queue may stay disabled: its one event tells of a restored guest.
const QUEUES_NEEDED: usize = 2;

/// The device.
#[derive(Debug)]
pub struct Vsock {
    /// struct virtio_vsock_config (virtio 1.2, 5.10.4): the guest's CID.
    config: [u8; 8],
    listener: UnixListener,
    path: PathBuf,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    stop: EventFd,
    thread: JoinHandle<()>,
}

impl Vsock {
    /// A device for the guest `guest_cid` (3 or more). Host programs connect to `listener`, which is bound to `path`; those that
    /// come before the guest's driver is ready wait.
    pub fn new(guest_cid: u64, listener: UnixListener, path: PathBuf) -> Self {
        Self {
            config: guest_cid.to_le_bytes(),
            listener,
            path,
            running: None,
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn name(&self) -> &'static str {
        "vsock"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            features,
            queues,
            interrupt,
        } = activation;
        let got = queues
            .iter()
            .take(QUEUES_NEEDED)
            .filter(|active| active.queue.ready())
            .count();
        let mut queues = queues.into_iter();
        let (Some(rx), Some(tx), QUEUES_NEEDED) = (queues.next(), queues.next(), got) else {
            return Err(ActivateError::MissingQueues {
                got,
                wanted: QUEUES_NEEDED,
            });
        };
        let stop = EventFd::new(EFD_NONBLOCK).map_err(ActivateError::Worker)?;
        let worker = Worker::new(Parts {
            guest_cid: u64::from_le_bytes(self.config),
            listener: self.listener.try_clone().map_err(ActivateError::Worker)?,
            path: self.path.clone(),
            stop: stop.try_clone().map_err(ActivateError::Worker)?,
            memory,
            interrupt,
            rx: DriverQueue::new(rx, features, "vsock receive"),
            tx: DriverQueue::new(tx, features, "vsock transmit"),
        })
        .map_err(ActivateError::Worker)?;
        let thread = thread::spawn(thread::Kind::Vsock, move || worker.run())
            .map_err(ActivateError::Worker)?;
        self.running = Some(Running { stop, thread });
        Ok(())
    }

    /// Ends every connection; host programs see their sockets closed. New ones wait for the driver's return.
    fn reset(&mut self) {
        if let Some(Running { stop, thread }) = self.running.take() {
            // The counter is far from full, so the write succeeds.
            let _ = stop.write(1);
            if thread.join().is_err() {
                tracing::error!("the vsock device's thread had panicked");
                #[cfg(test)]
                assert!(std::thread::panicking(), "the vsock thread panicked");
            }
        }
    }
}

impl Drop for Vsock {
    /// A device that goes before its process does takes its socket with it: the next one may want the path.
    fn drop(&mut self) {
        self.reset();
        // Whoever owns the folder may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}

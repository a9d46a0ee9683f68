//! The console device (virtio 1.2, 5.3) with one port: what the guest writes goes to the VMM's log, line by line.
//!
//! It takes no input. Lines are cut, cleaned of control characters and limited in rate, so that a guest can neither forge log
//! lines nor fill the disk.

use std::sync::{Arc, Mutex};

use tracing::info;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddressSpace};

use super::driver_queue::{Chain, DriverQueue};
use super::event::{self, QueueHandler};
use super::{ActivateError, Activation, Interrupt, Memory, VirtioDevice};
use crate::rate::Rate;
use crate::sync::lock;

/// Queues of port 0 (5.3.2).
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 2] = [16, 64];
/// Most bytes taken from one chain; the rest of it is dropped.
const MAX_CHAIN: usize = 4096;
/// Longest line logged.
const MAX_LINE: usize = 512;
/// Lines that may come at once, and how many come back each second.
const BURST: f64 = 200.0;
const LINES_PER_SECOND: f64 = 1.0;

/// The device.
#[derive(Debug)]
pub struct Console {
    worker: Arc<Mutex<Worker>>,
}

/// Its part on the event loop.
#[derive(Debug)]
struct Worker {
    active: Option<Active>,
    lines: Lines,
}

#[derive(Debug)]
struct Active {
    transmit: DriverQueue,
    memory: Memory,
    interrupt: Arc<Interrupt>,
}

impl Console {
    /// A console that logs at info level, target `guest`.
    pub fn new() -> Self {
        Self {
            worker: Arc::new(Mutex::new(Worker {
                active: None,
                lines: Lines::new(),
            })),
        }
    }

    /// What serves its queues.
    pub fn handler(&self) -> Arc<Mutex<dyn QueueHandler>> {
        self.worker.clone()
    }
}

impl Default for Console {
    fn default() -> Self {
        Self::new()
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn name(&self) -> &'static str {
        "console"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queues = activation.queues;
        let got = queues.iter().filter(|queue| queue.queue.ready()).count();
        let wanted = QUEUE_SIZES.len();
        if got < wanted {
            return Err(ActivateError::MissingQueues { got, wanted });
        }
        // A kick that came before now was dropped: look at the queue once.
        let transmit = queues.swap_remove(TRANSMIT);
        transmit.kick.write(1).map_err(ActivateError::Worker)?;
        lock(&self.worker).active = Some(Active {
            transmit: DriverQueue::new(transmit, activation.features, "console transmit"),
            memory: activation.memory,
            interrupt: activation.interrupt,
        });
        Ok(())
    }

    fn reset(&mut self) {
        lock(&self.worker).active = None;
    }
}

impl QueueHandler for Worker {
    fn serve(&mut self, index: usize) -> bool {
        let (Some(active), TRANSMIT) = (&mut self.active, index) else {
            // Receive buffers stay with the device: there is no input.
            return false;
        };
        let lines = &mut self.lines;
        let memory = active.memory.memory();
        event::drain(&mut active.transmit, &memory, &active.interrupt, |chain| {
            log_chain(chain, lines);
            0
        })
    }
}

fn log_chain(chain: Chain, lines: &mut Lines) {
    let mut buffer = [0; MAX_CHAIN];
    let mut left = MAX_CHAIN;
    for descriptor in chain.clone().readable() {
        let length = (descriptor.len() as usize).min(left);
        if length == 0 {
            break;
        }
        let bytes = &mut buffer[..length];
        if chain.memory().read_slice(bytes, descriptor.addr()).is_err() {
            break;
        }
        lines.push(bytes, |line| info!(target: "guest", "{line}"));
        left -= length;
    }
}

/// Makes log lines of a stream of bytes.
#[derive(Debug)]
struct Lines {
    line: String,
    rate: Rate,
}

impl Lines {
    fn new() -> Self {
        Self {
            line: String::new(),
            rate: Rate::new(BURST, LINES_PER_SECOND),
        }
    }

    /// Takes bytes and gives out each line that they complete.
    fn push(&mut self, bytes: &[u8], mut emit: impl FnMut(&str)) {
        for &byte in bytes {
            match byte {
                b'\n' => self.end_line(&mut emit),
                b'\r' => {}
                b'\t' | b' '..=b'~' => self.line.push(char::from(byte)),
                other => self.line.extend(other.escape_ascii().map(char::from)),
            }
            if self.line.len() >= MAX_LINE {
                self.end_line(&mut emit);
            }
        }
    }

    fn end_line(&mut self, emit: &mut impl FnMut(&str)) {
        if self.line.is_empty() {
            return;
        }
        if let Some(left_out) = self.rate.take() {
            if left_out > 0 {
                emit(&format!("({left_out} lines left out)"));
            }
            emit(&self.line);
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(lines: &mut Lines, bytes: &[u8]) -> Vec<String> {
        let mut out = Vec::new();
        lines.push(bytes, |line| out.push(line.to_owned()));
        out
    }

    #[test]
    fn bytes_become_lines_across_writes() {
        let mut lines = Lines::new();
        assert!(collect(&mut lines, b"hel").is_empty());
        assert_eq!(collect(&mut lines, b"lo\r\n\nworld\n"), ["hello", "world"]);
    }

    #[test]
    fn control_characters_cannot_forge_log_lines() {
        let mut lines = Lines::new();
        assert_eq!(
            collect(&mut lines, b"\x1b[2Jroot\x00\xff\n"),
            ["\\x1b[2Jroot\\x00\\xff"]
        );
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let mut lines = Lines::new();
        let out = collect(&mut lines, &[b'a'; 1300]);
        assert_eq!(out.len(), 2);
        assert!(out.iter().all(|line| line.len() == MAX_LINE));
    }

    #[test]
    fn a_flood_is_counted_instead_of_logged() {
        let mut lines = Lines::new();
        let out = collect(&mut lines, &b"x\n".repeat(10_000));
        assert!((BURST as usize..BURST as usize + 50).contains(&out.len()));
    }
}

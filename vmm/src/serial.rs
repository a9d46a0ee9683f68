//! The debugging serial port: an 8250 whose output goes to a file descriptor of the server's.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// Bytes held back until a line is complete.
const LINE: usize = 512;
/// How long a reader may hold up a vCPU before output is dropped.
const PATIENCE_MS: i32 = 1000;

/// The port.
pub struct SerialPort(Serial<Line, vm_superio::serial::NoEvents, Output>);

impl SerialPort {
    /// A port on `irqfd` whose output goes to `output`.
    pub fn new(irqfd: EventFd, output: File) -> Self {
        let output = Output {
            file: output,
            line: Vec::with_capacity(LINE),
            stuck: false,
        };
        Self(Serial::new(Line(irqfd), output))
    }

    /// The guest reads a register (0 to 7).
    pub fn read(&mut self, register: u8) -> u8 {
        self.0.read(register)
    }

    /// The guest writes a register (0 to 7).
    pub fn write(&mut self, register: u8, value: u8) {
        // Errors are lost output or a full eventfd, neither of which is the guest's business.
        let _ = self.0.write(register, value);
    }

    /// Writes out an unfinished line.
    pub fn flush(&mut self) {
        self.0.writer_mut().emit();
    }
}

/// The port's interrupt line.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Collects lines and writes each at once. A reader that does not read loses output rather than stopping the vCPU.
struct Output {
    file: File,
    line: Vec<u8>,
    stuck: bool,
}

impl Output {
    fn emit(&mut self) {
        let line = std::mem::take(&mut self.line);
        let mut rest = &line[..];
        while !rest.is_empty() && self.writable() {
            match self.file.write(rest) {
                Ok(0) => break,
                Ok(count) => rest = &rest[count..],
                // A kick for a pause, or a full pipe with O_NONBLOCK: look again whether it can be written.
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted) => {}
                Err(_) => break,
            }
        }
        self.line = line;
        self.line.clear();
    }

    /// Waits for room, once: after a first timeout there is no more patience until the reader is back.
    fn writable(&mut self) -> bool {
        let mut poll = libc::pollfd {
            fd: self.file.as_raw_fd(),
            events: libc::POLLOUT,
            revents: 0,
        };
        let patience = if self.stuck { 0 } else { PATIENCE_MS };
        // SAFETY: `poll` is one valid pollfd.
        let ready = unsafe { libc::poll(&mut poll, 1, patience) };
        self.stuck = ready == 0;
        ready > 0 && poll.revents & libc::POLLOUT != 0
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(bytes);
        if self.line.len() >= LINE || bytes.contains(&b'\n') {
            self.emit();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // vm-superio flushes after each byte; lines are what matters here.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    const TRANSMIT: u8 = 0;
    const LINE_STATUS: u8 = 5;

    #[test]
    fn output_arrives_in_lines_and_the_rest_at_a_flush() {
        let mut file = tempfile::tempfile().unwrap();
        let mut port = SerialPort::new(EventFd::new(0).unwrap(), file.try_clone().unwrap());
        for byte in b"one\ntwo" {
            assert_ne!(port.read(LINE_STATUS) & 0x20, 0, "ready to transmit");
            port.write(TRANSMIT, *byte);
        }
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one\n");
        file.seek(io::SeekFrom::End(0)).unwrap();
        port.flush();
        file.rewind().unwrap();
        text.clear();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one\ntwo");
    }

    #[test]
    fn a_reader_that_is_gone_does_not_stop_the_guest() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        drop(reader);
        let mut port = SerialPort::new(EventFd::new(0).unwrap(), File::from(writer));
        for _ in 0..10_000 {
            port.write(TRANSMIT, b'\n');
        }
    }
}

//! Terminals as clients use them: a console socket that takes the master, and a terminal of the test's own.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tempfile::TempDir;

/// How long a program may take to show something, on an emulated CPU.
const PATIENCE_MS: u16 = 30_000;

mod ioctl {
    nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, nix::pty::Winsize);
    nix::ioctl_write_int_bad!(set_controlling_terminal, libc::TIOCSCTTY);
}

/// Where a runtime sends the master of a container's terminal.
pub struct ConsoleSocket {
    dir: TempDir,
    listener: UnixListener,
}

impl ConsoleSocket {
    /// Listens.
    ///
    /// # Panics
    /// When it can't.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("console")).unwrap();
        Self { dir, listener }
    }

    /// The socket's path.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("console")
    }

    /// Takes the master that has been sent.
    ///
    /// # Panics
    /// When none has.
    pub fn receive(&self) -> Console {
        let (connection, _) = self.listener.accept().unwrap();
        let mut name = [0; 256];
        let mut buffers = [IoSliceMut::new(&mut name)];
        let mut space = nix::cmsg_space!(RawFd);
        let message = recvmsg::<()>(
            connection.as_raw_fd(),
            &mut buffers,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .unwrap();
        let fds = message.cmsgs().unwrap().find_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => Some(fds),
            _ => None,
        });
        // SAFETY: the kernel has just made this descriptor for us.
        let master = unsafe { OwnedFd::from_raw_fd(fds.unwrap()[0]) };
        Console {
            master: master.into(),
            seen: String::new(),
        }
    }
}

impl Default for ConsoleSocket {
    fn default() -> Self {
        Self::new()
    }
}

/// The side of a terminal at which the user sits.
pub struct Console {
    master: File,
    seen: String,
}

impl Console {
    /// A terminal, and its other side for a program's standard streams.
    ///
    /// # Panics
    /// When it can't be made.
    pub fn open(columns: u16, rows: u16) -> (Self, File) {
        let size = winsize(columns, rows);
        let OpenptyResult { master, slave } = openpty(Some(&size), None).unwrap();
        let console = Self {
            master: master.into(),
            seen: String::new(),
        };
        (console, slave.into())
    }

    /// Starts a command as a login does: on its own standard streams, and in a session whose controlling terminal this is, so that it is
    /// told of a new size.
    ///
    /// # Panics
    /// When it can't be started.
    pub fn start(terminal: &File, command: &mut Command) -> Child {
        let stream = || terminal.try_clone().unwrap();
        command.stdin(stream()).stdout(stream()).stderr(stream());
        // SAFETY: two system calls between fork and exec, on standard input, which is the terminal by then.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                ioctl::set_controlling_terminal(libc::STDIN_FILENO, 0)?;
                Ok(())
            });
        }
        command.spawn().unwrap()
    }

    /// Types.
    ///
    /// # Panics
    /// When nobody has the other side.
    pub fn type_in(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Reads until `text` has been shown since the last call; returns what was.
    ///
    /// # Panics
    /// When the terminal ends before.
    #[track_caller]
    pub fn expect(&mut self, text: &str) -> String {
        let mut buffer = [0; 4096];
        while !self.seen.contains(text) {
            match self.read(&mut buffer, text) {
                Ok(length @ 1..) => self
                    .seen
                    .push_str(&String::from_utf8_lossy(&buffer[..length])),
                end => panic!("no {text:?} before the end ({end:?}): {:?}", self.seen),
            }
        }
        std::mem::take(&mut self.seen)
    }

    /// Reads to the end of the terminal.
    pub fn rest(&mut self) -> String {
        let mut buffer = [0; 4096];
        // The end of a terminal is an error (EIO).
        while let Ok(length @ 1..) = self.read(&mut buffer, "the end") {
            self.seen
                .push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        std::mem::take(&mut self.seen)
    }

    fn read(&mut self, buffer: &mut [u8], what: &str) -> std::io::Result<usize> {
        let mut polled = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut polled, PollTimeout::from(PATIENCE_MS)).unwrap();
        assert_eq!(ready, 1, "waiting for {what:?}, seen {:?}", self.seen);
        self.master.read(buffer)
    }

    /// Changes its size.
    ///
    /// # Panics
    /// When it can't.
    pub fn resize(&self, columns: u16, rows: u16) {
        // SAFETY: the kernel reads a structure of this type.
        unsafe { ioctl::set_window_size(self.master.as_raw_fd(), &winsize(columns, rows)) }
            .unwrap();
    }
}

fn winsize(columns: u16, rows: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

//! Terminals of the host: raw mode, sizes, and the pair that stands between a client and a container.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use bulkhead_runtime::sock;
use bulkhead_runtime::stdio::TerminalSize;
use nix::pty::{OpenptyResult, openpty};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

nix::ioctl_read_bad!(get_window_size, libc::TIOCGWINSZ, libc::winsize);
nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);
nix::ioctl_write_int_bad!(set_controlling_terminal, libc::TIOCSCTTY);

/// The size of a terminal; `None` if `fd` is none, or has no size.
pub fn size(fd: BorrowedFd) -> Option<TerminalSize> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel fills `size`, which is what this request takes.
    unsafe { get_window_size(fd.as_raw_fd(), &mut size) }.ok()?;
    Some(TerminalSize {
        width: size.ws_col.into(),
        height: size.ws_row.into(),
    })
    .filter(|size| *size != TerminalSize::default())
}

/// Sets the size of a terminal.
pub fn set_size(fd: BorrowedFd, size: TerminalSize) -> nix::Result<()> {
    let bounded = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    let size = libc::winsize {
        ws_row: bounded(size.height),
        ws_col: bounded(size.width),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel reads `size`, which is what this request takes.
    unsafe { set_window_size(fd.as_raw_fd(), &size) }.map(drop)
}

/// The terminal of this process. Its streams may be redirected, so all are tried, in runc's order, and then the controlling one.
pub fn own() -> anyhow::Result<OwnedFd> {
    let (stderr, stdout, stdin) = (io::stderr(), io::stdout(), io::stdin());
    for stream in [stderr.as_fd(), stdout.as_fd(), stdin.as_fd()] {
        if tcgetattr(stream).is_ok() {
            return Ok(stream.try_clone_to_owned()?);
        }
    }
    File::open("/dev/tty").map(OwnedFd::from).map_err(|_| {
        anyhow!(
            "there is no terminal: no standard stream is one, and this process has no controlling one; run it in a terminal, \
             name a --console-socket for one in the background, or ask for none (`process.terminal`, --tty)"
        )
    })
}

/// The terminal of this process in raw mode: what is typed goes to the container as it is. Dropping it restores what was.
#[derive(Debug)]
pub struct Raw {
    terminal: OwnedFd,
    before: Termios,
}

impl Raw {
    /// Switches a terminal.
    pub fn enter(terminal: OwnedFd) -> anyhow::Result<Self> {
        let before = tcgetattr(&terminal).context("cannot read the terminal's settings")?;
        make_raw(terminal.as_fd(), &before).context("cannot switch the terminal to raw mode")?;
        Ok(Self { terminal, before })
    }

    /// Its size.
    pub fn size(&self) -> Option<TerminalSize> {
        size(self.terminal.as_fd())
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that has been hung up has nothing to restore.
        let _ = tcsetattr(&self.terminal, SetArg::TCSADRAIN, &self.before);
    }
}

fn make_raw(fd: BorrowedFd, before: &Termios) -> nix::Result<()> {
    let mut raw = before.clone();
    cfmakeraw(&mut raw);
    tcsetattr(fd, SetArg::TCSANOW, &raw)
}

/// A pair between a client, which gets the master, and the process that stands for the container's, which moves bytes
/// between the slave and the guest. The terminal that the container sees is the guest's; this one only passes on.
#[derive(Debug)]
pub struct Pair {
    master: OwnedFd,
    slave: OwnedFd,
    /// The client's.
    socket: UnixStream,
}

impl Pair {
    /// Makes one for a process in the background if that is to have a terminal, which `field` says: then there has to be a socket
    /// that takes the master, and else not.
    pub fn for_background(
        field: &str,
        terminal: bool,
        console_socket: Option<&Path>,
        size: Option<TerminalSize>,
    ) -> anyhow::Result<Option<Self>> {
        match (terminal, console_socket) {
            (true, None) => bail!(
                "{field} asks for a terminal, and one in the background needs a --console-socket: name it, or leave the \
                 terminal out"
            ),
            (false, Some(_)) => bail!(
                "--console-socket is for a terminal, and {field} asks for none: ask for one or leave the flag out"
            ),
            (false, None) => Ok(None),
            (true, Some(path)) => {
                let socket = sock::connect(path).with_context(|| {
                    format!("cannot connect to the console socket {}", path.display())
                })?;
                Self::open(size, socket).map(Some)
            }
        }
    }

    fn open(size: Option<TerminalSize>, socket: UnixStream) -> anyhow::Result<Self> {
        let OpenptyResult { master, slave } =
            openpty(None, None).context("cannot make a terminal")?;
        for end in [&master, &slave] {
            let flags = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC);
            nix::fcntl::fcntl(end, flags)?;
        }
        let before = tcgetattr(&slave).context("cannot read the new terminal's settings")?;
        make_raw(slave.as_fd(), &before).context("cannot switch the new terminal to raw mode")?;
        if let Some(size) = size {
            set_size(slave.as_fd(), size).context("cannot set the new terminal's size")?;
        }
        Ok(Self {
            master,
            slave,
            socket,
        })
    }

    /// Sends the master over the console socket, as runc does.
    pub fn send_master(&self) -> anyhow::Result<()> {
        let fds = [self.master.as_raw_fd()];
        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(b"/dev/ptmx")],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .context("cannot send the terminal over the console socket")?;
        Ok(())
    }

    /// The slave's end.
    pub fn slave(&self) -> BorrowedFd<'_> {
        self.slave.as_fd()
    }
}

/// Makes the terminal `slave` this session's own and this process's standard streams.
pub fn take(slave: BorrowedFd) -> io::Result<()> {
    // SAFETY: the request takes a number.
    unsafe { set_controlling_terminal(slave.as_raw_fd(), 0) }?;
    nix::unistd::dup2_stdin(slave)?;
    nix::unistd::dup2_stdout(slave)?;
    nix::unistd::dup2_stderr(slave)?;
    Ok(())
}

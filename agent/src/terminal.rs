//! A container's pseudo-terminal, made in its own devpts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{fstat, makedev};

use crate::error::{Context, Error, Kind, Result};
use crate::paths::{self, Make};
use crate::sys;

/// How large a terminal is; 0 is unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

impl Size {
    /// From the API's numbers; what is too large is as large as can be.
    pub fn bounded(columns: u32, rows: u32) -> Self {
        let bounded = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        Self {
            columns: bounded(columns),
            rows: bounded(rows),
        }
    }

    /// This one, or another if this is unknown.
    pub fn or(self, other: Self) -> Self {
        if self == Self::default() { other } else { self }
    }
}

/// Both ends.
#[derive(Debug)]
pub struct Terminal {
    /// For the agent.
    pub master: OwnedFd,
    /// For the process.
    pub slave: OwnedFd,
}

impl Terminal {
    /// Makes one in the devpts below `root`. The image can't pass off another file as the multiplexer: its device
    /// number is checked.
    pub fn make(root: BorrowedFd<'_>, size: Size) -> Result<Self> {
        let what = || "process.terminal: cannot make a pseudo-terminal in the container's /dev/pts";
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
        let master = match sys::open_in_root(root, b"/dev/ptmx", flags) {
            Err(Errno::ENOENT) => {
                return Err(Error::setup(
                    Kind::InvalidArgument,
                    "process.terminal: needs a devpts at /dev/pts in mounts",
                ));
            }
            master => master.what(what)?,
        };
        let stat = fstat(&master).what(what)?;
        if stat.st_mode & libc::S_IFMT != libc::S_IFCHR || stat.st_rdev != makedev(5, 2) {
            return Err(Error::system(what(), Errno::ENODEV));
        }
        sys::unlock_pty(master.as_fd()).what(what)?;
        let slave = sys::open_pty_peer(master.as_fd()).what(what)?;
        if size.columns != 0 || size.rows != 0 {
            sys::set_terminal_size(slave.as_fd(), size.columns, size.rows).what(what)?;
        }
        Ok(Self { master, slave })
    }

    /// Puts it at /dev/console below `root`, as runc does for a container's first process.
    pub fn show_at_console(&self, root: BorrowedFd<'_>) -> Result<()> {
        let what = || "process.terminal: cannot put the terminal at /dev/console";
        let console = sys::clone_tree_of(self.slave.as_fd(), false).what(what)?;
        let place = paths::open_or_make(root, b"/dev/console", Make::File).what(what)?;
        sys::attach(console.as_fd(), place.as_fd()).what(what)
    }
}

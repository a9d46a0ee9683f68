//! Descriptors beyond the standard streams that a caller hands to a process: `--preserve-fds`, and those of a service
//! manager (`LISTEN_FDS`, `sd_listen_fds(3)`).
//!
//! The process in the guest gets the end of a stream at the same number, and the other end is here. So what is no stream
//! of bytes can't be handed over.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use anyhow::{anyhow, bail};
use bulkhead_protocol::{FIRST_DESCRIPTOR, MAX_DESCRIPTORS};
use bulkhead_runtime::stdio::Flow;
use bulkhead_runtime::streams;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use nix::sys::stat::{SFlag, fstat};

/// A descriptor that is ours to hand over.
#[derive(Debug)]
pub struct Descriptor {
    /// Its number, here and in the process.
    pub number: u32,
    /// Where its bytes go.
    pub flow: Flow,
    /// Itself.
    pub fd: OwnedFd,
}

/// All of them, in order from [`FIRST_DESCRIPTOR`] on.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// How many of them, the first, a service manager has passed.
    pub listen_fds: usize,
    list: Vec<Descriptor>,
}

impl Descriptors {
    /// Takes over what this process was given for another of the container: once, as they have one owner.
    pub fn for_exec(preserve_fds: u32) -> anyhow::Result<Self> {
        Self::take(0, preserve_fds)
    }

    /// The same for the container's init, which gets what a service manager has passed to us as well, and that first.
    pub fn for_init(preserve_fds: u32) -> anyhow::Result<Self> {
        Self::take(listen_fds(), preserve_fds)
    }

    fn take(listen_fds: u32, preserve_fds: u32) -> anyhow::Result<Self> {
        let count = listen_fds.saturating_add(preserve_fds);
        if usize::try_from(count).map_or(true, |count| count > MAX_DESCRIPTORS) {
            bail!(
                "{count} descriptors beyond the standard streams (--preserve-fds, LISTEN_FDS) are more than \
                 {MAX_DESCRIPTORS}"
            );
        }
        let mut list = Vec::new();
        for index in 0..count {
            let number = FIRST_DESCRIPTOR + index;
            let asked = match index.checked_sub(listen_fds) {
                None => format!("LISTEN_FDS={listen_fds}"),
                Some(_) => format!("--preserve-fds {preserve_fds}"),
            };
            let fd = inherited(number).ok_or_else(|| match index.checked_sub(listen_fds) {
                None => anyhow!("{asked}: descriptor {number} is not open"),
                // In runc's words.
                Some(index) => anyhow!(
                    "unable to stat preserved-fd {index} (of {preserve_fds}): descriptor {number} is not open"
                ),
            })?;
            let flow = flow(&fd).map_err(|kind| {
                anyhow!(
                    "{asked}: descriptor {number} is {kind}; a VM gets only bytes: of pipes and files that are open for \
                     reading or for writing, of connected stream sockets, and of terminals"
                )
            })?;
            list.push(Descriptor { number, flow, fd });
        }
        Ok(Self {
            listen_fds: usize::try_from(listen_fds)?,
            list,
        })
    }

    /// What the server is to know of them.
    pub fn flows(&self) -> Vec<Flow> {
        self.list.iter().map(|descriptor| descriptor.flow).collect()
    }

    /// Their numbers, for who closes all others.
    pub fn numbers(&self) -> impl Iterator<Item = RawFd> {
        self.list.iter().map(|descriptor| descriptor.fd.as_raw_fd())
    }
}

impl IntoIterator for Descriptors {
    type Item = Descriptor;
    type IntoIter = std::vec::IntoIter<Descriptor>;

    fn into_iter(self) -> Self::IntoIter {
        self.list.into_iter()
    }
}

/// How many descriptors a service manager has passed to this very process.
fn listen_fds() -> u32 {
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    match number("LISTEN_PID") {
        Some(pid) if pid == std::process::id() => number("LISTEN_FDS").unwrap_or(0),
        _ => 0,
    }
}

/// Takes over a descriptor that the caller has left open for this process. What this program opens is closed by an exec, so
/// that one which is not has come through one.
fn inherited(number: u32) -> Option<OwnedFd> {
    let raw = RawFd::try_from(number).ok()?;
    // SAFETY: it is borrowed for two questions, which a closed one answers with an error.
    let fd = unsafe { BorrowedFd::borrow_raw(raw) };
    let flags = FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD).ok()?);
    if flags.contains(FdFlag::FD_CLOEXEC) {
        return None;
    }
    fcntl(fd, FcntlArg::F_SETFD(flags | FdFlag::FD_CLOEXEC)).ok()?;
    // SAFETY: it came through the exec, so nothing of this program owns it, and now that it does not look so any more nobody
    // takes it over again.
    Some(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Where the bytes of a descriptor go, or what it is that has none.
fn flow(fd: &OwnedFd) -> Result<Flow, String> {
    let unknown = |errno: Errno| format!("nothing that can be looked at ({})", errno.desc());
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).map_err(unknown)?);
    if flags.contains(OFlag::O_PATH) {
        return Err("a path that is not open (O_PATH)".to_owned());
    }
    let stat = fstat(fd).map_err(unknown)?;
    let access = flags & OFlag::O_ACCMODE;
    let one_way = |kind: &str| match access {
        OFlag::O_RDONLY => Ok(Flow::Inward),
        OFlag::O_WRONLY => Ok(Flow::Outward),
        // What is to be read and what was written would get into each other's way.
        _ => Err(format!("{kind} that is open for reading and writing")),
    };
    match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFIFO => one_way("a pipe"),
        SFlag::S_IFREG if has_path(fd) => one_way("a file"),
        SFlag::S_IFSOCK => socket(fd).map_err(str::to_owned),
        SFlag::S_IFCHR if streams::is_null(fd.as_fd()) => Ok(Flow::Nowhere),
        // Reading ahead would take what is typed for others, so it is done only where there is nothing else to do.
        SFlag::S_IFCHR if nix::unistd::isatty(fd).unwrap_or(false) => match access {
            OFlag::O_RDONLY => Ok(Flow::Inward),
            _ => Ok(Flow::Outward),
        },
        SFlag::S_IFCHR => Err("a character device".to_owned()),
        SFlag::S_IFBLK => Err("a block device".to_owned()),
        SFlag::S_IFDIR => Err("a directory".to_owned()),
        // An epoll instance, an event counter, a namespace...
        _ => Err(format!("an object of the kernel ({})", name(fd))),
    }
}

fn socket(fd: &OwnedFd) -> Result<Flow, &'static str> {
    match getsockopt(fd, sockopt::SockType) {
        Ok(SockType::Stream) if getsockopt(fd, sockopt::AcceptConn) == Ok(true) => {
            Err("a listening socket")
        }
        Ok(SockType::Stream) if has_peer(fd) => Ok(Flow::BothWays),
        Ok(SockType::Stream) => Err("a socket that is not connected"),
        _ => Err("a socket of messages and not of a stream"),
    }
}

fn has_peer(fd: &OwnedFd) -> bool {
    let mut length: libc::socklen_t = 0;
    // SAFETY: with a length of 0 nothing is written to the address.
    unsafe { libc::getpeername(fd.as_raw_fd(), std::ptr::null_mut(), &mut length) == 0 }
}

/// What `/proc/self/fd` says of it.
fn name(fd: &OwnedFd) -> String {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    std::fs::read_link(link).map_or_else(|_| "unknown".into(), |name| name.display().to_string())
}

/// Whether it is a file of a file system, and not, say, a namespace, which looks like one.
fn has_path(fd: &OwnedFd) -> bool {
    Path::new(&name(fd)).is_absolute()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, OpenOptions};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::fs::OpenOptionsExt;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    #[test]
    fn the_direction_is_that_of_the_descriptor() {
        let (reader, writer) = std::io::pipe().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        let (left, _right) = UnixStream::pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connected = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let terminal = nix::pty::openpty(None, None).unwrap();
        let tty = name(&terminal.slave);
        for (fd, expected) in [
            (OwnedFd::from(reader), Flow::Inward),
            (writer.into(), Flow::Outward),
            (File::create(&file).unwrap().into(), Flow::Outward),
            (File::open(&file).unwrap().into(), Flow::Inward),
            (
                OpenOptions::new().append(true).open(&file).unwrap().into(),
                Flow::Outward,
            ),
            (left.into(), Flow::BothWays),
            (connected.into(), Flow::BothWays),
            (File::open("/dev/null").unwrap().into(), Flow::Nowhere),
            (terminal.slave, Flow::Outward),
            (File::open(tty).unwrap().into(), Flow::Inward),
        ] {
            assert_eq!(flow(&fd), Ok(expected), "{}", name(&fd));
        }
    }

    #[test]
    fn what_is_no_stream_is_refused_by_its_kind() {
        let dir = tempfile::tempdir().unwrap();
        let both = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.path().join("file"))
            .unwrap();
        let path = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open("/etc")
            .unwrap();
        let unconnected = nix::sys::socket::socket(
            nix::sys::socket::AddressFamily::Unix,
            SockType::Stream,
            nix::sys::socket::SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap();
        let (packets, _) = nix::sys::socket::socketpair(
            nix::sys::socket::AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty());
        let namespace = File::open("/proc/self/ns/mnt").unwrap();
        for (fd, expected) in [
            (
                OwnedFd::from(both),
                "a file that is open for reading and writing",
            ),
            (path.into(), "O_PATH"),
            (unconnected, "a socket that is not connected"),
            (packets, "a socket of messages"),
            (
                UnixDatagram::unbound().unwrap().into(),
                "a socket of messages",
            ),
            (
                TcpListener::bind("127.0.0.1:0").unwrap().into(),
                "a listening socket",
            ),
            (File::open("/").unwrap().into(), "a directory"),
            (
                File::open("/dev/zero").unwrap().into(),
                "a character device",
            ),
            (epoll.unwrap().0, "eventpoll"),
            (namespace.into(), "mnt:["),
        ] {
            let kind = flow(&fd).unwrap_err();
            assert!(kind.contains(expected), "{kind}");
        }
    }
}

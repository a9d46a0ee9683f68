//! Unix sockets in a directory whose path may be longer than a socket's address can hold.
//!
//! A socket address has room for 107 bytes of path, and clients choose roots and ids that together exceed that; so
//! sockets are bound and reached through a descriptor of their directory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::sockopt::SendTimeout;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, setsockopt, socket};
use nix::sys::time::TimeVal;

/// Binds a listener at `path`.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    let (_dir, short) = short(path)?;
    UnixListener::bind(short)
}

/// How long a listener that takes no calls is given.
const PATIENCE: TimeVal = TimeVal::new(3, 0);

/// Connects to the listener at `path`. One that has too many calls waiting, and takes none, is as [`io::ErrorKind::WouldBlock`].
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let (_dir, short) = short(path)?;
    let socket = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // `connect` waits for room in the listener's queue as long as writing may wait (unix(7), socket(7)).
    setsockopt(&socket, SendTimeout, &PATIENCE)?;
    nix::sys::socket::connect(socket.as_raw_fd(), &UnixAddr::new(&short)?)?;
    setsockopt(&socket, SendTimeout, &TimeVal::new(0, 0))?;
    Ok(socket.into())
}

/// A short name of `path`, good while the returned descriptor of its directory is open. A mere name is short, and need not be reached by
/// way of `/proc`, which not every process sees.
fn short(path: &Path) -> io::Result<(Option<File>, PathBuf)> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => return Ok((None, name.into())),
    };
    let dir = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(parent)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    Ok((Some(dir), short))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_longer_than_a_socket_address_work() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("d".repeat(200));
        std::fs::create_dir(&dir).unwrap();
        let path = dir.join("s");
        let listener = bind(&path).unwrap();
        connect(&path).unwrap();
        listener.accept().unwrap();
    }

    #[test]
    fn a_listener_that_takes_no_calls_is_not_waited_for_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = bind(&path).unwrap();
        // The shortest queue that there is.
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let _first = connect(&path).unwrap();
        let error = connect(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}

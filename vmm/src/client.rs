//! The server's side of a VMM: starting the process, and a blocking client for its control socket.
//!
//! A caller with an event loop of its own takes the socket out of the client and uses [`crate::socket`] on it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::control::{
    AttachConfig, BootConfig, CONTROL_FD, Event, Info, Message, Request, Response,
};
use crate::socket::{self, SocketError};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The VMM could not be started.
    #[error("cannot start the VMM")]
    Spawn(#[source] io::Error),
    /// The socket failed or was closed.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The VMM refused the request; its own sentence.
    #[error("{0}")]
    Refused(String),
    /// The VMM answered something else than the request calls for.
    #[error("the VMM gave an answer that does not fit the request")]
    Unexpected,
    /// The VM ended before it answered.
    #[error("the VM ended: {reason}")]
    Ended {
        /// One of [`crate::control::exit_code`].
        exit_code: i32,
        /// What ended it.
        reason: String,
    },
}

/// A running VMM process.
#[derive(Debug)]
pub struct VmmProcess {
    /// The process. Whoever holds it must wait for it.
    pub child: Child,
    /// Its control socket: blocking, close-on-exec.
    pub socket: OwnedFd,
}

impl VmmProcess {
    /// Starts `bulkhead-vmm` at `path` with `args` (see its help). Its standard error goes to `stderr`; it reads and prints nothing.
    ///
    /// The VMM is killed when the calling *thread* ends, and ends by itself when the socket is closed: a VMM does not outlive its server.
    pub fn spawn(path: &Path, args: &[&str], stderr: Stdio) -> Result<Self, ClientError> {
        let (socket, theirs) = socket::pair().map_err(ClientError::Spawn)?;
        // A number of at least CONTROL_FD, so that CONTROL_FD itself is taken when `spawn` makes the pipe by which it learns of a failed
        // exec: that pipe must not be where the socket goes.
        let theirs = nix::fcntl::fcntl(&theirs, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(CONTROL_FD))
            // SAFETY: the descriptor has just been made for us.
            .map(|fd| unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) })
            .map_err(|errno| ClientError::Spawn(errno.into()))?;
        let fd = theirs.as_raw_fd();
        let parent = std::process::id();
        let mut command = Command::new(path);
        command
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        // SAFETY: the closure only makes system calls that are allowed between fork and exec, and does not allocate.
        unsafe { command.pre_exec(move || prepare_child(fd, parent)) };
        let child = command.spawn().map_err(ClientError::Spawn)?;
        Ok(Self { child, socket })
    }
}

/// Runs in the child before exec: ties its life to the parent's and puts the socket where the VMM looks for it.
fn prepare_child(socket: i32, parent: u32) -> io::Result<()> {
    // SAFETY: plain system calls on values.
    unsafe {
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
            return Err(io::Error::last_os_error());
        }
        // The parent may have died before the call above.
        if libc::getppid() as u32 != parent {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        let result = if socket == CONTROL_FD {
            // dup2 onto itself would leave close-on-exec set.
            libc::fcntl(socket, libc::F_SETFD, 0)
        } else {
            libc::dup2(socket, CONTROL_FD)
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A blocking client. Events that arrive while it waits for an answer are kept for [`Client::next_event`].
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    events: VecDeque<Event>,
}

impl Client {
    /// A client on a VMM's (blocking) control socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            events: VecDeque::new(),
        }
    }

    /// Boots the machine. `fds` as [`Request::Boot`] says.
    pub fn boot(&mut self, config: BootConfig, fds: &[BorrowedFd]) -> Result<(), ClientError> {
        self.ok(&Request::Boot(config), fds)
    }

    /// Starts the machine from a template. `fds` as [`Request::Restore`] says.
    pub fn restore(&mut self, config: BootConfig, fds: &[BorrowedFd]) -> Result<(), ClientError> {
        self.ok(&Request::Restore(config), fds)
    }

    /// Stops every vCPU.
    pub fn pause(&mut self) -> Result<(), ClientError> {
        self.ok(&Request::Pause, &[])
    }

    /// Lets the vCPUs run again.
    pub fn resume(&mut self) -> Result<(), ClientError> {
        self.ok(&Request::Resume, &[])
    }

    /// Ends the VM at once.
    pub fn shutdown(&mut self) -> Result<(), ClientError> {
        self.ok(&Request::Shutdown, &[])
    }

    /// State and timeline.
    pub fn info(&mut self) -> Result<Info, ClientError> {
        match self.call(&Request::Info, &[])? {
            Response::Info(info) => Ok(info),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Fills a spare slot. Returns the address of its registers.
    pub fn attach(&mut self, config: AttachConfig) -> Result<u64, ClientError> {
        match self.call(&Request::Attach(config), &[])? {
            Response::Attached { mmio_base } => Ok(mmio_base),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Waits for the next event.
    pub fn next_event(&mut self) -> Result<Event, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(event);
        }
        match socket::recv_message(&self.socket)? {
            Message::Event(event) => Ok(event),
            Message::Response(_) => Err(ClientError::Unexpected),
        }
    }

    /// Sends a request and waits for its answer. A refusal is an error.
    pub fn call(&mut self, request: &Request, fds: &[BorrowedFd]) -> Result<Response, ClientError> {
        socket::send_request(&self.socket, request, fds)?;
        loop {
            match socket::recv_message(&self.socket) {
                Ok(Message::Response(Response::Error { message })) => {
                    return Err(ClientError::Refused(message));
                }
                Ok(Message::Response(response)) => return Ok(response),
                Ok(Message::Event(event)) => self.events.push_back(event),
                Err(SocketError::Closed) => return Err(self.ended()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn ok(&mut self, request: &Request, fds: &[BorrowedFd]) -> Result<(), ClientError> {
        match self.call(request, fds)? {
            Response::Ok => Ok(()),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// The socket is closed: with the reason, if the VMM gave one.
    fn ended(&self) -> ClientError {
        match self.events.back() {
            Some(Event::Ended {
                exit_code, reason, ..
            }) => ClientError::Ended {
                exit_code: *exit_code,
                reason: reason.clone(),
            },
            _ => SocketError::Closed.into(),
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

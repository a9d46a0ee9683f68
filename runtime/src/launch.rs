//! Starting a sandbox server, and its command line.
//!
//! The client claims the state directory and binds the server's socket there, and the server inherits the listener: the
//! client can connect at once and nobody waits for a file to appear.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use thiserror::Error;

use crate::config::Config;
use crate::id::{ContainerId, IdError};
use crate::preflight::{self, PreflightError};
use crate::state::{StateDir, StateError};

/// The server's subcommand.
pub const SERVE: &str = "serve";

/// Why no server runs.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// This host can't.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// The state directory can't be had.
    #[error(transparent)]
    State(#[from] StateError),
    /// A system call failed.
    #[error("cannot start the sandbox server {}: {cause}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// What went wrong.
        cause: io::Error,
    },
}

/// Why the server's command line is wrong.
#[derive(Debug, Error)]
pub enum ArgsError {
    /// An argument that it does not know.
    #[error("unknown argument {0:?}")]
    Unknown(OsString),
    /// An argument without its value, or with a wrong one.
    #[error("{0} needs a value")]
    Value(&'static str),
    /// A required argument is missing.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// The id is no id.
    #[error(transparent)]
    Id(#[from] IdError),
}

/// What a server is told on its command line after [`SERVE`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerArgs {
    /// The sandbox's id: that of its first container.
    pub id: ContainerId,
    /// Root of the state directories.
    pub root: PathBuf,
    /// The configuration file, if not the default.
    pub config: Option<PathBuf>,
    /// Whether to log at debug level, whatever the configuration says.
    pub debug: bool,
    /// The listener of the Task API.
    pub listener_fd: RawFd,
    /// A pipe whose closing means that the client is gone and the sandbox has to go too.
    pub lifeline_fd: Option<RawFd>,
    /// Where the timeline is written at the end.
    pub timeline_fd: Option<RawFd>,
}

impl ServerArgs {
    /// As arguments of the program.
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec![
            SERVE.into(),
            "--id".into(),
            self.id.as_str().into(),
            "--root".into(),
            self.root.clone().into(),
            "--listener-fd".into(),
            self.listener_fd.to_string().into(),
        ];
        if let Some(config) = &self.config {
            args.extend(["--config".into(), config.clone().into()]);
        }
        if self.debug {
            args.push("--debug".into());
        }
        for (name, fd) in [
            ("--lifeline-fd", self.lifeline_fd),
            ("--timeline-fd", self.timeline_fd),
        ] {
            if let Some(fd) = fd {
                args.extend([name.into(), fd.to_string().into()]);
            }
        }
        args
    }

    /// From the arguments after [`SERVE`].
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, ArgsError> {
        let mut args = args.into_iter();
        let (mut id, mut root, mut config, mut debug) = (None, None, None, false);
        let (mut listener, mut lifeline, mut timeline) = (None, None, None);
        while let Some(name) = args.next() {
            match name.to_str() {
                Some("--id") => id = Some(text("--id", args.next())?),
                Some("--root") => root = args.next(),
                Some("--config") => config = args.next(),
                Some("--debug") => debug = true,
                Some("--listener-fd") => listener = Some(fd("--listener-fd", args.next())?),
                Some("--lifeline-fd") => lifeline = Some(fd("--lifeline-fd", args.next())?),
                Some("--timeline-fd") => timeline = Some(fd("--timeline-fd", args.next())?),
                _ => return Err(ArgsError::Unknown(name)),
            }
        }
        Ok(Self {
            id: ContainerId::new(id.ok_or(ArgsError::Missing("--id"))?)?,
            root: root.ok_or(ArgsError::Missing("--root"))?.into(),
            config: config.map(PathBuf::from),
            debug,
            listener_fd: listener.ok_or(ArgsError::Missing("--listener-fd"))?,
            lifeline_fd: lifeline,
            timeline_fd: timeline,
        })
    }
}

fn text(name: &'static str, value: Option<OsString>) -> Result<String, ArgsError> {
    value
        .and_then(|value| value.into_string().ok())
        .ok_or(ArgsError::Value(name))
}

fn fd(name: &'static str, value: Option<OsString>) -> Result<RawFd, ArgsError> {
    text(name, value)?
        .parse()
        .ok()
        .filter(|fd| *fd > 2)
        .ok_or(ArgsError::Value(name))
}

/// Takes over a descriptor that the command line names, so that no child of the server inherits it.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the number comes from the command line and stands for a descriptor that the client left open for this
    // process alone; each is taken once. A closed one makes the next call fail.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    match fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        Ok(_) => Ok(fd),
        Err(errno) => {
            std::mem::forget(fd);
            Err(errno.into())
        }
    }
}

/// What to start.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The sandbox's id.
    pub id: &'a ContainerId,
    /// Root of the state directories.
    pub root: &'a Path,
    /// The configuration in force.
    pub config: &'a Config,
    /// The file it is from, if not the default one.
    pub config_file: Option<&'a Path>,
    /// Whether to log at debug level.
    pub debug: bool,
    /// Whether the caller stays until the sandbox's end: the server may then use its standard error.
    pub foreground: bool,
    /// Whether the caller wants the timeline.
    pub timeline: bool,
}

/// A server that has been started.
#[derive(Debug)]
pub struct Launched {
    /// The process.
    pub child: Child,
    /// A connection to its Task API.
    pub connection: UnixStream,
    /// Its state directory.
    pub state: StateDir,
    /// Ties the sandbox to the caller: it ends when this is closed before a byte is written to it.
    pub lifeline: Option<OwnedFd>,
    /// The timeline, readable once the server has ended.
    pub timeline: Option<File>,
}

impl Launch<'_> {
    /// Claims the id and starts its server.
    pub fn start(&self) -> Result<Launched, LaunchError> {
        preflight::require_root()?;
        let program = &self.config.server;
        preflight::require_program("sandbox server", "server", program)?;
        let (state, listener) = StateDir::claim(self.root, self.id)?;
        self.spawn(&state, &listener).map_err(|cause| {
            // Nobody else knows of the directory yet.
            let _ = state.remove();
            LaunchError::Start {
                program: program.clone(),
                cause,
            }
        })
    }

    fn spawn(&self, state: &StateDir, listener: &UnixListener) -> io::Result<Launched> {
        keep_from_children()?;
        let connection = crate::sock::connect(&state.task_socket())?;
        let lifeline = Some(io::pipe()?);
        let timeline = self.timeline.then(io::pipe).transpose()?;
        let args = ServerArgs {
            id: self.id.clone(),
            root: self.root.to_path_buf(),
            config: self.config_file.map(Path::to_path_buf),
            debug: self.debug,
            listener_fd: inheritable(listener)?,
            lifeline_fd: lifeline.as_ref().map(|(r, _)| inheritable(r)).transpose()?,
            timeline_fd: timeline.as_ref().map(|(_, w)| inheritable(w)).transpose()?,
        };
        let stderr = if self.foreground {
            Stdio::inherit()
        } else {
            // Whoever reads the caller's output waits for its end, and the server lives on.
            File::create(state.server_log())?.into()
        };
        let mut child = Command::new(&self.config.server)
            .args(args.to_args())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()?;
        if let Err(error) = state.save_server_pid(child.id()) {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        Ok(Launched {
            child,
            connection,
            state: state.clone(),
            lifeline: lifeline.map(|(_, writer)| writer.into()),
            timeline: timeline.map(|(reader, _)| File::from(OwnedFd::from(reader))),
        })
    }
}

/// Marks everything beyond the standard streams to be closed in children: who gave this process a pipe or a lock would wait
/// for the server's end, which is the container's.
fn keep_from_children() -> io::Result<()> {
    // SAFETY: a system call on numbers that closes nothing in this process.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Lets the next child inherit `fd`. The caller is single-threaded and closes it afterwards.
fn inheritable(fd: &impl AsRawFd) -> io::Result<RawFd> {
    let raw = fd.as_raw_fd();
    // SAFETY: `fd` is open and borrowed for the duration of the call.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(raw) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_servers_command_line_comes_back_as_it_was_written() {
        let id = ContainerId::new("c1").unwrap();
        let small = ServerArgs {
            id,
            root: "/run/x".into(),
            config: None,
            debug: false,
            listener_fd: 5,
            lifeline_fd: None,
            timeline_fd: None,
        };
        let full = ServerArgs {
            config: Some("/c.toml".into()),
            debug: true,
            lifeline_fd: Some(6),
            timeline_fd: Some(7),
            ..small.clone()
        };
        for args in [small, full] {
            let line = args.to_args();
            assert_eq!(line[0], SERVE);
            assert_eq!(ServerArgs::parse(line.into_iter().skip(1)).unwrap(), args);
        }
    }

    #[test]
    fn a_broken_command_line_is_refused_by_name() {
        for (line, expected) in [
            ("", "--id is missing"),
            ("--id a --root /r", "--listener-fd is missing"),
            ("--id a/b --root /r --listener-fd 5", "invalid container id"),
            (
                "--id a --root /r --listener-fd 1",
                "--listener-fd needs a value",
            ),
            ("--id", "--id needs a value"),
            ("--bogus", "unknown argument \"--bogus\""),
        ] {
            let args = line.split_whitespace().map(OsString::from);
            let message = ServerArgs::parse(args).unwrap_err().to_string();
            assert!(message.contains(expected), "{line}: {message}");
        }
    }
}

//! `hooks.startContainer`: programs of the container that run in it right before its own.
//!
//! Runs in the container's init, which is the container's user under the container's filter by then, as in runc; what the filter may
//! know nothing of is done before. The other hooks are the host's.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::error::{Error, Kind, Result, errno_of, errno_text};
use crate::process::Program;
use crate::spec::{Hook, StartHooks};

/// The end of a failed hook's output that its message holds.
const SHOWN_OUTPUT: u64 = 1024;

/// The hooks of a container, ready to run.
#[derive(Debug)]
pub struct Prepared<'a>(Vec<PreparedHook<'a>>);

#[derive(Debug)]
struct PreparedHook<'a> {
    hook: &'a Hook,
    /// Files in memory and no pipes: nothing has to be fed or drained while the hook runs.
    streams: [File; 3],
    /// Its output and errors once more, to be read.
    told: [File; 2],
    /// Tells of the end of one whose time is limited.
    ended: Option<SignalFd>,
}

/// Makes ready what the hooks will want. In the process that will run them: they are told its pid.
pub fn prepare<'a>(hooks: &'a StartHooks, id: &str) -> Result<Prepared<'a>> {
    let state = serde_json::json!({
        "ociVersion": hooks.version,
        "id": id,
        "status": "created",
        "pid": std::process::id(),
        "bundle": hooks.bundle,
        "annotations": hooks.annotations,
    })
    .to_string();
    let list = hooks.list.iter().enumerate();
    let prepared = list
        .map(|(index, hook)| prepare_one(hook, &state).map_err(|failure| failure.of_hook(index)));
    prepared.collect::<Result<_>>().map(Prepared)
}

fn prepare_one<'a>(hook: &'a Hook, state: &str) -> Result<PreparedHook<'a>, Failure> {
    let mut input = memory_file()?;
    input.write_all(state.as_bytes())?;
    input.rewind()?;
    let (output, errors) = (memory_file()?, memory_file()?);
    let told = [output.try_clone()?, errors.try_clone()?];
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let ended = hook.timeout.map(|_| SignalFd::with_flags(&ends(), flags));
    Ok(PreparedHook {
        hook,
        streams: [input, output, errors],
        told,
        ended: ended.transpose()?,
    })
}

/// The signal that a child has ended.
fn ends() -> SigSet {
    SigSet::from(Signal::SIGCHLD)
}

/// Runs the hooks, one after the other; the first that fails ends it. `program` has the environment of those that
/// have none of their own.
pub fn run(prepared: Prepared<'_>, program: &Program) -> Result<()> {
    let list = prepared.0.into_iter().enumerate();
    for (index, prepared) in list {
        run_one(prepared, program).map_err(|failure| failure.of_hook(index))?;
    }
    Ok(())
}

/// What went wrong with a hook.
#[derive(Debug)]
struct Failure {
    kind: Kind,
    problem: String,
}

impl Failure {
    fn of_hook(self, index: usize) -> Error {
        let problem = format!("hooks.startContainer[{index}]: {}", self.problem);
        Error::setup(self.kind, problem)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        let errno = errno_of(&error);
        Self {
            kind: Kind::of(errno),
            problem: format!("error running hook: {}", errno_text(errno)),
        }
    }
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        std::io::Error::from(errno).into()
    }
}

fn run_one(prepared: PreparedHook<'_>, program: &Program) -> Result<(), Failure> {
    let hook = prepared.hook;
    let [input, output, errors] = prepared.streams;
    let mut command = Command::new(&hook.path);
    if let [name, rest @ ..] = hook.args.as_slice() {
        command.arg0(name).args(rest);
    }
    command.env_clear();
    match &hook.env {
        Some(env) => command.envs(env.iter().map(|(name, value)| (name, value))),
        None => command.envs(program.variables()),
    };
    let mut child = command
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(output))
        .stderr(Stdio::from(errors))
        .spawn()?;
    let status = match (hook.timeout, &prepared.ended) {
        (Some(limit), Some(ended)) => wait(&mut child, limit, ended)?,
        _ => child.wait()?,
    };
    if status.success() {
        return Ok(());
    }
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown end".to_owned(),
    };
    let [output, errors] = prepared.told;
    Err(Failure {
        kind: Kind::Internal,
        problem: format!(
            "error running hook: {how}, stdout: {}, stderr: {}",
            tail(output)?,
            tail(errors)?
        ),
    })
}

fn memory_file() -> Result<File, Errno> {
    memfd_create(c"hook", MFdFlags::MFD_CLOEXEC).map(File::from)
}

fn tail(mut file: File) -> std::io::Result<String> {
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(SHOWN_OUTPUT)))?;
    let mut text = Vec::new();
    file.take(SHOWN_OUTPUT).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).trim_end().to_owned())
}

/// Waits for a hook's end; kills one that takes too long.
fn wait(child: &mut Child, limit: Duration, ended: &SignalFd) -> Result<ExitStatus, Failure> {
    // Not before the fork, which would pass it on to the hook. An end before this is seen at once.
    ends().thread_block()?;
    let status = wait_blocked(child, limit, ended);
    ends().thread_unblock()?;
    status
}

fn wait_blocked(
    child: &mut Child,
    limit: Duration,
    ended: &SignalFd,
) -> Result<ExitStatus, Failure> {
    // A limit beyond all time is none.
    let end = Instant::now().checked_add(limit);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            let _ = child.kill();
            child.wait()?;
            return Err(Failure {
                kind: Kind::Internal,
                problem: format!(
                    "hook ran past specified timeout of {:.1}s",
                    limit.as_secs_f64()
                ),
            });
        }
        // Rounded up, so that the last wait does not end early and turn into a busy one.
        let left = left.map(|left| left.as_micros().div_ceil(1000));
        let left = left.map_or(Ok(PollTimeout::NONE), PollTimeout::try_from);
        let mut fds = [PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, left.unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        // Of this child, or of one that a hook has left to this process.
        while ended.read_signal()?.is_some() {}
    }
}

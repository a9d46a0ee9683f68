//! `hooks.startContainer`: programs of the container that run in it right before its own.
//!
//! Runs in the container's init, which is the container's user under the container's filter by then, as in runc. The
//! other hooks are the host's.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::error::{Error, Kind, Result, errno_of, errno_text};
use crate::process::Program;
use crate::spec::{Hook, StartHooks};
use crate::sys;

/// The end of a failed hook's output that its message holds.
const SHOWN_OUTPUT: u64 = 1024;

/// Runs the hooks, one after the other; the first that fails ends it. `program` has the environment of those that
/// have none of their own.
pub fn run(hooks: &StartHooks, id: &str, program: &Program) -> Result<()> {
    if hooks.list.is_empty() {
        return Ok(());
    }
    let state = serde_json::json!({
        "ociVersion": hooks.version,
        "id": id,
        "status": "created",
        "pid": std::process::id(),
        "bundle": hooks.bundle,
        "annotations": hooks.annotations,
    })
    .to_string();
    for (index, hook) in hooks.list.iter().enumerate() {
        run_one(hook, &state, program).map_err(|failure| {
            Error::setup(
                failure.kind,
                format!("hooks.startContainer[{index}]: {}", failure.problem),
            )
        })?;
    }
    Ok(())
}

/// What went wrong with a hook.
#[derive(Debug)]
struct Failure {
    kind: Kind,
    problem: String,
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

fn run_one(hook: &Hook, state: &str, program: &Program) -> Result<(), Failure> {
    // Files in memory and no pipes: nothing has to be fed or drained while the hook runs.
    let mut input = memory_file()?;
    input.write_all(state.as_bytes())?;
    input.rewind()?;
    let (output, errors) = (memory_file()?, memory_file()?);
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
        .stdout(Stdio::from(output.try_clone()?))
        .stderr(Stdio::from(errors.try_clone()?))
        .spawn()?;
    let status = wait(&mut child, hook.timeout)?;
    if status.success() {
        return Ok(());
    }
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown end".to_owned(),
    };
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
fn wait(child: &mut Child, limit: Option<Duration>) -> Result<ExitStatus, Failure> {
    let Some(limit) = limit else {
        return Ok(child.wait()?);
    };
    let process = sys::open_process(child.id())?;
    // A limit beyond all time is none.
    let Some(end) = Instant::now().checked_add(limit) else {
        return Ok(child.wait()?);
    };
    loop {
        let left = end.saturating_duration_since(Instant::now());
        // Rounded up, so that the last wait does not end early and turn into a busy one.
        let left = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        match poll(
            &mut fds,
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
        ) {
            Ok(0) if Instant::now() >= end => {
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
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(child.wait()?),
            Err(errno) => return Err(errno.into()),
        }
    }
}

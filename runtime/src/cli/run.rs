//! `bulkhead run`: a container in the foreground, from the bundle to its exit code.
//!
//! The sandbox is tied to this process: when it is gone, however that came, the server notices and takes everything down.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, anyhow};
use bulkhead_protocol::agent::StreamKind;
use bulkhead_runtime::id::ContainerId;
use bulkhead_runtime::launch::{Launch, Launched};
use bulkhead_runtime::state::StateDir;
use bulkhead_runtime::stdio::{Attach, Stdio};
use bulkhead_runtime::streams::{self, Stream};
use bulkhead_runtime::timeline::{Record, Timeline};
use clap::Args;
use thiserror::Error;
use tokio::sync::oneshot;

use super::client::{Server, ServerError};
use super::signals::Signals;
use super::{Invocation, absolute};

/// Stack of a thread that only moves bytes.
const PUMP_STACK: usize = 128 * 1024;

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Directory of the bundle
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Name of the container
    id: String,
    /// File to which the boot timeline is written as JSON
    #[arg(long, value_name = "FILE", hide = true)]
    timeline: Option<PathBuf>,
}

/// The sandbox ended under its container.
#[derive(Debug, Error)]
#[error("{reason}")]
pub struct Lost {
    reason: String,
    /// What the command exits with.
    pub exit_code: i32,
}

/// How the container came to its end.
enum Outcome {
    /// With an exit code.
    Exited(u32),
    /// By a signal that came before there was a container to give it to.
    Signalled(u32),
}

/// Runs the command and returns the exit code.
pub fn run(invocation: &Invocation, args: &RunArgs) -> anyhow::Result<i32> {
    let timeline = Timeline::default();
    timeline.mark("client: started");
    let id = ContainerId::new(args.id.as_str())?;
    let bundle = absolute(&args.bundle)?;
    let launched = Launch {
        id: &id,
        root: &invocation.root,
        config: &invocation.config,
        config_file: invocation.config_file.as_deref(),
        debug: invocation.debug,
        tied: true,
        timeline: args.timeline.is_some(),
    }
    .start()?;
    timeline.mark("client: server started");
    let Launched {
        mut child,
        connection,
        state,
        lifeline,
        timeline: server_timeline,
    } = launched;

    let result = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| {
            let session = session(connection, &state, &id, &bundle, &timeline);
            let result = runtime.block_on(session);
            // A pump may still wait for our standard input; the process's end is its end.
            runtime.shutdown_background();
            result
        });
    timeline.mark("client: container deleted");
    drop(lifeline);
    let ended = child.wait().context("cannot wait for the sandbox server")?;
    // The server leaves nothing, unless something made an end of it.
    let removed = state.remove();
    timeline.mark("client: server ended");
    if let (Some(path), Some(server)) = (&args.timeline, server_timeline) {
        write_timeline(path, &timeline, server)?;
    }
    let code = exit_code(result?)?;
    removed?;
    if !ended.success() {
        return Err(anyhow!(
            "the sandbox server failed ({ended}) after the container's end"
        ));
    }
    Ok(code)
}

fn exit_code(outcome: Outcome) -> anyhow::Result<i32> {
    let code = match outcome {
        Outcome::Exited(code) => code,
        Outcome::Signalled(signal) => 128 + signal,
    };
    i32::try_from(code).context("the container's exit code is none")
}

/// Everything between the server's start and its end.
async fn session(
    connection: UnixStream,
    state: &StateDir,
    id: &ContainerId,
    bundle: &Path,
    timeline: &Timeline,
) -> anyhow::Result<Outcome> {
    let mut signals = Signals::catch()?;
    let server = Server::new(connection, id.as_str())?;
    let result = container(&server, &mut signals, state, id, bundle, timeline).await;
    server.shutdown().await;
    result
}

async fn container(
    server: &Server<'_>,
    signals: &mut Signals,
    state: &StateDir,
    id: &ContainerId,
    bundle: &Path,
    timeline: &Timeline,
) -> anyhow::Result<Outcome> {
    let bundle = bundle.to_str().context("the bundle's path is not UTF-8")?;
    let stdio = own_stdio();
    tokio::select! {
        created = server.create(bundle, stdio) => created?,
        signal = signals.next() => return Ok(Outcome::Signalled(signal)),
    };
    timeline.mark("client: container created");
    // The streams are attached while the program starts: the guest keeps what comes before.
    let mut streams = attach(stdio, &state.vsock(), id)?;
    server.start().await?;
    timeline.mark("client: container started");

    let code = {
        let wait = server.wait();
        let attached = streams.attached();
        tokio::pin!(wait, attached);
        let mut all_attached = false;
        loop {
            tokio::select! {
                code = &mut wait => break code?,
                // Without its streams a process could wait for ever.
                result = &mut attached, if !all_attached => {
                    result?;
                    all_attached = true;
                }
                // The process may be gone by now; that is no news.
                signal = signals.next() => match server.kill(signal).await {
                    Ok(()) | Err(ServerError::Refused(_)) => {}
                    Err(error @ ServerError::Gone) => return Err(error.into()),
                },
            }
        }
    };
    timeline.mark("client: container exited");
    if let Some(reason) = state.load().ok().and_then(|record| record.failure) {
        let exit_code = i32::try_from(code).unwrap_or(super::FAILURE);
        return Err(Lost { reason, exit_code }.into());
    }
    // A reader of our output may be slow, and a second signal says not to wait for it.
    tokio::select! {
        () = streams.drained() => {}
        _ = signals.next() => {}
    }
    timeline.mark("client: output written");
    server.delete().await?;
    Ok(Outcome::Exited(code))
}

/// Which of our streams are worth a connection.
fn own_stdio() -> Stdio {
    let attach = |fd: BorrowedFd| {
        if streams::is_null(fd) {
            Attach::Nobody
        } else {
            Attach::Client
        }
    };
    Stdio {
        stdin: attach(io::stdin().as_fd()),
        stdout: attach(io::stdout().as_fd()),
        stderr: attach(io::stderr().as_fd()),
    }
}

/// Gives each stream a thread that connects it and moves its bytes.
fn attach(stdio: Stdio, vsock: &Path, id: &ContainerId) -> anyhow::Result<Streams> {
    let mut streams = Streams::default();
    for (attach, kind) in [
        (stdio.stdin, StreamKind::STDIN),
        (stdio.stdout, StreamKind::STDOUT),
        (stdio.stderr, StreamKind::STDERR),
    ] {
        if attach == Attach::Nobody {
            continue;
        }
        let (vsock, id) = (vsock.to_path_buf(), id.clone());
        let (attached, attached_receiver) = oneshot::channel();
        let (drained, drained_receiver) = oneshot::channel();
        thread::Builder::new()
            .stack_size(PUMP_STACK)
            .spawn(move || {
                // Who waits for these may be gone, and the process with it in a moment.
                match connect(&vsock, &id, kind) {
                    Ok(socket) => {
                        let _ = attached.send(Ok(()));
                        // A closed end, ours or the guest's, is an end like any other.
                        let _ = pump(kind, &socket);
                    }
                    Err(error) => {
                        let _ = attached.send(Err(error));
                    }
                }
                let _ = drained.send(());
            })
            .context("cannot start a thread")?;
        streams.attached.push(attached_receiver);
        if kind != StreamKind::STDIN {
            streams.drained.push(drained_receiver);
        }
    }
    Ok(streams)
}

/// What the streams' threads have to say.
#[derive(Default)]
struct Streams {
    attached: Vec<oneshot::Receiver<anyhow::Result<()>>>,
    drained: Vec<oneshot::Receiver<()>>,
}

impl Streams {
    /// Returns when every stream is attached, or one can't be.
    async fn attached(&mut self) -> anyhow::Result<()> {
        for attached in &mut self.attached {
            // A thread that is gone without a word has nothing to tell.
            attached.await.unwrap_or(Ok(()))?;
        }
        Ok(())
    }

    /// Returns when all output is written.
    async fn drained(&mut self) {
        for drained in &mut self.drained {
            let _ = drained.await;
        }
    }
}

fn connect(vsock: &Path, id: &ContainerId, kind: StreamKind) -> anyhow::Result<UnixStream> {
    let stream = Stream {
        container_id: id.as_str(),
        exec_id: "",
        kind,
    };
    streams::attach(vsock, &stream)
        .with_context(|| format!("cannot attach {kind:?} of the container"))
}

fn pump(kind: StreamKind, socket: &UnixStream) -> io::Result<u64> {
    match kind {
        StreamKind::STDIN => streams::pump_in(io::stdin().as_fd(), socket),
        StreamKind::STDOUT => streams::pump_out(socket, io::stdout().as_fd()),
        _ => streams::pump_out(socket, io::stderr().as_fd()),
    }
}

fn write_timeline(path: &Path, ours: &Timeline, mut server: File) -> anyhow::Result<()> {
    let mut text = Vec::new();
    server.read_to_end(&mut text)?;
    let mut record = ours.record();
    // A server that was killed has written none.
    if let Ok(theirs) = serde_json::from_slice::<Record>(&text) {
        record.merge(theirs);
    }
    std::fs::write(path, serde_json::to_vec_pretty(&record)?)
        .with_context(|| format!("cannot write the timeline to {}", path.display()))
}

//! A process's streams in this process: each stream a thread that moves its bytes, and the process followed to its end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::Context;
use bulkhead_protocol::agent::StreamKind;
use bulkhead_runtime::id::ContainerId;
use bulkhead_runtime::stdio::{Attach, Flow, Stdio};
use bulkhead_runtime::streams::{self, Stream};
use bulkhead_vmm::fault;
use nix::sys::socket::{Shutdown, shutdown};
use tokio::sync::oneshot;

use super::client::{Server, ServerError};
use super::descriptors::{Descriptor, Descriptors};
use super::known::Known;
use super::signals::{Signal, Signals};

/// Stack of a thread that only moves bytes.
const PUMP_STACK: usize = 128 * 1024;

/// Who attaches the streams of a process that has ours: which of them are worth a connection, unless it has a terminal.
pub fn own_stdio(terminal: bool) -> Stdio {
    if terminal {
        return Stdio::TERMINAL;
    }
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
        terminal: false,
    }
}

/// What the streams' threads have to say.
#[derive(Default)]
pub struct Streams {
    attached: Vec<oneshot::Receiver<anyhow::Result<()>>>,
    drained: Vec<oneshot::Receiver<()>>,
}

/// The process whose streams are attached.
#[derive(Clone)]
struct Target {
    vsock: PathBuf,
    id: ContainerId,
    exec_id: String,
}

impl Streams {
    /// Gives each stream of a process a thread that connects it to the standard stream, or the further descriptor, of ours and
    /// moves its bytes.
    pub fn attach(
        stdio: Stdio,
        descriptors: Descriptors,
        vsock: &Path,
        id: &ContainerId,
        exec_id: &str,
    ) -> anyhow::Result<Self> {
        let target = Target {
            vsock: vsock.to_path_buf(),
            id: id.clone(),
            exec_id: exec_id.to_owned(),
        };
        let mut streams = Self::default();
        for kind in stdio.standard_of_client() {
            let connect = target.connect(kind, 0);
            let is_output = kind != StreamKind::STDIN;
            streams.add(connect, is_output, move |socket| pump(kind, socket))?;
        }
        for descriptor in descriptors {
            if descriptor.flow != Flow::Nowhere {
                let connect = target.connect(StreamKind::DESCRIPTOR, descriptor.number);
                let is_output = descriptor.flow != Flow::Inward;
                streams.add(connect, is_output, move |socket| {
                    pump_descriptor(descriptor, socket)
                })?;
            }
        }
        Ok(streams)
    }

    fn add(
        &mut self,
        connect: impl FnOnce() -> anyhow::Result<UnixStream> + Send + 'static,
        is_output: bool,
        pump: impl FnOnce(UnixStream) -> io::Result<u64> + Send + 'static,
    ) -> anyhow::Result<()> {
        let (attached, attached_receiver) = oneshot::channel();
        let (drained, drained_receiver) = oneshot::channel();
        spawn(move || {
            // Who waits for these may be gone, and the process with it in a moment.
            match connect() {
                Ok(socket) => {
                    let _ = attached.send(Ok(()));
                    // A closed end, ours or the guest's, is an end like any other.
                    let _ = pump(socket);
                }
                Err(error) => {
                    let _ = attached.send(Err(error));
                }
            }
            let _ = drained.send(());
        })
        .context("cannot start a thread")?;
        self.attached.push(attached_receiver);
        if is_output {
            self.drained.push(drained_receiver);
        }
        Ok(())
    }

    /// Returns when all output is written. A reader of it may be slow, and a signal says not to wait for it.
    pub async fn written(&mut self, signals: &mut Signals) {
        tokio::select! {
            () = all_drained(&mut self.drained) => {}
            _ = signals.end() => {}
        }
    }
}

/// Returns when every stream is attached, or one can't be.
async fn all_attached(streams: &mut [oneshot::Receiver<anyhow::Result<()>>]) -> anyhow::Result<()> {
    for attached in streams {
        // A thread that is gone without a word has nothing to tell.
        attached.await.unwrap_or(Ok(()))?;
    }
    Ok(())
}

/// Returns when all output has come to its end and is written. Can be asked again.
async fn all_drained(streams: &mut Vec<oneshot::Receiver<()>>) {
    while let Some(drained) = streams.last_mut() {
        let _ = drained.await;
        streams.pop();
    }
}

/// Fails when the output has ended, the process most likely with it, and the container's server says nothing: neither of that end nor,
/// asked after a while, anything else. One that answers is right to be silent, and is not asked again.
async fn missed_end(
    known: Option<&Known>,
    output: &mut Vec<oneshot::Receiver<()>>,
) -> anyhow::Result<()> {
    match known {
        // Without output its end is no event.
        Some(known) if !output.is_empty() => {
            all_drained(output).await;
            known.sign_of_life().await?;
            fault::point("client: server answered after the output");
            Ok(())
        }
        _ => Ok(()),
    }
}

impl Target {
    fn connect(
        &self,
        kind: StreamKind,
        descriptor: u32,
    ) -> impl FnOnce() -> anyhow::Result<UnixStream> + Send + use<> {
        let target = self.clone();
        move || {
            let stream = Stream {
                container_id: target.id.as_str(),
                exec_id: &target.exec_id,
                kind,
                descriptor,
            };
            streams::attach(&target.vsock, &stream)
                .with_context(|| format!("cannot attach {kind:?} of the container"))
        }
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = thread::Builder::new().stack_size(PUMP_STACK);
    builder.spawn(work).map(drop)
}

fn pump(kind: StreamKind, socket: UnixStream) -> io::Result<u64> {
    match kind {
        StreamKind::STDIN => streams::pump_in(io::stdin().as_fd(), &socket),
        StreamKind::STDOUT => streams::pump_out(&socket, io::stdout().as_fd()),
        StreamKind::STDERR => streams::pump_out(&socket, io::stderr().as_fd()),
        _ => {
            let typed = socket.try_clone()?;
            spawn(move || drop(streams::pump_in(io::stdin().as_fd(), &typed)))?;
            streams::pump_out(&socket, io::stdout().as_fd())
        }
    }
}

/// Closes the descriptor at the end: others may wait for that of its last holder.
fn pump_descriptor(descriptor: Descriptor, socket: UnixStream) -> io::Result<u64> {
    let Descriptor { flow, fd, .. } = descriptor;
    match flow {
        Flow::Nowhere => Ok(0),
        Flow::Inward => streams::pump_in(fd.as_fd(), &socket),
        Flow::Outward => streams::pump_out(&socket, fd.as_fd()),
        Flow::BothWays => {
            let (inward, here) = (socket.try_clone()?, fd.try_clone()?);
            spawn(move || drop(streams::pump_in(here.as_fd(), &inward)))?;
            let moved = streams::pump_out(&socket, fd.as_fd())?;
            // The peer learns of the end of what the process writes and may go on itself.
            shutdown(fd.as_raw_fd(), Shutdown::Write)?;
            Ok(moved)
        }
    }
}

/// Follows a started process to its end, passing on what comes in for it: signals, and a new size of our terminal. Returns
/// its exit code; its output may still be on its way ([`Streams::written`]). With `known`, the container, a server that takes no
/// signal, or does not tell of the end of a process that has closed its output, is not waited for longer than it answers.
///
/// The end of the output is one event, and leads to one question: a process can close its output and live on for hours, in which nothing
/// is asked. So a server is still waited for without limit, until a signal comes, if it stops after it has answered that question, if
/// another process holds the output open, or if none of the output is ours (it goes to `/dev/null`).
pub async fn follow(
    known: Option<&Known>,
    server: &Server<'_>,
    signals: &mut Signals,
    streams: &mut Streams,
) -> anyhow::Result<u32> {
    let wait = server.wait();
    let attached = all_attached(&mut streams.attached);
    let missed = missed_end(known, &mut streams.drained);
    tokio::pin!(wait, attached, missed);
    let (mut is_attached, mut is_asked) = (false, false);
    loop {
        tokio::select! {
            code = &mut wait => return Ok(code?),
            // Without its streams a process could wait for ever.
            result = &mut attached, if !is_attached => {
                result?;
                is_attached = true;
            }
            result = &mut missed, if !is_asked => {
                result?;
                is_asked = true;
            }
            signal = signals.next() => {
                let passing = async {
                    match signal {
                        Signal::Number(number) => server.kill(number, false).await,
                        Signal::Resized(size) => server.resize(size).await,
                    }
                };
                let passed = match known {
                    Some(known) => known.patiently(passing).await?,
                    None => passing.await,
                };
                match passed {
                    // The process may be gone by now; that is no news.
                    Ok(()) | Err(ServerError::Refused { .. }) => {}
                    Err(error @ ServerError::Gone) => return Err(error.into()),
                }
            }
        }
    }
}

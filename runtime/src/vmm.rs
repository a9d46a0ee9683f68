//! One VMM process: starting it, its control socket, its end.
//!
//! A task of its own owns the process and the socket; [`Vmm`] is the handle. When the last handle is gone the process is
//! killed, and when the server dies the kernel kills it (`PR_SET_PDEATHSIG`).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};

use bulkhead_vmm::client::{ClientError, VmmProcess};
use bulkhead_vmm::control::{Event, Message, Request, Response, exit_code};
use bulkhead_vmm::socket::{SocketError, recv_message, send_request};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use thiserror::Error;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};

use crate::standin::pidfd;
use crate::timeline::TimelineEntry;

/// What went wrong with the VMM.
#[derive(Debug, Clone, Error)]
pub enum VmmError {
    /// The process could not be started.
    #[error("cannot start the VMM {program}: {message}")]
    Spawn {
        /// The program.
        program: String,
        /// What went wrong.
        message: String,
    },
    /// It refused a request.
    #[error("the VMM refused: {0}")]
    Refused(String),
    /// It has ended.
    #[error("{0}")]
    Ended(#[from] Ended),
    /// It said something that is no answer to what it was asked.
    #[error("the VMM gave an answer that fits no request")]
    Confused,
}

/// How a VMM ended.
#[derive(Debug, Clone, Error)]
#[error("the VM ended: {reason}")]
pub struct Ended {
    /// The exit code; `None` when a signal killed the process.
    pub exit_code: Option<i32>,
    /// One line: what ended it.
    pub reason: String,
    /// The VMM's boot timeline, if it was still able to tell.
    pub timeline: Vec<TimelineEntry>,
}

impl Ended {
    /// The end that a VMM was given and that nobody has seen.
    pub fn unseen() -> Self {
        Self {
            exit_code: None,
            reason: "its VMM was killed and has not ended yet".into(),
            timeline: vec![],
        }
    }

    /// Whether the machine itself failed, which on a `/dev/kvm` that can't run a kernel is how it shows.
    pub fn is_crash(&self) -> bool {
        self.exit_code == Some(exit_code::CRASH)
    }
}

/// Handle of a VMM.
#[derive(Debug, Clone)]
pub struct Vmm {
    pid: u32,
    calls: mpsc::UnboundedSender<Call>,
    ended: watch::Receiver<Option<Ended>>,
    template: watch::Receiver<Option<Result<(), String>>>,
    many_files: watch::Receiver<u64>,
}

/// A request on its way.
#[derive(Debug)]
enum Call {
    Request(Request, Vec<OwnedFd>, oneshot::Sender<Response>),
    Kill,
}

impl Vmm {
    /// Starts `program` in the current directory; its log goes to `log`, nothing but bugs unless `debug`. Call it on the
    /// thread that lives as long as the server.
    pub fn spawn(program: &Path, log: Stdio, debug: bool) -> Result<Self, VmmError> {
        let fail = |e: io::Error| VmmError::Spawn {
            program: program.display().to_string(),
            message: e.to_string(),
        };
        // What ends the VM arrives as an event, and needs no second line on the user's terminal.
        let level = if debug { "debug" } else { "off" };
        let VmmProcess { child, socket } = VmmProcess::spawn(program, &["--log-level", level], log)
            .map_err(|e| match e {
                ClientError::Spawn(e) => fail(e),
                e => fail(io::Error::other(e)),
            })?;
        let process = Process(child);
        let pid = process.0.id();
        let pidfd = pidfd(pid).map_err(fail)?;
        fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|e| fail(e.into()))?;
        // SAFETY: the owned descriptors stay the same open files until the `AsyncFd`s are dropped.
        let (socket, pidfd) = unsafe { (AsyncFd::register(socket), AsyncFd::register(pidfd)) };
        let (calls, receiver) = mpsc::unbounded_channel();
        let (sender, ended) = watch::channel(None);
        let (template_sender, template) = watch::channel(None);
        let (many_files_sender, many_files) = watch::channel(0);
        let driver = Driver {
            socket: socket.map_err(|e| fail(e.into()))?,
            pidfd: pidfd.map_err(|e| fail(e.into()))?,
            process,
            waiting: VecDeque::new(),
            template: template_sender,
            many_files: many_files_sender,
            last_word: None,
        };
        tokio::spawn(async move {
            let end = driver.run(receiver).await;
            sender.send_replace(Some(end));
        });
        Ok(Self {
            pid,
            calls,
            ended,
            template,
            many_files,
        })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends a request with the descriptors that go along, and waits for its answer.
    pub async fn call(&self, request: Request, fds: Vec<OwnedFd>) -> Result<Response, VmmError> {
        let (sender, receiver) = oneshot::channel();
        let sent = self.calls.send(Call::Request(request, fds, sender));
        let answer = match sent {
            Ok(()) => receiver.await.ok(),
            Err(_) => None,
        };
        match answer {
            Some(Response::Error { message }) => Err(VmmError::Refused(message)),
            Some(response) => Ok(response),
            None => Err(self.ended().await.into()),
        }
    }

    /// Sends a request that has nothing to say but that it is done.
    pub async fn order(&self, request: Request, fds: Vec<OwnedFd>) -> Result<(), VmmError> {
        match self.call(request, fds).await? {
            Response::Ok => Ok(()),
            _ => Err(VmmError::Confused),
        }
    }

    /// Waits for the end of the VMM.
    pub async fn ended(&self) -> Ended {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(ended)) => ended.clone(),
            _ => Ended {
                exit_code: None,
                timeline: vec![],
                reason: "nobody looks after the VMM any more".into(),
            },
        }
    }

    /// Waits until the template that was asked for is saved; the reason if it is not.
    pub fn template_saved(&self) -> impl Future<Output = Result<(), String>> + use<> {
        let mut template = self.template.clone();
        async move {
            match template.wait_for(Option::is_some).await.as_deref() {
                Ok(Some(result)) => result.clone(),
                _ => Err("the VM ended before".into()),
            }
        }
    }

    /// How often the VMM has said that the guest has many files of the share cached. Nobody changes it any more once the VMM has ended.
    pub fn many_files(&self) -> watch::Receiver<u64> {
        self.many_files.clone()
    }

    /// Kills the process, whatever it does.
    pub fn kill(&self) {
        // A task that is gone has seen the end already.
        let _ = self.calls.send(Call::Kill);
    }
}

/// The process, which does not outlive this value.
#[derive(Debug)]
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Nothing of this matters to a process that has been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Owns the process and the socket.
struct Driver {
    socket: AsyncFd<OwnedFd>,
    pidfd: AsyncFd<OwnedFd>,
    process: Process,
    /// Who waits for an answer, in the order of the requests.
    waiting: VecDeque<oneshot::Sender<Response>>,
    /// Who waits for the template.
    template: watch::Sender<Option<Result<(), String>>>,
    /// Who has the guest forget files.
    many_files: watch::Sender<u64>,
    /// What the VMM, or its socket, said of its end.
    last_word: Option<(String, Vec<TimelineEntry>)>,
}

impl Driver {
    async fn run(mut self, mut calls: mpsc::UnboundedReceiver<Call>) -> Ended {
        loop {
            tokio::select! {
                // What it has said is heard before its end is seen, which the socket need not show.
                biased;
                packet = receive(&self.socket) => match packet {
                    Ok(Message::Response(response)) => {
                        if let Some(sender) = self.waiting.pop_front() {
                            // Who asked may have stopped waiting.
                            let _ = sender.send(response);
                        }
                    }
                    Ok(Message::Event(Event::Template { error })) => {
                        self.template.send_replace(Some(error.map_or(Ok(()), Err)));
                    }
                    Ok(Message::Event(Event::ManyFiles)) => {
                        self.many_files.send_modify(|times| *times += 1);
                    }
                    Ok(Message::Event(Event::Ended { reason, timeline, .. })) => {
                        self.last_word = Some((reason, timeline));
                        break;
                    }
                    Err(SocketError::Closed) => break,
                    Err(error) => {
                        self.last_word = Some((error.to_string(), vec![]));
                        let _ = self.process.0.kill();
                        break;
                    }
                },
                _ = self.pidfd.readable() => break,
                call = calls.recv() => match call {
                    Some(Call::Request(request, fds, sender)) => {
                        match send(&self.socket, &request, &fds).await {
                            Ok(()) => self.waiting.push_back(sender),
                            // It has ended by itself, and has something to say about that.
                            Err(SocketError::Closed) => {}
                            Err(error) => {
                                let message = error.to_string();
                                let _ = sender.send(Response::Error { message });
                            }
                        }
                    }
                    Some(Call::Kill) | None => {
                        let _ = self.process.0.kill();
                        break;
                    }
                },
            }
        }
        self.end(calls).await
    }

    /// The process is about to end, or is asked to: a kill still gets through to one that lingers.
    async fn end(mut self, mut calls: mpsc::UnboundedReceiver<Call>) -> Ended {
        self.waiting.clear();
        loop {
            tokio::select! {
                _ = self.pidfd.readable() => break,
                Some(call) = calls.recv() => {
                    if matches!(call, Call::Kill) {
                        let _ = self.process.0.kill();
                    }
                }
            }
        }
        let status = self.process.0.wait();
        let exit_code = status.as_ref().ok().and_then(ExitStatus::code);
        let (reason, timeline) = self.last_word.take().unwrap_or_else(|| {
            let reason = match &status {
                Ok(status) => describe(*status),
                Err(error) => error.to_string(),
            };
            (reason, vec![])
        });
        Ended {
            exit_code,
            reason,
            timeline,
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("its VMM exited with code {code} and gave no reason"),
        (None, Some(signal)) => match Signal::try_from(signal) {
            Ok(signal) => format!("its VMM was killed by {signal}"),
            Err(_) => format!("its VMM was killed by signal {signal}"),
        },
        _ => "its VMM is gone".into(),
    }
}

async fn send(
    socket: &AsyncFd<OwnedFd>,
    request: &Request,
    fds: &[OwnedFd],
) -> Result<(), SocketError> {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    loop {
        let mut ready = socket.writable().await.map_err(SocketError::Io)?;
        match send_request(socket.get_ref(), request, &fds) {
            Err(error) if error.is_would_block() => ready.clear_ready(),
            result => return result,
        }
    }
}

async fn receive(socket: &AsyncFd<OwnedFd>) -> Result<Message, SocketError> {
    loop {
        let mut ready = socket.readable().await.map_err(SocketError::Io)?;
        match recv_message(socket.get_ref()) {
            Err(error) if error.is_would_block() => ready.clear_ready(),
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A program that does what `script` says.
    fn program(script: &str) -> tempfile::TempPath {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        io::Write::write_all(&mut file, format!("#!/bin/sh\n{script}\n").as_bytes()).unwrap();
        let mode = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(file.path(), mode).unwrap();
        file.into_temp_path()
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(future)
    }

    #[test]
    fn a_missing_program_is_named() {
        let error =
            block_on(async { Vmm::spawn(Path::new("/nonexistent/vmm"), Stdio::inherit(), false) });
        let message = error.unwrap_err().to_string();
        assert!(
            message.contains("/nonexistent/vmm: No such file"),
            "{message}"
        );
    }

    #[test]
    fn an_end_without_a_word_is_told_by_the_exit_status() {
        for (script, expected) in [
            ("exit 3", "exited with code 3"),
            ("kill -9 $$", "killed by SIGKILL"),
        ] {
            let program = program(script);
            let error = block_on(async {
                let vmm = Vmm::spawn(&program, Stdio::inherit(), false).unwrap();
                vmm.order(Request::Pause, vec![]).await.unwrap_err()
            });
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn a_vmm_that_hangs_is_killed_on_demand() {
        let program = program("exec sleep 1000");
        let ended = block_on(async {
            let vmm = Vmm::spawn(&program, Stdio::inherit(), false).unwrap();
            vmm.kill();
            vmm.ended().await
        });
        assert_eq!(ended.exit_code, None);
    }

    #[test]
    fn an_end_is_seen_even_if_somebody_else_holds_the_socket() {
        let program = program("sleep 5 & exit 3");
        let began = std::time::Instant::now();
        let ended = block_on(async {
            let vmm = Vmm::spawn(&program, Stdio::inherit(), false).unwrap();
            vmm.ended().await
        });
        assert_eq!(ended.exit_code, Some(3));
        assert!(began.elapsed() < std::time::Duration::from_secs(4));
    }

    #[test]
    fn answers_and_the_last_word_arrive() {
        // The control socket is descriptor 3; every write is a packet.
        let program = program(
            r#"dd bs=65536 count=1 <&3 >/dev/null 2>&1
            printf '%s' '{"response":{"response":"ok"}}' >&3
            dd bs=65536 count=1 <&3 >/dev/null 2>&1
            printf '%s' '{"event":{"event":"ended","exit_code":11,"reason":"triple fault","timeline":[]}}' >&3
            exit 11"#,
        );
        block_on(async {
            let vmm = Vmm::spawn(&program, Stdio::inherit(), false).unwrap();
            vmm.order(Request::Pause, vec![]).await.unwrap();
            let error = vmm.order(Request::Resume, vec![]).await.unwrap_err();
            assert_eq!(error.to_string(), "the VM ended: triple fault");
            assert!(vmm.ended().await.is_crash());
        });
    }
}

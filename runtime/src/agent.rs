//! The guest's agent, as its client sees it: one ttrpc connection that the agent has opened.
//!
//! Answers are a guest's and therefore not to be trusted: they carry numbers and a message for the user, nothing that the
//! host acts on.

use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use bulkhead_protocol::agent::{
    self, ContainerStatsRequest, ContainerStatsResponse, CreateContainerRequest,
    DeleteContainerRequest, DeleteProcessRequest, ExecProcessRequest, ForgetFilesRequest,
    HelloRequest, HelloResponse, NamespaceOf, PauseContainerRequest, ResizeTerminalRequest,
    ResumeContainerRequest, ShutdownRequest, SignalProcessRequest, StartContainerRequest, Stdio,
    UpdateContainerRequest, WaitOomRequest, WaitProcessRequest, WaitProcessResponse,
};
use bulkhead_protocol::agent_ttrpc::AgentClient;
use bulkhead_protocol::{PROTOCOL_VERSION, SEED_LENGTH};
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

use crate::mounts_below::Inherited;
use crate::spec::Join;

/// How long an answer may take that has nothing to wait for. Generous: emulated machines are 20 times slower.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// After how long without an answer to something that may take its time the agent is asked whether it answers at all.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long it may take to answer that. It has nothing to wait for then, and it has been waited for already.
const SIGN_OF_LIFE_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest message of a guest that is shown.
const MAX_MESSAGE: usize = 1024;

/// What went wrong between server and agent.
#[derive(Debug, Clone, Error)]
pub enum AgentError {
    /// The two ends speak different versions.
    #[error(
        "the guest's agent {agent} speaks protocol version {theirs} and this runtime version {PROTOCOL_VERSION}: \
         install an initramfs of the same release"
    )]
    Version {
        /// The agent's own version.
        agent: String,
        /// The protocol's version there.
        theirs: u32,
    },
    /// The agent refused, for a reason that is the user's to know.
    #[error("{message}")]
    Refused {
        /// What kind of refusal.
        kind: Refusal,
        /// One sentence.
        message: String,
    },
    /// No answer within the time.
    #[error("the guest's agent did not answer in {} s", ANSWER_TIMEOUT.as_secs())]
    Timeout,
    /// The host has no random numbers for the guest.
    #[error("cannot seed the guest's random numbers from /dev/urandom: {0}")]
    Seed(String),
    /// No answer to anything.
    #[error("the guest's agent has stopped answering: --debug shows the guest's console")]
    Silent,
    /// The connection is gone.
    #[error("the connection to the guest's agent is lost: {0}")]
    Lost(String),
}

/// Kinds of refusals that callers tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The request or the spec is wrong.
    Invalid,
    /// No such container, process, program or path.
    NotFound,
    /// The id is taken.
    Exists,
    /// Not in this state, or a mismatch of versions.
    Precondition,
    /// Not permitted, or not executable.
    Permission,
    /// Anything else.
    Other,
}

impl From<ttrpc::Error> for AgentError {
    fn from(error: ttrpc::Error) -> Self {
        let ttrpc::Error::RpcStatus(status) = error else {
            return Self::Lost(error.to_string());
        };
        let kind = match status.code() {
            ttrpc::Code::INVALID_ARGUMENT => Refusal::Invalid,
            ttrpc::Code::NOT_FOUND => Refusal::NotFound,
            ttrpc::Code::ALREADY_EXISTS => Refusal::Exists,
            ttrpc::Code::FAILED_PRECONDITION => Refusal::Precondition,
            ttrpc::Code::PERMISSION_DENIED => Refusal::Permission,
            _ => Refusal::Other,
        };
        Self::Refused {
            kind,
            message: printable(status.message()),
        }
    }
}

/// A guest's message made fit for a terminal and a log.
fn printable(message: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    message.chars().take(MAX_MESSAGE).map(clean).collect()
}

/// The time that a guest has for its answers, which stands still with the guest.
#[derive(Debug, Clone)]
pub struct Clock(watch::Receiver<bool>);

impl Clock {
    /// A clock that stands still as long as `still` says so.
    pub fn new(still: watch::Receiver<bool>) -> Self {
        Self(still)
    }

    /// Bounds the time of a call; `None` when that is over. After a standstill the call has all of the time again.
    async fn timeout<T>(&self, limit: Duration, call: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(call);
        let mut still = self.0.clone();
        loop {
            tokio::select! {
                biased;
                answer = &mut call => return Some(answer),
                // Fails when there is no machine any more, and then the call does too.
                _ = still.wait_for(|&still| !still) => {}
            }
            match timeout(limit, &mut call).await {
                Ok(answer) => return Some(answer),
                Err(_) if still.has_changed().unwrap_or(false) => {}
                Err(_) => return None,
            }
        }
    }
}

/// The agent of one guest.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    clock: Clock,
}

impl Agent {
    /// Greets the agent at the other end of `stream`, which has dialled the host.
    pub async fn greet(
        stream: UnixStream,
        clock: Clock,
    ) -> Result<(Self, HelloResponse), AgentError> {
        let agent = Self {
            client: AgentClient::new(Client::new(Socket::from(stream))),
            clock,
        };
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let mut seed = vec![0; SEED_LENGTH];
        File::open("/dev/urandom")
            .and_then(|mut random| random.read_exact(&mut seed))
            .map_err(|error| AgentError::Seed(error.to_string()))?;
        let request = HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            host_version: env!("CARGO_PKG_VERSION").to_owned(),
            wall_clock_ns: u64::try_from(now.as_nanos()).unwrap_or(0),
            seed,
            ..Default::default()
        };
        let hello = agent
            .limited(agent.client.hello(Context::default(), &request))
            .await?;
        if hello.protocol_version != PROTOCOL_VERSION {
            return Err(AgentError::Version {
                agent: printable(&hello.agent_version),
                theirs: hello.protocol_version,
            });
        }
        Ok((agent, hello))
    }

    /// Makes a container; returns its init's pid in the guest.
    pub async fn create(
        &self,
        id: &str,
        bundle: &Path,
        spec_json: Vec<u8>,
        stdio: Stdio,
        inherited: Inherited,
        joins: &[Join],
    ) -> Result<u32, AgentError> {
        let mounts_below = inherited.binds.into_iter().map(|below| agent::MountBelow {
            mount: u32::try_from(below.mount).unwrap_or(u32::MAX),
            path: below.path.into_os_string().into_vec(),
            options: below.options,
            ..Default::default()
        });
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            bundle: bundle.to_string_lossy().into_owned(),
            spec_json,
            stdio: Some(stdio).into(),
            mounts_below: mounts_below.collect(),
            root_options: inherited.root,
            join: joins
                .iter()
                .map(|join| NamespaceOf {
                    type_: join.namespace.to_owned(),
                    container_id: join.container.as_str().to_owned(),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        };
        let answer = self
            .patiently(self.client.create_container(Context::default(), &request))
            .await?;
        Ok(answer.pid)
    }

    /// Executes a created container's program.
    pub async fn start(&self, id: &str) -> Result<(), AgentError> {
        let request = StartContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.patiently(self.client.start_container(Context::default(), &request))
            .await?;
        Ok(())
    }

    /// Executes another process in a running container; returns its pid in the guest.
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process_json: Vec<u8>,
        stdio: Stdio,
        cgroup: String,
    ) -> Result<u32, AgentError> {
        let request = ExecProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            process_json,
            stdio: Some(stdio).into(),
            cgroup,
            ..Default::default()
        };
        let answer = self
            .patiently(self.client.exec_process(Context::default(), &request))
            .await?;
        Ok(answer.pid)
    }

    /// Forgets an exec'd process that has ended.
    pub async fn delete_process(&self, id: &str, exec_id: &str) -> Result<(), AgentError> {
        let request = DeleteProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        self.limited(self.client.delete_process(Context::default(), &request))
            .await?;
        Ok(())
    }

    /// Sets the size of a process's terminal, in columns and rows.
    pub async fn resize(
        &self,
        id: &str,
        exec_id: &str,
        width: u32,
        height: u32,
    ) -> Result<(), AgentError> {
        let request = ResizeTerminalRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            width,
            height,
            ..Default::default()
        };
        self.limited(self.client.resize_terminal(Context::default(), &request))
            .await?;
        Ok(())
    }

    /// Freezes every process of a container.
    pub async fn pause(&self, id: &str) -> Result<(), AgentError> {
        let request = PauseContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.patiently(self.client.pause_container(Context::default(), &request))
            .await?;
        Ok(())
    }

    /// Thaws them.
    pub async fn resume(&self, id: &str) -> Result<(), AgentError> {
        let request = ResumeContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.limited(self.client.resume_container(Context::default(), &request))
            .await?;
        Ok(())
    }

    /// Changes the limits of a container to what `resources_json` (the spec's `linux.resources`) names.
    pub async fn update(&self, id: &str, resources_json: Vec<u8>) -> Result<(), AgentError> {
        let request = UpdateContainerRequest {
            container_id: id.to_owned(),
            resources_json,
            ..Default::default()
        };
        self.limited(self.client.update_container(Context::default(), &request))
            .await?;
        Ok(())
    }

    /// What a container has used.
    pub async fn stats(&self, id: &str) -> Result<ContainerStatsResponse, AgentError> {
        let request = ContainerStatsRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.limited(self.client.container_stats(Context::default(), &request))
            .await
    }

    /// Waits until the guest's kernel has killed more than `seen` processes of a container for want of memory, however
    /// long it takes; returns how many. Without `seen` it waits for none.
    pub async fn wait_oom(&self, id: &str, seen: Option<u64>) -> Result<u64, AgentError> {
        let request = WaitOomRequest {
            container_id: id.to_owned(),
            seen,
            ..Default::default()
        };
        let answer = self.client.wait_oom(Context::default(), &request).await?;
        Ok(answer.kills)
    }

    /// Signals a process, or every process of the container.
    pub async fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), AgentError> {
        let request = SignalProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.limited(self.client.signal_process(Context::default(), &request))
            .await?;
        Ok(())
    }

    /// Waits for a process's end, however long it takes.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<WaitProcessResponse, AgentError> {
        let request = WaitProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        Ok(self
            .client
            .wait_process(Context::default(), &request)
            .await?)
    }

    /// Kills what is left of a container and forgets it.
    pub async fn delete(&self, id: &str) -> Result<(), AgentError> {
        let request = DeleteContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.limited(self.client.delete_container(Context::default(), &request))
            .await?;
        Ok(())
    }

    /// Has the guest's kernel forget the files that nothing in the guest uses.
    pub async fn forget_files(&self) -> Result<(), AgentError> {
        let request = ForgetFilesRequest::default();
        self.limited(self.client.forget_files(Context::default(), &request))
            .await?;
        Ok(())
    }

    /// Awaits an answer that may take its time, for hooks and for files of the host, as long as the agent gives others.
    async fn patiently<T>(
        &self,
        call: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, AgentError> {
        tokio::pin!(call);
        loop {
            if let Some(answer) = self.clock.timeout(PATIENCE, &mut call).await {
                return Ok(answer?);
            }
            // Refused for want of an id, which is an answer too.
            let request = ContainerStatsRequest::default();
            let sign = self.client.container_stats(Context::default(), &request);
            tokio::select! {
                answer = &mut call => return Ok(answer?),
                sign = self.clock.timeout(SIGN_OF_LIFE_TIMEOUT, sign) => {
                    if sign.is_none() {
                        return Err(AgentError::Silent);
                    }
                }
            }
        }
    }

    /// Has the guest write back what is dirty and power itself off. The end of the connection is as good as an answer.
    pub async fn shutdown(&self) -> Result<(), AgentError> {
        let request = ShutdownRequest::default();
        match self
            .limited(self.client.shutdown(Context::default(), &request))
            .await
        {
            Ok(_) | Err(AgentError::Lost(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Bounds the time of a call. (The client's own deadline can't be told from a lost connection.)
    async fn limited<T>(
        &self,
        call: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, AgentError> {
        match self.clock.timeout(ANSWER_TIMEOUT, call).await {
            Some(answer) => Ok(answer?),
            None => Err(AgentError::Timeout),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap()
            .block_on(future)
    }

    #[test]
    fn a_guest_has_all_the_time_for_its_answer_after_a_standstill() {
        const LIMIT: Duration = Duration::from_millis(50);
        block_on(async {
            let (still, clock) = watch::channel(false);
            let clock = Clock::new(clock);
            assert_eq!(
                clock.timeout(LIMIT, std::future::pending::<()>()).await,
                None
            );
            still.send_replace(true);
            let answered = clock.timeout(LIMIT, async {
                // It stands still for longer than it may take.
                let _ = timeout(3 * LIMIT, std::future::pending::<()>()).await;
                still.send_replace(false);
                let _ = timeout(LIMIT / 2, std::future::pending::<()>()).await;
                "done"
            });
            assert_eq!(answered.await, Some("done"));
            // A standstill that began and ended within the time counts too.
            let answered = clock.timeout(LIMIT, async {
                still.send_replace(true);
                let _ = timeout(LIMIT / 2, std::future::pending::<()>()).await;
                still.send_replace(false);
                let _ = timeout(LIMIT, std::future::pending::<()>()).await;
                "done"
            });
            assert_eq!(answered.await, Some("done"));
        });
    }

    #[test]
    fn a_guests_message_is_one_line_of_bounded_length() {
        let status = ttrpc::get_status(
            ttrpc::Code::NOT_FOUND,
            format!("exec: \"foo\"\n\x1b[31m{}", "x".repeat(5000)),
        );
        let error = AgentError::from(ttrpc::Error::RpcStatus(status));
        let AgentError::Refused { kind, message } = &error else {
            panic!("{error}");
        };
        assert_eq!(*kind, Refusal::NotFound);
        assert_eq!(message.len(), MAX_MESSAGE);
        assert!(message.starts_with("exec: \"foo\"  [31m"), "{message}");
    }
}

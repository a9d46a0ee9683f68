//! Power-on: the share, the VMM, and the agent's call.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::{CONTROL_PORT, SHARE_TAG};
use bulkhead_vmm::control::{BootConfig, Request, ShareConfig};
use thiserror::Error;
use tokio::net::UnixListener;
use tokio::sync::watch;

use super::{Sandbox, SandboxError};
use crate::agent::{Agent, AgentError};
use crate::preflight::{self, GuestFiles};
use crate::share::Share;
use crate::sizing::Size;
use crate::sock;
use crate::timeline::{self, TimelineEntry};
use crate::vmm::{Ended, Vmm, VmmError};

/// Most request queues of the share; each is a thread of the VMM.
const MAX_SHARE_QUEUES: u8 = 4;

/// How long after the loss of the agent's connection the VMM may take to say that the VM has ended, and why.
const LAST_WORD_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a guest did not come up.
#[derive(Debug, Clone, Error)]
pub enum BootError {
    /// The VMM could not be started or refused the machine.
    #[error(transparent)]
    Vmm(VmmError),
    /// The machine failed.
    #[error(
        "the VM crashed while it booted: {0}; `bulkhead check` tells whether the /dev/kvm of this machine can run a kernel"
    )]
    Crashed(String),
    /// The guest ended itself.
    #[error("the guest ended while it booted: {0}; --debug shows its console")]
    Ended(String),
    /// The guest was not ready in time.
    #[error(
        "the guest was not ready within {} s: --debug shows its console, `boot_timeout_s` in the configuration file gives it longer",
        .0.as_secs()
    )]
    Timeout(Duration),
    /// The agent's call could not be taken.
    #[error("cannot take the agent's call: {0}")]
    Accept(String),
    /// A file of the sandbox could not be made.
    #[error("cannot make {0}")]
    File(String),
    /// The handshake failed.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

impl From<Ended> for BootError {
    fn from(ended: Ended) -> Self {
        if ended.is_crash() {
            Self::Crashed(ended.reason)
        } else {
            Self::Ended(ended.reason)
        }
    }
}

impl From<VmmError> for BootError {
    fn from(error: VmmError) -> Self {
        match error {
            VmmError::Ended(ended) => ended.into(),
            error => Self::Vmm(error),
        }
    }
}

/// Whether the agent can be spoken to.
type Ready = Option<Result<Agent, BootError>>;

/// The VM of a sandbox, from the moment its VMM runs.
pub struct Machine {
    vmm: Vmm,
    share: Share,
    size: Size,
    ready: watch::Receiver<Ready>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("vmm", &self.vmm)
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// Starts the VMM with the machine's description and returns without waiting for the guest.
    pub fn power_on(
        sandbox: &Arc<Sandbox>,
        size: Size,
        cmdline: String,
    ) -> Result<Self, SandboxError> {
        let files = preflight::open_guest_files(sandbox.config())?;
        let state = sandbox.state_dir();
        // Bound before the guest exists: the agent's call can't come too early.
        let port = state.vsock_port(CONTROL_PORT);
        let listener = sock::bind(&port)
            .and_then(|listener| {
                listener.set_nonblocking(true)?;
                UnixListener::from_std(listener)
            })
            .map_err(|e| BootError::Accept(e.to_string()))?;
        let share_dir = state.share();
        std::fs::create_dir(&share_dir)
            .map_err(|e| BootError::File(format!("{}: {e}", share_dir.display())))?;
        let share = Share::new(&share_dir)?;
        sandbox.timeline.mark("server: share made");
        let debug = sandbox.config().debug;
        let log = match sandbox.debug_file("vmm") {
            Some(path) if debug => File::create(&path)
                .map_err(|e| BootError::File(format!("{}: {e}", path.display())))?
                .into(),
            _ => Stdio::inherit(),
        };
        let vmm = Vmm::spawn(&sandbox.config().vmm, log, debug)?;
        sandbox.timeline.mark("server: VMM started");

        let serial = debug
            .then(|| serial_output(sandbox.debug_file("console")))
            .transpose();
        let serial = serial.map_err(|e| BootError::File(format!("the console's log: {e}")))?;
        let (request, fds) = boot_request(sandbox, size, cmdline, &share, files, serial);
        let (sender, ready) = watch::channel(None);
        tokio::spawn({
            let (sandbox, vmm) = (sandbox.clone(), vmm.clone());
            async move {
                let deadline = sandbox.config().boot_timeout;
                let boot = bring_up(&sandbox, &vmm, request, fds, listener, port);
                let result = tokio::select! {
                    result = tokio::time::timeout(deadline, boot) => {
                        result.unwrap_or(Err(BootError::Timeout(deadline)))
                    }
                    ended = vmm.ended() => Err(ended.into()),
                };
                sender.send_replace(Some(result));
                let ended = vmm.ended().await;
                sandbox.vm_ended(&ended);
            }
        });
        Ok(Self {
            vmm,
            share,
            size,
            ready,
        })
    }

    /// The VMM.
    pub fn vmm(&self) -> &Vmm {
        &self.vmm
    }

    /// The shared tree.
    pub fn share(&self) -> &Share {
        &self.share
    }

    /// How big the guest is.
    pub fn size(&self) -> Size {
        self.size
    }

    /// The agent, once it has called; the reason if it never will.
    pub async fn agent(&self) -> Result<Agent, BootError> {
        let mut ready = self.ready.clone();
        match ready.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(result)) => result.clone(),
            _ => Err(BootError::Accept("nobody waits for it".into())),
        }
    }

    /// An answer of the agent. When the connection is lost because the VM has ended, its VMM tells the reason.
    pub async fn explain<T>(&self, answer: Result<T, AgentError>) -> Result<T, SandboxError> {
        match answer {
            Err(AgentError::Lost(message)) => Err(match last_word(&self.vmm).await {
                Some(ended) => SandboxError::Failed(ended.to_string()),
                None => AgentError::Lost(message).into(),
            }),
            answer => answer.map_err(SandboxError::from),
        }
    }

    /// The agent, if it has called already.
    pub fn agent_if_ready(&self) -> Option<Agent> {
        self.ready.borrow().as_ref()?.as_ref().ok().cloned()
    }
}

/// How the VM has ended, if it has: a guest's connections are cut a moment before.
async fn last_word(vmm: &Vmm) -> Option<Ended> {
    tokio::time::timeout(LAST_WORD_TIMEOUT, vmm.ended())
        .await
        .ok()
}

/// Boots the machine and takes the agent's call.
async fn bring_up(
    sandbox: &Sandbox,
    vmm: &Vmm,
    request: Request,
    fds: Vec<OwnedFd>,
    listener: UnixListener,
    port: PathBuf,
) -> Result<Agent, BootError> {
    vmm.order(request, fds).await?;
    sandbox.timeline.mark("server: vCPUs run");
    let (stream, _) = listener
        .accept()
        .await
        .map_err(|e| BootError::Accept(e.to_string()))?;
    // Any process of the guest can dial the host: the first call is the agent's, and there is no second.
    drop(listener);
    let _ = std::fs::remove_file(&port);
    sandbox.timeline.mark("server: agent called");
    let (agent, hello) = match Agent::greet(stream).await {
        Err(error @ AgentError::Lost(_)) => {
            return Err(last_word(vmm).await.map_or(error.into(), BootError::from));
        }
        greeted => greeted?,
    };
    sandbox.timeline.mark("server: agent greeted");
    let guest = hello.timeline.iter().take(64).map(|entry| TimelineEntry {
        name: entry.name.chars().take(64).collect(),
        at_ns: entry.at_ns,
    });
    sandbox.timeline.merge(timeline::Record {
        entries: vec![],
        guest: guest.collect(),
    });
    Ok(agent)
}

fn boot_request(
    sandbox: &Sandbox,
    size: Size,
    cmdline: String,
    share: &Share,
    files: GuestFiles,
    serial: Option<OwnedFd>,
) -> (Request, Vec<OwnedFd>) {
    let config = BootConfig {
        vcpus: size.vcpus,
        memory_mib: size.memory_mib,
        cmdline,
        // The current directory is the state directory: a socket's address has no room for long paths.
        vsock_path: sandbox
            .state_dir()
            .vsock()
            .file_name()
            .map(PathBuf::from)
            .unwrap_or_default(),
        share: Some(ShareConfig {
            tag: SHARE_TAG.to_owned(),
            directory: share.root().to_path_buf(),
            queues: size.vcpus.clamp(1, MAX_SHARE_QUEUES),
        }),
        spare_slots: 0,
        serial: serial.is_some(),
    };
    let mut fds = vec![files.kvm, files.kernel, files.initramfs];
    fds.extend(serial);
    (Request::Boot(config), fds)
}

/// Where the serial console goes: a file of its own, or this process's standard error.
fn serial_output(file: Option<PathBuf>) -> io::Result<OwnedFd> {
    match file {
        Some(path) => Ok(File::create(path)?.into()),
        None => io::stderr().as_fd().try_clone_to_owned(),
    }
}

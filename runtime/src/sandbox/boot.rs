//! Power-on: the share, the VMM, and the agent's call.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::{CONTROL_PORT, SHARE_TAG, STEP_PREPARED};
use bulkhead_vmm::control::{BootConfig, Request, ShareConfig};
use thiserror::Error;
use tokio::net::UnixListener;
use tokio::sync::watch;

use super::files::Forgetting;
use super::{Sandbox, SandboxError};
use crate::agent::{Agent, AgentError, Clock};
use crate::config::Config;
use crate::preflight::{self, GuestFiles};
use crate::share::Share;
use crate::sizing::{Size, most_files};
use crate::sock;
use crate::template::{Template, Trial};
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
    still: watch::Sender<bool>,
    forgetting: Arc<Forgetting>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("vmm", &self.vmm)
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// Starts the VMM with the machine's description and returns without waiting for the guest. One that boots leaves a template if it may.
    pub fn power_on(
        sandbox: &Arc<Sandbox>,
        size: Size,
        cmdline: String,
        may_leave_template: bool,
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
        let start = Start {
            config: boot_config(sandbox, size, cmdline, &share, serial.is_some()),
            files,
            serial,
            may_leave_template,
        };
        let (sender, ready) = watch::channel(None);
        let (still, clock) = watch::channel(false);
        let forgetting = Arc::new(Forgetting::new());
        tokio::spawn({
            let (sandbox, vmm) = (sandbox.clone(), vmm.clone());
            let forgetting = forgetting.clone();
            async move {
                let deadline = sandbox.config().boot_timeout;
                let clock = Clock::new(clock);
                let boot = bring_up(&sandbox, &vmm, start, listener, port, clock);
                let result = tokio::select! {
                    result = tokio::time::timeout(deadline, boot) => {
                        result.unwrap_or(Err(BootError::Timeout(deadline)))
                    }
                    ended = vmm.ended() => Err(ended.into()),
                };
                let agent = result.as_ref().ok().cloned();
                sender.send_replace(Some(result));
                let ended = tokio::select! {
                    ended = vmm.ended() => ended,
                    never = forgetting.serve(&sandbox, &vmm, agent) => match never {},
                };
                sandbox.vm_ended(&ended);
            }
        });
        Ok(Self {
            vmm,
            share,
            size,
            ready,
            still,
            forgetting,
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

    /// Notes whether the guest stands still, and with it the time that it has for answers.
    pub fn set_still(&self, still: bool) {
        self.still.send_replace(still);
    }

    /// The wishes that the guest forget files.
    pub fn forgetting(&self) -> &Forgetting {
        &self.forgetting
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
    start: Start,
    listener: UnixListener,
    port: PathBuf,
    clock: Clock,
) -> Result<Agent, BootError> {
    let trial = start.go(sandbox, vmm).await?;
    sandbox.timeline.mark("server: vCPUs run");
    let (stream, _) = listener
        .accept()
        .await
        .map_err(|e| BootError::Accept(e.to_string()))?;
    // Any process of the guest can dial the host: the first call is the agent's, and there is no second.
    drop(listener);
    let _ = std::fs::remove_file(&port);
    sandbox.timeline.mark("server: agent called");
    let (agent, hello) = match Agent::greet(stream, clock).await {
        Err(error @ AgentError::Lost(_)) => {
            return Err(last_word(vmm).await.map_or(error.into(), BootError::from));
        }
        greeted => greeted?,
    };
    sandbox.timeline.mark("server: agent greeted");
    let steps = hello.timeline.iter().take(64).map(|entry| TimelineEntry {
        name: entry.name.chars().take(64).collect(),
        at_ns: entry.at_ns,
    });
    // What comes before is of the guest that the template was saved of.
    let of_template = |step: &TimelineEntry| trial.is_some() && step.name != STEP_PREPARED;
    let guest = steps.skip_while(of_template);
    sandbox.timeline.merge(timeline::Record {
        entries: vec![],
        guest: guest.collect(),
    });
    if let Some(trial) = trial {
        trial.pass();
    }
    Ok(agent)
}

/// What a machine is made of.
struct Start {
    config: BootConfig,
    files: GuestFiles,
    serial: Option<OwnedFd>,
    may_leave_template: bool,
}

impl Start {
    /// Starts the machine from a template, which is then on trial, or else by booting it, which may leave a template.
    async fn go(self, sandbox: &Sandbox, vmm: &Vmm) -> Result<Option<Trial>, BootError> {
        let template = self.template(sandbox.config());
        if let Some(template) = &template
            && let Some(file) = tell_of(template.open()).flatten()
            && let Some(kvm) = tell_of(self.files.kvm.try_clone())
        {
            let request = Request::Restore(self.config.clone());
            let trial = Trial::new(template.clone());
            match vmm.order(request, vec![kvm, file.into()]).await {
                Ok(()) => return Ok(Some(trial)),
                Err(VmmError::Refused(message)) => {
                    tracing::info!("a template is of no use, so the guest boots: {message}");
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.boot(vmm, template).await?;
        Ok(None)
    }

    /// Where the template of such machines is. Debugging shows a boot, and arguments of the user's own are for one machine alone.
    fn template(&self, config: &Config) -> Option<Template> {
        if self.config.serial || !self.config.cmdline.is_empty() {
            return None;
        }
        tell_of(Template::of(config, &self.config)).flatten()
    }

    async fn boot(self, vmm: &Vmm, template: Option<Template>) -> Result<(), BootError> {
        let mut config = self.config;
        let mut fds = vec![self.files.kvm, self.files.kernel, self.files.initramfs];
        fds.extend(self.serial);
        let unfinished = template
            .filter(|_| self.may_leave_template)
            .and_then(|template| tell_of(template.create()).flatten());
        if let Some(unfinished) = &unfinished {
            let file = unfinished.file().try_clone();
            fds.push(
                file.map_err(|e| BootError::File(format!("a template: {e}")))?
                    .into(),
            );
            config.save_template = true;
        }
        let saved = vmm.template_saved();
        vmm.order(Request::Boot(config), fds).await?;
        if let Some(unfinished) = unfinished {
            tokio::spawn(async move {
                match saved.await {
                    Ok(()) => drop(tell_of(unfinished.keep())),
                    Err(message) => tracing::info!("no template: {message}"),
                }
            });
        }
        Ok(())
    }
}

/// Templates save time, and without them guests still start: what is wrong with them is for the log.
fn tell_of<T>(result: io::Result<T>) -> Option<T> {
    result
        .inspect_err(|error| tracing::info!("no template: {error}"))
        .ok()
}

fn boot_config(
    sandbox: &Sandbox,
    size: Size,
    cmdline: String,
    share: &Share,
    serial: bool,
) -> BootConfig {
    BootConfig {
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
            files: most_files(size.memory_mib),
        }),
        spare_slots: 0,
        serial,
        save_template: false,
    }
}

/// Where the serial console goes: a file of its own, or this process's standard error.
fn serial_output(file: Option<PathBuf>) -> io::Result<OwnedFd> {
    match file {
        Some(path) => Ok(File::create(path)?.into()),
        None => io::stderr().as_fd().try_clone_to_owned(),
    }
}

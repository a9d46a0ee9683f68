//! Why a sandbox did not do as told.

use thiserror::Error;

use super::boot::BootError;
use super::process::Status;
use crate::agent::AgentError;
use crate::hooks::HookError;
use crate::host_cgroup::HostCgroupError;
use crate::id::{ContainerId, IdError};
use crate::preflight::PreflightError;
use crate::share::ShareError;
use crate::spec::SpecError;
use crate::state::StateError;
use crate::stdio::StdioError;
use crate::vmm::VmmError;

/// Why a sandbox did not do as told.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// The id is no id.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The bundle is refused.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The streams can't be attached as asked.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// This host can't start a guest.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// A mount failed.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The state directory failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// The VMM failed.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The guest did not come up.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The agent refused or is gone.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A hook failed.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The host's cgroup failed.
    #[error(transparent)]
    HostCgroup(#[from] HostCgroupError),
    /// A process can't be given the score.
    #[error("`process.oomScoreAdj`: cannot set it for process {0}: {1}")]
    OomScore(u32, std::io::Error),
    /// The process that stands for the container's is not one that can.
    #[error("cannot use process {0} as a stand-in: {1}")]
    StandIn(u32, std::io::Error),
    /// The process that stands for the container's ended while that was being made.
    #[error("the process that stands for the container's was killed before that could start")]
    Orphan,
    /// The VM ended under its containers.
    #[error("{0}")]
    Failed(String),
    /// No such container.
    #[error("container {0:?} does not exist")]
    NotFound(String),
    /// No such process in the container.
    #[error("process {0:?} does not exist")]
    NoProcess(String),
    /// The id is taken.
    #[error("container with id {0} already exists: choose another id or delete that container")]
    Exists(ContainerId),
    /// The exec id is taken.
    #[error("process with id {0:?} already exists")]
    ExecExists(String),
    /// Limits that were to hold from the end of a pause on do not.
    #[error(
        "the container goes on, but without the limits that it was given while it was paused: {0}"
    )]
    LateUpdate(Box<SandboxError>),
    /// A request's JSON is not what it should be.
    #[error("{what}: {problem}")]
    Request {
        /// What was to be parsed.
        what: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The container is in another state.
    #[error("{what}: it is {status}")]
    Status {
        /// What can't be done.
        what: &'static str,
        /// What the container is.
        status: Status,
    },
}

//! Exits and errors in the words of the Task API.

use std::time::SystemTime;

use bulkhead_runtime::agent::{AgentError, Refusal};
use bulkhead_runtime::host_cgroup::HostCgroupError;
use bulkhead_runtime::sandbox::{SandboxError, Status};
use containerd_shim_protos::types::task;
use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;
use ttrpc::{Code, get_status};

/// A moment as protobuf has it.
pub fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(Timestamp::from(at))
}

/// A container's state as containerd names it. One that is being made is as good as unknown.
pub fn status(status: Status) -> task::Status {
    match status {
        Status::Creating => task::Status::UNKNOWN,
        Status::Created => task::Status::CREATED,
        Status::Running => task::Status::RUNNING,
        Status::Paused => task::Status::PAUSED,
        Status::Stopped => task::Status::STOPPED,
    }
}

/// An error with the code by which clients tell kinds apart, and the sentence for the user.
pub fn rpc_error(error: &SandboxError) -> ttrpc::Error {
    let code = match error {
        SandboxError::Id(_)
        | SandboxError::Spec(_)
        | SandboxError::Stdio(_)
        | SandboxError::HostCgroup(
            HostCgroupError::Path(..) | HostCgroupError::Property(..) | HostCgroupError::Limit(_),
        )
        | SandboxError::Request { .. } => Code::INVALID_ARGUMENT,
        SandboxError::NotFound(_) | SandboxError::NoProcess(_) => Code::NOT_FOUND,
        SandboxError::Exists(_) | SandboxError::ExecExists(_) => Code::ALREADY_EXISTS,
        SandboxError::Status { .. } | SandboxError::Preflight(_) => Code::FAILED_PRECONDITION,
        SandboxError::Hook(_)
        | SandboxError::HostCgroup(_)
        | SandboxError::StandIn(..)
        | SandboxError::OomScore(..)
        | SandboxError::LateUpdate(_)
        | SandboxError::Orphan => Code::UNKNOWN,
        SandboxError::Failed(_) | SandboxError::Boot(_) => Code::UNAVAILABLE,
        SandboxError::Agent(AgentError::Refused { kind, .. }) => match kind {
            Refusal::Invalid => Code::INVALID_ARGUMENT,
            Refusal::NotFound => Code::NOT_FOUND,
            Refusal::Exists => Code::ALREADY_EXISTS,
            Refusal::Precondition => Code::FAILED_PRECONDITION,
            Refusal::Permission => Code::PERMISSION_DENIED,
            Refusal::Other => Code::UNKNOWN,
        },
        SandboxError::Agent(_) => Code::UNAVAILABLE,
        SandboxError::Share(_) | SandboxError::State(_) | SandboxError::Vmm(_) => Code::INTERNAL,
    };
    ttrpc::Error::RpcStatus(get_status(code, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_errors_keep_their_codes_and_sentences() {
        let agent = |kind| {
            SandboxError::Agent(AgentError::Refused {
                kind,
                message: "exec: \"foo\": executable file not found in $PATH".into(),
            })
        };
        for (error, code, text) in [
            (
                agent(Refusal::NotFound),
                Code::NOT_FOUND,
                "executable file not found",
            ),
            (agent(Refusal::Permission), Code::PERMISSION_DENIED, "foo"),
            (
                SandboxError::NotFound("c".into()),
                Code::NOT_FOUND,
                "does not exist",
            ),
            (
                SandboxError::Status {
                    what: "container not running",
                    status: Status::Stopped,
                },
                Code::FAILED_PRECONDITION,
                "container not running: it is stopped",
            ),
        ] {
            let ttrpc::Error::RpcStatus(status) = rpc_error(&error) else {
                panic!("no status");
            };
            assert_eq!(status.code(), code);
            assert!(status.message().contains(text), "{}", status.message());
        }
    }
}

//! The agent's one error type, and its one mapping to ttrpc status codes.
//!
//! Messages are what users see: one sentence that names the spec's field or the path, never the contents of
//! arguments or environment.

use std::io;

use nix::errno::Errno;
use ttrpc::Code;

/// What kind of failure it is, as far as the host has to tell them apart. The numbers travel between a container's
/// init and the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The request or the spec is wrong.
    InvalidArgument = 1,
    /// A program, path, container or process does not exist.
    NotFound = 2,
    /// The user of the container may not do it.
    PermissionDenied = 3,
    /// The container id is taken.
    AlreadyExists = 4,
    /// Not in this state.
    FailedPrecondition = 5,
    /// The guest could not do it.
    Internal = 6,
}

impl Kind {
    /// The kind with this number; what is unknown is internal.
    pub fn from_number(number: u8) -> Self {
        match number {
            1 => Self::InvalidArgument,
            2 => Self::NotFound,
            3 => Self::PermissionDenied,
            4 => Self::AlreadyExists,
            5 => Self::FailedPrecondition,
            _ => Self::Internal,
        }
    }

    /// The kind that an errno of a system call on a thing named by the spec stands for.
    pub fn of(errno: Errno) -> Self {
        match errno {
            Errno::ENOENT => Self::NotFound,
            Errno::EACCES | Errno::EPERM => Self::PermissionDenied,
            Errno::EINVAL
            | Errno::ENOTDIR
            | Errno::EISDIR
            | Errno::ELOOP
            | Errno::ENODEV
            | Errno::EROFS
            | Errno::ENAMETOOLONG => Self::InvalidArgument,
            _ => Self::Internal,
        }
    }
}

/// A failed request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A field of the OCI spec holds what can't be done.
    #[error("{field}: {problem}")]
    Spec {
        /// Path of the field in config.json.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A field of the request, spec aside, is wrong.
    #[error("{0}")]
    Request(String),
    /// The id is taken.
    #[error("container {0} already exists")]
    ContainerExists(String),
    /// The id of an exec is taken.
    #[error("process {0} already exists")]
    ProcessExists(String),
    /// No such container.
    #[error("container {0} does not exist")]
    NoContainer(String),
    /// No such process, or it has ended.
    #[error("{0}")]
    NoProcess(String),
    /// The container is not in the state that the call needs.
    #[error("{0}")]
    State(String),
    /// The set-up of a container failed, here or in its init.
    #[error("{message}")]
    Setup {
        /// What kind of failure.
        kind: Kind,
        /// The sentence.
        message: String,
    },
}

/// Result of the agent's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A field of the spec that can't be honoured.
    pub fn spec(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Spec {
            field: field.into(),
            problem: problem.into(),
        }
    }

    /// A failure whose kind is given.
    pub fn setup(kind: Kind, message: impl Into<String>) -> Self {
        Self::Setup {
            kind,
            message: message.into(),
        }
    }

    /// A failed system call: `what` names the thing, the kind follows from the errno.
    pub fn system(what: impl std::fmt::Display, source: impl Into<Errno>) -> Self {
        let errno = source.into();
        Self::setup(Kind::of(errno), format!("{what}: {}", errno_text(errno)))
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Spec { .. } | Self::Request(_) => Kind::InvalidArgument,
            Self::ContainerExists(_) | Self::ProcessExists(_) => Kind::AlreadyExists,
            Self::NoContainer(_) | Self::NoProcess(_) => Kind::NotFound,
            Self::State(_) => Kind::FailedPrecondition,
            Self::Setup { kind, .. } => *kind,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let code = match error.kind() {
            Kind::InvalidArgument => Code::INVALID_ARGUMENT,
            Kind::NotFound => Code::NOT_FOUND,
            Kind::PermissionDenied => Code::PERMISSION_DENIED,
            Kind::AlreadyExists => Code::ALREADY_EXISTS,
            Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
            Kind::Internal => Code::INTERNAL,
        };
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, error.to_string()))
    }
}

/// `strerror` as runc and the Go library spell it: "no such file or directory". Clients match on these texts.
pub fn errno_text(errno: Errno) -> String {
    // The C library's words, as Go's are; `nix` has others for some.
    let text = io::Error::from(errno).to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut characters = text.chars();
    match characters.next() {
        // "RPC struct is bad" keeps its capitals.
        Some(first) if characters.clone().next().is_some_and(char::is_lowercase) => {
            first.to_lowercase().chain(characters).collect()
        }
        _ => text.to_owned(),
    }
}

/// The errno of an I/O error of the standard library.
pub fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Names the thing that a failed system call was about.
pub trait Context<T> {
    /// Turns the failure into an [`Error::Setup`] that begins with `what()`.
    fn what<D: std::fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T> Context<T> for nix::Result<T> {
    fn what<D: std::fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|errno| Error::system(what(), errno))
    }
}

impl<T> Context<T> for io::Result<T> {
    fn what<D: std::fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| Error::system(what(), errno_of(&error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_its_number() {
        for kind in [
            Kind::InvalidArgument,
            Kind::NotFound,
            Kind::PermissionDenied,
            Kind::AlreadyExists,
            Kind::FailedPrecondition,
            Kind::Internal,
        ] {
            assert_eq!(Kind::from_number(kind as u8), kind);
        }
    }

    #[test]
    fn errno_texts_are_spelled_as_runc_spells_them() {
        assert_eq!(errno_text(Errno::ENOENT), "no such file or directory");
        assert_eq!(errno_text(Errno::EACCES), "permission denied");
        assert_eq!(errno_text(Errno::ENOEXEC), "exec format error");
        assert_eq!(errno_text(Errno::EIO), "input/output error");
        assert_eq!(
            errno_text(Errno::ELOOP),
            "too many levels of symbolic links"
        );
    }

    #[test]
    fn a_spec_error_is_invalid_argument_and_names_the_field() {
        let error = ttrpc::Error::from(Error::spec("linux.seccomp", "not supported"));
        let ttrpc::Error::RpcStatus(status) = error else {
            panic!("not a status")
        };
        assert_eq!(status.code(), Code::INVALID_ARGUMENT);
        assert_eq!(status.message(), "linux.seccomp: not supported");
    }
}

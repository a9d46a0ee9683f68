//! Container ids: runc's rules, in a type whose constructor is the only door.

use std::fmt;
use std::path::Path;

use bulkhead_protocol::{MAX_CONTAINER_ID, is_container_id};
use thiserror::Error;

/// An id that is safe as a file name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ContainerId(String);

/// Why a string is no container id.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum IdError {
    /// No characters at all.
    #[error("container id is empty: give a name of letters, digits, `_`, `+`, `,`, `-` and `.`")]
    Empty,
    /// Longer than a file name can be.
    #[error("container id has {0} bytes: use at most {MAX_CONTAINER_ID}")]
    TooLong(usize),
    /// A character outside runc's `^[\w+-\.]+$`, or `.` or `..`.
    #[error(
        "invalid container id {0:?}: use letters, digits, `_`, `+`, `,`, `-` and `.`, and not `.` or `..` alone"
    )]
    Format(String),
}

impl ContainerId {
    /// Checks `id` as runc does, and the agent.
    pub fn new(id: impl Into<String>) -> Result<Self, IdError> {
        let id = id.into();
        if id.is_empty() {
            return Err(IdError::Empty);
        }
        if id.len() > MAX_CONTAINER_ID {
            return Err(IdError::TooLong(id.len()));
        }
        if !is_container_id(&id) {
            return Err(IdError::Format(id));
        }
        Ok(Self(id))
    }

    /// The id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl AsRef<Path> for ContainerId {
    fn as_ref(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_runc_takes_are_taken() {
        for id in ["a", "A.b-c_d+e,f", ".hidden", "...", "-", &"x".repeat(255)] {
            assert_eq!(ContainerId::new(id).unwrap().as_str(), id);
        }
    }

    #[test]
    fn ids_that_are_no_file_names_are_refused() {
        for id in [
            "",
            ".",
            "..",
            "a/b",
            "a b",
            "ä",
            "a\0",
            "a\n",
            "a:b",
            &"x".repeat(256),
        ] {
            assert!(ContainerId::new(id).is_err(), "{id:?}");
        }
    }
}

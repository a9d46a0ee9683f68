//! Who attaches a process's standard streams, as the Task API's `stdin`, `stdout` and `stderr` fields say it.
//!
//! | field | meaning |
//! | --- | --- |
//! | empty | nobody: the process gets `/dev/null` |
//! | `vsock:` | the client of the Task API, which connects to the guest itself ([`crate::streams`]) |
//!
//! A process with a terminal has one stream for all three, in `stdin` and `stdout`.
//!
//! For descriptors beyond these three the Task API has no field; the command line names them beside it ([`Flow`]).
//!
//! containerd's own forms (paths of FIFOs, `fifo://`, `binary://`, `file://`) are for the server to attach.

use bulkhead_protocol::FIRST_DESCRIPTOR;
use bulkhead_protocol::agent::{self, StreamKind};
use protobuf::EnumOrUnknown;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The field's value for [`Attach::Client`].
pub const CLIENT: &str = "vsock:";

/// Who attaches a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attach {
    /// Nobody.
    Nobody,
    /// The client.
    Client,
}

/// A form that this version does not attach.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{field} is {value:?}: only {CLIENT:?} and the empty string are supported")]
pub struct StdioError {
    field: &'static str,
    value: String,
}

/// The streams of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stdio {
    /// Standard input.
    pub stdin: Attach,
    /// Standard output.
    pub stdout: Attach,
    /// Standard error.
    pub stderr: Attach,
    /// A terminal in place of the three.
    pub terminal: bool,
}

impl Attach {
    /// The Task API's field.
    pub fn as_field(self) -> &'static str {
        match self {
            Self::Nobody => "",
            Self::Client => CLIENT,
        }
    }

    fn parse(field: &'static str, value: &str) -> Result<Self, StdioError> {
        match value {
            "" => Ok(Self::Nobody),
            CLIENT => Ok(Self::Client),
            other => Err(StdioError {
                field,
                value: other.to_owned(),
            }),
        }
    }
}

impl Stdio {
    /// A terminal that the client attaches.
    pub const TERMINAL: Self = Self {
        stdin: Attach::Client,
        stdout: Attach::Client,
        stderr: Attach::Nobody,
        terminal: true,
    };

    /// Reads the Task API's fields.
    pub fn parse(
        stdin: &str,
        stdout: &str,
        stderr: &str,
        terminal: bool,
    ) -> Result<Self, StdioError> {
        Ok(Self {
            stdin: Attach::parse("stdin", stdin)?,
            stdout: Attach::parse("stdout", stdout)?,
            stderr: Attach::parse("stderr", stderr)?,
            terminal,
        })
    }

    /// The standard streams that the client attaches, or the terminal in their place.
    pub fn standard_of_client(self) -> impl Iterator<Item = StreamKind> {
        let streams = if self.terminal {
            vec![(Attach::Client, StreamKind::TERMINAL)]
        } else {
            vec![
                (self.stdin, StreamKind::STDIN),
                (self.stdout, StreamKind::STDOUT),
                (self.stderr, StreamKind::STDERR),
            ]
        };
        streams
            .into_iter()
            .filter_map(|(who, kind)| (who == Attach::Client).then_some(kind))
    }

    /// The streams that the client attaches, each with the number of its descriptor in the process if it is none of the standard ones.
    pub fn of_client(self, descriptors: &[Flow]) -> Vec<(StreamKind, u32)> {
        let further = (FIRST_DESCRIPTOR..)
            .zip(descriptors)
            .filter(|(_, flow)| **flow != Flow::Nowhere);
        self.standard_of_client()
            .map(|kind| (kind, 0))
            .chain(further.map(|(number, _)| (StreamKind::DESCRIPTOR, number)))
            .collect()
    }

    /// What the agent is told; `size` is the terminal's, in columns and rows, `descriptors` are those beyond these streams.
    pub fn for_agent(self, size: Option<TerminalSize>, descriptors: &[Flow]) -> agent::Stdio {
        let TerminalSize { width, height } = size.unwrap_or_default();
        agent::Stdio {
            stdin: self.stdin == Attach::Client,
            stdout: self.stdout == Attach::Client,
            stderr: self.stderr == Attach::Client,
            terminal: self.terminal,
            terminal_width: width,
            terminal_height: height,
            descriptors: descriptors.iter().map(|flow| flow.of_agent()).collect(),
            ..Default::default()
        }
    }
}

/// Where the bytes of a descriptor beyond the standard streams go. The client attaches each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flow {
    /// Nowhere: `/dev/null`.
    Nowhere,
    /// To the process.
    Inward,
    /// From the process.
    Outward,
    /// Both ways, each with an end of its own.
    BothWays,
}

impl Flow {
    fn of_agent(self) -> EnumOrUnknown<agent::Flow> {
        let flow = match self {
            Self::Nowhere => agent::Flow::NOWHERE,
            Self::Inward => agent::Flow::INWARD,
            Self::Outward => agent::Flow::OUTWARD,
            Self::BothWays => agent::Flow::BOTH_WAYS,
        };
        flow.into()
    }
}

/// Columns and rows of a terminal; 0 is unknown.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_forms_come_back_as_they_were_written() {
        let stdio = Stdio {
            stdin: Attach::Nobody,
            stdout: Attach::Client,
            stderr: Attach::Client,
            terminal: false,
        };
        let parsed = Stdio::parse(
            stdio.stdin.as_field(),
            stdio.stdout.as_field(),
            stdio.stderr.as_field(),
            false,
        );
        assert_eq!(parsed, Ok(stdio));
        let told = stdio.for_agent(None, &[]);
        assert!(!told.stdin && told.stdout && told.stderr && !told.terminal);
    }

    #[test]
    fn other_forms_are_refused_by_the_name_of_their_field() {
        let error = Stdio::parse("", "/run/fifo", "", false).unwrap_err();
        assert!(error.to_string().starts_with("stdout is \"/run/fifo\""));
    }
}

//! The log: one line for each event, written to standard error with one system call.
//!
//! A whole subscriber library would cost more at boot than everything else the agent does there. No spans; fields
//! never hold a container's arguments, environment or files.

use std::fmt::{self, Write as _};
use std::io::Write as _;

use nix::time::ClockId;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::timeline::nanoseconds;

/// Begins to log events up to this level.
pub fn start(level: LevelFilter) {
    // Fails only if there is a log already, which is as good.
    let _ = tracing::subscriber::set_global_default(Console { level });
}

struct Console {
    level: LevelFilter,
}

impl Subscriber for Console {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn event(&self, event: &Event<'_>) {
        let metadata = event.metadata();
        let mut line = Line(String::with_capacity(128));
        let _ = write!(line.0, "{} {}:", metadata.level(), metadata.target());
        event.record(&mut line);
        let _ = std::io::stderr()
            .write_all(finish(line.0, nanoseconds(ClockId::CLOCK_BOOTTIME)).as_bytes());
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// Puts the time in front, as the kernel's messages have it, and keeps it one line.
fn finish(line: String, now: u64) -> String {
    let line = line.replace('\n', " ");
    format!(
        "[{:5}.{:06}] {line}\n",
        now / 1_000_000_000,
        now % 1_000_000_000 / 1_000
    )
}

struct Line(String);

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        let _ = match field.name() {
            "message" => write!(self.0, " {value}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_a_time_and_no_second_line() {
        assert_eq!(
            finish("INFO agent: two\nlines".to_owned(), 12_034_567_890),
            "[   12.034567] INFO agent: two lines\n"
        );
    }
}

//! What a command has to tell besides its output, errors and warnings, in runc's form, which clients read: on standard error, or in
//! the file of `--log`. Of an error the user is told on standard error in any case.

use std::fmt::{self, Debug, Write as _};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::SystemTime;

use anyhow::Context;
use clap::ValueEnum;
use serde_json::json;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{self, Layer, SubscriberExt};

/// Formats of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// `time="..." level=error msg="..."`
    Text,
    /// `{"level":"error","msg":"...","time":"..."}`
    Json,
}

/// The log of one command.
#[derive(Debug)]
pub struct Log {
    file: Option<File>,
    format: Format,
    /// The process that opened it. One that is forked from it closes what it has inherited, the file too.
    owner: u32,
}

impl Log {
    /// Opens the file for appending, if one is named.
    pub fn open(path: Option<&Path>, format: Format) -> anyhow::Result<Self> {
        let open = |path: &Path| {
            File::options()
                .append(true)
                .create(true)
                .open(path)
                .with_context(|| format!("cannot open the log file {}", path.display()))
        };
        Ok(Self {
            file: path.map(open).transpose()?,
            format,
            owner: std::process::id(),
        })
    }

    /// Takes all warnings and errors of this process from now on.
    pub fn start(self) {
        let all = tracing_subscriber::registry()
            .with(LevelFilter::WARN)
            .with(self);
        // Fails if that has been done before.
        let _ = tracing::subscriber::set_global_default(all);
    }

    /// Tells an error, to readers of standard error in words of their own.
    pub fn error(&self, message: &str, to_people: &str) {
        self.tell(Level::ERROR, message, to_people);
    }

    /// Nobody is left to be told of a failure.
    fn tell(&self, level: Level, message: &str, to_people: &str) {
        if std::process::id() != self.owner {
            return;
        }
        let entry = entry(self.format, level, message, SystemTime::now());
        let to_people = match (self.file.as_ref(), self.format) {
            (Some(mut file), _) => {
                let _ = file.write_all(entry.as_bytes());
                (level == Level::ERROR).then(|| format!("{to_people}\n"))
            }
            (None, Format::Text) => Some(format!("{to_people}\n")),
            (None, Format::Json) => Some(entry),
        };
        if let Some(line) = to_people {
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }
}

impl<S: Subscriber> Layer<S> for Log {
    fn on_event(&self, event: &Event<'_>, _context: layer::Context<'_, S>) {
        let level = *event.metadata().level();
        let mut words = Words::default();
        event.record(&mut words);
        let Words { message, fields } = words;
        let message = message + &fields;
        // Scripts and test suites look for that word, which runc's `level=error` has.
        self.tell(level, &message, &format!("{}: {message}", name(level)));
    }
}

/// What an event says: its sentence, and whatever it names besides.
#[derive(Default)]
struct Words {
    message: String,
    fields: String,
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let _: fmt::Result = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

/// logrus' name of a level.
fn name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        _ => "warning",
    }
}

fn entry(format: Format, level: Level, message: &str, now: SystemTime) -> String {
    let time = humantime::format_rfc3339_seconds(now).to_string();
    let level = name(level);
    match format {
        Format::Json => {
            let entry = json!({"level": level, "msg": message, "time": time});
            format!("{entry}\n")
        }
        Format::Text => format!("time=\"{time}\" level={level} msg={message:?}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_runcs_form() {
        assert_eq!(
            entry(
                Format::Json,
                Level::ERROR,
                "a \"b\"",
                SystemTime::UNIX_EPOCH
            ),
            "{\"level\":\"error\",\"msg\":\"a \\\"b\\\"\",\"time\":\"1970-01-01T00:00:00Z\"}\n"
        );
        assert_eq!(
            entry(Format::Text, Level::WARN, "a \"b\"", SystemTime::UNIX_EPOCH),
            "time=\"1970-01-01T00:00:00Z\" level=warning msg=\"a \\\"b\\\"\"\n"
        );
    }

    #[test]
    fn an_event_is_told_with_what_it_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = Log::open(Some(&path), Format::Json).unwrap();
        let all = tracing_subscriber::registry()
            .with(LevelFilter::WARN)
            .with(log);
        tracing::subscriber::with_default(all, || {
            tracing::info!("nothing");
            tracing::warn!(error = %"no such file", hook = "a", "it stays");
        });
        let told = std::fs::read_to_string(&path).unwrap();
        assert_eq!(told.lines().count(), 1, "{told}");
        assert!(
            told.starts_with(
                r#"{"level":"warning","msg":"it stays error=no such file hook=\"a\"","#
            ),
            "{told}"
        );
    }
}

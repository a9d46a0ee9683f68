//! How errors are told: one line on standard error, and one in the file of `--log` in runc's format, which clients read.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::SystemTime;

use anyhow::Context;
use clap::ValueEnum;
use serde_json::json;

/// Formats of the log file.
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
        let file = path.map(open).transpose()?;
        Ok(Self { file, format })
    }

    /// Tells an error.
    pub fn error(&self, message: &str) {
        // Scripts and test suites look for that word, which runc's `level=error` has. Nobody is left to be told of a failure.
        let _ = writeln!(std::io::stderr(), "error: {message}");
        self.note(message);
    }

    /// Writes an error to the file, if there is one, of which the user has been told.
    pub fn note(&self, message: &str) {
        if let Some(mut file) = self.file.as_ref() {
            let line = line(self.format, message, SystemTime::now());
            let _ = file.write_all(line.as_bytes());
        }
    }
}

fn line(format: Format, message: &str, now: SystemTime) -> String {
    let time = humantime::format_rfc3339_seconds(now);
    match format {
        Format::Json => {
            format!(
                "{}\n",
                json!({"level": "error", "msg": message, "time": time.to_string()})
            )
        }
        Format::Text => format!("time=\"{time}\" level=error msg={message:?}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_runcs_form() {
        assert_eq!(
            line(Format::Json, "a \"b\"", SystemTime::UNIX_EPOCH),
            "{\"level\":\"error\",\"msg\":\"a \\\"b\\\"\",\"time\":\"1970-01-01T00:00:00Z\"}\n"
        );
        assert_eq!(
            line(Format::Text, "a \"b\"", SystemTime::UNIX_EPOCH),
            "time=\"1970-01-01T00:00:00Z\" level=error msg=\"a \\\"b\\\"\"\n"
        );
    }
}

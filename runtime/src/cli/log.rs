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
        // Nobody is left to be told of a failure of these.
        let _ = writeln!(std::io::stderr(), "{message}");
        if let Some(mut file) = self.file.as_ref() {
            let line = line(self.format, message, SystemTime::now());
            let _ = file.write_all(line.as_bytes());
        }
    }
}

fn line(format: Format, message: &str, now: SystemTime) -> String {
    let time = rfc3339(now);
    match format {
        Format::Json => {
            format!(
                "{}\n",
                json!({"level": "error", "msg": message, "time": time})
            )
        }
        Format::Text => format!("time=\"{time}\" level=error msg={message:?}\n"),
    }
}

/// UTC time in seconds, as `date -u +%FT%TZ` writes it.
fn rfc3339(time: SystemTime) -> String {
    let seconds = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days are counted from 0000-03-01, so that the leap day is a year's last; 400 years have 146,097 days.
    let day = days + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{:02}T{:02}:{:02}:{:02}Z",
        of_year - (153 * from_march + 2) / 5 + 1,
        rest / 3_600,
        rest / 60 % 60,
        rest % 60,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn times_are_those_of_date() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_704_067_199, "2023-12-31T23:59:59Z"),
            (1_795_233_834, "2026-11-21T04:03:54Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(at(seconds)), expected);
        }
    }

    #[test]
    fn lines_have_runcs_form() {
        assert_eq!(
            line(Format::Json, "a \"b\"", at(0)),
            "{\"level\":\"error\",\"msg\":\"a \\\"b\\\"\",\"time\":\"1970-01-01T00:00:00Z\"}\n"
        );
        assert_eq!(
            line(Format::Text, "a \"b\"", at(0)),
            "time=\"1970-01-01T00:00:00Z\" level=error msg=\"a \\\"b\\\"\"\n"
        );
    }
}

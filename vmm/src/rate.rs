//! How often a guest may make the VMM write something down: its log may be memory of the host.

use std::io::{self, Write};
use std::sync::Mutex;
use std::time::Instant;

use tracing_subscriber::fmt::MakeWriter;

use crate::sync::lock;

/// Lines of the log that may come at once, and how many come back each second.
const LOG_BURST: f64 = 5000.0;
const LOG_PER_SECOND: f64 = 2.0;

/// A bucket of tokens.
#[derive(Debug)]
pub struct Rate {
    burst: f64,
    per_second: f64,
    tokens: f64,
    refilled: Instant,
    refused: u64,
}

impl Rate {
    /// Allows `burst` at once, and `per_second` more each second after that.
    pub fn new(burst: f64, per_second: f64) -> Self {
        Self {
            burst,
            per_second,
            tokens: burst,
            refilled: Instant::now(),
            refused: 0,
        }
    }

    /// Takes one, if there is one; returns how many were refused before it.
    pub fn take(&mut self) -> Option<u64> {
        let now = Instant::now();
        let since = now.duration_since(self.refilled).as_secs_f64();
        self.tokens = (self.tokens + since * self.per_second).min(self.burst);
        self.refilled = now;
        if self.tokens < 1.0 {
            self.refused += 1;
            return None;
        }
        self.tokens -= 1.0;
        Some(std::mem::take(&mut self.refused))
    }
}

/// Standard error as a log, limited in rate: whatever the VMM has to say, the guest may be the cause of it.
#[derive(Debug)]
pub struct Log(Mutex<Rate>);

impl Default for Log {
    /// With the whole burst to spend.
    fn default() -> Self {
        Self(Mutex::new(Rate::new(LOG_BURST, LOG_PER_SECOND)))
    }
}

/// Where one line goes.
#[derive(Debug)]
pub enum Line {
    /// To standard error.
    Written(io::Stderr),
    /// Nowhere.
    LeftOut,
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        let Some(refused) = lock(&self.0).take() else {
            return Line::LeftOut;
        };
        let mut stderr = io::stderr();
        if refused > 0 {
            // There is nobody to tell that there is nobody to tell.
            let _ = writeln!(stderr, "({refused} lines left out)");
        }
        Line::Written(stderr)
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Written(stderr) => stderr.write(bytes),
            Self::LeftOut => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Written(stderr) => stderr.flush(),
            Self::LeftOut => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_counts_what_it_refuses() {
        let mut rate = Rate::new(3.0, 0.0);
        let taken: Vec<_> = (0..5).map(|_| rate.take()).collect();
        assert_eq!(taken, [Some(0), Some(0), Some(0), None, None]);
        rate.tokens = 1.0;
        assert_eq!(rate.take(), Some(2));
        rate.tokens = 1.0;
        assert_eq!(rate.take(), Some(0));
    }

    #[test]
    fn a_log_leaves_out_what_is_beyond_its_rate() {
        let log = Log(Mutex::new(Rate::new(1.0, 0.0)));
        assert!(matches!(log.make_writer(), Line::Written(_)));
        let mut line = log.make_writer();
        assert!(matches!(line, Line::LeftOut));
        line.write_all(b"anything").unwrap();
    }
}

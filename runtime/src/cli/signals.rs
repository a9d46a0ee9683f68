//! Signals: those that a command passes on to its container's process, and how users name them.

use std::task::Poll;

use anyhow::anyhow;
use nix::sys::signal;
use tokio::signal::unix::{Signal as Stream, SignalKind, signal};

/// What is passed on: everything that can be caught, but what is about this process itself (its children, its faults, its
/// place in job control) or its connections.
const FORWARDED: [i32; 11] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGPWR,
    libc::SIGCONT,
];

/// One that has come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// To be passed on.
    Number(u32),
    /// The terminal has another size.
    Resized,
}

/// The signals that have come in.
pub struct Signals(Vec<(Signal, Stream)>);

impl Signals {
    /// Catches them from now on.
    pub fn catch() -> std::io::Result<Self> {
        let forwarded = FORWARDED.into_iter().map(|number| {
            let stream = signal(SignalKind::from_raw(number))?;
            Ok((Signal::Number(number.unsigned_abs()), stream))
        });
        let real_time = (libc::SIGRTMIN()..=libc::SIGRTMAX()).filter_map(|number| {
            // The library that catches them may keep some to itself.
            let stream = signal(SignalKind::from_raw(number)).ok()?;
            Some(Ok((Signal::Number(number.unsigned_abs()), stream)))
        });
        let resized = signal(SignalKind::window_change()).map(|stream| (Signal::Resized, stream));
        forwarded
            .chain(real_time)
            .chain([resized])
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The next one.
    pub async fn next(&mut self) -> Signal {
        std::future::poll_fn(|cx| {
            for (number, signal) in &mut self.0 {
                if signal.poll_recv(cx).is_ready() {
                    return Poll::Ready(*number);
                }
            }
            Poll::Pending
        })
        .await
    }

    /// The next one that asks this process to end.
    pub async fn end(&mut self) -> u32 {
        loop {
            if let Signal::Number(number) = self.next().await
                && number != libc::SIGCONT.unsigned_abs()
            {
                return number;
            }
        }
    }
}

/// A signal as users name it: a number, or a name with or without `SIG`, in any case. 0 is none and has no name (kill(2)).
pub fn parse(text: &str) -> anyhow::Result<u32> {
    let unknown =
        || anyhow!("unknown signal {text:?}: give a number from 0 to 64 or a name such as TERM");
    if let Ok(number) = text.parse::<u32>() {
        return (0..=64)
            .contains(&number)
            .then_some(number)
            .ok_or_else(unknown);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    for (base, first) in [("RTMIN", libc::SIGRTMIN()), ("RTMAX", libc::SIGRTMAX())] {
        if let Some(offset) = name.strip_prefix(base) {
            let offset = if offset.is_empty() { "0" } else { offset };
            let number = offset.parse().ok().and_then(|n: i32| first.checked_add(n));
            let in_range = number.filter(|n| (libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(n));
            return in_range.map(i32::unsigned_abs).ok_or_else(unknown);
        }
    }
    let signal: signal::Signal = format!("SIG{name}").parse().map_err(|_| unknown())?;
    Ok((signal as i32).unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_numbers_and_names() {
        for (text, number) in [
            ("0", 0),
            ("15", 15),
            ("64", 64),
            ("TERM", 15),
            ("SIGKILL", 9),
            ("sigusr1", 10),
            ("RTMIN+3", libc::SIGRTMIN().unsigned_abs() + 3),
            ("SIGRTMAX-1", libc::SIGRTMAX().unsigned_abs() - 1),
        ] {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
        for text in ["", "SIG0", "65", "-1", "NONE", "RTMIN+99", "RTMAX+1"] {
            assert!(
                parse(text)
                    .unwrap_err()
                    .to_string()
                    .contains("unknown signal"),
                "{text}"
            );
        }
    }
}

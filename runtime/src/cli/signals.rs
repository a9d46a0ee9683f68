//! Signals that a foreground command passes on to its container.

use std::task::Poll;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What is passed on. `runc run` passes on everything that can be caught and means something to a container without a
/// terminal.
const FORWARDED: [i32; 7] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
];

/// The signals that have come in.
pub struct Signals(Vec<(u32, Signal)>);

impl Signals {
    /// Catches them from now on.
    pub fn catch() -> std::io::Result<Self> {
        let catch = |number: i32| {
            let signal = signal(SignalKind::from_raw(number))?;
            Ok((number.unsigned_abs(), signal))
        };
        FORWARDED
            .into_iter()
            .map(catch)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The next one.
    pub async fn next(&mut self) -> u32 {
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
}

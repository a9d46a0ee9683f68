//! Signals: those that a command passes on to its container's process, and how users name them.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};

use anyhow::anyhow;
use bulkhead_runtime::stdio::TerminalSize;
use nix::sys::signal::{self, SigSet};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::terminal;

/// What a command in the foreground leaves to the kernel: news of its own children, and that it may not use its terminal, being in
/// the background of that. runc passes on the latter two, and tries again what they forbid, without end.
const OWN: [signal::Signal; 3] = [signal::SIGCHLD, signal::SIGTTIN, signal::SIGTTOU];

/// What does not end a process that does nothing about it.
const HARMLESS: [libc::c_int; 7] = [
    libc::SIGCHLD,
    libc::SIGCONT,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGURG,
    libc::SIGWINCH,
];

/// One that has come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// To be passed on.
    Number(u32),
    /// The terminal has another size, this one.
    Resized(TerminalSize),
}

/// The signals that come in for this process. They are blocked and read: so none is lost or taken for another, not even one that is
/// known for a fault of the process itself, which in turn still ends it.
#[derive(Debug)]
pub struct Signals {
    fd: AsyncFd<SignalFd>,
    /// The terminal whose size is looked after.
    terminal: Option<OwnedFd>,
    /// Whether SIGWINCH is a signal as any other if there is no terminal. runc's command itself gets it otherwise.
    passes_resizes: bool,
    /// Such as have come in and are still to be given.
    kept: VecDeque<Signal>,
    before: SigSet,
}

impl Signals {
    /// Catches those of a command in the foreground from now on, which looks after that terminal. Needs a runtime.
    pub fn of_command(terminal: Option<OwnedFd>) -> io::Result<Self> {
        let mut caught = SigSet::all();
        OWN.into_iter().for_each(|own| caught.remove(own));
        Self::catch(&caught, terminal, false)
    }

    /// Catches all that can be caught of a process that stands for another, which has our standard input's terminal or none: whoever
    /// signals it means the other. Needs a runtime.
    pub fn of_stand_in(has_terminal: bool) -> io::Result<Self> {
        let stdin = io::stdin();
        let terminal = has_terminal.then(|| stdin.as_fd().try_clone_to_owned());
        Self::catch(&SigSet::all(), terminal.transpose()?, true)
    }

    fn catch(caught: &SigSet, terminal: Option<OwnedFd>, passes_resizes: bool) -> io::Result<Self> {
        let fd = SignalFd::with_flags(caught, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        // SAFETY: the descriptor is open, and its owner, which is never taken out again, keeps it so.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        let before = SigSet::thread_get_mask()?;
        // Threads are made later, and begin with what is blocked here.
        caught.thread_block()?;
        Ok(Self {
            fd,
            terminal,
            passes_resizes,
            kept: VecDeque::new(),
            before,
        })
    }

    /// The next one.
    pub async fn next(&mut self) -> Signal {
        match self.kept.pop_front() {
            Some(kept) => kept,
            None => self.coming().await,
        }
    }

    /// The next one that asks this process to end. Others are kept for [`Signals::next`], of several sizes the last.
    pub async fn end(&mut self) -> u32 {
        loop {
            match self.coming().await {
                Signal::Number(number) if !is_harmless(number) => return number,
                other => {
                    let is_size = |signal: &Signal| matches!(signal, Signal::Resized(_));
                    if is_size(&other) {
                        self.kept.retain(|kept| !is_size(kept));
                    }
                    self.kept.push_back(other);
                }
            }
        }
    }

    /// The next one that has not been kept.
    async fn coming(&self) -> Signal {
        let read = |fd: &SignalFd| fd.read_signal()?.ok_or(ErrorKind::WouldBlock.into());
        loop {
            match self.fd.async_io(Interest::READABLE, read).await {
                Ok(info) => {
                    if let Some(signal) = self.signal(&info) {
                        return signal;
                    }
                }
                // There is no such case.
                Err(_) => std::future::pending().await,
            }
        }
    }

    /// What a signal means for the container's process, if anything.
    fn signal(&self, info: &siginfo) -> Option<Signal> {
        // What the kernel says of this process's own doing, SIGPIPE say, is as if sent by itself.
        if info.ssi_pid == std::process::id() && info.ssi_code == libc::SI_USER {
            return None;
        }
        if info.ssi_signo == libc::SIGWINCH.unsigned_abs() {
            match &self.terminal {
                Some(terminal) => return terminal::size(terminal.as_fd()).map(Signal::Resized),
                None if !self.passes_resizes => return None,
                None => {}
            }
        }
        Some(Signal::Number(info.ssi_signo))
    }
}

impl Drop for Signals {
    /// Who is still to be waited for can be given up; and children are not to begin with signals blocked.
    fn drop(&mut self) {
        // What has come in was for a process that has ended.
        while let Ok(Some(_)) = self.fd.get_ref().read_signal() {}
        let _ = self.before.thread_set_mask();
    }
}

fn is_harmless(number: u32) -> bool {
    HARMLESS.iter().any(|known| known.unsigned_abs() == number)
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

    /// Sends signals to this thread alone, since the other threads of the tests catch none.
    fn send(numbers: impl IntoIterator<Item = libc::c_int>) {
        for number in numbers {
            // SAFETY: the thread is this one, which has that signal blocked.
            let result = unsafe { libc::pthread_kill(libc::pthread_self(), number) };
            assert_eq!(result, 0, "{number}");
        }
    }

    /// All that come in before the last one.
    async fn up_to(signals: &mut Signals, last: libc::c_int) -> Vec<Signal> {
        let mut all = Vec::new();
        loop {
            let next = signals.next().await;
            if next == number(last) {
                return all;
            }
            all.push(next);
        }
    }

    fn number(number: libc::c_int) -> Signal {
        Signal::Number(number.unsigned_abs())
    }

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(test);
    }

    #[test]
    fn a_stand_in_passes_on_whatever_can_be_caught() {
        run(async {
            let mut signals = Signals::of_stand_in(false).unwrap();
            let uncatchable = [libc::SIGKILL, libc::SIGSTOP];
            let mut all: Vec<_> = (1..32)
                .chain(libc::SIGRTMIN()..=libc::SIGRTMAX())
                .filter(|number| !uncatchable.contains(number))
                .collect();
            // A stop takes away a continuation that is still to come.
            all.retain(|number| *number != libc::SIGCONT);
            send(all.iter().copied());
            let mut passed = up_to(&mut signals, libc::SIGRTMAX()).await;
            passed.push(number(libc::SIGRTMAX()));
            passed.sort_by_key(|signal| format!("{signal:?}"));
            let mut expected = Vec::from_iter(all.into_iter().map(number));
            expected.sort_by_key(|signal| format!("{signal:?}"));
            assert_eq!(passed, expected);
            send([libc::SIGCONT]);
            assert_eq!(signals.next().await, number(libc::SIGCONT));
        });
    }

    #[test]
    fn real_time_signals_come_as_often_as_they_are_sent() {
        run(async {
            let mut signals = Signals::of_stand_in(false).unwrap();
            let first = libc::SIGRTMIN();
            send([first, first, first, libc::SIGRTMAX()]);
            let passed = up_to(&mut signals, libc::SIGRTMAX()).await;
            assert_eq!(passed, [number(first); 3]);
        });
    }

    #[test]
    fn a_command_passes_on_what_runc_does() {
        run(async {
            let mut signals = Signals::of_command(None).unwrap();
            let passed = [
                libc::SIGTSTP,
                libc::SIGURG,
                libc::SIGIO,
                libc::SIGABRT,
                libc::SIGTERM,
            ];
            send([libc::SIGWINCH, libc::SIGCHLD].into_iter().chain(passed));
            send([libc::SIGRTMAX()]);
            let all = up_to(&mut signals, libc::SIGRTMAX()).await;
            assert_eq!(all.len(), passed.len(), "{all:?}");
            assert!(passed.into_iter().all(|one| all.contains(&number(one))));
        });
    }

    #[test]
    fn a_new_size_and_what_is_harmless_is_kept_by_who_waits_for_an_end() {
        run(async {
            let terminal = nix::pty::openpty(None, None).unwrap();
            let set = |width, height| {
                let size = TerminalSize { width, height };
                terminal::set_size(terminal.slave.as_fd(), size).unwrap();
                size
            };
            let slave = terminal.slave.try_clone().unwrap();
            let mut signals = Signals::of_command(Some(slave)).unwrap();
            set(80, 25);
            send([libc::SIGWINCH, libc::SIGCONT, libc::SIGUSR1]);
            assert_eq!(signals.end().await, libc::SIGUSR1.unsigned_abs());
            let last = set(97, 41);
            send([libc::SIGWINCH, libc::SIGTERM]);
            assert_eq!(signals.end().await, libc::SIGTERM.unsigned_abs());
            assert_eq!(signals.next().await, number(libc::SIGCONT));
            assert_eq!(signals.next().await, Signal::Resized(last));
        });
    }

    #[test]
    fn a_new_size_of_no_terminal_is_a_signal_to_what_a_stand_in_stands_for() {
        run(async {
            let mut signals = Signals::of_stand_in(false).unwrap();
            send([libc::SIGWINCH]);
            assert_eq!(signals.next().await, number(libc::SIGWINCH));
        });
    }

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

//! Runs one command over a link to a supervisor: moves stdio, forwards signals, keeps the time limit.

use crate::frame::{CHUNK, Frame, Message, Start, Stdio, WINDOW};
use nix::sys::signal::{SigSet, Signal};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The only stream of this link.
const STREAM: u32 = 1;
/// How long a killed command may take to end.
const GRACE: Duration = Duration::from_secs(20);
/// Input beyond this is not kept for a second attempt.
const REPLAY: usize = 1 << 20;

/// How a command ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// By itself or by a signal: its exit code.
    Exited(i32),
    /// By the time limit.
    TimedOut,
    /// It could not be started: errno and a sentence.
    Rejected(i32, String),
    /// The user interrupted it with this signal, twice.
    Interrupted(i32),
    /// Our own standard output can't be written.
    OutputClosed,
    /// The emulated host failed: reason, tail of its console.
    HostFailed(String, String),
    /// The supervisor went away.
    Gone,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

enum Event {
    Frame(Frame),
    Closed,
    Signal(i32),
}

/// Hands signals to the attempt that runs; with none running, or at the third, ends the process.
#[derive(Clone)]
pub struct Signals {
    target: Arc<Mutex<Option<Sender<Event>>>>,
}

impl Signals {
    /// Signals that are left alone.
    pub fn none() -> Self {
        Self {
            target: Arc::default(),
        }
    }

    /// Takes over SIGINT, SIGTERM, SIGHUP and SIGQUIT. To be called before any other thread is started.
    /// `cleanup` is run before the process is ended.
    pub fn take_over(cleanup: impl Fn() + Send + 'static) -> nix::Result<Self> {
        let mut set = SigSet::empty();
        for signal in [
            Signal::SIGINT,
            Signal::SIGTERM,
            Signal::SIGHUP,
            Signal::SIGQUIT,
        ] {
            set.add(signal);
        }
        set.thread_block()?;
        let signals = Self {
            target: Arc::default(),
        };
        let target = signals.target.clone();
        thread::spawn(move || {
            let mut count = 0;
            while let Ok(signal) = set.wait() {
                count += 1;
                let to = held(&target).clone().filter(|_| count < 3);
                if to.is_none_or(|to| to.send(Event::Signal(signal as i32)).is_err()) {
                    cleanup();
                    std::process::exit(128 + signal as i32);
                }
            }
        });
        Ok(signals)
    }
}

/// Our standard input, read once and kept so that a second attempt can be given it again.
#[derive(Clone)]
pub struct Input {
    shared: Arc<(Mutex<Buffer>, Condvar)>,
}

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// How many bytes before `bytes` have been dropped.
    dropped: usize,
    /// How far the current attempt has sent.
    sent: usize,
    eof: bool,
}

impl Buffer {
    fn end(&self) -> usize {
        self.dropped + self.bytes.len()
    }
}

impl Input {
    /// Starts the thread that reads, never further ahead than one window.
    pub fn new(mut from: impl Read + Send + 'static) -> Self {
        let input = Self {
            shared: Arc::default(),
        };
        let shared = input.shared.clone();
        thread::spawn(move || {
            let (buffer, changed) = &*shared;
            let mut chunk = vec![0; CHUNK];
            loop {
                let count = match from.read(&mut chunk) {
                    Ok(count) => count,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => 0,
                };
                let mut buffer = held(buffer);
                buffer.eof = count == 0;
                buffer.bytes.extend(&chunk[..count]);
                changed.notify_all();
                while buffer.end() - buffer.sent >= WINDOW {
                    buffer = changed.wait(buffer).unwrap_or_else(PoisonError::into_inner);
                }
                if buffer.eof {
                    break;
                }
            }
        });
        input
    }

    /// Whether everything read so far can be sent again.
    pub fn replayable(&self) -> bool {
        held(&self.shared.0).dropped == 0
    }

    fn rewind(&self) {
        held(&self.shared.0).sent = 0;
    }

    /// The next piece of at most `room` bytes, empty at the end of file; `None` if told to stop.
    fn next(&self, room: usize, stop: &dyn Fn() -> bool) -> Option<Vec<u8>> {
        let (buffer, changed) = &*self.shared;
        let mut buffer = held(buffer);
        loop {
            if stop() {
                return None;
            }
            if buffer.sent < buffer.end() || buffer.eof {
                break;
            }
            buffer = changed.wait(buffer).unwrap_or_else(PoisonError::into_inner);
        }
        let from = buffer.sent - buffer.dropped;
        let to = buffer.bytes.len().min(from + room.min(CHUNK));
        let piece = buffer.bytes[from..to].to_vec();
        buffer.sent += piece.len();
        if buffer.dropped > 0 || buffer.bytes.len() > REPLAY {
            let done = buffer.sent - buffer.dropped;
            buffer.bytes.drain(..done);
            buffer.dropped += done;
        }
        changed.notify_all();
        Some(piece)
    }

    fn wake(&self) {
        let _guard = held(&self.shared.0);
        self.shared.1.notify_all();
    }
}

/// How much input may be under way; shared by the pump and the loop that sees the acknowledgements.
struct Credit {
    left: Mutex<Option<usize>>,
    changed: Condvar,
}

impl Credit {
    fn wait(&self) -> Option<usize> {
        let mut left = held(&self.left);
        while *left == Some(0) {
            left = self
                .changed
                .wait(left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *left
    }

    fn change(&self, how: impl FnOnce(&mut Option<usize>)) {
        how(&mut held(&self.left));
        self.changed.notify_all();
    }

    fn stopped(&self) -> bool {
        held(&self.left).is_none()
    }
}

/// Where output goes.
pub type Sink<'a> = &'a dyn Fn(Stdio, &[u8]) -> io::Result<()>;

/// Our own standard output and standard error as a sink.
pub fn own_stdio(stdio: Stdio, data: &[u8]) -> io::Result<()> {
    fn write(mut to: impl Write, data: &[u8]) -> io::Result<()> {
        to.write_all(data)?;
        to.flush()
    }
    match stdio {
        Stdio::Err => write(io::stderr(), data),
        _ => write(io::stdout(), data),
    }
}

/// A command and all that it is connected with.
pub struct Order<'a> {
    /// What is run.
    pub start: &'a Start,
    /// How long it may take from its start.
    pub limit: Option<Duration>,
    /// Its standard input.
    pub input: &'a Input,
    /// Who interrupts it.
    pub signals: &'a Signals,
    /// Who gets its output.
    pub sink: Sink<'a>,
}

/// Runs the command to its end.
pub fn run(link: &UnixStream, order: &Order<'_>) -> Outcome {
    let (events, inbox) = mpsc::channel();
    *held(&order.signals.target) = Some(events.clone());
    let outcome = attempt(link, order, events, &inbox);
    *held(&order.signals.target) = None;
    // Ends the reader of this attempt and tells the supervisor that we are done.
    let _ = link.shutdown(std::net::Shutdown::Both);
    outcome
}

fn attempt(
    link: &UnixStream,
    order: &Order<'_>,
    events: Sender<Event>,
    inbox: &Receiver<Event>,
) -> Outcome {
    let input = order.input;
    let Ok(reader) = link.try_clone() else {
        return Outcome::Gone;
    };
    thread::spawn(move || {
        while let Ok(Some(frame)) = Frame::read_from(&reader) {
            if events.send(Event::Frame(frame)).is_err() {
                return;
            }
        }
        let _ = events.send(Event::Closed);
    });
    let say = |message: Message| Frame::new(STREAM, message).write_to(link).is_ok();
    if !say(Message::Start(order.start.clone())) {
        return Outcome::Gone;
    }
    input.rewind();
    let credit = Credit {
        left: Mutex::new(Some(WINDOW)),
        changed: Condvar::new(),
    };
    thread::scope(|scope| {
        let outcome = Loop {
            say: &say,
            limit: order.limit,
            sink: order.sink,
            credit: &credit,
            inbox,
            start_input: &|| {
                scope.spawn(|| send_input(&say, input, &credit));
            },
        }
        .run();
        credit.change(|left| *left = None);
        input.wake();
        outcome
    })
}

fn send_input(say: &dyn Fn(Message) -> bool, input: &Input, credit: &Credit) {
    while let Some(room) = credit.wait() {
        let Some(piece) = input.next(room, &|| credit.stopped()) else {
            return;
        };
        let count = piece.len();
        credit.change(|left| {
            if let Some(left) = left {
                *left -= count.min(*left);
            }
        });
        if !say(Message::Data(Stdio::In, piece)) || count == 0 {
            return;
        }
    }
}

struct Loop<'a> {
    say: &'a dyn Fn(Message) -> bool,
    limit: Option<Duration>,
    sink: Sink<'a>,
    credit: &'a Credit,
    inbox: &'a Receiver<Event>,
    start_input: &'a dyn Fn(),
}

impl Loop<'_> {
    fn run(&self) -> Outcome {
        let mut deadline = None;
        // What becomes of the command if it ends from now on: set when we have killed it.
        let mut verdict: Option<Outcome> = None;
        let mut interrupted = false;
        loop {
            let event = match deadline {
                None => self
                    .inbox
                    .recv()
                    .map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => {
                    let left = Instant::saturating_duration_since(&at, Instant::now());
                    self.inbox.recv_timeout(left)
                }
            };
            let mut kill = |verdict: &mut Option<Outcome>, why| {
                (self.say)(Message::Kill);
                verdict.get_or_insert(why);
                deadline = Some(Instant::now() + GRACE);
            };
            match event {
                Ok(Event::Frame(frame)) => match frame.message {
                    Message::Started => {
                        deadline = self.limit.map(|limit| Instant::now() + limit);
                        (self.start_input)();
                    }
                    Message::Data(stdio, data) => {
                        if (self.sink)(stdio, &data).is_err() && verdict.is_none() {
                            kill(&mut verdict, Outcome::OutputClosed);
                        }
                        (self.say)(Message::Ack(stdio, data.len() as u32));
                    }
                    Message::Ack(Stdio::In, count) => self.credit.change(|left| {
                        if let Some(left) = left {
                            *left += count as usize;
                        }
                    }),
                    Message::Exit(code) => return verdict.unwrap_or(Outcome::Exited(code)),
                    Message::Rejected(errno, text) => return Outcome::Rejected(errno, text),
                    Message::HostFailed(reason, tail) => {
                        return Outcome::HostFailed(reason, tail);
                    }
                    _ => {}
                },
                Ok(Event::Closed) | Err(RecvTimeoutError::Disconnected) => {
                    return verdict.unwrap_or(Outcome::Gone);
                }
                Ok(Event::Signal(number)) if interrupted => {
                    kill(&mut verdict, Outcome::Interrupted(number));
                }
                Ok(Event::Signal(number)) => {
                    interrupted = true;
                    (self.say)(Message::Signal(number));
                }
                Err(RecvTimeoutError::Timeout) => match verdict.take() {
                    Some(verdict) => return verdict,
                    None => kill(&mut verdict, Outcome::TimedOut),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(input: &Input) -> Vec<u8> {
        let mut all = vec![];
        loop {
            match input.next(1000, &|| false) {
                Some(piece) if piece.is_empty() => return all,
                Some(piece) => all.extend(piece),
                None => unreachable!("never told to stop"),
            }
        }
    }

    #[test]
    fn input_is_given_again_to_a_second_attempt() {
        let data: Vec<u8> = (0..REPLAY / 2).map(|n| n as u8).collect();
        let input = Input::new(io::Cursor::new(data.clone()));
        assert_eq!(read_all(&input), data);
        assert!(input.replayable());
        input.rewind();
        assert_eq!(read_all(&input), data);
    }

    #[test]
    fn input_too_long_to_be_kept_is_passed_on_but_not_given_again() {
        let data: Vec<u8> = (0..3 * REPLAY).map(|n| n as u8).collect();
        let input = Input::new(io::Cursor::new(data.clone()));
        assert_eq!(read_all(&input), data);
        assert!(!input.replayable());
    }

    /// Plays a supervisor that answers `Start` with the given messages and then hangs up or waits.
    fn against(script: Vec<Message>, limit: Option<Duration>, hang_up: bool) -> Outcome {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let peer = thread::spawn(move || {
            let first = Frame::read_from(&theirs).unwrap().unwrap();
            assert!(matches!(first.message, Message::Start(_)));
            for message in script {
                Frame::new(STREAM, message).write_to(&theirs).unwrap();
            }
            if !hang_up {
                // Like an init: a killed command ends with 137.
                while let Ok(Some(frame)) = Frame::read_from(&theirs) {
                    if frame.message == Message::Kill {
                        let exit = Message::Exit(137);
                        Frame::new(STREAM, exit).write_to(&theirs).unwrap();
                    }
                }
            }
        });
        let input = Input::new(io::empty());
        let order = Order {
            start: &Start::default(),
            limit,
            input: &input,
            signals: &Signals::none(),
            sink: &|_, _| Ok(()),
        };
        let outcome = run(&ours, &order);
        peer.join().unwrap();
        outcome
    }

    #[test]
    fn outcomes_are_told_apart() {
        use Message::{Exit, HostFailed, Rejected, Started};
        assert_eq!(
            against(vec![Started, Exit(3)], None, false),
            Outcome::Exited(3)
        );
        assert_eq!(
            against(vec![Rejected(2, "no".into())], None, false),
            Outcome::Rejected(2, "no".into())
        );
        assert_eq!(
            against(
                vec![Started, HostFailed("panic".into(), String::new())],
                None,
                false
            ),
            Outcome::HostFailed("panic".into(), String::new())
        );
        assert_eq!(against(vec![Started], None, true), Outcome::Gone);
        let limit = Some(Duration::from_millis(20));
        assert_eq!(against(vec![Started], limit, false), Outcome::TimedOut);
    }
}

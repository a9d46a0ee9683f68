//! Owns one boot of the emulated host: starts the machine, hands it its configuration, connects clients with
//! the commands they run, and watches the host's health. Three things can end a host: its console shows that
//! the kernel has failed, its heartbeat stops, or QEMU ends.

use crate::autopsy;
use crate::console::{Finding, Severity, Watch};
use crate::frame::{CONTROL, Configure, Frame, Message, VERSION};
use crate::machine::Machine;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Time limits for signs of life.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// From QEMU's start to the init's `Ready`.
    pub boot: Duration,
    /// Between two heartbeats.
    pub heartbeat: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            boot: Duration::from_secs(180),
            heartbeat: Duration::from_secs(60),
        }
    }
}

/// How long a failed kernel may go on printing its trace.
const TRACE: Duration = Duration::from_secs(10);
/// How long the supervisor waits at a time for a sign of life.
const LOOK: Duration = Duration::from_secs(1);
/// How often the host is sent an interrupt, see [`ping`].
const PING: Duration = Duration::from_millis(200);
/// How long the init may take to unmount the writable shares.
const SHUTDOWN: Duration = Duration::from_secs(15);

/// The emulated host failed by itself.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{reason}")]
pub struct HostFailure {
    /// One sentence.
    pub reason: String,
    /// The end of its console, and of QEMU's own words if there are any.
    pub tail: String,
    /// Its init could not do what it was told: that is nobody's mishap, and would happen again.
    pub in_setup: bool,
}

enum Event {
    Frame(Message),
    Console(Finding),
    MachineEnded(String),
    /// A command failed after the console had shown something suspicious.
    SuspectExit,
    Close,
}

/// What the threads of one host share.
struct Shared {
    port: Mutex<UnixStream>,
    streams: Mutex<HashMap<u32, Stream>>,
    next_stream: AtomicU32,
    watch: Mutex<Watch>,
    suspects: AtomicU32,
    failure: Mutex<Option<HostFailure>>,
    events: Mutex<Sender<Event>>,
    qemu_log: PathBuf,
    pid: Mutex<Option<Pid>>,
}

/// A running command, seen from here.
struct Stream {
    /// The client's own number for it.
    theirs: u32,
    to_client: Sender<Frame>,
    suspects_before: u32,
}

/// A booted host.
#[derive(Clone)]
pub struct Host {
    shared: Arc<Shared>,
    /// Wall time from QEMU's start to `Ready`.
    pub boot_time: Duration,
    closed: Arc<Mutex<Option<Receiver<()>>>>,
}

/// A lock whose holder panicked still guards usable data here.
fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    /// Takes charge of a machine that has just been started; returns when it is ready for commands.
    pub fn boot(
        machine: Machine,
        configure: Configure,
        patience: Patience,
        console_log: File,
        qemu_log: PathBuf,
        say: Arc<dyn Fn(&str) + Send + Sync>,
    ) -> Result<Self, HostFailure> {
        let started = Instant::now();
        let (events, inbox) = mpsc::channel();
        let Machine {
            mut child,
            port,
            console,
            monitor,
        } = machine;
        let reader = port.try_clone();
        let shared = Arc::new(Shared {
            port: Mutex::new(port),
            streams: Mutex::default(),
            next_stream: AtomicU32::new(CONTROL + 1),
            watch: Mutex::default(),
            suspects: AtomicU32::new(0),
            failure: Mutex::default(),
            events: Mutex::new(events.clone()),
            qemu_log,
            pid: Mutex::new(Some(Pid::from_raw(child.id() as i32))),
        });

        let console_end = console.try_clone();
        let to_console = (shared.clone(), events.clone());
        let console_thread =
            thread::spawn(move || read_console(console, console_log, &to_console.0, &to_console.1));
        let ended = (shared.clone(), events.clone());
        thread::spawn(move || {
            let how = ended.0.wait_for(&mut child);
            // The last words must be in before the end is announced; what was sent is read in spite of this.
            if let Ok(console) = console_end {
                let _ = console.shutdown(std::net::Shutdown::Read);
                let _ = console_thread.join();
            }
            let _ = ended.1.send(Event::MachineEnded(how));
        });
        match reader {
            Ok(reader) => {
                let shared = shared.clone();
                thread::spawn(move || read_port(reader, &shared, &events));
            }
            Err(error) => {
                shared.kill();
                return Err(shared.failed(format!("no access to its port: {error}")));
            }
        }

        let monitor = Monitor {
            machine: monitor,
            shared: shared.clone(),
            inbox,
            patience,
            say,
        };
        monitor.until_ready(started + patience.boot, configure)?;
        let (pinging, until) = mpsc::channel();
        let pinged = shared.clone();
        thread::spawn(move || ping(&pinged, &until));
        let (end, closed) = mpsc::channel();
        thread::spawn(move || {
            monitor.until_closed();
            drop(pinging);
            drop(end);
        });
        Ok(Self {
            shared,
            boot_time: started.elapsed(),
            closed: Arc::new(Mutex::new(Some(closed))),
        })
    }

    /// Serves one client until it hangs up. Frames of its streams pass through, the one read already first.
    pub fn serve(&self, client: UnixStream, mut first: Option<Frame>) -> std::io::Result<()> {
        let (to_client, outbox) = mpsc::channel::<Frame>();
        let mut writer = client.try_clone()?;
        let client_writer = thread::spawn(move || {
            for frame in outbox {
                if frame.write_to(&mut writer).is_err() {
                    break;
                }
            }
            // Wakes the reader below when the host ends first.
            let _ = writer.shutdown(std::net::Shutdown::Both);
        });
        let mut mine: HashMap<u32, u32> = HashMap::new();
        let shared = &self.shared;
        while let Some(frame) = first
            .take()
            .or_else(|| Frame::read_from(&client).ok().flatten())
        {
            let theirs = frame.stream;
            if let Message::Start(_) = frame.message {
                let ours = shared.next_stream.fetch_add(1, Ordering::Relaxed);
                mine.insert(theirs, ours);
                let stream = Stream {
                    theirs,
                    to_client: to_client.clone(),
                    suspects_before: shared.suspects.load(Ordering::Relaxed),
                };
                held(&shared.streams).insert(ours, stream);
                if let Some(failure) = held(&shared.failure).clone() {
                    let _ = to_client.send(failure.frame());
                    held(&shared.streams).remove(&ours);
                    continue;
                }
            }
            let Some(&ours) = mine.get(&theirs) else {
                continue;
            };
            shared.send(Frame::new(ours, frame.message));
        }
        for ours in mine.into_values() {
            if held(&shared.streams).remove(&ours).is_some() {
                shared.send(Frame::new(ours, Message::HangUp));
            }
        }
        drop(to_client);
        let _ = client_writer.join();
        Ok(())
    }

    /// The console's last lines.
    pub fn console_tail(&self) -> String {
        held(&self.shared.watch).tail()
    }

    /// The failure that ended the host, if one did.
    pub fn failure(&self) -> Option<HostFailure> {
        held(&self.shared.failure).clone()
    }

    /// Switches the host off: unmounts the writable shares, then ends QEMU.
    pub fn close(&self) {
        let _ = held(&self.shared.events).send(Event::Close);
        self.wait();
    }

    /// Ends QEMU at once.
    pub fn kill(&self) {
        self.shared.kill();
        self.wait();
    }

    /// Blocks until the host has ended, for whatever reason.
    pub fn wait(&self) {
        if let Some(closed) = &*held(&self.closed) {
            // Nothing is ever sent: the other end is dropped.
            let _ = closed.recv();
        }
    }
}

impl HostFailure {
    /// What clients are told.
    pub fn frame(&self) -> Frame {
        Frame::control(Message::HostFailed(self.reason.clone(), self.tail.clone()))
    }
}

impl Shared {
    fn send(&self, frame: Frame) {
        // A port that can't be written has a machine that has ended: its waiter reports that.
        let _ = frame.write_to(&mut *held(&self.port));
    }

    /// Waits for QEMU. Its pid is given up in the moment it may be used anew.
    fn wait_for(&self, child: &mut Child) -> String {
        let pid = Pid::from_raw(child.id() as i32);
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        while waitid(Id::Pid(pid), flags) == Err(nix::Error::EINTR) {}
        let mut pid = held(&self.pid);
        let status = child.wait();
        *pid = None;
        match status {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        }
    }

    fn kill(&self) {
        if let Some(pid) = *held(&self.pid) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }

    fn failed(&self, reason: String) -> HostFailure {
        let mut tail = held(&self.watch).tail();
        let said = std::fs::read_to_string(&self.qemu_log).unwrap_or_default();
        // It greets every boot with the features that the CPU model has and TCG has not.
        let telling = |line: &&str| !line.contains("TCG doesn't support requested feature");
        for line in said.lines().filter(telling).take(10) {
            tail += "\nqemu: ";
            tail += line;
        }
        // Clients get it in one frame.
        let cut = tail.len().saturating_sub(64 * 1024);
        let cut = (cut..=tail.len())
            .find(|at| tail.is_char_boundary(*at))
            .unwrap_or(0);
        HostFailure {
            reason,
            tail: tail.split_off(cut),
            in_setup: false,
        }
    }
}

fn read_console(mut console: UnixStream, mut log: File, shared: &Shared, events: &Sender<Event>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = console.read(&mut buffer) {
        let bytes = &buffer[..count];
        // A full disk must not hide what the console says.
        let _ = log.write_all(bytes);
        let mut watch = held(&shared.watch);
        for finding in watch.feed(bytes) {
            if finding.severity == Severity::Suspect {
                shared.suspects.fetch_add(1, Ordering::Relaxed);
            }
            let _ = events.send(Event::Console(finding));
        }
    }
}

fn read_port(port: UnixStream, shared: &Shared, events: &Sender<Event>) {
    while let Ok(Some(frame)) = Frame::read_from(&port) {
        if frame.stream == CONTROL {
            let _ = events.send(Event::Frame(frame.message));
            continue;
        }
        let mut streams = held(&shared.streams);
        let ends = matches!(frame.message, Message::Exit(_) | Message::Rejected(..));
        let bad = matches!(frame.message, Message::Exit(code) if code != 0);
        let Some(stream) = streams.get(&frame.stream) else {
            continue;
        };
        if bad && shared.suspects.load(Ordering::Relaxed) > stream.suspects_before {
            // The stream stays: the monitor tells its client that the host failed.
            let _ = events.send(Event::SuspectExit);
            continue;
        }
        let _ = stream
            .to_client
            .send(Frame::new(stream.theirs, frame.message));
        if ends {
            streams.remove(&frame.stream);
        }
    }
}

/// Keeps a lost timer interrupt from being the host's end. In QEMU 10.0 the VMRUN helper changes the CPU's set of
/// pending interrupts without the lock that the thread of the local APIC's timer holds (`interrupt_request` in
/// target/i386/tcg/system/svm_helper.c), so that the timer's request can get lost. A kernel arms its timer anew only
/// when it has rung, so that it would wait for ever; but any other interrupt makes the APIC request again all that is
/// pending. An idle or computing host has no other interrupts. This makes some. (That this is what silenced the one host
/// seen to fall silent is likely, not proven: it takes minutes to hours to happen.)
fn ping(shared: &Shared, until: &Receiver<()>) {
    while until.recv_timeout(PING) == Err(RecvTimeoutError::Timeout) {
        shared.send(Frame::control(Message::Ping));
    }
}

/// The thread that decides whether the host lives.
struct Monitor {
    /// QEMU's control channel.
    machine: UnixStream,
    shared: Arc<Shared>,
    inbox: Receiver<Event>,
    patience: Patience,
    say: Arc<dyn Fn(&str) + Send + Sync>,
}

impl Monitor {
    fn until_ready(&self, deadline: Instant, configure: Configure) -> Result<(), HostFailure> {
        let mut configure = Some(configure);
        let mut in_setup = false;
        let reason = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Ok(Event::Frame(Message::Hello(VERSION))) => {
                    if let Some(configure) = configure.take() {
                        let message = Message::Configure(configure);
                        self.shared.send(Frame::control(message));
                    }
                }
                Ok(Event::Frame(Message::Hello(other))) => {
                    break format!("its init speaks version {other}, not {VERSION}");
                }
                Ok(Event::Frame(Message::Ready(_))) => return Ok(()),
                Ok(Event::Frame(Message::SetupFailed(why))) => {
                    in_setup = true;
                    break why;
                }
                Ok(event) => {
                    if let Some(reason) = self.judge(event) {
                        break reason;
                    }
                }
                Err(_) => {
                    break format!("not ready within {} s", self.patience.boot.as_secs());
                }
            }
        };
        let failure = HostFailure {
            in_setup,
            ..self.shared.failed(reason)
        };
        *held(&self.shared.failure) = Some(failure.clone());
        self.end();
        Err(failure)
    }

    fn until_closed(&self) {
        let mut silence = Duration::ZERO;
        let mut looked = Instant::now();
        let mut silent = false;
        let reason = loop {
            let left = self.patience.heartbeat.saturating_sub(silence);
            let event = self.inbox.recv_timeout(left.min(LOOK));
            // Time in which this process itself stood still (stopped, the machine suspended) was no silence.
            silence += looked.elapsed().min(2 * LOOK);
            looked = Instant::now();
            match event {
                Ok(Event::Frame(Message::Heartbeat(_))) => silence = Duration::ZERO,
                Ok(Event::Close) => {
                    self.close();
                    return;
                }
                Ok(event) => {
                    if let Some(reason) = self.judge(event) {
                        break reason;
                    }
                }
                Err(RecvTimeoutError::Timeout) if silence < self.patience.heartbeat => {}
                Err(RecvTimeoutError::Timeout) => {
                    silent = true;
                    break format!(
                        "no heartbeat from inside for {} s",
                        self.patience.heartbeat.as_secs()
                    );
                }
                Err(RecvTimeoutError::Disconnected) => break "its channels closed".into(),
            }
        };
        let mut failure = self.shared.failed(reason);
        if silent {
            failure.tail += &autopsy::examine(&self.machine);
        }
        *held(&self.shared.failure) = Some(failure.clone());
        for (_, stream) in held(&self.shared.streams).drain() {
            let _ = stream.to_client.send(failure.frame());
        }
        self.end();
    }

    /// Whether an event means that the host is lost, and why.
    fn judge(&self, event: Event) -> Option<String> {
        match event {
            Event::Console(Finding {
                severity: Severity::Fatal,
                line,
            }) => {
                self.let_it_print();
                Some(format!("its kernel failed: {line}"))
            }
            Event::Console(finding) => {
                (self.say)(&format!(
                    "{:?} on the host's console: {}",
                    finding.severity, finding.line
                ));
                None
            }
            Event::MachineEnded(how) => Some(format!("QEMU ended by itself ({how})")),
            Event::SuspectExit => {
                Some("a command failed after the host's console had shown a stall".into())
            }
            Event::Frame(_) | Event::Close => None,
        }
    }

    /// After a panic the kernel prints its trace and then resets, which ends QEMU.
    fn let_it_print(&self) {
        let deadline = Instant::now() + TRACE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Ok(Event::MachineEnded(_)) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    fn close(&self) {
        self.shared.send(Frame::control(Message::Shutdown));
        let deadline = Instant::now() + SHUTDOWN;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Ok(Event::Frame(Message::Bye) | Event::MachineEnded(_)) => break,
                Ok(_) => {}
                Err(_) => {
                    (self.say)("the host did not unmount its shares in time");
                    break;
                }
            }
        }
        self.end();
    }

    /// Kills QEMU and waits until it is gone.
    fn end(&self) {
        self.shared.kill();
        // A killed process ends; the bound is for a machine whose disk hangs.
        let deadline = Instant::now() + SHUTDOWN;
        while held(&self.shared.pid).is_some() {
            let left = deadline.saturating_duration_since(Instant::now());
            if let Ok(Event::MachineEnded(_)) | Err(_) = self.inbox.recv_timeout(left) {
                break;
            }
        }
    }
}

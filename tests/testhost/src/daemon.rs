//! Hosts that stay up: the supervisor in the background and the commands that talk to it over its socket.

use crate::cli;
use crate::run::{self, ATTEMPTS, BED_FAILED, Prepared, say};
use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use testhost::client::{self, Input, Order, Outcome, Signals};
use testhost::frame::{Frame, Message};
use testhost::state::{self, Folder, Name};
use testhost::supervisor::Host;

/// What the supervisor says on its standard output when the host is ready, followed by a sentence.
const READY: &str = "ready ";

fn folder(name: &str) -> Result<Folder> {
    Ok(Folder::new(&state::cache_root()?, Name::new(name)?))
}

/// Starts a supervisor in the background and waits for its host.
pub fn up(name: &str) -> Result<ExitCode> {
    let folder = folder(name)?;
    drop(folder.claim()?);
    // Fetching has things to say.
    drop(Prepared::new(false)?);
    let log = File::create(folder.supervisor_log()).context("supervisor's log")?;
    // The same arguments, for the other subcommand.
    let arguments = std::env::args_os().skip(2);
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("supervise")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log);
    // SAFETY: one system call.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            Ok(())
        });
    }
    let mut child = command.spawn().context("starting the supervisor")?;
    let said = child.stdout.take().map(BufReader::new);
    let mut lines = said.into_iter().flat_map(|s| s.lines());
    if let Some(Ok(line)) = lines.next()
        && let Some(text) = line.strip_prefix(READY)
    {
        say(&format!("host {name} is up: {text}"));
        return Ok(ExitCode::SUCCESS);
    }
    let status = child.wait()?;
    io::stderr().write_all(&std::fs::read(folder.supervisor_log())?)?;
    Ok(ExitCode::from(status.code().unwrap_or(1) as u8))
}

/// What the supervisor's threads know.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    host: Option<Host>,
    boots: u32,
    failures: u32,
    closing: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host, when it is up; `None` if there will be none any more.
    fn host(&self) -> Option<Host> {
        let mut state = self.state();
        loop {
            if state.closing {
                return None;
            }
            if let Some(host) = &state.host
                && host.failure().is_none()
            {
                return Some(host.clone());
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The background process: boots the host, boots it again when it fails, until told to end.
pub fn supervise(name: &str, options: &cli::Host) -> Result<ExitCode> {
    let folder = folder(name)?;
    let cleaned = folder.clone();
    let _signals = Signals::take_over(move || drop(cleaned.remove()))?;
    let _lock = folder.claim()?;
    let prepared = Prepared::new(false)?;
    // A socket of a supervisor that was killed: ours is the folder now.
    let _ = std::fs::remove_file(folder.socket());
    let shared = Arc::new(Shared::default());
    let mut failed_in_a_row = 0;
    let mut listening = false;
    while !shared.state().closing {
        match prepared.boot(&folder, options)? {
            Ok(host) => {
                failed_in_a_row = 0;
                {
                    let mut state = shared.state();
                    state.boots += 1;
                    state.host = Some(host.clone());
                    shared.changed.notify_all();
                }
                if !listening {
                    listening = true;
                    listen(&folder, &shared)?;
                    let boot = host.boot_time.as_secs_f64();
                    let mut out = io::stdout();
                    writeln!(out, "{READY}boot {boot:.1} s")?;
                    out.flush()?;
                    // Whoever waits for the end of our output shall not wait.
                    let null = File::options().write(true).open("/dev/null")?;
                    nix::unistd::dup2_stdout(null.as_fd())?;
                }
                host.wait();
                if let Some(failure) = host.failure() {
                    shared.state().failures += 1;
                    run::report_failure(&prepared.cache, &folder, &failure.reason, &failure.tail);
                }
            }
            Err(failure) => {
                shared.state().failures += 1;
                failed_in_a_row += 1;
                run::report_failure(&prepared.cache, &folder, &failure.reason, &failure.tail);
                if failed_in_a_row == ATTEMPTS {
                    shared.state().closing = true;
                    shared.changed.notify_all();
                    folder.remove()?;
                    return Ok(ExitCode::from(BED_FAILED));
                }
            }
        }
    }
    folder.remove()?;
    Ok(ExitCode::SUCCESS)
}

fn listen(folder: &Folder, shared: &Arc<Shared>) -> Result<()> {
    let path = folder.socket();
    let listener =
        UnixListener::bind(&path).with_context(|| format!("binding {}", path.display()))?;
    let shared = shared.clone();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let shared = shared.clone();
            std::thread::spawn(move || answer(&client, &shared));
        }
    });
    Ok(())
}

/// One connection: the first frame says what it is for.
fn answer(client: &UnixStream, shared: &Shared) {
    let Ok(Some(frame)) = Frame::read_from(client) else {
        return;
    };
    match frame.message {
        Message::Shutdown => {
            let host = {
                let mut state = shared.state();
                state.closing = true;
                shared.changed.notify_all();
                state.host.clone()
            };
            if let Some(host) = host {
                host.close();
            }
        }
        Message::Status(_) => {
            let state = shared.state();
            let up = state.host.as_ref().is_some_and(|h| h.failure().is_none());
            let text = format!(
                "{}; boots: {}; host failures: {}",
                if up { "up" } else { "booting" },
                state.boots,
                state.failures
            );
            let _ = Frame::control(Message::Status(text)).write_to(client);
        }
        Message::Start(_) => {
            // Until the host is up the client may have gone; serving it then ends at once.
            if let Some(host) = shared.host()
                && let Ok(client) = client.try_clone()
            {
                let _ = host.serve(client, Some(frame));
            }
        }
        _ => {}
    }
}

/// Runs a command in a host that is up.
pub fn exec(name: &str, fresh: bool, keep: bool, command: &cli::RunOptions) -> Result<ExitCode> {
    let folder = folder(name)?;
    let signals = Signals::take_over(|| ())?;
    let mut start = command.start()?;
    start.fresh = fresh;
    start.keep = keep;
    let input = Input::new(io::stdin());
    let order = Order {
        start: &start,
        limit: command.limit(),
        input: &input,
        signals: &signals,
        sink: &client::own_stdio,
    };
    let mut failures = 0;
    for attempt in 1..=ATTEMPTS {
        let link = connect(&folder)?;
        let began = Instant::now();
        let outcome = client::run(&link, &order);
        if let Outcome::HostFailed(reason, tail) = &outcome {
            failures += 1;
            run::show_failure(reason, tail);
            if !input.replayable() {
                say("its input was too long to be kept: no second attempt");
                break;
            }
            if attempt < ATTEMPTS {
                say("running the command again on a fresh boot");
            }
            continue;
        }
        if !command.quiet || failures > 0 {
            say(&format!(
                "host failures: {failures}; command {:.1} s",
                began.elapsed().as_secs_f64()
            ));
        }
        return Ok(ExitCode::from(run::conclude(outcome, command)));
    }
    say(&format!(
        "host failures: {failures}; the command has no result"
    ));
    Ok(ExitCode::from(BED_FAILED))
}

fn connect(folder: &Folder) -> Result<UnixStream> {
    UnixStream::connect(folder.socket()).with_context(|| {
        format!(
            "no host {0} is up; `testhost up --name {0}` boots one",
            folder.name
        )
    })
}

pub fn status(name: &str) -> Result<ExitCode> {
    let link = connect(&folder(name)?)?;
    Frame::control(Message::Status(String::new())).write_to(&link)?;
    match Frame::read_from(&link)? {
        Some(Frame {
            message: Message::Status(text),
            ..
        }) => println!("{text}"),
        _ => bail!("the supervisor of {name} gave no answer"),
    }
    Ok(ExitCode::SUCCESS)
}

/// Switches a host off and waits until its supervisor has ended. One that is not up is no error.
pub fn down(name: &str) -> Result<ExitCode> {
    let folder = folder(name)?;
    let Ok(link) = UnixStream::connect(folder.socket()) else {
        match folder.claim() {
            // Nobody's: what a killed supervisor left.
            Ok(_lock) => folder.remove()?,
            Err(error) => return Err(error.into()),
        }
        return Ok(ExitCode::SUCCESS);
    };
    let status = connect(&folder).ok().and_then(|other| {
        Frame::control(Message::Status(String::new()))
            .write_to(&other)
            .ok()?;
        Frame::read_from(&other).ok()?
    });
    Frame::control(Message::Shutdown).write_to(&link)?;
    // The end of the connection is the end of the supervisor.
    let mut fds = [PollFd::new(link.as_fd(), PollFlags::POLLIN)];
    if poll(&mut fds, PollTimeout::from(60_000u16))? == 0 {
        bail!("the supervisor of {name} does not end");
    }
    if let Some(Message::Status(text)) = status.map(|frame| frame.message) {
        say(&format!("host {name} is down; it was {text}"));
    }
    Ok(ExitCode::SUCCESS)
}

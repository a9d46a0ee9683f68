//! `testhost run`, and what it has in common with `up`: preparing, booting, reporting.

use crate::cli;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use testhost::client::{self, Input, Order, Outcome, Signals};
use testhost::frame::Configure;
use testhost::packages::{Kernel, Qemu, Store};
use testhost::state::{self, Folder, Name};
use testhost::supervisor::{Host, HostFailure};
use testhost::{image, machine};

/// The host could not be set up: packages, arguments, folders.
pub const UNUSABLE: u8 = 123;
/// The time limit ended the command.
pub const TIMED_OUT: u8 = 124;
/// The emulated host failed, and failed again on a fresh boot.
pub const BED_FAILED: u8 = 125;
const CANNOT_RUN: u8 = 126;
const NOT_FOUND: u8 = 127;

/// How often a run is tried on a fresh boot.
pub const ATTEMPTS: u32 = 2;

pub fn say(text: &str) {
    // Standard error may be closed; there is nowhere else to say so.
    let _ = writeln!(io::stderr(), "testhost: {text}");
}

/// What every boot needs.
pub struct Prepared {
    pub kernel: Kernel,
    pub qemu: Qemu,
    pub cache: PathBuf,
}

impl Prepared {
    pub fn new(refresh: bool) -> Result<Self> {
        let cache = state::cache_root()?;
        let _lock = state::lock(&cache.join("prepare.lock"))?;
        state::sweep(&cache);
        let store = Store::new(cache.clone());
        Ok(Self {
            kernel: store
                .kernel(refresh, &say)
                .context("preparing the kernel")?,
            qemu: store.qemu(refresh, &say).context("preparing QEMU")?,
            cache,
        })
    }

    /// Boots a host in that folder. The inner error is a failure of the bed.
    pub fn boot(&self, folder: &Folder, host: &cli::Host) -> Result<Result<Host, HostFailure>> {
        let initramfs = image::initramfs(&self.kernel)?;
        let hardware = host.hardware();
        let configure = Configure {
            modules_dir: self.kernel.modules_dir.as_os_str().as_bytes().to_vec(),
            binds: hardware.bind_frames(),
            copies: host
                .tmpfs_copy
                .iter()
                .map(|path| Ok(std::path::absolute(path)?.as_os_str().as_bytes().to_vec()))
                .collect::<io::Result<_>>()?,
            cgroup_v1: host.cgroup_v1,
        };
        let console = File::create(folder.console()).context("console log")?;
        let machine = machine::start(
            &self.qemu,
            &self.kernel,
            &initramfs,
            &hardware,
            &folder.qemu_log(),
        )
        .context("starting QEMU")?;
        let booted = Host::boot(
            machine,
            configure,
            host.patience(),
            console,
            folder.qemu_log(),
            Arc::new(say),
        );
        match booted {
            Err(failure) if failure.in_setup => {
                bail!("setting up the host failed: {}", failure.reason)
            }
            other => Ok(other),
        }
    }
}

pub fn prepare(refresh: bool) -> Result<ExitCode> {
    let prepared = Prepared::new(refresh)?;
    println!("kernel {}", prepared.kernel.release);
    println!("{}", prepared.qemu.version);
    Ok(ExitCode::SUCCESS)
}

pub fn run(host: &cli::Host, command: &cli::RunOptions) -> Result<ExitCode> {
    let cache = state::cache_root()?;
    let folder = Folder::new(&cache, Name::transient());
    let cleaned = folder.clone();
    let signals = Signals::take_over(move || drop(cleaned.remove()))?;
    let _lock = folder.claim()?;
    let result = attempts(host, command, &folder, &signals);
    folder.remove()?;
    result
}

fn attempts(
    host: &cli::Host,
    command: &cli::RunOptions,
    folder: &Folder,
    signals: &Signals,
) -> Result<ExitCode> {
    let prepared = Prepared::new(false)?;
    let start = command.start()?;
    let input = Input::new(io::stdin());
    let order = Order {
        start: &start,
        limit: command.limit(),
        input: &input,
        signals,
        sink: &client::own_stdio,
    };
    let mut failures = 0;
    for attempt in 1..=ATTEMPTS {
        let booted = match prepared.boot(folder, host)? {
            Ok(booted) => booted,
            Err(failure) => {
                failures += 1;
                report_failure(&prepared.cache, folder, &failure.reason, &failure.tail);
                continue;
            }
        };
        let (ours, theirs) = UnixStream::pair()?;
        let server = booted.clone();
        std::thread::spawn(move || server.serve(theirs, None));
        let began = Instant::now();
        let outcome = client::run(&ours, &order);
        let took = began.elapsed();
        if let Outcome::HostFailed(reason, tail) = &outcome {
            failures += 1;
            booted.wait();
            report_failure(&prepared.cache, folder, reason, tail);
            if !input.replayable() {
                say("its input was too long to be kept: no second attempt");
                break;
            }
            if attempt < ATTEMPTS {
                say("running the command again on a fresh boot");
            }
            continue;
        }
        booted.close();
        let code = conclude(outcome, command);
        if !command.quiet || failures > 0 {
            say(&format!(
                "host failures: {failures}; boot {:.1} s, command {:.1} s",
                booted.boot_time.as_secs_f64(),
                took.as_secs_f64()
            ));
        }
        return Ok(ExitCode::from(code));
    }
    say(&format!(
        "host failures: {failures}; the command has no result"
    ));
    Ok(ExitCode::from(BED_FAILED))
}

/// The exit code for an outcome other than a failure of the host, with a word where the command has none.
pub fn conclude(outcome: Outcome, command: &cli::RunOptions) -> u8 {
    match outcome {
        Outcome::Exited(code) => code as u8,
        Outcome::TimedOut => {
            say(&format!(
                "time limit: the command was killed after {} s",
                command.timeout
            ));
            TIMED_OUT
        }
        Outcome::Rejected(errno, text) => {
            say(&text);
            match errno {
                libc::ENOENT => NOT_FOUND,
                _ => CANNOT_RUN,
            }
        }
        Outcome::Interrupted(signal) => 128 + signal as u8,
        Outcome::OutputClosed => 128 + libc::SIGPIPE as u8,
        Outcome::Gone => {
            say("the host's supervisor went away");
            BED_FAILED
        }
        Outcome::HostFailed(reason, _) => {
            say(&reason);
            BED_FAILED
        }
    }
}

/// Shows a failure of the emulated host so that nobody takes it for the command's, and keeps its console.
pub fn report_failure(cache: &std::path::Path, folder: &Folder, reason: &str, tail: &str) {
    show_failure(reason, tail);
    if let Err(error) = keep(cache, folder, reason, tail) {
        say(&format!("the failure could not be recorded: {error}"));
    }
}

/// The frame that nobody overlooks.
pub fn show_failure(reason: &str, tail: &str) {
    let bar = "=".repeat(72);
    let mut text = format!("{bar}\nTEST HOST FAILURE (not the command's): {reason}\n");
    for line in tail.lines() {
        text += &format!("console| {line}\n");
    }
    text += &bar;
    let _ = writeln!(io::stderr(), "{text}");
}

/// One line in `failures.log`, and the console's log beside it.
fn keep(cache: &std::path::Path, folder: &Folder, reason: &str, tail: &str) -> io::Result<()> {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let kept = cache.join("failures");
    fs::create_dir_all(&kept)?;
    let console = kept.join(format!("{now}-{}.log", folder.name));
    fs::copy(folder.console(), &console)?;
    // What QEMU said when asked stands nowhere else.
    let mut whole = File::options().append(true).open(&console)?;
    writeln!(whole, "--- {reason}")?;
    for line in tail.lines().filter(|line| line.starts_with("qemu:")) {
        writeln!(whole, "{line}")?;
    }
    let mut log = File::options()
        .create(true)
        .append(true)
        .open(kept.join("failures.log"))?;
    writeln!(log, "{now} {} {reason}", folder.name)?;
    say(&format!("its console is kept in {}", console.display()));
    Ok(())
}

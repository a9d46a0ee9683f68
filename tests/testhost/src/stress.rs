//! `testhost stress`: shows whether the emulated host can be trusted, by running one command very often.

use crate::cli;
use crate::run::{BED_FAILED, Prepared, TIMED_OUT, report_failure, say};
use anyhow::{Result, ensure};
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use testhost::client::{self, Input, Order, Outcome, Signals};
use testhost::frame::Start;
use testhost::state::{self, Folder, Name};
use testhost::supervisor::Host;

/// With more failures than this the host is hopeless.
const ENOUGH: u32 = 10;
/// Bytes of a failed command's output that are shown.
const SHOWN: usize = 4096;

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
struct Tally {
    waiting: VecDeque<usize>,
    /// How many more may be started in this boot.
    left_in_boot: usize,
    passed: Vec<Duration>,
    failed: usize,
}

pub fn stress(host: &cli::Host, options: &cli::StressOptions) -> Result<ExitCode> {
    let cache = state::cache_root()?;
    let folder = Folder::new(&cache, Name::transient());
    let cleaned = folder.clone();
    let _signals = Signals::take_over(move || drop(cleaned.remove()))?;
    let _lock = folder.claim()?;
    let result = boots(host, options, &folder);
    folder.remove()?;
    result
}

fn boots(host: &cli::Host, options: &cli::StressOptions, folder: &Folder) -> Result<ExitCode> {
    let prepared = Prepared::new(false)?;
    let tally = Mutex::new(Tally {
        waiting: (0..options.guests).collect(),
        ..Tally::default()
    });
    let mut boots = 0;
    let mut host_failures = 0;
    let began = Instant::now();
    while !held(&tally).waiting.is_empty() && host_failures < ENOUGH {
        let booted = match prepared.boot(folder, host)? {
            Ok(booted) => booted,
            Err(failure) => {
                host_failures += 1;
                report_failure(&prepared.cache, folder, &failure.reason, &failure.tail);
                continue;
            }
        };
        boots += 1;
        say(&format!(
            "boot {boots} took {:.1} s",
            booted.boot_time.as_secs_f64()
        ));
        held(&tally).left_in_boot = match options.per_boot {
            0 => usize::MAX,
            n => n,
        };
        let result = one_boot(&booted, options, &tally);
        if let Some(failure) = booted.failure() {
            booted.wait();
            host_failures += 1;
            report_failure(&prepared.cache, folder, &failure.reason, &failure.tail);
            continue;
        }
        booted.close();
        result?;
    }
    let mut tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    tally.passed.sort();
    let seconds = |d: Option<&Duration>| d.map_or(0.0, Duration::as_secs_f64);
    println!(
        "guests: {} passed, {} failed, {} without result; median {:.1} s, longest {:.1} s; \
         host failures: {host_failures}; boots: {boots}; {:.0} s in all",
        tally.passed.len(),
        tally.failed,
        tally.waiting.len(),
        seconds(tally.passed.get(tally.passed.len() / 2)),
        seconds(tally.passed.last()),
        began.elapsed().as_secs_f64()
    );
    Ok(match (tally.failed, host_failures) {
        (0, 0) => ExitCode::SUCCESS,
        (0, _) => ExitCode::from(BED_FAILED),
        _ => ExitCode::FAILURE,
    })
}

fn one_boot(host: &Host, options: &cli::StressOptions, tally: &Mutex<Tally>) -> Result<()> {
    if let Some(setup) = &options.setup {
        let shell = [OsStr::new("sh"), OsStr::new("-c"), setup];
        let (outcome, output) = one_run(host, &shell, 0, Duration::from_secs(300))?;
        if !matches!(outcome, Outcome::HostFailed(..)) {
            ensure!(
                outcome == Outcome::Exited(0),
                "the set-up failed ({outcome:?}): {}",
                String::from_utf8_lossy(&output)
            );
        }
    }
    let argv: Vec<&OsStr> = options.argv.iter().map(|a| a.as_os_str()).collect();
    let limit = Duration::from_secs(options.guest_timeout);
    std::thread::scope(|scope| {
        let worker = || -> Result<()> {
            while let Some(guest) = next(tally) {
                let began = Instant::now();
                let (outcome, output) = one_run(host, &argv, guest, limit)?;
                judge(tally, guest, &outcome, &output, began.elapsed());
                if matches!(outcome, Outcome::HostFailed(..) | Outcome::Gone) {
                    break;
                }
            }
            Ok(())
        };
        let workers: Vec<_> = (0..options.parallel).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .filter_map(|worker| worker.join().ok())
            .collect()
    })
}

fn next(tally: &Mutex<Tally>) -> Option<usize> {
    let mut tally = held(tally);
    tally.left_in_boot = tally.left_in_boot.checked_sub(1)?;
    tally.waiting.pop_front()
}

fn judge(tally: &Mutex<Tally>, guest: usize, outcome: &Outcome, output: &[u8], took: Duration) {
    let mut tally = held(tally);
    let seconds = took.as_secs_f64();
    let verdict = match outcome {
        Outcome::Exited(0) => {
            tally.passed.push(took);
            say(&format!("guest {guest}: ok, {seconds:.1} s"));
            return;
        }
        Outcome::HostFailed(..) | Outcome::Gone => {
            tally.waiting.push_back(guest);
            return;
        }
        Outcome::Exited(code) => format!("exit code {code}"),
        Outcome::TimedOut => format!("time limit (as by exit code {TIMED_OUT})"),
        Outcome::Rejected(_, text) => text.clone(),
        Outcome::Interrupted(_) | Outcome::OutputClosed => "interrupted".into(),
    };
    tally.failed += 1;
    say(&format!(
        "guest {guest}: FAILED, {verdict}, {seconds:.1} s; the end of its output:"
    ));
    let end = &output[output.len().saturating_sub(SHOWN)..];
    for line in String::from_utf8_lossy(end).lines() {
        say(&format!("guest {guest}| {line}"));
    }
}

fn one_run(
    host: &Host,
    argv: &[&OsStr],
    guest: usize,
    limit: Duration,
) -> Result<(Outcome, Vec<u8>)> {
    let (ours, theirs) = UnixStream::pair()?;
    let server = host.clone();
    std::thread::spawn(move || server.serve(theirs, None));
    let output = Mutex::new(Vec::new());
    let start = Start {
        argv: argv.iter().map(|a| a.as_bytes().to_vec()).collect(),
        env: vec![format!("STRESS_GUEST={guest}").into_bytes()],
        cwd: std::env::current_dir()?.into_os_string().into_vec(),
        ..Start::default()
    };
    let order = Order {
        start: &start,
        limit: Some(limit),
        input: &Input::new(io::empty()),
        signals: &Signals::none(),
        sink: &|_, data| {
            let mut output = held(&output);
            output.extend(data);
            // Only the end is ever shown.
            let over = output.len().saturating_sub(16 * SHOWN);
            output.drain(..over);
            Ok(())
        },
    };
    let outcome = client::run(&ours, &order);
    Ok((
        outcome,
        output.into_inner().unwrap_or_else(PoisonError::into_inner),
    ))
}

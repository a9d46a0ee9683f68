//! Throughput of a container's standard streams: 64 MiB out and in through pipes. Of a container in the foreground, whose runtime stands
//! between, and of one that was created with the pipes, as engines do: runc hands them to the container itself, so what a
//! second pipe costs it is measured too.

use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Write, pipe};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{bulkhead, run_command, runc};
use bulkhead_e2e::container::Container;

use crate::files::with_helper;
use crate::life::alternate;
use crate::table::{Comparison, Goal, Measure, median, print};

const MIB: usize = 64;
const CHUNK: usize = 64 << 10;

/// Who waits for the container.
#[derive(Clone, Copy)]
enum Way {
    /// `run`.
    Foreground,
    /// `create`, then `start`.
    Created,
}

/// Measures both directions, both ways.
pub fn measure(
    rounds: usize,
    helper: &Path,
    comparisons: &mut Vec<Comparison>,
) -> anyhow::Result<()> {
    let blocks = format!("count={}", MIB * (1 << 20) / CHUNK);
    let source = Bundle::busybox(&["dd", "if=/dev/zero", "bs=64k", &blocks, "status=none"]);
    let sink = with_helper(
        Bundle::busybox(&["/container-work", "sink", &(MIB << 20).to_string()]),
        helper,
    )?;
    for (way, how) in [
        (Way::Foreground, "`run` in the foreground"),
        (Way::Created, "`create` with pipes"),
    ] {
        let read = |runtime| read_from(way, runtime, &source);
        let write = |runtime| write_to(way, runtime, &sink);
        let (ours, theirs) = alternate(rounds, || read(bulkhead()), || read(runc()))?;
        comparisons.push(comparison("standard output", how, ours, theirs));
        let (ours, theirs) = alternate(rounds, || write(bulkhead()), || write(runc()))?;
        comparisons.push(comparison("standard input", how, ours, theirs));
    }
    second_pipe(rounds, helper, &source, &sink)
}

/// Prints how runc, with a second pipe between the container's process and the caller's pipe, does beside itself without: any virtual
/// machine has both, one in the guest and one on the host.
fn second_pipe(rounds: usize, helper: &Path, source: &Bundle, sink: &Bundle) -> anyhow::Result<()> {
    let blocks = MIB * (1 << 20) / CHUNK;
    let relayed_source = Bundle::shell(&format!(
        "dd if=/dev/zero bs=64k count={blocks} status=none | dd bs=64k status=none"
    ));
    let relayed_sink = with_helper(
        Bundle::shell(&format!(
            "dd bs=64k status=none | /container-work sink {}",
            MIB << 20
        )),
        helper,
    )?;
    let mut rows = Vec::new();
    for (stream, measure, direct, relayed) in [
        (
            "standard output",
            read_from as Measured,
            source,
            &relayed_source,
        ),
        ("standard input", write_to, sink, &relayed_sink),
    ] {
        let mut seconds = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            seconds.0.push(measure(Way::Created, runc(), direct)?);
            seconds.1.push(measure(Way::Created, runc(), relayed)?);
        }
        let (direct, relayed) = (median(&seconds.0), median(&seconds.1));
        rows.push(vec![
            format!("{MIB} MiB of {stream}, `create` with pipes"),
            format!("{:.0} MiB/s", MIB as f64 / direct),
            format!("{:.0} MiB/s", MIB as f64 / relayed),
            format!("{:.2}", direct / relayed),
        ]);
    }
    print(
        "runc beside itself with a second pipe in the container",
        &["what", "runc", "with a second pipe", "ratio"],
        &rows,
    );
    Ok(())
}

/// [`read_from`] or [`write_to`].
type Measured = fn(Way, PathBuf, &Bundle) -> anyhow::Result<f64>;

fn comparison(stream: &str, how: &str, ours: Vec<f64>, theirs: Vec<f64>) -> Comparison {
    Comparison {
        what: format!("{MIB} MiB of {stream}, {how}"),
        peer: "runc",
        measure: Measure::Rate(MIB as f64, "MiB".to_owned()),
        goal: Some(Goal::AtLeast(0.5)),
        ours,
        theirs,
    }
}

/// Seconds from the first bytes of a container's output to the last.
fn read_from(way: Way, runtime: PathBuf, bundle: &Bundle) -> anyhow::Result<f64> {
    let mut running = Running::start(way, runtime, bundle)?;
    let mut buffer = vec![0; CHUNK];
    let mut len = running.stdout.read(&mut buffer)?;
    let began = Instant::now();
    while len < MIB << 20 {
        match running.stdout.read(&mut buffer)? {
            0 => break,
            count => len += count,
        }
    }
    let took = began.elapsed().as_secs_f64();
    ensure!(len == MIB << 20, "the container wrote {len} bytes");
    running.end()?;
    Ok(took)
}

/// Seconds from the first byte written to a container's input until it says that it has read the last.
fn write_to(way: Way, runtime: PathBuf, bundle: &Bundle) -> anyhow::Result<f64> {
    let mut running = Running::start(way, runtime, bundle)?;
    let mut lines = BufReader::new(running.stdout.try_clone()?).lines();
    let mut expect = |expected: &str| -> anyhow::Result<()> {
        let line = lines.next().context("the output has ended")??;
        ensure!(line == expected, "the container said {line:?}");
        Ok(())
    };
    expect("ready")?;
    let chunk = vec![0; CHUNK];
    let began = Instant::now();
    for _ in 0..(MIB << 20) / CHUNK {
        running.stdin.write_all(&chunk)?;
    }
    expect("done")?;
    let took = began.elapsed().as_secs_f64();
    drop(lines);
    running.end()?;
    Ok(took)
}

/// A started container between two pipes.
struct Running<'a> {
    container: Started<'a>,
    stdin: PipeWriter,
    stdout: PipeReader,
}

enum Started<'a> {
    Foreground(Child),
    Created(Container<'a>),
}

impl<'a> Running<'a> {
    fn start(way: Way, runtime: PathBuf, bundle: &'a Bundle) -> anyhow::Result<Self> {
        let (their_stdin, stdin) = pipe()?;
        let (stdout, their_stdout) = pipe()?;
        let container = match way {
            Way::Foreground => {
                let child = run_command(Command::new(runtime), bundle)
                    .stdin(their_stdin)
                    .stdout(their_stdout)
                    .stderr(Stdio::inherit())
                    .spawn()?;
                Started::Foreground(child)
            }
            Way::Created => {
                // A runtime that keeps its standard error open is not to keep ours.
                let stderr = File::options().write(true).open("/dev/null")?;
                let streams = [their_stdin.into(), their_stdout.into(), stderr.into()];
                let container = Container::create_on(runtime, bundle, streams);
                container.command(&["start"]).expect_code(0);
                Started::Created(container)
            }
        };
        Ok(Self {
            container,
            stdin,
            stdout,
        })
    }

    /// Waits for its own end, with its input closed.
    fn end(self) -> anyhow::Result<()> {
        drop(self.stdin);
        let code = match self.container {
            Started::Foreground(mut child) => child.wait()?.code(),
            Started::Created(container) => Some(container.wait()),
        };
        ensure!(code == Some(0), "the container ended with code {code:?}");
        Ok(())
    }
}

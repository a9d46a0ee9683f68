//! Measures Bulkhead beside its peers, all in one run on one machine, in alternation, and prints tables.
//!
//! Ratios are what counts: on an emulated CPU everything is 10 to 30 times slower than on a real one.

mod calls;
mod files;
mod idle;
mod life;
mod memory;
mod start;
mod streams;
mod table;
mod wakeups;

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use crate::table::Comparison;

/// Measures Bulkhead beside its peers, and prints tables.
#[derive(Debug, Parser)]
struct Arguments {
    /// Rounds; each runs every program once. The tables show medians.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Measure this alone; may be given several times.
    #[arg(long)]
    only: Vec<Part>,
    /// QEMU, for its microvm machine booting the same kernel.
    #[arg(long)]
    qemu: Option<PathBuf>,
    /// The program that is PID 1 in QEMU's guest and powers it off.
    #[arg(long)]
    guest_probe: PathBuf,
    /// The program that works in containers.
    #[arg(long)]
    container_work: PathBuf,
}

/// What can be measured by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// From the start of `run` to its end.
    Start,
    /// `create` and `start`; `exec`.
    Life,
    /// Throughput of standard streams.
    Streams,
    /// Work on files.
    Files,
    /// Memory of an idle sandbox.
    Memory,
    /// Wake-ups of an idle sandbox.
    Wakeups,
    /// System calls of a start and of an idle sandbox.
    Calls,
    /// Sizes of the files.
    Sizes,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut comparisons = Vec::new();
    let compared = compare(&arguments, &mut comparisons);
    // Also when a later one has failed.
    if !comparisons.is_empty() {
        table::print_comparisons(&comparisons, arguments.rounds);
    }
    compared?;
    if arguments.wants(Part::Memory) {
        memory::measure(arguments.rounds)?;
    }
    if arguments.wants(Part::Wakeups) {
        wakeups::measure()?;
    }
    if arguments.wants(Part::Calls) {
        calls::measure()?;
    }
    if arguments.wants(Part::Sizes) {
        memory::sizes()?;
    }
    Ok(())
}

/// Everything that a peer does too.
fn compare(arguments: &Arguments, comparisons: &mut Vec<Comparison>) -> anyhow::Result<()> {
    let rounds = arguments.rounds;
    let work = &arguments.container_work;
    if arguments.wants(Part::Start) {
        let qemu = arguments.qemu.as_deref();
        start::measure(rounds, qemu, &arguments.guest_probe, comparisons)?;
    }
    if arguments.wants(Part::Life) {
        life::measure(rounds, comparisons)?;
    }
    if arguments.wants(Part::Streams) {
        streams::measure(rounds, work, comparisons)?;
    }
    if arguments.wants(Part::Files) {
        files::measure(rounds, work, comparisons)?;
    }
    Ok(())
}

impl Arguments {
    /// Whether a part is to be measured; says so, since some take minutes.
    fn wants(&self, part: Part) -> bool {
        let wanted = self.only.is_empty() || self.only.contains(&part);
        if wanted {
            eprintln!("measuring: {part:?}");
        }
        wanted
    }
}

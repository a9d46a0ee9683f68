//! Measures Bulkhead beside its peers, all in one run on one machine, in alternation, and prints tables.
//!
//! Ratios are what counts: on an emulated CPU everything is 10 to 30 times slower than on a real one.

mod idle;
mod memory;
mod start;
mod table;
mod wakeups;

use std::path::PathBuf;

use clap::Parser;

/// Measures start time, memory, wake-ups and sizes, and prints them as tables.
#[derive(Debug, Parser)]
struct Arguments {
    /// Rounds; each runs every program once. The tables show medians.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// QEMU, for its microvm machine booting the same kernel.
    #[arg(long)]
    qemu: Option<PathBuf>,
    /// The program that is PID 1 in QEMU's guest and powers it off.
    #[arg(long)]
    guest_probe: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    start::measure(
        arguments.rounds,
        arguments.qemu.as_deref(),
        &arguments.guest_probe,
    )?;
    memory::measure(arguments.rounds)?;
    wakeups::measure()?;
    memory::sizes()
}

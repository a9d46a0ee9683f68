//! The steps of a container's life that an engine waits for: its start by `create` and `start`, and `exec` in it.

use std::path::PathBuf;
use std::time::Instant;

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{bulkhead, runc};
use bulkhead_e2e::container::Container;

use crate::table::{Comparison, Goal, Measure};

/// Measures both.
pub fn measure(rounds: usize, comparisons: &mut Vec<Comparison>) -> anyhow::Result<()> {
    comparisons.push(create_to_started(rounds)?);
    comparisons.push(exec(rounds)?);
    Ok(())
}

fn idle() -> Bundle {
    Bundle::busybox(&["sleep", "100000"])
}

/// From the start of `create` until `start` has returned.
fn create_to_started(rounds: usize) -> anyhow::Result<Comparison> {
    let bundle = idle();
    let start = |runtime: PathBuf| {
        let began = Instant::now();
        // Its end is not timed.
        let _container = Container::running(runtime, &bundle);
        Ok(began.elapsed().as_secs_f64())
    };
    let (ours, theirs) = alternate(rounds, || start(bulkhead()), || start(runc()))?;
    Ok(Comparison {
        what: "`create` and `start` of a container that idles".to_owned(),
        peer: "runc",
        measure: Measure::Time,
        goal: None,
        ours,
        theirs,
    })
}

/// `exec true` in a container that idles, from the command's start to its end.
fn exec(rounds: usize) -> anyhow::Result<Comparison> {
    let ours = Container::running(bulkhead(), idle());
    let theirs = Container::running(runc(), idle());
    let exec = |container: &Container| {
        let began = Instant::now();
        container.exec(&["true"]).expect_code(0);
        Ok(began.elapsed().as_secs_f64())
    };
    let (ours, theirs) = alternate(rounds, || exec(&ours), || exec(&theirs))?;
    Ok(Comparison {
        what: "`exec` of `true` in a running container".to_owned(),
        peer: "runc",
        measure: Measure::Time,
        goal: Some(Goal::AtMost(1.5)),
        ours,
        theirs,
    })
}

/// Both in turn, and their seconds. The round before the first warms caches and is not counted.
pub fn alternate(
    rounds: usize,
    mut ours: impl FnMut() -> anyhow::Result<f64>,
    mut theirs: impl FnMut() -> anyhow::Result<f64>,
) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    let mut seconds = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        let (their, our) = (theirs()?, ours()?);
        eprintln!("round {round}: runc {their:.2} s, bulkhead {our:.2} s");
        if round > 0 {
            seconds.0.push(our);
            seconds.1.push(their);
        }
    }
    Ok(seconds)
}

//! Work on files in a container's root file system: virtio-fs beside runc's direct way to the same disk.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::run_command;
use bulkhead_e2e::container::{bulkhead, runc};

use crate::table::{Comparison, Goal, Measure};

const DATA: Option<Goal> = Some(Goal::AtLeast(0.7));
const METADATA: Option<Goal> = Some(Goal::AtLeast(0.4));

/// The steps of `container-work files`, in its order.
const STEPS: &[(&str, &str, Option<Goal>)] = &[
    ("write", "files: write 64 MiB and sync", DATA),
    ("read", "files: read 64 MiB, for the first time", DATA),
    ("read again", "files: read the same 64 MiB again", DATA),
    (
        "random reads",
        "files: 4 KiB at random places, for the first time",
        DATA,
    ),
    ("make", "files: make 5,000 of 100 bytes", METADATA),
    ("stat", "files: stat them", METADATA),
    ("remove", "files: remove them", METADATA),
    (
        "build",
        "files: a build of 100 sources with 10 headers each",
        None,
    ),
];

/// Measures every step in new containers, each round of both runtimes. Nothing warms them up: a container's own caches are new
/// each time, and the host's are filled when the files are made.
pub fn measure(
    rounds: usize,
    helper: &Path,
    comparisons: &mut Vec<Comparison>,
) -> anyhow::Result<()> {
    let bundle = Bundle::busybox(&["/container-work", "files", "/work"]);
    std::fs::copy(helper, bundle.in_root("container-work"))
        .with_context(|| format!("cannot copy {}", helper.display()))?;
    run(Command::new(helper)
        .arg("prepare")
        .arg(bundle.in_root("work")))?;

    let began = comparisons.len();
    for round in 1..=rounds {
        let theirs = steps(runc(), &bundle)?;
        let ours = steps(bulkhead(), &bundle)?;
        for (index, (&(name, what, goal), (ours, theirs))) in
            STEPS.iter().zip(ours.iter().zip(&theirs)).enumerate()
        {
            for step in [ours, theirs] {
                ensure!(step.name == name, "step {:?} came for {name:?}", step.name);
            }
            let (their, our) = (theirs.seconds, ours.seconds);
            eprintln!("round {round}, {name}: runc {their:.2} s, bulkhead {our:.2} s");
            if comparisons.len() <= began + index {
                comparisons.push(Comparison {
                    what: what.to_owned(),
                    peer: "runc",
                    measure: ours.measure.clone(),
                    goal,
                    ours: Vec::new(),
                    theirs: Vec::new(),
                });
            }
            comparisons[began + index].ours.push(ours.seconds);
            comparisons[began + index].theirs.push(theirs.seconds);
        }
    }
    Ok(())
}

/// A step and the time it took by the container's own clock.
#[derive(Debug, PartialEq)]
struct Step {
    name: String,
    measure: Measure,
    seconds: f64,
}

fn steps(runtime: PathBuf, bundle: &Bundle) -> anyhow::Result<Vec<Step>> {
    let output = run(&mut run_command(Command::new(runtime), bundle))?;
    let steps: Vec<_> = output.lines().map(parse).collect::<Result<_, _>>()?;
    ensure!(
        steps.len() == STEPS.len(),
        "{} steps were done",
        steps.len()
    );
    Ok(steps)
}

fn parse(line: &str) -> anyhow::Result<Step> {
    let words: Vec<_> = line.split('\t').collect();
    let [name, amount, unit, nanoseconds] = words[..] else {
        anyhow::bail!("not a step: {line:?}");
    };
    Ok(Step {
        name: name.to_owned(),
        measure: Measure::Rate(amount.parse()?, unit.to_owned()),
        seconds: nanoseconds.parse::<f64>()? / 1e9,
    })
}

fn run(command: &mut Command) -> anyhow::Result<String> {
    let name = command.get_program().to_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", name.display()))?;
    ensure!(
        output.status.success(),
        "{} ended with {}: {}",
        name.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

#[cfg(test)]
mod tests {
    use super::{Measure, Step, parse};

    #[test]
    fn a_step_is_its_name_amount_unit_and_nanoseconds() {
        let expected = Step {
            name: "random reads".to_owned(),
            measure: Measure::Rate(4096.0, "reads".to_owned()),
            seconds: 1.5,
        };
        assert_eq!(
            parse("random reads\t4096\treads\t1500000000").ok(),
            Some(expected)
        );
        assert!(parse("random reads\t4096\t1500000000").is_err());
    }
}

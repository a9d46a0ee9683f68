//! Work on files in a container's root file system: virtio-fs beside runc's direct way to the same disk.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{bulkhead, run_command, runc};
use serde_json::json;

use crate::table::{Comparison, Goal, Measure};

const DATA: Option<Goal> = Some(Goal::AtLeast(0.7));
const METADATA: Option<Goal> = Some(Goal::AtLeast(0.4));

/// The steps of `container-work files`, in its order.
const STEPS: &[(&str, &str, Option<Goal>)] = &[
    ("write", "write 64 MiB and sync", DATA),
    ("read", "read 64 MiB, for the first time", DATA),
    ("read again", "read the same 64 MiB again", DATA),
    (
        "random reads",
        "4 KiB at random places, for the first time",
        DATA,
    ),
    ("make", "make 5,000 of 100 bytes", METADATA),
    ("stat", "stat them", METADATA),
    ("remove", "remove them", METADATA),
    ("build", "a build of 100 sources with 10 headers each", None),
];

/// The steps of `container-work requests`, which the other figures are to be seen against: the least that anything asked of the host
/// costs, and of its file system.
const REQUESTS: &[(&str, &str, Option<Goal>)] = &[
    ("exit", "to the host's kernel and back (CPUID)", None),
    ("room", "files: how much room there is (fstatfs)", None),
];

/// Steps that a container does.
struct Series {
    bundle: Bundle,
    steps: &'static [(&'static str, &'static str, Option<Goal>)],
    /// Where: the beginning of each row.
    place: &'static str,
    /// Whether the goals apply.
    aimed: bool,
}

/// Measures every step in new containers, each round of both runtimes. Nothing warms them up: a container's own caches are new
/// each time, and the host's are filled when the files are made. On a tmpfs of the container's own, where nobody is asked for
/// anything, it shows what the guest's processor alone allows.
pub fn measure(
    rounds: usize,
    helper: &Path,
    comparisons: &mut Vec<Comparison>,
) -> anyhow::Result<()> {
    let root = with_helper(
        Bundle::busybox(&["/container-work", "files", "/work"]),
        helper,
    )?;
    run(Command::new(helper)
        .arg("prepare")
        .arg(root.in_root("work")))?;
    let work = "/container-work prepare /memory && /container-work files /memory";
    let mut memory = with_helper(Bundle::shell(work), helper)?;
    if let Some(mounts) = memory.config["mounts"].as_array_mut() {
        mounts.push(json!({"destination": "/memory", "type": "tmpfs", "source": "tmpfs"}));
    }
    let requests = Bundle::busybox(&["/container-work", "requests", "/work"]);
    let requests = with_helper(requests, helper)?;
    std::fs::create_dir(requests.in_root("work"))?;
    for series in [
        Series {
            bundle: root,
            steps: STEPS,
            place: "files: ",
            aimed: true,
        },
        Series {
            bundle: memory,
            steps: STEPS,
            place: "a tmpfs of the container's own: ",
            aimed: false,
        },
        Series {
            bundle: requests,
            steps: REQUESTS,
            place: "",
            aimed: false,
        },
    ] {
        series.measure(rounds, comparisons)?;
    }
    Ok(())
}

/// Puts the program that works in containers into a bundle, as `/container-work`.
pub fn with_helper(bundle: Bundle, helper: &Path) -> anyhow::Result<Bundle> {
    std::fs::copy(helper, bundle.in_root("container-work"))
        .with_context(|| format!("cannot copy {}", helper.display()))?;
    Ok(bundle)
}

impl Series {
    fn measure(&self, rounds: usize, comparisons: &mut Vec<Comparison>) -> anyhow::Result<()> {
        let began = comparisons.len();
        for round in 1..=rounds {
            let theirs = self.run(runc())?;
            let ours = self.run(bulkhead())?;
            for (index, (&(name, what, goal), (ours, theirs))) in
                self.steps.iter().zip(ours.iter().zip(&theirs)).enumerate()
            {
                for step in [ours, theirs] {
                    ensure!(step.name == name, "step {:?} came for {name:?}", step.name);
                }
                let (their, our) = (theirs.seconds, ours.seconds);
                eprintln!("round {round}, {name}: runc {their:.2} s, bulkhead {our:.2} s");
                if comparisons.len() <= began + index {
                    comparisons.push(Comparison {
                        what: format!("{}{what}", self.place),
                        peer: "runc",
                        measure: ours.measure.clone(),
                        goal: goal.filter(|_| self.aimed),
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

    fn run(&self, runtime: PathBuf) -> anyhow::Result<Vec<Step>> {
        let output = run(&mut run_command(Command::new(runtime), &self.bundle))?;
        let steps: Vec<_> = output.lines().map(parse).collect::<Result<_, _>>()?;
        ensure!(
            steps.len() == self.steps.len(),
            "{} steps were done",
            steps.len()
        );
        Ok(steps)
    }
}

/// A step and the time it took by the container's own clock.
#[derive(Debug, PartialEq)]
struct Step {
    name: String,
    measure: Measure,
    seconds: f64,
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

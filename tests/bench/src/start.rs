//! From the start of a command to its end, for a container that does nothing: Bulkhead, runc, crun, and QEMU's microvm
//! booting the same kernel.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};
use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{bulkhead, run_command};
use bulkhead_e2e::{dist, initramfs};
use serde_json::Value;

use crate::table::{Comparison, Goal, Measure, median, print};

/// Runs every program once a round, and prints Bulkhead's boot timeline.
pub fn measure(
    rounds: usize,
    qemu: Option<&Path>,
    probe: &Path,
    comparisons: &mut Vec<Comparison>,
) -> anyhow::Result<()> {
    let bundle = Bundle::busybox(&["true"]);
    let folder = tempfile_folder()?;
    let initrd = folder.join("initramfs.cpio");
    fs::write(
        &initrd,
        initramfs::with_init(&fs::read(probe).context("cannot read the guest's probe")?),
    )?;
    let timeline = folder.join("timeline.json");
    let no_templates = folder.join("config.toml");
    fs::write(&no_templates, "template_directory = \"\"")?;

    let mut seconds: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut steps: Vec<(String, Vec<f64>)> = Vec::new();
    // The round before the first warms the page cache, leaves a template, and is not counted.
    for round in 0..=rounds {
        let mut measure = |name: &'static str, command: &mut Command| -> anyhow::Result<()> {
            let began = Instant::now();
            let output = command
                .stdin(Stdio::null())
                .output()
                .with_context(|| format!("cannot start {name}"))?;
            let took = began.elapsed().as_secs_f64();
            if !output.status.success() {
                bail!(
                    "{name} ended with {}: {}",
                    output.status,
                    String::from_utf8_lossy(&output.stderr)
                );
            }
            if round > 0 {
                seconds.entry(name).or_default().push(took);
            }
            Ok(())
        };
        for name in ["runc", "crun"] {
            measure(name, &mut run_command(Command::new(name), &bundle))?;
        }
        let mut ours = run_command(Command::new(bulkhead()), &bundle);
        measure("bulkhead", ours.arg("--timeline").arg(&timeline))?;
        let mut booting = run_command(Command::new(bulkhead()), &bundle);
        measure(
            "bulkhead, booting",
            booting.env("BULKHEAD_CONFIG", &no_templates),
        )?;
        if let Some(qemu) = qemu {
            measure("QEMU microvm", &mut microvm(qemu, &initrd))?;
        }
        if round > 0 {
            read_timeline(&timeline, &mut steps)?;
        }
    }

    let microvm = "`run` of `true`; the peer only boots the same kernel to PID 1 and powers off";
    let without = "the same without a template";
    for (ours, peer, what, goal) in [
        (
            "bulkhead",
            "runc",
            "`run` of `true`",
            Some(Goal::AtMost(2.0)),
        ),
        ("bulkhead", "crun", "`run` of `true`", None),
        ("bulkhead", "QEMU microvm", microvm, Some(Goal::AtMost(0.6))),
        ("bulkhead, booting", "runc", without, None),
        ("bulkhead, booting", "QEMU microvm", without, None),
    ] {
        let ours = seconds[ours].clone();
        if let Some(theirs) = seconds.get(peer) {
            comparisons.push(Comparison {
                what: what.to_owned(),
                peer,
                measure: Measure::Time,
                goal,
                ours,
                theirs: theirs.clone(),
            });
        }
    }

    let mut previous = 0.0;
    let rows: Vec<_> = steps
        .iter()
        .map(|(name, at)| {
            let at = median(at);
            let row = vec![
                name.clone(),
                format!("{at:.0} ms"),
                format!("{:.0} ms", at - previous),
            ];
            previous = at;
            row
        })
        .collect();
    print(
        "Bulkhead's boot timeline, medians",
        &["step", "since the command's start", "since the step before"],
        &rows,
    );
    fs::remove_dir_all(folder)?;
    Ok(())
}

/// QEMU's smallest machine with Bulkhead's kernel; PID 1 resets, which `-no-reboot` makes the end.
fn microvm(qemu: &Path, initrd: &Path) -> Command {
    let mut command = Command::new(qemu);
    command
        .args([
            "-M",
            "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=off",
            "-accel",
            "kvm",
            "-cpu",
            "host",
        ])
        .args([
            "-m",
            "256",
            "-smp",
            "1",
            "-nodefaults",
            "-no-user-config",
            "-nographic",
            "-no-reboot",
        ])
        .args([
            "-append",
            "reboot=t panic=-1 quiet tsc=reliable no_timer_check random.trust_cpu=on probe=reset",
        ])
        .arg("-kernel")
        .arg(dist().join("lib/bulkhead/vmlinux"))
        .arg("-initrd")
        .arg(initrd);
    command
}

/// Adds one run's steps, in milliseconds since its first, to those of the runs before.
fn read_timeline(path: &Path, steps: &mut Vec<(String, Vec<f64>)>) -> anyhow::Result<()> {
    let record: Value =
        serde_json::from_slice(&fs::read(path).context("no timeline was written")?)?;
    let entries = record["entries"]
        .as_array()
        .context("a timeline without entries")?;
    let at = |entry: &Value| {
        entry["at_ns"]
            .as_f64()
            .context("a timeline entry without a time")
    };
    let began = at(entries.first().context("the timeline is empty")?)?;
    for entry in entries {
        let name = entry["name"]
            .as_str()
            .context("a timeline entry without a name")?;
        let since = (at(entry)? - began) / 1e6;
        match steps.iter_mut().find(|(known, _)| known == name) {
            Some((_, all)) => all.push(since),
            None => steps.push((name.to_owned(), vec![since])),
        }
    }
    Ok(())
}

fn tempfile_folder() -> anyhow::Result<std::path::PathBuf> {
    let folder = std::env::temp_dir().join(format!("bulkhead-bench-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

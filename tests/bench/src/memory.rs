//! What an idle sandbox costs in memory, and how large the files are.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};

use anyhow::{Context, ensure};
use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{bulkhead, run_command, start};
use bulkhead_e2e::{dist, processes};

use crate::table::{median, print};

/// Guest memory of the measured sandbox, in MiB.
const GUEST_MIB: u64 = 128;

/// Starts idle sandboxes and prints the proportional set size (PSS) of each process, guest memory apart.
pub fn measure(rounds: usize) -> anyhow::Result<()> {
    let mut sizes: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let config = std::env::temp_dir().join(format!("bulkhead-bench-{}.toml", std::process::id()));
    fs::write(&config, format!("memory_mib = {GUEST_MIB}\n"))?;
    for _ in 0..rounds {
        let bundle = Bundle::shell("echo ready; exec sleep 100000");
        let mut command = bulkhead();
        command.arg("--config").arg(&config);
        let mut child = start(run_command(command, &bundle).stdin(Stdio::null()));
        let looked = look(&mut child, &mut sizes);
        let pids = processes::of_the_build_under_test();
        child.kill()?;
        child.wait()?;
        processes::wait_for_end(&pids);
        looked?;
    }
    fs::remove_file(config)?;
    let rows: Vec<_> = sizes
        .iter()
        .map(|(what, kib)| vec![what.clone(), format!("{:.1} MiB", median(kib) / 1024.0)])
        .collect();
    print(
        &format!(
            "Memory (PSS) of an idle sandbox with a guest of {GUEST_MIB} MiB, median of {rounds}"
        ),
        &["what", "size"],
        &rows,
    );
    Ok(())
}

/// Adds the sizes of a sandbox's processes once its container runs.
fn look(client: &mut Child, sizes: &mut BTreeMap<String, Vec<f64>>) -> anyhow::Result<()> {
    let mut line = String::new();
    BufReader::new(client.stdout.take().context("no stdout")?).read_line(&mut line)?;
    ensure!(line == "ready\n", "the container said {line:?}");
    for pid in processes::of_the_build_under_test() {
        let name = fs::read_to_string(format!("/proc/{pid}/comm"))?
            .trim()
            .to_owned();
        let (guest, rest) = pss_kib(pid)?;
        sizes
            .entry(format!("{name}, without guest memory"))
            .or_default()
            .push(rest);
        if guest > 0.0 {
            sizes
                .entry("guest memory touched".to_owned())
                .or_default()
                .push(guest);
        }
    }
    Ok(())
}

/// PSS of guest memory and of everything else. Guest memory is the one mapping of its size.
fn pss_kib(pid: u32) -> anyhow::Result<(f64, f64)> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let kib = |line: &str| {
        line.split_whitespace()
            .nth(1)
            .and_then(|n| n.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let (mut guest, mut rest, mut size) = (0, 0, 0);
    for line in smaps.lines() {
        if line.starts_with("Size:") {
            size = kib(line);
        } else if line.starts_with("Pss:") {
            let share = if size >= GUEST_MIB * 1024 {
                &mut guest
            } else {
                &mut rest
            };
            *share += kib(line);
        }
    }
    Ok((guest as f64, rest as f64))
}

/// Prints the sizes of what is installed.
pub fn sizes() -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for folder in ["bin", "lib/bulkhead"] {
        let mut entries: Vec<_> = fs::read_dir(dist().join(folder))?.collect::<Result<_, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            rows.push(vec![
                Path::new(folder)
                    .join(entry.file_name())
                    .display()
                    .to_string(),
                format!(
                    "{:.1} MiB",
                    entry.metadata()?.len() as f64 / f64::from(1 << 20)
                ),
            ]);
        }
    }
    print("Sizes of the files", &["file", "size"], &rows);
    Ok(())
}

//! `bulkhead state`, `list` and `ps`, with runc's output.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use bulkhead_runtime::state::Record;
use clap::{Args, ValueEnum};
use nix::unistd::{Uid, User};
use serde::Serialize;

use super::Invocation;
use super::client::ProcessState;
use super::known::{Known, block_on};
use super::lifecycle::{IdAndWords, IdArgs};

/// How lists are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns.
    Table,
    /// JSON.
    Json,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Print the ids only
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Debug, Args)]
pub struct PsArgs {
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    format: Format,
    #[command(flatten)]
    pub target: IdAndWords,
}

/// A container as runc prints it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct State {
    oci_version: String,
    id: String,
    pid: u32,
    status: String,
    bundle: PathBuf,
    rootfs: PathBuf,
    created: String,
    /// In the order of their names.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
    owner: String,
}

impl State {
    fn new(record: Record, process: ProcessState, owner: String) -> Self {
        Self {
            oci_version: record.oci_version,
            id: record.id,
            pid: process.pid,
            status: process.status.to_string(),
            bundle: record.bundle,
            rootfs: record.rootfs,
            created: humantime::format_rfc3339_nanos(record.created).to_string(),
            annotations: record.annotations.into_iter().collect(),
            owner,
        }
    }

    async fn of(known: &Known) -> anyhow::Result<Self> {
        let record = known.record()?;
        Ok(Self::new(
            record,
            known.ask_state().await?,
            owner(known.state.path()),
        ))
    }
}

/// Who made a container: the name of its state directory's owner.
fn owner(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    let Ok(metadata) = path.metadata() else {
        return String::new();
    };
    match User::from_uid(Uid::from_raw(metadata.uid())) {
        Ok(Some(user)) => user.name,
        _ => format!("#{}", metadata.uid()),
    }
}

/// Runs `bulkhead state`.
pub fn state(invocation: &Invocation, args: &IdArgs) -> anyhow::Result<i32> {
    let known = Known::find(invocation, &args.id)?;
    let mut state = block_on(State::of(&known))?;
    // As with runc: a list alone tells it.
    state.owner.clear();
    super::say(&format!("{}\n", serde_json::to_string_pretty(&state)?))?;
    Ok(0)
}

/// Runs `bulkhead list`.
pub fn list(invocation: &Invocation, args: &ListArgs) -> anyhow::Result<i32> {
    let mut names = Vec::new();
    match std::fs::read_dir(&invocation.root) {
        Ok(entries) => {
            for entry in entries {
                names.extend(entry?.file_name().into_string());
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(error)
                .with_context(|| format!("cannot list {}", invocation.root.display()));
        }
    }
    names.sort();
    let known = names
        .iter()
        .filter_map(|name| Known::find(invocation, name).ok());
    let states = block_on(async {
        // All at once: each may have to be waited for.
        let asked: Vec<_> = known
            .map(|known| tokio::spawn(async move { State::of(&known).await }))
            .collect();
        let mut states = Vec::new();
        for state in asked {
            // What goes away, or is not there yet, while we look is not to be listed.
            states.extend(state.await?);
        }
        Ok(states)
    })?;
    if args.quiet {
        let ids: String = states
            .iter()
            .map(|state| format!("{}\n", state.id))
            .collect();
        super::say(&ids)?;
        return Ok(0);
    }
    match args.format {
        Format::Json if states.is_empty() => super::say("null\n")?,
        Format::Json => super::say(&format!("{}\n", serde_json::to_string(&states)?))?,
        Format::Table => {
            let header = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
            let rows = states.into_iter().map(|state| {
                [
                    state.id,
                    state.pid.to_string(),
                    state.status,
                    state.bundle.display().to_string(),
                    state.created,
                    state.owner,
                ]
            });
            super::say(&table(header, rows.collect()))?;
        }
    }
    Ok(0)
}

/// Columns as runc aligns them: at least 12 wide, with 3 spaces between.
fn table<const N: usize>(header: [String; N], rows: Vec<[String; N]>) -> String {
    let mut all = vec![header];
    all.extend(rows);
    let mut widths = [0; N];
    for row in &all {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (cell.chars().count() + 3).max(*width).max(12);
        }
    }
    let mut text = String::new();
    for row in &all {
        let cells = row.iter().zip(widths).enumerate();
        for (n, (cell, width)) in cells {
            if n + 1 == N {
                text.push_str(cell);
            } else {
                text.push_str(&format!("{cell:width$}"));
            }
        }
        text.push('\n');
    }
    text
}

/// Runs `bulkhead ps`: the processes of the host that stand for the container's.
pub fn ps(invocation: &Invocation, args: &PsArgs) -> anyhow::Result<i32> {
    let known = Known::find(invocation, args.target.id())?;
    let pids = known.unless_stopped(async |server| Ok(known.patiently(server.pids()).await??))?;
    let pids = pids.unwrap_or_default();
    if args.format == Format::Json {
        super::say(&format!("{}\n", serde_json::to_string(&pids)?))?;
        return Ok(0);
    }
    let mut options = args.target.words().to_vec();
    if options.is_empty() {
        options.push("-ef".to_owned());
    }
    let output = Command::new("ps")
        .args(&options)
        .output()
        .context("cannot run ps; --format json does not need it")?;
    if !output.status.success() {
        bail!("ps: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header
        .split_whitespace()
        .position(|name| name == "PID")
        .context("ps prints no column PID with these options")?;
    let mut found = format!("{header}\n");
    for line in lines {
        let pid = line.split_whitespace().nth(column);
        if pid
            .and_then(|pid| pid.parse().ok())
            .is_some_and(|pid: u32| pids.contains(&pid))
        {
            found.push_str(line);
            found.push('\n');
        }
    }
    super::say(&found)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    use bulkhead_runtime::sandbox::Status;
    use serde_json::json;

    #[test]
    fn annotations_are_in_the_order_of_their_names() {
        let names = ["c", "a.b", "d", "a", "e", "b"];
        let annotations: Vec<_> = names.iter().map(|name| (*name, "x")).collect();
        let record = json!({
            "oci_version": "1.0.2", "id": "c1", "bundle": "/b", "rootfs": "/b/rootfs",
            "created": SystemTime::UNIX_EPOCH, "pid": 7, "status": "running",
            "annotations": BTreeMap::from_iter(annotations),
        });
        let process = ProcessState {
            status: Status::Running,
            pid: 7,
        };
        let record = serde_json::from_value(record).unwrap();
        let state = State::new(record, process, String::new());
        let shown = serde_json::to_string(&state).unwrap();
        let expected = r#""annotations":{"a":"x","a.b":"x","b":"x","c":"x","d":"x","e":"x"}"#;
        assert!(shown.contains(expected), "{shown}");
    }

    #[test]
    fn tables_are_aligned_as_runcs() {
        let header = ["ID", "PID", "OWNER"].map(str::to_owned);
        let rows = vec![["a-long-container-id", "7", "root"].map(str::to_owned)];
        assert_eq!(
            table(header, rows),
            "ID                    PID         OWNER\na-long-container-id   7           root\n"
        );
    }
}

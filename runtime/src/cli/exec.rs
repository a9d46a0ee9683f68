//! `bulkhead exec`: another process in a running container.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use bulkhead_runtime::sandbox::{ExecOptions, OPTIONS};
use bulkhead_runtime::spec::{drop_unknown_capabilities, fill_in_user};
use bulkhead_runtime::stdio::TerminalSize;
use bulkhead_vmm::fault;
use clap::Args;
use nix::sched::CloneFlags;
use serde_json::{Map, Value, json};
use thiserror::Error;
use tokio::time::timeout;

use super::attach::{Streams, follow, own_stdio};
use super::client::{Server, ServerError};
use super::create::write_pid_file;
use super::descriptors::Descriptors;
use super::foreground::Foreground;
use super::known::{Known, Silent, block_on};
use super::lifecycle::IdAndWords;
use super::proxy::{IdMaps, Job, Proxy};
use super::terminal::Pair;
use super::{Invocation, absolute};

/// How long a process that was killed may take to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Unix socket that takes the master of the process's terminal; a relative path is from the bundle on, with --process from here
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// Environment variable, NAME=VALUE
    #[arg(short, long, value_name = "ENV")]
    env: Vec<String>,
    /// Give the process a terminal
    #[arg(short, long)]
    tty: bool,
    /// User, UID or UID:GID
    #[arg(short, long, value_name = "UID[:GID]")]
    user: Option<String>,
    /// Further group
    #[arg(short = 'g', long, value_name = "GID")]
    additional_gids: Vec<u32>,
    /// File with the process as JSON, as in a config.json
    #[arg(short, long, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Return once the process runs
    #[arg(short, long)]
    detach: bool,
    /// File to which the pid that stands for the process is written
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// SELinux label
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// AppArmor profile
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// Set the process's no_new_privs
    #[arg(long)]
    no_new_privs: bool,
    /// Capability to add
    #[arg(short, long, value_name = "CAP")]
    cap: Vec<String>,
    /// Number of further descriptors to hand over, from 3 on: pipes, connected stream sockets, files or terminals
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    /// Cgroup below the container's to execute the process in
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<String>,
    /// Wait for a paused container to be resumed, and execute the process then
    #[arg(long)]
    ignore_paused: bool,
    #[command(flatten)]
    pub target: IdAndWords,
}

/// The process did not come to be; runc's exit code for it is another than for other failures.
#[derive(Debug, Error)]
#[error("{0:#}")]
pub struct NotExecuted(anyhow::Error);

impl NotExecuted {
    /// runc's exit code.
    pub const EXIT_CODE: i32 = 255;
}

/// Runs `bulkhead exec`; the exit code is the process's.
pub fn exec(invocation: &Invocation, args: &ExecArgs) -> anyhow::Result<i32> {
    run(invocation, args).map_err(|error| NotExecuted(error).into())
}

fn run(invocation: &Invocation, args: &ExecArgs) -> anyhow::Result<i32> {
    let descriptors = Descriptors::for_exec(args.preserve_fds)?;
    let cgroup = cgroup(&args.cgroup)?;
    let known = Known::find(invocation, args.target.id())?;
    let process = process(&known, args)?;
    if args.detach {
        detached(&known, args, process, cgroup, descriptors)
    } else {
        if args.console_socket.is_some() {
            bail!(
                "--console-socket is for a process in the background: add --detach or leave it out"
            );
        }
        foreground(&known, args, process, cgroup, descriptors)
    }
}

/// The one `--cgroup`: with cgroup version 2, a guest's, there are no controllers that could be named each.
fn cgroup(given: &[String]) -> anyhow::Result<String> {
    let path = match given {
        [] => return Ok(String::new()),
        [path] => path,
        _ => bail!("--cgroup may be given once: a process is in one cgroup of the guest"),
    };
    if let Some((controllers, path)) = path.split_once(':') {
        bail!(
            "--cgroup {controllers}:{path}: the guest has cgroup version 2, where controllers have no cgroups of their own: \
             give the path alone"
        );
    }
    Ok(path.clone())
}

/// The process's description: a file's, or the container's own changed by the flags.
fn process(known: &Known, args: &ExecArgs) -> anyhow::Result<Map<String, Value>> {
    if let Some(path) = &args.process {
        let path = absolute(path)?;
        let text =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let what = || format!("{} is not a process of the runtime spec", path.display());
        // Not as a map at once: serde would quote what it finds in place of one.
        let Value::Object(process) = serde_json::from_slice(&text).with_context(what)? else {
            bail!("{}: it holds no object", what());
        };
        return check(process);
    }
    let path = known.record()?.bundle.join("config.json");
    let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut spec: Value = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not a valid runtime spec", path.display()))?;
    let Some(Value::Object(mut process)) = spec.get_mut("process").map(Value::take) else {
        bail!(
            "{} has no `process` from which this one could take its user and environment: name a file with --process",
            path.display()
        );
    };
    change(&mut process, args)?;
    check(process)
}

fn change(process: &mut Map<String, Value>, args: &ExecArgs) -> anyhow::Result<()> {
    process.insert("args".into(), json!(args.target.words()));
    process.insert("terminal".into(), json!(args.tty));
    process.remove("consoleSize");
    if let Some(cwd) = &args.cwd {
        process.insert("cwd".into(), json!(cwd));
    }
    if let Some(profile) = &args.apparmor {
        process.insert("apparmorProfile".into(), json!(profile));
    }
    if let Some(label) = &args.process_label {
        process.insert("selinuxLabel".into(), json!(label));
    }
    if args.no_new_privs {
        process.insert("noNewPrivileges".into(), json!(true));
    }
    extend(process, "env", &args.env);
    if !args.cap.is_empty() {
        let sets = process.entry("capabilities").or_insert(Value::Null);
        if sets.is_null() {
            *sets = json!({});
        }
        if let Value::Object(sets) = sets {
            // As under runc in the ambient set too. The agent leaves out what the kernel would refuse.
            for set in ["bounding", "effective", "permitted", "ambient"] {
                extend(sets, set, &args.cap);
            }
        }
    }
    fill_in_user(process);
    let Some(Value::Object(user)) = process.get_mut("user") else {
        bail!("process.user is no object such as {{\"uid\": 0, \"gid\": 0}}: correct config.json");
    };
    if let Some(given) = &args.user {
        let (uid, gid) = given
            .split_once(':')
            .map_or((given.as_str(), None), |(u, g)| (u, Some(g)));
        let number = |text: &str| {
            text.parse::<u32>()
                .with_context(|| format!("--user {given}: give UID or UID:GID, in numbers"))
        };
        user.insert("uid".into(), json!(number(uid)?));
        if let Some(gid) = gid {
            user.insert("gid".into(), json!(number(gid)?));
        }
    }
    extend(user, "additionalGids", &args.additional_gids);
    Ok(())
}

/// Adds to a list, which need not be there. What is no list is refused by who reads it.
fn extend<T: Clone + Into<Value>>(object: &mut Map<String, Value>, name: &str, more: &[T]) {
    if more.is_empty() {
        return;
    }
    let list = object.entry(name).or_insert(Value::Null);
    if list.is_null() {
        *list = json!([]);
    }
    if let Value::Array(list) = list {
        list.extend(more.iter().cloned().map(Into::into));
    }
}

fn check(mut process: Map<String, Value>) -> anyhow::Result<Map<String, Value>> {
    let args = process.get("args").and_then(Value::as_array);
    if args.is_none_or(Vec::is_empty) {
        bail!("process.args must not be empty: say which program to run");
    }
    let cwd = process
        .get("cwd")
        .and_then(Value::as_str)
        .unwrap_or_default();
    if !cwd.starts_with('/') {
        bail!("process.cwd is {cwd:?}: give an absolute path");
    }
    drop_unknown_capabilities(process.get_mut("capabilities"));
    fill_in_user(&mut process);
    Ok(process)
}

/// A name that no other process of the container has.
fn exec_id() -> String {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    format!("{}-{}", std::process::id(), now.as_nanos())
}

fn with_options(mut process: Map<String, Value>, options: &ExecOptions) -> anyhow::Result<Vec<u8>> {
    process.insert(OPTIONS.into(), serde_json::to_value(options)?);
    Ok(serde_json::to_vec(&process)?)
}

fn has_terminal(process: &Map<String, Value>) -> bool {
    process.get("terminal").and_then(Value::as_bool) == Some(true)
}

/// The description's own `consoleSize`.
fn console_size(process: &Map<String, Value>) -> Option<TerminalSize> {
    let size = process.get("consoleSize")?;
    let of = |name| u32::try_from(size.get(name)?.as_u64()?).ok();
    Some(TerminalSize {
        width: of("width")?,
        height: of("height")?,
    })
}

fn foreground(
    known: &Known,
    args: &ExecArgs,
    process: Map<String, Value>,
    cgroup: String,
    descriptors: Descriptors,
) -> anyhow::Result<i32> {
    let foreground = Foreground::enter(has_terminal(&process))?;
    let stdio = foreground.stdio;
    let options = ExecOptions {
        proxy: None,
        client: Some(std::process::id()),
        ends_with_client: args.pid_file.is_some(),
        terminal_size: foreground.size.or_else(|| console_size(&process)),
        descriptors: descriptors.flows(),
        cgroup,
        ignore_paused: args.ignore_paused,
    };
    let json = with_options(process, &options)?;
    let exec_id = exec_id();
    let connection = known
        .connect()?
        .context("cannot exec in a stopped container: container not running")?;
    let code = foreground.run(async |signals| {
        let server = Server::new(connection, known.id.as_str(), &exec_id)?;
        known.patiently(server.exec(json, stdio)).await??;
        fault::point("client: process described");
        let pid = known.patiently(server.start()).await??;
        fault::point("client: process started");
        let followed = async {
            if let Some(path) = &args.pid_file {
                write_pid_file(path, pid)?;
            }
            let mut streams = Streams::attach(
                stdio,
                descriptors,
                &known.state.vsock(),
                &known.id,
                &exec_id,
            )?;
            let code = follow(Some(known), &server, signals, &mut streams).await?;
            anyhow::Ok((code, streams))
        };
        let (code, mut streams) = match followed.await {
            Ok(followed) => followed,
            Err(error) => {
                // As under runc such a process does not stay. Of a server that answers nothing that can't be asked.
                if !error.is::<Silent>() {
                    let _ = timeout(KILL_TIMEOUT, end(&server)).await;
                }
                return Err(error);
            }
        };
        if i32::try_from(code) == Ok(NotExecuted::EXIT_CODE)
            && let Some(reason) = known.record().ok().and_then(|record| record.failure)
        {
            bail!(reason);
        }
        streams.written(signals).await;
        // The server forgets it with its container anyway.
        let _ = known.patiently(server.delete()).await;
        Ok(code)
    });
    let code = code.map_err(|error| known.told(error))?;
    Ok(i32::try_from(code).unwrap_or(NotExecuted::EXIT_CODE))
}

/// Where `--console-socket` is: from the bundle on, in which runc is by then unless it has been given the process's description.
fn console_socket(known: &Known, args: &ExecArgs) -> anyhow::Result<Option<PathBuf>> {
    Ok(match &args.console_socket {
        Some(path) if args.process.is_none() => Some(known.record()?.bundle.join(path)),
        given => given.clone(),
    })
}

/// Kills a process and waits for its end.
async fn end(server: &Server<'_>) -> Result<(), ServerError> {
    server.kill(libc::SIGKILL.unsigned_abs(), false).await?;
    server.wait().await?;
    server.delete().await
}

fn detached(
    known: &Known,
    args: &ExecArgs,
    process: Map<String, Value>,
    cgroup: String,
    descriptors: Descriptors,
) -> anyhow::Result<i32> {
    let pair = Pair::for_background(
        "--tty",
        has_terminal(&process),
        console_socket(known, args)?.as_deref(),
        console_size(&process),
    )?;
    let stdio = own_stdio(pair.is_some());
    let exec_id = exec_id();
    let connection = known
        .connect()?
        .context("cannot exec in a stopped container: container not running")?;
    let flows = descriptors.flows();
    let proxy = Proxy::fork(Job {
        state: &known.state,
        id: &known.id,
        exec_id: &exec_id,
        stdio,
        descriptors,
        terminal: pair.as_ref().map(Pair::slave),
        namespaces: CloneFlags::empty(),
        id_maps: IdMaps::default(),
        view: None,
    })?;
    let options = ExecOptions {
        proxy: Some(proxy.pid),
        client: None,
        ends_with_client: false,
        terminal_size: console_size(&process),
        descriptors: flows,
        cgroup,
        ignore_paused: args.ignore_paused,
    };
    let json = with_options(process, &options)?;
    block_on(async {
        let server = Server::new(connection, known.id.as_str(), &exec_id)?;
        known.patiently(server.exec(json, stdio)).await??;
        fault::point("client: process described");
        if let Some(pair) = &pair {
            pair.send_master()?;
        }
        let pid = known.patiently(server.start()).await??;
        fault::point("client: process started");
        if let Some(path) = &args.pid_file {
            write_pid_file(path, pid)?;
        }
        Ok(())
    })
    .map_err(|error| known.told(error))?;
    proxy.go()?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        exec: ExecArgs,
    }

    fn changed(line: &[&str]) -> Result<Value, String> {
        let process = json!({
            "args": ["old"], "cwd": "/", "env": ["A=b"], "user": {"uid": 1, "gid": 2},
            "capabilities": {"bounding": ["CAP_KILL"]}, "consoleSize": {"width": 1, "height": 2},
        });
        changed_from(process, line)
    }

    fn changed_from(process: Value, line: &[&str]) -> Result<Value, String> {
        let line = std::iter::once(&"exec").chain(line);
        let args = Line::parse_from(line).exec;
        let mut process = object(process);
        change(&mut process, &args).map_err(|e| e.to_string())?;
        Ok(Value::Object(process))
    }

    fn object(value: Value) -> Map<String, Value> {
        let Value::Object(object) = value else {
            panic!("no object")
        };
        object
    }

    #[test]
    fn flags_change_the_containers_own_process() {
        let process = changed(&[
            "-t",
            "-e",
            "C=d",
            "--user",
            "7:8",
            "-g",
            "9",
            "--cwd",
            "/tmp",
            "--cap",
            "CAP_CHOWN",
            "--no-new-privs",
            "c1",
            "ls",
            "-l",
        ])
        .unwrap();
        assert_eq!(
            process,
            json!({
                "args": ["ls", "-l"], "cwd": "/tmp", "env": ["A=b", "C=d"], "terminal": true, "noNewPrivileges": true,
                "user": {"uid": 7, "gid": 8, "additionalGids": [9]},
                "capabilities": {"bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"], "ambient": ["CAP_CHOWN"]},
            })
        );
        assert_eq!(
            changed(&["c1", "ls"]).unwrap()["user"],
            json!({"uid": 1, "gid": 2})
        );
    }

    #[test]
    fn what_is_null_is_as_good_as_left_out() {
        let process = json!({"cwd": "/", "env": null, "user": null, "capabilities": null});
        let line = [
            "-e", "A=b", "-g", "9", "--cap", "CAP_KILL", "--user", "7", "c1", "ls",
        ];
        assert_eq!(
            changed_from(process, &line).unwrap(),
            json!({
                "args": ["ls"], "cwd": "/", "env": ["A=b"], "terminal": false,
                "user": {"uid": 7, "gid": 0, "additionalGids": [9]},
                "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"], "ambient": ["CAP_KILL"]},
            })
        );
    }

    #[test]
    fn a_process_without_a_user_is_roots() {
        let root = json!({"uid": 0, "gid": 0});
        for (user, expected) in [
            (None, &root),
            (Some(json!(null)), &root),
            (Some(json!({})), &root),
            (Some(json!({"gid": 5})), &json!({"uid": 0, "gid": 5})),
        ] {
            let mut process = object(json!({"args": ["ls"], "cwd": "/"}));
            process.extend(user.map(|user| ("user".to_owned(), user)));
            assert_eq!(&check(process).unwrap()["user"], expected);
        }
    }

    #[test]
    fn a_user_by_name_is_refused() {
        let message = changed(&["--user", "root", "c1", "ls"]).unwrap_err();
        assert!(message.contains("--user root: give UID"), "{message}");
    }
}

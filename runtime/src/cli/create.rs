//! `bulkhead create` and `bulkhead run`: from the bundle to a container.
//!
//! A container that outlives the command has a proxy ([`super::proxy`]); one in the foreground has this process. The sandbox
//! is tied to the command until that has done its work: when it goes before, however that came, the server notices and takes
//! everything down.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};

use anyhow::{Context, anyhow, bail};
use bulkhead_runtime::id::ContainerId;
use bulkhead_runtime::launch::{Launch, Launched};
use bulkhead_runtime::sandbox::CreateOptions;
use bulkhead_runtime::spec::Bundle;
use bulkhead_runtime::stdio::{Stdio, TerminalSize};
use bulkhead_runtime::timeline::{Record, Timeline};
use bulkhead_runtime::view::View;
use bulkhead_vmm::fault;
use clap::Args;
use nix::sched::{CloneFlags, setns, unshare};
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};
use thiserror::Error;

use super::attach::{Streams, follow, own_stdio};
use super::client::{Server, ServerError};
use super::descriptors::Descriptors;
use super::foreground::Foreground;
use super::known::{Known, Silent, block_on, clean_up};
use super::proxy::{IdMaps, Job, Proxy};
use super::signals::Signals;
use super::terminal::Pair;
use super::{Invocation, absolute};

/// What `create` and `run` share.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Directory of the bundle
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Unix socket that takes the master of the container's terminal; a relative path is from the bundle on
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// File to which the pid that stands for the container is written
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Accepted for runc's sake: the guest's root is never on a ramdisk of the host
    #[arg(long, hide = true)]
    no_pivot: bool,
    /// Accepted for runc's sake: the guest has its own keyrings
    #[arg(long, hide = true)]
    no_new_keyring: bool,
    /// Number of further descriptors to hand over, from 3 on: pipes, connected stream sockets, files or terminals
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    /// Name of the container
    id: String,
}

/// `run` on top of `create`.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    create: CreateArgs,
    /// Return once the container runs
    #[arg(short, long)]
    detach: bool,
    /// Keep the container's state when it has ended
    #[arg(long)]
    keep: bool,
    /// Accepted for runc's sake: there are no processes to be reaped
    #[arg(long, hide = true)]
    no_subreaper: bool,
    /// File to which the boot timeline is written as JSON
    #[arg(long, value_name = "FILE", hide = true)]
    timeline: Option<PathBuf>,
}

/// The sandbox ended under its container.
#[derive(Debug, Error)]
#[error("{reason}")]
pub struct Lost {
    reason: String,
    /// What the command exits with.
    pub exit_code: i32,
}

/// How a container in the foreground came to its end.
enum Outcome {
    /// With an exit code.
    Exited(u32),
    /// By a signal that came before there was a container to give it to.
    Signalled(u32),
}

/// Runs `bulkhead create`.
pub fn create(invocation: &Invocation, args: &CreateArgs) -> anyhow::Result<i32> {
    detached(invocation, args, false)
}

/// Runs `bulkhead run` and returns the exit code.
pub fn run(invocation: &Invocation, args: &RunArgs) -> anyhow::Result<i32> {
    if args.detach {
        return detached(invocation, &args.create, true);
    }
    if args.create.console_socket.is_some() {
        bail!(
            "--console-socket is for a container in the background: add --detach or leave it out"
        );
    }
    foreground(invocation, args)
}

/// What is known before anything is started.
struct Prepared {
    id: ContainerId,
    bundle: PathBuf,
    spec: Spec,
    view: View,
    descriptors: Descriptors,
}

impl Prepared {
    /// Checks the arguments and the bundle.
    fn new(args: &CreateArgs) -> anyhow::Result<Self> {
        let descriptors = Descriptors::for_init(args.preserve_fds)?;
        let id = ContainerId::new(args.id.as_str())?;
        let bundle = Bundle::load(&absolute(&args.bundle)?)?;
        if std::env::var_os("NOTIFY_SOCKET").is_some_and(|path| !path.is_empty()) {
            tracing::warn!(
                "NOTIFY_SOCKET is ignored: a container in a VM cannot reach a socket of the host, so nobody there is told when it \
                 is ready; unset the variable"
            );
        }
        Ok(Self {
            id,
            view: View::of(&bundle),
            bundle: bundle.dir,
            spec: bundle.spec,
            descriptors,
        })
    }

    fn terminal(&self) -> bool {
        let process = self.spec.process().as_ref();
        process.and_then(|process| process.terminal()) == Some(true)
    }

    /// The spec's `process.consoleSize`.
    fn console_size(&self) -> Option<TerminalSize> {
        let size = self.spec.process().as_ref()?.console_size()?;
        Some(TerminalSize {
            width: u32::try_from(size.width()).ok()?,
            height: u32::try_from(size.height()).ok()?,
        })
    }

    /// What the server is told; `size` is that of our own terminal.
    fn options(
        &self,
        invocation: &Invocation,
        descriptors: &Descriptors,
        size: Option<TerminalSize>,
    ) -> CreateOptions {
        CreateOptions {
            proxy: None,
            client: None,
            terminal_size: size.or_else(|| self.console_size()),
            systemd_cgroup: invocation.systemd_cgroup,
            descriptors: descriptors.flows(),
            listen_fds: descriptors.listen_fds,
        }
    }

    fn launch(
        &self,
        invocation: &Invocation,
        foreground: bool,
        timeline: bool,
    ) -> anyhow::Result<Launched> {
        let launch = Launch {
            id: &self.id,
            root: &invocation.root,
            config: &invocation.config,
            config_file: invocation.config_file.as_deref(),
            debug: invocation.debug,
            foreground,
            timeline,
        };
        Ok(launch.start()?)
    }
}

/// A container that outlives the command.
fn detached(invocation: &Invocation, args: &CreateArgs, start: bool) -> anyhow::Result<i32> {
    let mut prepared = Prepared::new(args)?;
    let console_socket = args.console_socket.as_ref();
    let pair = Pair::for_background(
        "process.terminal",
        prepared.terminal(),
        // From the bundle, in which runc is by then.
        console_socket
            .map(|path| prepared.bundle.join(path))
            .as_deref(),
        prepared.console_size(),
    )?;
    let Launched {
        child,
        connection,
        state,
        lifeline,
        ..
    } = prepared.launch(invocation, false, false)?;
    fault::point("client: server started");
    let known = Known {
        id: prepared.id.clone(),
        state,
    };
    let end = connection.try_clone()?;
    let stdio = own_stdio(pair.is_some());
    let descriptors = std::mem::take(&mut prepared.descriptors);
    let mut options = prepared.options(invocation, &descriptors, None);
    let made = Proxy::fork(Job {
        state: &known.state,
        id: &known.id,
        exec_id: "",
        stdio,
        descriptors,
        terminal: pair.as_ref().map(Pair::slave),
        namespaces: namespaces(&prepared.spec),
        id_maps: id_maps(&prepared.spec),
        view: Some(prepared.view.clone()),
    })
    .and_then(|proxy| {
        fault::point("client: stand-in forked");
        options.proxy = Some(proxy.pid);
        block_on(async {
            let server = Server::new(connection, known.id.as_str(), "")?;
            let made: anyhow::Result<()> = async {
                make(&known, &server, &prepared, stdio, &options, &pair, args).await?;
                if start {
                    known.patiently(server.start()).await??;
                }
                Ok(())
            }
            .await;
            if matches!(&made, Err(error) if !error.is::<Silent>()) {
                let _ = known.patiently(server.shutdown(true)).await;
            }
            made
        })?;
        fault::point("client: container made");
        proxy.go()
    });
    match made {
        Ok(()) => {
            fault::point("client: stand-in stands");
            keep(lifeline, &known.id)?;
            Ok(0)
        }
        Err(error) => {
            drop(lifeline);
            let last_words = last_words(&known);
            // A server that ended in order has left nothing.
            let left = see_off(&known, child, &end, error.is::<Silent>())
                .and_then(|_| clean_up(&known.state))
                .err();
            let error = told(error, &last_words);
            Err(match left {
                Some(left) => {
                    anyhow!("{error:#} (and what is left of it could not be removed: {left:#})")
                }
                None => error,
            })
        }
    }
}

/// Sees a server to its end. One that answers nothing is killed.
fn see_off(
    known: &Known,
    mut child: Child,
    connection: &UnixStream,
    silent: bool,
) -> anyhow::Result<ExitStatus> {
    if silent || known.wait_for_end(connection).is_err() {
        child.kill().context("cannot kill the sandbox server")?;
    }
    child.wait().context("cannot wait for the sandbox server")
}

/// The last words of a server, which are in its log or, if it shares our standard error, there.
fn last_words(known: &Known) -> String {
    match std::fs::read_to_string(known.state.server_log()) {
        Ok(log) => match log.lines().next_back() {
            Some(line) => format!("its last words: {line}"),
            None => "it said nothing".to_owned(),
        },
        Err(_) => "its last words, if any, are above".to_owned(),
    }
}

/// An error as this command tells it, which takes its sandbox along; of a server that has ended `last_words` tell more.
fn told(error: anyhow::Error, last_words: &str) -> anyhow::Error {
    if error.is::<Silent>() {
        return anyhow!(
            "the sandbox server did not answer and was killed, and its container with it: try again with --debug to see what it does"
        );
    }
    if matches!(error.downcast_ref(), Some(ServerError::Gone)) {
        return anyhow!(
            "{error}, and its container with it; {last_words}; try again with --debug to see what it does"
        );
    }
    error
}

async fn make(
    known: &Known,
    server: &Server<'_>,
    prepared: &Prepared,
    stdio: Stdio,
    options: &CreateOptions,
    pair: &Option<Pair>,
    args: &CreateArgs,
) -> anyhow::Result<()> {
    let created = server.create(path_text(&prepared.bundle)?, stdio, options);
    let pid = known.patiently(created).await??;
    fault::point("client: container created");
    if let Some(pair) = pair {
        pair.send_master()?;
    }
    if let Some(path) = &args.pid_file {
        write_pid_file(path, pid)?;
    }
    Ok(())
}

/// A container in the foreground.
fn foreground(invocation: &Invocation, args: &RunArgs) -> anyhow::Result<i32> {
    let timeline = Timeline::default();
    timeline.mark("client: started");
    let prepared = Prepared::new(&args.create)?;
    let foreground = Foreground::enter(prepared.terminal())?;
    let launched = prepared.launch(invocation, !args.keep, args.timeline.is_some())?;
    timeline.mark("client: server started");
    let Launched {
        child,
        connection,
        state,
        lifeline,
        timeline: server_timeline,
    } = launched;
    let known = Known {
        id: prepared.id.clone(),
        state,
    };
    let end = connection.try_clone()?;

    let session = Session {
        invocation,
        args,
        prepared,
        known: &known,
        timeline: &timeline,
        stdio: foreground.stdio,
        size: foreground.size,
    };
    let result = foreground.run(async |signals| session.run(connection, signals).await);
    timeline.mark("client: container deleted");
    if args.keep && matches!(result, Ok(Outcome::Exited(_))) {
        // Somebody may have deleted it meanwhile; the code is what there is to tell.
        if let Err(error) = keep(lifeline, &known.id) {
            tracing::warn!("{error:#}");
        }
        return exit_code(result?);
    }
    drop(lifeline);
    let silent = matches!(&result, Err(error) if error.is::<Silent>());
    let last_words = last_words(&known);
    let ended = see_off(&known, child, &end, silent)?;
    // The server leaves nothing, unless something made an end of it.
    let cleaned = clean_up(&known.state);
    timeline.mark("client: server ended");
    if let (Some(path), Some(server)) = (&args.timeline, server_timeline) {
        write_timeline(path, &timeline, server)?;
    }
    // What went wrong first is what there is to know.
    let code = exit_code(result.map_err(|error| told(error, &last_words))?)?;
    cleaned?;
    if !ended.success() {
        return Err(anyhow!(
            "the sandbox server failed ({ended}) after the container's end"
        ));
    }
    Ok(code)
}

/// Lets the sandbox outlive the command.
fn keep(lifeline: Option<OwnedFd>, id: &ContainerId) -> anyhow::Result<()> {
    if let Some(mut lifeline) = lifeline.map(File::from) {
        lifeline.write_all(&[1]).with_context(|| {
            format!(
                "the sandbox server ended just after container {id} was ready: `bulkhead delete --force {id}` removes what is \
                 left of it"
            )
        })?;
    }
    Ok(())
}

fn exit_code(outcome: Outcome) -> anyhow::Result<i32> {
    let code = match outcome {
        Outcome::Exited(code) => code,
        Outcome::Signalled(signal) => 128 + signal,
    };
    i32::try_from(code).with_context(|| {
        format!(
            "the container is said to have exited with {code}, which is no exit code: install the sandbox server and this \
             command from the same release"
        )
    })
}

/// A container in the foreground, from its server's start to its end.
struct Session<'a> {
    invocation: &'a Invocation,
    args: &'a RunArgs,
    prepared: Prepared,
    known: &'a Known,
    timeline: &'a Timeline,
    stdio: Stdio,
    size: Option<TerminalSize>,
}

impl Session<'_> {
    async fn run(
        mut self,
        connection: UnixStream,
        signals: &mut Signals,
    ) -> anyhow::Result<Outcome> {
        let known = self.known;
        let server = Server::new(connection, known.id.as_str(), "")?;
        let result = self.container(&server, signals).await;
        let exited = matches!(result, Ok(Outcome::Exited(_)));
        let silent = matches!(&result, Err(error) if error.is::<Silent>());
        if !(self.args.keep && exited || silent) {
            let _ = known.patiently(server.shutdown(!exited)).await;
        }
        result
    }

    async fn container(
        &mut self,
        server: &Server<'_>,
        signals: &mut Signals,
    ) -> anyhow::Result<Outcome> {
        let (prepared, timeline, stdio) = (&mut self.prepared, self.timeline, self.stdio);
        let known = self.known;
        let descriptors = std::mem::take(&mut prepared.descriptors);
        let options = CreateOptions {
            client: Some(std::process::id()),
            ..prepared.options(self.invocation, &descriptors, self.size)
        };
        let _network = Network::enter(&prepared.spec)?;
        let bundle = path_text(&prepared.bundle)?;
        let pid = tokio::select! {
            created = known.patiently(server.create(bundle, stdio, &options)) => created??,
            signal = signals.end() => return Ok(Outcome::Signalled(signal)),
        };
        timeline.mark("client: container created");
        if let Some(path) = &self.args.create.pid_file {
            write_pid_file(path, pid)?;
        }
        // The streams are attached while the program starts: the guest keeps what comes before.
        let mut streams = Streams::attach(stdio, descriptors, &known.state.vsock(), &known.id, "")?;
        known.patiently(server.start()).await??;
        timeline.mark("client: container started");

        let code = follow(Some(known), server, signals, &mut streams).await?;
        timeline.mark("client: container exited");
        if let Some(reason) = known.state.load().ok().and_then(|record| record.failure) {
            let exit_code = i32::try_from(code).unwrap_or(super::FAILURE);
            return Err(Lost { reason, exit_code }.into());
        }
        streams.written(signals).await;
        timeline.mark("client: output written");
        if !self.args.keep {
            match known.patiently(server.delete()).await? {
                // Somebody else has deleted it meanwhile.
                Err(error) if error.is_not_found() || matches!(error, ServerError::Gone) => {}
                deleted => deleted?,
            }
        }
        Ok(Outcome::Exited(code))
    }
}

/// A network namespace for this thread, if the bundle names one: as a proxy, this process has the sandbox's for those who look for the
/// container's. Dropping it goes back.
struct Network(File);

impl Network {
    fn enter(spec: &Spec) -> anyhow::Result<Option<Self>> {
        if !namespaces(spec).contains(CloneFlags::CLONE_NEWNET) {
            return Ok(None);
        }
        let own =
            File::open("/proc/thread-self/ns/net").context("cannot see the network namespace")?;
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
        Ok(Some(Self(own)))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Hooks that this process may still have to run are of the caller's. It came from there, and is let in again.
        let _ = setns(&self.0, CloneFlags::CLONE_NEWNET);
    }
}

/// The namespaces of the spec that a process of the host can have as well, for those who look at them from outside.
fn namespaces(spec: &Spec) -> CloneFlags {
    let list = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_deref());
    let flag = |typ| match typ {
        LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
        LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
        LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
        LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
        LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
        LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
        LinuxNamespaceType::Time => CloneFlags::empty(),
    };
    let flags = list.into_iter().flatten().map(|entry| flag(entry.typ()));
    flags.collect()
}

/// The ids of the container's user namespace, as `/proc/<pid>/uid_map` takes them (`user_namespaces(7)`).
fn id_maps(spec: &Spec) -> IdMaps {
    let text = |mappings: Option<&Vec<LinuxIdMapping>>| {
        let lines = mappings.into_iter().flatten().map(|mapping| {
            let (inside, outside) = (mapping.container_id(), mapping.host_id());
            format!("{inside} {outside} {}\n", mapping.size())
        });
        lines.collect()
    };
    let linux = spec.linux().as_ref();
    IdMaps {
        users: text(linux.and_then(|linux| linux.uid_mappings().as_ref())),
        groups: text(linux.and_then(|linux| linux.gid_mappings().as_ref())),
    }
}

/// Writes a pid file, whole or not at all: decimal, no newline.
pub fn write_pid_file(path: &Path, pid: u32) -> anyhow::Result<()> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.with_context(|| format!("{} is no path of a pid file", path.display()))?;
    let new = path.with_file_name(format!(".{name}"));
    create_anew(&new)
        .and_then(|mut file| file.write_all(pid.to_string().as_bytes()))
        .and_then(|()| std::fs::rename(&new, path))
        .with_context(|| format!("cannot write the pid file {}", path.display()))
}

/// Makes a file that nobody else has made: in a directory that others may write to, what is there already may be their
/// link to a file of ours. What a killed command left is removed.
fn create_anew(path: &Path) -> io::Result<File> {
    match File::create_new(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            std::fs::remove_file(path)?;
            File::create_new(path)
        }
        made => made,
    }
}

fn path_text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().with_context(|| {
        format!("the bundle's path {path:?} is not UTF-8: give its directories other names")
    })
}

fn write_timeline(path: &Path, ours: &Timeline, mut server: File) -> anyhow::Result<()> {
    let mut text = Vec::new();
    server.read_to_end(&mut text)?;
    let mut record = ours.record();
    // A server that was killed has written none.
    if let Ok(theirs) = serde_json::from_slice::<Record>(&text) {
        record.merge(theirs);
    }
    std::fs::write(path, serde_json::to_vec_pretty(&record)?)
        .with_context(|| format!("cannot write the timeline to {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_that_stands_for_a_container_gets_its_user_namespace_and_ids() {
        let spec: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "linux": {
                "namespaces": [{"type": "user"}, {"type": "uts"}],
                "uidMappings": [
                    {"containerID": 0, "hostID": 1000, "size": 10},
                    {"containerID": 10, "hostID": 5000, "size": 1}
                ],
                "gidMappings": [{"containerID": 0, "hostID": 2000, "size": 20}]
            }
        }))
        .unwrap();
        assert_eq!(
            namespaces(&spec),
            CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWUTS
        );
        let maps = id_maps(&spec);
        assert_eq!(maps.users, "0 1000 10\n10 5000 1\n");
        assert_eq!(maps.groups, "0 2000 20\n");
    }

    #[test]
    fn a_pid_file_is_written_past_links_that_others_have_put_in_its_way() {
        let dir = tempfile::tempdir().unwrap();
        let precious = dir.path().join("precious");
        std::fs::write(&precious, "precious").unwrap();
        for name in [".pid", "pid"] {
            std::os::unix::fs::symlink(&precious, dir.path().join(name)).unwrap();
        }
        write_pid_file(&dir.path().join("pid"), 7).unwrap();
        assert_eq!(std::fs::read_to_string(&precious).unwrap(), "precious");
        let pid = dir.path().join("pid");
        assert!(pid.symlink_metadata().unwrap().is_file());
        assert_eq!(std::fs::read_to_string(pid).unwrap(), "7");
        assert!(!dir.path().join(".pid").exists());
    }
}

//! A test bed for whole containers without a guest: the agent's server in a process of its own, over unix sockets.
//!
//! The process has a mount namespace of its own and its cgroups below one that the bed removes.

use std::fs;
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio as Inherit};

use bulkhead_agent::boot::make_ahead;
use bulkhead_agent::cgroup::Hierarchy;
use bulkhead_agent::container::Ground;
use bulkhead_agent::network::SpareNetwork;
use bulkhead_agent::serve::serve;
use bulkhead_agent::timeline::Timeline;
use bulkhead_agent::transport::{Connection, Listener};
use bulkhead_protocol::PROTOCOL_VERSION;
use bulkhead_protocol::agent::{
    ContainerStatsRequest, ContainerStatsResponse, CreateContainerRequest, DeleteContainerRequest,
    DeleteProcessRequest, ExecProcessRequest, HelloRequest, ListProcessesRequest, NamespaceOf,
    PauseContainerRequest, ResizeTerminalRequest, ResumeContainerRequest, SignalProcessRequest,
    StartContainerRequest, Stdio, StreamHeader, StreamKind, UpdateContainerRequest, WaitOomRequest,
    WaitProcessRequest, WaitProcessResponse,
};
use bulkhead_protocol::agent_ttrpc::AgentClient;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use protobuf::Message;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use ttrpc::Code;
use ttrpc::context::Context;

/// First argument of the test program when it is to be the agent.
pub const AGENT_MODE: &str = "--be-the-agent";

/// Third argument of an agent that makes ahead what a container will want, as the guest's does.
const AHEAD: &str = "ahead";

/// Where the kernel is told to forget files.
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

/// The agent's process: arguments are the folder of the sockets and the cgroup.
pub fn be_the_agent(dir: &Path, cgroup: &Path, how: Option<&str>) {
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).unwrap();
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none: Option<&str> = None;
    let private = nix::mount::MsFlags::MS_PRIVATE | nix::mount::MsFlags::MS_REC;
    nix::mount::mount(none, "/", none, private, none).unwrap();
    if let Some(file) = how.filter(|how| how.starts_with('/')) {
        let bind = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some(file), DROP_CACHES, none, bind, none).unwrap();
    }
    bulkhead_agent::log::start(tracing::level_filters::LevelFilter::WARN);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let hierarchy = Hierarchy::set_up(cgroup).unwrap();
        let network = match how {
            Some(AHEAD) => make_ahead(&hierarchy),
            _ => SpareNetwork::default(),
        };
        let ground = Ground {
            hierarchy,
            share: false,
            network,
        };
        let streams = Listener::Unix(UnixListener::bind(dir.join("streams")).unwrap());
        let control = UnixStream::connect(dir.join("control")).await.unwrap();
        serve(
            Connection::Unix(control),
            streams,
            ground,
            Timeline::default(),
        )
        .await
        .unwrap();
    });
}

/// An agent, its client and a root filesystem of busybox.
pub struct Bed {
    pub client: AgentClient,
    pub agent: Child,
    dir: tempfile::TempDir,
    cgroup: PathBuf,
}

/// What a container did.
#[derive(Debug)]
pub struct Outcome {
    pub code: u32,
    pub stdout: String,
    pub stderr: String,
}

impl Bed {
    /// Starts an agent and greets it.
    pub async fn new() -> Self {
        Self::greeted(None).await
    }

    /// Starts an agent that has made ahead what the first container will want, and greets it.
    pub async fn ahead() -> Self {
        Self::greeted(Some(AHEAD)).await
    }

    /// Starts an agent that finds `file` where the kernel is told to forget files, which forgets none of the machine's, and greets it.
    pub async fn forgetting_by(file: &Path) -> Self {
        Self::greeted(file.to_str()).await
    }

    async fn greeted(how: Option<&str>) -> Self {
        let bed = Self::started(how).await;
        let hello = HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            ..Default::default()
        };
        bed.client.hello(Context::default(), &hello).await.unwrap();
        bed
    }

    /// Starts an agent.
    pub async fn ungreeted() -> Self {
        Self::started(None).await
    }

    async fn started(how: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().file_name().unwrap().to_str().unwrap().to_owned();
        let cgroup =
            cgroup2_mount().join(format!("bulkhead-test-{}", name.trim_start_matches('.')));
        fs::create_dir(&cgroup).unwrap();
        make_rootfs(&dir.path().join("rootfs"));
        let listener = UnixListener::bind(dir.path().join("control")).unwrap();
        let agent = Command::new(std::env::current_exe().unwrap())
            .arg(AGENT_MODE)
            .arg(dir.path())
            .arg(&cgroup)
            .args(how)
            .stdin(Inherit::null())
            .process_group(0)
            .spawn()
            .unwrap();
        let (control, _) = listener.accept().await.unwrap();
        let socket = ttrpc::r#async::transport::Socket::new(control);
        let client = AgentClient::new(ttrpc::r#async::Client::new(socket));
        Self {
            client,
            agent,
            dir,
            cgroup,
        }
    }

    /// Folder of the root filesystem and whatever a test needs beside it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The root filesystem.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    /// A container's cgroup.
    pub fn cgroup_of(&self, id: &str) -> PathBuf {
        self.cgroup.join(format!("container-{id}"))
    }

    /// How many cgroups there are.
    pub fn cgroups(&self) -> usize {
        let entries = fs::read_dir(&self.cgroup).unwrap();
        entries
            .filter(|entry| entry.as_ref().unwrap().path().is_dir())
            .count()
    }

    /// A spec like runc's default one, for a shell command.
    pub fn spec(&self, script: &str) -> Value {
        json!({
            "ociVersion": "1.0.2-dev",
            "root": {"path": self.rootfs(), "readonly": false},
            "hostname": "box",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": ["/bin/sh", "-c", script],
                "env": ["PATH=/bin", "TERM=xterm"],
                "cwd": "/",
                "capabilities": {
                    "bounding": ["CAP_KILL", "CAP_NET_BIND_SERVICE"],
                    "effective": ["CAP_KILL", "CAP_NET_BIND_SERVICE"],
                    "permitted": ["CAP_KILL", "CAP_NET_BIND_SERVICE"]
                },
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512}],
                "noNewPrivileges": true
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                 "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                 "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs",
                 "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                 "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
            ],
            "linux": {
                "namespaces": [
                    {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                    {"type": "mount"}, {"type": "cgroup"}
                ],
                "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/scsi", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
            }
        })
    }

    /// Creates a container with these streams.
    pub async fn create(
        &self,
        id: &str,
        spec: &Value,
        stdio: Stdio,
    ) -> Result<u32, (Code, String)> {
        self.create_joining(id, spec, stdio, &[]).await
    }

    /// The same, with namespaces (type and container) to join.
    pub async fn create_joining(
        &self,
        id: &str,
        spec: &Value,
        stdio: Stdio,
        join: &[(&str, &str)],
    ) -> Result<u32, (Code, String)> {
        let join = join.iter().map(|&(kind, container)| NamespaceOf {
            type_: kind.to_owned(),
            container_id: container.to_owned(),
            ..Default::default()
        });
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            spec_json: serde_json::to_vec(spec).unwrap(),
            stdio: Some(stdio).into(),
            join: join.collect(),
            bundle: self.dir().display().to_string(),
            ..Default::default()
        };
        let response = self
            .client
            .create_container(Context::default(), &request)
            .await;
        response.map(|response| response.pid).map_err(status)
    }

    pub async fn start(&self, id: &str) -> Result<(), (Code, String)> {
        let request = StartContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        let response = self
            .client
            .start_container(Context::default(), &request)
            .await;
        response.map(drop).map_err(status)
    }

    /// A process like runc's default one, for a shell command.
    pub fn process(&self, script: &str) -> Value {
        json!({
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/sh", "-c", script],
            "env": ["PATH=/bin"],
            "cwd": "/"
        })
    }

    /// A container that runs until it is killed.
    pub async fn running(&self, id: &str) -> u32 {
        let spec = self.spec("exec sleep 1000");
        let pid = self.create(id, &spec, Stdio::default()).await.unwrap();
        self.start(id).await.unwrap();
        pid
    }

    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        stdio: Stdio,
    ) -> Result<u32, (Code, String)> {
        self.exec_below(id, exec_id, "", process, stdio).await
    }

    /// Waits until the agent has no child: those who close last what a container has left are not waited for by it.
    pub async fn without_children(&self) {
        let children = format!("/proc/{0}/task/{0}/children", self.agent.id());
        while fs::read_to_string(&children).unwrap() != "" {
            assert_eq!(self.stats("none").await.unwrap_err().0, Code::NOT_FOUND);
        }
    }

    pub async fn exec_below(
        &self,
        id: &str,
        exec_id: &str,
        cgroup: &str,
        process: &Value,
        stdio: Stdio,
    ) -> Result<u32, (Code, String)> {
        let request = ExecProcessRequest {
            cgroup: cgroup.to_owned(),
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            process_json: serde_json::to_vec(process).unwrap(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let response = self.client.exec_process(Context::default(), &request).await;
        response.map(|response| response.pid).map_err(status)
    }

    pub async fn delete_exec(&self, id: &str, exec_id: &str) -> Result<(), (Code, String)> {
        let request = DeleteProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        let response = self
            .client
            .delete_process(Context::default(), &request)
            .await;
        response.map(drop).map_err(status)
    }

    pub async fn resize(
        &self,
        id: &str,
        exec_id: &str,
        width: u32,
        height: u32,
    ) -> Result<(), (Code, String)> {
        let request = ResizeTerminalRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            width,
            height,
            ..Default::default()
        };
        let response = self
            .client
            .resize_terminal(Context::default(), &request)
            .await;
        response.map(drop).map_err(status)
    }

    pub async fn pause(&self, id: &str) -> Result<(), (Code, String)> {
        let request = PauseContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        let response = self
            .client
            .pause_container(Context::default(), &request)
            .await;
        response.map(drop).map_err(status)
    }

    pub async fn resume(&self, id: &str) -> Result<(), (Code, String)> {
        let request = ResumeContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        let response = self
            .client
            .resume_container(Context::default(), &request)
            .await;
        response.map(drop).map_err(status)
    }

    pub async fn update(&self, id: &str, resources: &Value) -> Result<(), (Code, String)> {
        let request = UpdateContainerRequest {
            container_id: id.to_owned(),
            resources_json: serde_json::to_vec(resources).unwrap(),
            ..Default::default()
        };
        let response = self
            .client
            .update_container(Context::default(), &request)
            .await;
        response.map(drop).map_err(status)
    }

    pub async fn stats(&self, id: &str) -> Result<ContainerStatsResponse, (Code, String)> {
        let request = ContainerStatsRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        let response = self
            .client
            .container_stats(Context::default(), &request)
            .await;
        response.map_err(status)
    }

    /// Pids and exec ids.
    pub async fn processes(&self, id: &str) -> Result<Vec<(u32, String)>, (Code, String)> {
        let request = ListProcessesRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        let response = self
            .client
            .list_processes(Context::default(), &request)
            .await;
        let entries = response.map_err(status)?.processes.into_iter();
        Ok(entries.map(|entry| (entry.pid, entry.exec_id)).collect())
    }

    pub async fn wait_oom(
        &self,
        id: &str,
        seen: impl Into<Option<u64>>,
    ) -> Result<u64, (Code, String)> {
        let request = WaitOomRequest {
            container_id: id.to_owned(),
            seen: seen.into(),
            ..Default::default()
        };
        let response = self.client.wait_oom(Context::default(), &request).await;
        response.map(|response| response.kills).map_err(status)
    }

    /// Whether containers' cgroups have this controller.
    pub fn has_controller(&self, name: &str) -> bool {
        let controllers = fs::read_to_string(self.cgroup.join("cgroup.controllers")).unwrap();
        controllers.split_whitespace().any(|has| has == name)
    }

    /// Runs a process in a container to its end and forgets it.
    pub async fn run_exec(&self, id: &str, process: &Value) -> Result<Outcome, (Code, String)> {
        let exec_id = "exec";
        self.exec(id, exec_id, process, all_pipes()).await?;
        let input = self.stream_of(id, exec_id, StreamKind::STDIN).await;
        let mut output = self.stream_of(id, exec_id, StreamKind::STDOUT).await;
        let mut errors = self.stream_of(id, exec_id, StreamKind::STDERR).await;
        drop(input);
        let (mut stdout, mut stderr) = (String::new(), String::new());
        let (_, _, exit) = tokio::join!(
            output.read_to_string(&mut stdout),
            errors.read_to_string(&mut stderr),
            self.wait_exec(id, exec_id)
        );
        self.delete_exec(id, exec_id).await?;
        Ok(Outcome {
            code: exit?.exit_code,
            stdout,
            stderr,
        })
    }

    /// The standard output of a process that must succeed and write no errors.
    pub async fn exec_output(&self, id: &str, process: &Value) -> String {
        let outcome = self.run_exec(id, process).await.unwrap();
        assert_eq!(
            (outcome.code, outcome.stderr.as_str()),
            (0, ""),
            "{}",
            outcome.stdout
        );
        outcome.stdout
    }

    pub async fn signal(&self, id: &str, signal: u32, all: bool) -> Result<(), (Code, String)> {
        self.send_signal(id, "", signal, all).await
    }

    pub async fn signal_exec(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
    ) -> Result<(), (Code, String)> {
        self.send_signal(id, exec_id, signal, false).await
    }

    async fn send_signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), (Code, String)> {
        let request = SignalProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        let response = self
            .client
            .signal_process(Context::default(), &request)
            .await;
        response.map(drop).map_err(status)
    }

    pub async fn wait(&self, id: &str) -> Result<WaitProcessResponse, (Code, String)> {
        self.wait_exec(id, "").await
    }

    pub async fn wait_exec(
        &self,
        id: &str,
        exec_id: &str,
    ) -> Result<WaitProcessResponse, (Code, String)> {
        let request = WaitProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        let response = self.client.wait_process(Context::default(), &request).await;
        response.map_err(status)
    }

    pub async fn delete(&self, id: &str) -> Result<(), (Code, String)> {
        let request = DeleteContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        let response = self
            .client
            .delete_container(Context::default(), &request)
            .await;
        response.map(drop).map_err(status)
    }

    /// Opens one of a container's streams.
    pub async fn stream(&self, id: &str, kind: StreamKind) -> UnixStream {
        self.stream_of(id, "", kind).await
    }

    /// Opens one of a process's streams.
    pub async fn stream_of(&self, id: &str, exec_id: &str, kind: StreamKind) -> UnixStream {
        self.open(id, exec_id, kind, 0).await
    }

    /// Opens the stream of one of a process's descriptors beyond the standard ones.
    pub async fn descriptor(&self, id: &str, exec_id: &str, number: u32) -> UnixStream {
        self.open(id, exec_id, StreamKind::DESCRIPTOR, number).await
    }

    async fn open(&self, id: &str, exec_id: &str, kind: StreamKind, descriptor: u32) -> UnixStream {
        let header = StreamHeader {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            kind: kind.into(),
            descriptor,
            ..Default::default()
        };
        let header = header.write_to_bytes().unwrap();
        let mut stream = UnixStream::connect(self.dir().join("streams"))
            .await
            .unwrap();
        stream.write_u32(header.len() as u32).await.unwrap();
        stream.write_all(&header).await.unwrap();
        stream
    }

    /// Runs a container to its end and deletes it.
    pub async fn run(&self, spec: &Value) -> Outcome {
        self.run_with(spec, b"").await.unwrap()
    }

    /// The same, with input.
    pub async fn run_with(&self, spec: &Value, stdin: &[u8]) -> Result<Outcome, (Code, String)> {
        let id = "box";
        self.create(id, spec, all_pipes()).await?;
        let mut input = self.stream(id, StreamKind::STDIN).await;
        let mut output = self.stream(id, StreamKind::STDOUT).await;
        let mut errors = self.stream(id, StreamKind::STDERR).await;
        let ran = async {
            self.start(id).await?;
            let (mut stdout, mut stderr) = (String::new(), String::new());
            let write = async {
                // The process may end before it has read everything.
                let _ = input.write_all(stdin).await;
                let _ = input.shutdown().await;
            };
            let (_, _, _, exit) = tokio::join!(
                write,
                output.read_to_string(&mut stdout),
                errors.read_to_string(&mut stderr),
                self.wait(id)
            );
            Ok(Outcome {
                code: exit?.exit_code,
                stdout,
                stderr,
            })
        }
        .await;
        self.delete(id).await?;
        ran
    }

    /// The standard output of a shell command that must succeed and write no errors.
    pub async fn output(&self, spec: &Value) -> String {
        let outcome = self.run(spec).await;
        assert_eq!(
            (outcome.code, outcome.stderr.as_str()),
            (0, ""),
            "{}",
            outcome.stdout
        );
        outcome.stdout
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        if let Err(error) = clear_cgroup(&self.cgroup) {
            eprintln!("left behind: {}: {error}", self.cgroup.display());
        }
    }
}

/// Kills what is in a cgroup and removes it with everything below.
fn clear_cgroup(cgroup: &Path) -> std::io::Result<()> {
    fs::write(cgroup.join("cgroup.kill"), "1")?;
    let mut events = fs::File::open(cgroup.join("cgroup.events"))?;
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        if text.contains("populated 0") {
            break;
        }
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        poll(&mut fds, PollTimeout::from(5000u16))?;
    }
    remove_tree(cgroup)
}

fn remove_tree(cgroup: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(cgroup)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_tree(&path)?;
        }
    }
    fs::remove_dir(cgroup)
}

/// stdin, stdout and stderr.
pub fn all_pipes() -> Stdio {
    Stdio {
        stdin: true,
        stdout: true,
        stderr: true,
        ..Default::default()
    }
}

fn status(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("not a status: {other}"),
    }
}

fn cgroup2_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mount = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"))
        .expect("no cgroup2 is mounted");
    PathBuf::from(mount[1])
}

/// busybox, links to its applets, and a few files.
fn make_rootfs(root: &Path) {
    for dir in ["bin", "etc", "tmp", "data", "home/me"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "echo", "ls", "id", "env", "pwd", "sleep", "hostname", "stat", "mount",
        "grep", "test", "readlink", "ps", "kill", "true", "false", "touch", "mkdir", "head", "wc",
        "tty", "stty", "ifconfig", "sort", "setsid", "tr",
    ] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nme:x:1000:1000::/home/me:/bin/sh\n",
    )
    .unwrap();
    fs::write(root.join("etc/plain"), "no program\n").unwrap();
}

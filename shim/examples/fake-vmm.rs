//! A stand-in for the VMM and its guest, for tests of the server and the command line where KVM can't boot a kernel: it
//! speaks the control socket, the hybrid vsock and the agent's API, and runs the container's program as a plain process.
//!
//! `FAKE_VMM` chooses how it misbehaves, and `FAKE_VMM_LOG` names a file that tells what the agent was asked.

#![allow(clippy::unwrap_used)] // a failure of a test is a panic

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use async_trait::async_trait;
use bulkhead_e2e::command::hand_over;
use bulkhead_protocol::agent::{
    ContainerStatsRequest, ContainerStatsResponse, CreateContainerRequest, CreateContainerResponse,
    DeleteContainerRequest, DeleteContainerResponse, DeleteProcessRequest, DeleteProcessResponse,
    ExecProcessRequest, ExecProcessResponse, Flow, ForgetFilesRequest, ForgetFilesResponse,
    HelloRequest, HelloResponse, ShutdownRequest, ShutdownResponse, SignalProcessRequest,
    SignalProcessResponse, StartContainerRequest, StartContainerResponse, StreamHeader, StreamKind,
    WaitOomRequest, WaitOomResponse, WaitProcessRequest, WaitProcessResponse,
};
use bulkhead_protocol::agent_ttrpc::{Agent, create_agent};
use bulkhead_protocol::{CONTROL_PORT, PROTOCOL_VERSION};
use bulkhead_vmm::control::{CONTROL_FD, Event, Message, Request, Response, exit_code};
use bulkhead_vmm::socket::{recv_request, send_message};
use protobuf::{Enum, Message as _};
use serde_json::Value;
use tokio::sync::{Notify, watch};
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, TtrpcContext};
use ttrpc::{Code, get_status};

/// A process, a kind, and the number of a descriptor.
type Place = (String, i32, u32);
type Streams = Arc<(Mutex<HashMap<Place, UnixStream>>, Condvar)>;

fn main() {
    let mode = std::env::var("FAKE_VMM").unwrap_or_default();
    // SAFETY: the parent has put the control socket here for this process alone.
    let control = Arc::new(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    let Ok((Request::Boot(config), fds)) = recv_request(&*control) else {
        std::process::exit(exit_code::SETUP);
    };
    assert_eq!(fds.len(), if config.serial { 4 } else { 3 });
    match mode.as_str() {
        "refuse" => {
            let message = "memory is too small".into();
            let _ = send_message(&*control, &Message::Response(Response::Error { message }));
        }
        "die" => std::process::exit(3),
        _ => {
            let _ = send_message(&*control, &Message::Response(Response::Ok));
        }
    }
    match mode.as_str() {
        "crash" => end(
            &control,
            exit_code::CRASH,
            "vcpu 0: KVM internal error, suberror 1",
        ),
        "panic" => end(&control, exit_code::RESET, "the guest reset itself"),
        "refuse" | "silent" => {}
        _ => {
            let streams = Streams::default();
            if mode != "deaf" {
                serve_vsock(&config.vsock_path, &streams);
            }
            let (mode, control) = (mode.clone(), control.clone());
            thread::spawn(move || serve_agent(&mode, control, streams));
        }
    }
    loop {
        match recv_request(&*control) {
            Ok((Request::Shutdown, _)) => {
                end(&control, exit_code::POWER_OFF, "shut down by request")
            }
            // Its processes run on: who is asked nothing meanwhile can't tell.
            Ok((request @ (Request::Pause | Request::Resume), _)) => {
                if matches!(request, Request::Resume) {
                    log("resumed");
                } else if mode == "many files" {
                    // On the last requests before it stands still.
                    tell_many_files(&control);
                }
                let _ = send_message(&*control, &Message::Response(Response::Ok));
            }
            Ok(_) => {}
            Err(_) => std::process::exit(exit_code::ORPHANED),
        }
    }
}

fn end(control: &OwnedFd, exit_code: i32, reason: &str) -> ! {
    let event = Event::Ended {
        exit_code,
        reason: reason.into(),
        timeline: vec![],
    };
    let _ = send_message(control, &Message::Event(event));
    std::process::exit(exit_code);
}

fn tell_many_files(control: &OwnedFd) {
    let _ = send_message(control, &Message::Event(Event::ManyFiles));
}

/// Takes the streams' connections.
fn serve_vsock(path: &Path, streams: &Streams) {
    let listener = UnixListener::bind(path).unwrap();
    let streams = streams.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut line = String::new();
            BufReader::with_capacity(1, &stream)
                .read_line(&mut line)
                .unwrap();
            assert_eq!(line, "CONNECT 1025\n");
            stream.write_all(b"OK 7\n").unwrap();
            let mut length = [0; 4];
            stream.read_exact(&mut length).unwrap();
            let mut body = vec![0; u32::from_be_bytes(length) as usize];
            stream.read_exact(&mut body).unwrap();
            let header = StreamHeader::parse_from_bytes(&body).unwrap();
            let (map, arrived) = &*streams;
            let place = (header.exec_id, header.kind.value(), header.descriptor);
            map.lock().unwrap().insert(place, stream);
            arrived.notify_all();
        }
    });
}

/// Calls the host on the agent's port.
async fn dial() -> std::io::Result<tokio::net::UnixStream> {
    tokio::net::UnixStream::connect(format!("vsock_{CONTROL_PORT}")).await
}

/// Dials the host and serves the agent's API on the connection.
fn serve_agent(mode: &str, control: Arc<OwnedFd>, streams: Streams) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let stream = dial().await.unwrap();
        let agent = FakeAgent {
            mode: mode.to_owned(),
            control,
            streams,
            processes: Processes::default(),
            asked: Notify::new(),
            forgetting: Notify::new(),
            ooms: watch::Sender::new(0),
        };
        let connection = futures_stream(stream);
        let mut server = Server::new()
            .add_listener(Listener::new(connection))
            .register_service(create_agent(Arc::new(agent)));
        server.start().await.unwrap();
        std::future::pending::<()>().await;
    });
}

/// A listener's stream of connections that has this one only.
fn futures_stream(
    stream: tokio::net::UnixStream,
) -> impl futures::Stream<Item = std::io::Result<tokio::net::UnixStream>> + Send {
    use futures::StreamExt;
    futures::stream::iter([Ok(stream)]).chain(futures::stream::pending())
}

/// The container's init, by an empty name, or an exec'd process.
struct Process {
    args: Vec<String>,
    env: Vec<(String, String)>,
    wanted: Vec<Place>,
    descriptors: Vec<Flow>,
    pid: Option<u32>,
    exit: watch::Sender<Option<u32>>,
}

struct FakeAgent {
    mode: String,
    control: Arc<OwnedFd>,
    streams: Streams,
    processes: Processes,
    /// Whether it has been asked if it is still there.
    asked: Notify,
    /// Lets it forget files, one time: SIGUSR2 in the mode "many files", in which SIGUSR1 has it cache many.
    forgetting: Notify,
    /// Kills for want of memory: SIGUSR1 in the mode "ooms".
    ooms: watch::Sender<u64>,
}

type Processes = Arc<Mutex<HashMap<String, Process>>>;

impl FakeAgent {
    fn add(&self, exec_id: &str, process: &Value, stdio: &bulkhead_protocol::agent::Stdio) {
        let args = process["args"].as_array().unwrap();
        let env = process["env"].as_array().into_iter().flatten();
        let wanted = [
            (stdio.stdin, StreamKind::STDIN),
            (stdio.stdout, StreamKind::STDOUT),
            (stdio.stderr, StreamKind::STDERR),
        ];
        let flows = stdio.descriptors.iter();
        let descriptors: Vec<Flow> = flows.map(|flow| flow.enum_value().unwrap()).collect();
        let standard = wanted.iter().filter(|w| w.0).map(|w| (w.1, 0));
        let further = (3..)
            .zip(&descriptors)
            .filter(|(_, flow)| **flow != Flow::NOWHERE)
            .map(|(number, _)| (StreamKind::DESCRIPTOR, number));
        let process = Process {
            args: args
                .iter()
                .map(|arg| arg.as_str().unwrap().to_owned())
                .collect(),
            env: env
                .filter_map(|pair| pair.as_str()?.split_once('='))
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            wanted: standard
                .chain(further)
                .filter(|_| self.mode != "deaf")
                .map(|(kind, number)| (exec_id.to_owned(), kind.value(), number))
                .collect(),
            descriptors,
            pid: None,
            exit: watch::Sender::new(None),
        };
        let mut processes = self.processes.lock().unwrap();
        processes.insert(exec_id.to_owned(), process);
    }
}

/// Executes a program once its streams are there.
fn execute(exec_id: &str, processes: &Processes, streams: &Streams) -> ttrpc::Result<()> {
    let wanted = processes.lock().unwrap()[exec_id].wanted.clone();
    let (map, arrived) = &**streams;
    let mut streams = arrived
        .wait_while(map.lock().unwrap(), |map| {
            !wanted.iter().all(|name| map.contains_key(name))
        })
        .unwrap();
    let mut processes = processes.lock().unwrap();
    let process = processes.get_mut(exec_id).unwrap();
    if process.exit.borrow().is_some() {
        return Ok(());
    }
    let mut end = |kind: StreamKind, number| {
        let place = (exec_id.to_owned(), kind.value(), number);
        let null = || {
            std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/null")
        };
        match streams.remove(&place) {
            Some(stream) => OwnedFd::from(stream),
            None => null().unwrap().into(),
        }
    };
    let descriptors: Vec<OwnedFd> = (3..)
        .zip(&process.descriptors)
        .map(|(number, _)| end(StreamKind::DESCRIPTOR, number))
        .collect();
    let mut command = Command::new(&process.args[0]);
    hand_over(&mut command, descriptors);
    command
        .args(&process.args[1..])
        .envs(process.env.clone())
        .stdin(end(StreamKind::STDIN, 0))
        .stdout(end(StreamKind::STDOUT, 0))
        .stderr(end(StreamKind::STDERR, 0));
    // The processes of a guest end with it.
    // SAFETY: a system call on a number between fork and exec.
    unsafe {
        command.pre_exec(|| {
            Ok(nix::sys::prctl::set_pdeathsig(
                nix::sys::signal::Signal::SIGKILL,
            )?)
        });
    }
    let mut child = command.spawn().map_err(|_| {
        let program = &process.args[0];
        let message = format!("exec: {program:?}: executable file not found in $PATH");
        status(Code::NOT_FOUND, message)
    })?;
    process.pid = Some(child.id());
    log("executed");
    let exit = process.exit.clone();
    thread::spawn(move || {
        let end = child.wait().unwrap();
        let code = end
            .code()
            .or(end.signal().map(|signal| signal + 128))
            .unwrap();
        exit.send_replace(Some(code as u32));
    });
    Ok(())
}

/// Tells the test what has been asked.
fn log(line: &str) {
    if let Some(path) = std::env::var_os("FAKE_VMM_LOG") {
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(path);
        writeln!(file.unwrap(), "{line}").unwrap();
    }
}

fn status(code: Code, message: String) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, message))
}

#[async_trait]
impl Agent for FakeAgent {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> ttrpc::Result<HelloResponse> {
        assert_eq!(request.protocol_version, PROTOCOL_VERSION);
        // The host has taken the agent's call by now, and nobody else gets through to it.
        if self.mode == "dial twice" && dial().await.is_ok() {
            let message = "a second call was taken".into();
            return Err(status(Code::INTERNAL, message));
        }
        let skew = u32::from(self.mode == "version");
        Ok(HelloResponse {
            protocol_version: PROTOCOL_VERSION + skew,
            agent_version: "9.9".into(),
            ..Default::default()
        })
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        match self.mode.as_str() {
            "slow create" | "mute" => std::future::pending().await,
            "late create" => self.asked.notified().await,
            _ => {}
        }
        let spec: Value = serde_json::from_slice(&request.spec_json).unwrap();
        // What the guest would mount from the share has to be there.
        let rootfs = spec["root"]["path"].as_str().unwrap();
        let on_host = rootfs.replace("/run/bulkhead/share", "share");
        if !Path::new(&on_host).join("marker").exists() {
            return Err(status(Code::INTERNAL, format!("{on_host} has no marker")));
        }
        self.add("", &spec["process"], &request.stdio);
        Ok(CreateContainerResponse {
            pid: 2,
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        _: StartContainerRequest,
    ) -> ttrpc::Result<StartContainerResponse> {
        if self.mode == "die at start" {
            std::process::exit(3);
        }
        execute("", &self.processes, &self.streams)?;
        Ok(StartContainerResponse::default())
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<ExecProcessResponse> {
        log("exec_process");
        if self.mode == "slow exec" {
            self.asked.notified().await;
        }
        let process: Value = serde_json::from_slice(&request.process_json).unwrap();
        self.add(&request.exec_id, &process, &request.stdio);
        // Its streams come after the answer.
        let (processes, streams) = (self.processes.clone(), self.streams.clone());
        thread::spawn(move || {
            execute(&request.exec_id, &processes, &streams).unwrap();
            // The process ends with the thread that has started it.
            loop {
                thread::park();
            }
        });
        Ok(ExecProcessResponse {
            pid: 3,
            ..Default::default()
        })
    }

    /// Without a container it is what the host asks to see whether anything is answered.
    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: ContainerStatsRequest,
    ) -> ttrpc::Result<ContainerStatsResponse> {
        if self.mode == "mute" {
            std::future::pending::<()>().await;
        }
        if request.container_id.is_empty() {
            self.asked.notify_one();
            return Err(status(Code::INVALID_ARGUMENT, "no container".into()));
        }
        Ok(ContainerStatsResponse::default())
    }

    async fn wait_oom(
        &self,
        _: &TtrpcContext,
        request: WaitOomRequest,
    ) -> ttrpc::Result<WaitOomResponse> {
        let mut ooms = self.ooms.subscribe();
        let kills = match request.seen {
            Some(seen) => {
                log(&format!("wait_oom by {}", self.ooms.receiver_count()));
                *ooms.wait_for(|&kills| kills > seen).await.unwrap()
            }
            None => {
                let kills = *ooms.borrow();
                log("ooms asked");
                kills
            }
        };
        Ok(WaitOomResponse {
            kills,
            ..Default::default()
        })
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        _: DeleteProcessRequest,
    ) -> ttrpc::Result<DeleteProcessResponse> {
        log("delete_process");
        Ok(DeleteProcessResponse::default())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: WaitProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let mut exit = {
            let processes = self.processes.lock().unwrap();
            processes[&request.exec_id].exit.subscribe()
        };
        let exit_code = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        Ok(WaitProcessResponse {
            exit_code,
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<SignalProcessResponse> {
        if self.mode == "unwilling" {
            std::future::pending::<()>().await;
        }
        if self.mode == "undying" {
            return Ok(SignalProcessResponse::default());
        }
        if self.mode == "ooms" && request.signal == nix::libc::SIGUSR1.unsigned_abs() {
            self.ooms.send_modify(|kills| *kills += 1);
            return Ok(SignalProcessResponse::default());
        }
        if self.mode == "many files" {
            match i32::try_from(request.signal).unwrap() {
                nix::libc::SIGUSR1 => tell_many_files(&self.control),
                nix::libc::SIGUSR2 => self.forgetting.notify_one(),
                _ => {}
            }
            if request.signal != nix::libc::SIGKILL.unsigned_abs() {
                return Ok(SignalProcessResponse::default());
            }
        }
        let mut processes = self.processes.lock().unwrap();
        let process = processes.get_mut(&request.exec_id).unwrap();
        match process.pid {
            Some(pid) => {
                let signal = match request.signal {
                    0 => None,
                    number => Some(nix::sys::signal::Signal::try_from(number as i32).unwrap()),
                };
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal);
            }
            // What waits for its exec.
            None if request.signal != 0 => {
                process.exit.send_replace(Some(128 + request.signal));
            }
            None => {}
        }
        Ok(SignalProcessResponse::default())
    }

    async fn forget_files(
        &self,
        _: &TtrpcContext,
        _: ForgetFilesRequest,
    ) -> ttrpc::Result<ForgetFilesResponse> {
        log("forget_files");
        self.forgetting.notified().await;
        log("forgotten");
        Ok(ForgetFilesResponse::default())
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        _: DeleteContainerRequest,
    ) -> ttrpc::Result<DeleteContainerResponse> {
        Ok(DeleteContainerResponse::default())
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _: ShutdownRequest,
    ) -> ttrpc::Result<ShutdownResponse> {
        for process in self.processes.lock().unwrap().values() {
            if let Some(pid) = process.pid.filter(|_| process.exit.borrow().is_none()) {
                let pid = nix::unistd::Pid::from_raw(pid as i32);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
        if self.mode == "unwilling" {
            std::future::pending::<()>().await;
        }
        if self.mode == "linger" {
            return Ok(ShutdownResponse::default());
        }
        end(&self.control, exit_code::POWER_OFF, "the guest powered off")
    }
}

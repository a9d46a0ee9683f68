//! Runs commands: spawns them, moves their stdio between pipes and the port within the windows, reaps every
//! child of PID 1, and reports how each command ended, after the last byte of its output.

use super::cgroups::Group;
use super::{Port, Result, send, step};
use crate::frame::{CHUNK, Frame, Message, Start, Stdio, WINDOW};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::Pid;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{self, ChildStdin, Command};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All running commands.
pub struct Commands {
    port: Port,
    cgroup_v1: bool,
    running: Arc<Mutex<HashMap<u32, Arc<Running>>>>,
    /// Who waits for which process. Locked while one is spawned, so that none ends unknown.
    waiting: Arc<Mutex<HashMap<Pid, Sender<i32>>>>,
}

struct Running {
    pid: Pid,
    group: Option<Group>,
    stdin: Mutex<Option<Sender<Vec<u8>>>>,
    stdout: Window,
    stderr: Window,
    /// Closed when the command has ended: the pumps take what is there and stop.
    ended: Mutex<Option<io::PipeWriter>>,
}

/// How much may still be sent before it is acknowledged; `None` when nobody listens any more.
struct Window(Mutex<Option<usize>>, Condvar);

impl Window {
    fn new() -> Self {
        Self(Mutex::new(Some(WINDOW)), Condvar::new())
    }

    /// Blocks until something may be sent.
    fn take(&self) -> Option<usize> {
        let mut left = held(&self.0);
        while *left == Some(0) {
            left = self.1.wait(left).unwrap_or_else(PoisonError::into_inner);
        }
        *left
    }

    fn used(&self, count: usize) {
        if let Some(left) = &mut *held(&self.0) {
            *left = left.saturating_sub(count);
        }
    }

    fn acknowledged(&self, count: usize) {
        if let Some(left) = &mut *held(&self.0) {
            *left = left.saturating_add(count).min(WINDOW);
        }
        self.1.notify_all();
    }

    fn abandon(&self) {
        *held(&self.0) = None;
        self.1.notify_all();
    }
}

impl Commands {
    /// Starts the thread that reaps.
    pub fn new(port: Port, cgroup_v1: bool) -> Result<Self> {
        // Blocked in every thread, so that only the reaper takes it.
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGCHLD);
        signals.thread_block().map_err(step("SIGCHLD"))?;
        let waiting = Arc::new(Mutex::new(HashMap::new()));
        let for_reaper = waiting.clone();
        thread::spawn(move || reap(&signals, &for_reaper));
        Ok(Self {
            port,
            cgroup_v1,
            running: Arc::default(),
            waiting,
        })
    }

    /// Acts on a frame of a command's stream.
    pub fn handle(&self, stream: u32, message: Message) {
        if let Message::Start(start) = message {
            if let Err((errno, text)) = self.start(stream, start) {
                send(
                    &self.port,
                    &Frame::new(stream, Message::Rejected(errno, text)),
                );
            }
            return;
        }
        let Some(command) = held(&self.running).get(&stream).cloned() else {
            return;
        };
        match message {
            Message::Data(Stdio::In, data) => {
                let mut stdin = held(&command.stdin);
                if data.is_empty() {
                    *stdin = None;
                } else if let Some(stdin) = &*stdin {
                    let _ = stdin.send(data);
                }
            }
            Message::Ack(Stdio::Out, count) => command.stdout.acknowledged(count as usize),
            Message::Ack(Stdio::Err, count) => command.stderr.acknowledged(count as usize),
            Message::Signal(number) => {
                if let Ok(signal) = Signal::try_from(number) {
                    let _ = killpg(command.pid, signal);
                }
            }
            Message::Kill | Message::HangUp => {
                if message == Message::HangUp {
                    command.stdout.abandon();
                    command.stderr.abandon();
                }
                let _ = killpg(command.pid, Signal::SIGKILL);
                if command.group.is_some() {
                    // It waits for the last process, which must not hold up the other commands.
                    thread::spawn(move || command.group.as_ref().map(Group::kill));
                }
            }
            _ => {}
        }
    }

    fn start(&self, stream: u32, start: Start) -> std::result::Result<(), (i32, String)> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: io::Error| {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                (errno, format!("{what}: {error}"))
            }
        };
        if start.fresh {
            // Twice: the first round frees the overlay's inodes that pin those of 9p.
            for _ in 0..2 {
                let _ = fs::write("/proc/sys/vm/drop_caches", "3");
            }
        }
        let (program, arguments) = start
            .argv
            .split_first()
            .ok_or((libc::EINVAL, "empty command".to_owned()))?;
        let program = OsStr::from_bytes(program);
        let mut command = Command::new(program);
        command
            .args(arguments.iter().map(|a| OsStr::from_bytes(a)))
            .env_clear()
            .envs(environment(&start.env))
            .stdin(process::Stdio::piped())
            .stdout(process::Stdio::piped())
            .stderr(process::Stdio::piped());
        let cwd = OsStr::from_bytes(&start.cwd);
        if !std::path::Path::new(cwd).is_dir() {
            let text = format!("working directory {}: no such folder", cwd.display());
            return Err((libc::EIO, text));
        }
        command.current_dir(cwd);
        let group = match self.cgroup_v1 {
            true => None,
            false => Some(Group::new(stream).map_err(|e| (libc::EIO, e.to_string()))?),
        };
        let entrance = match &group {
            Some(group) => Some(group.entrance().map_err(|e| (libc::EIO, e.to_string()))?),
            None => None,
        };
        // SAFETY: system calls only, on fds that are open until exec; no memory is allocated.
        unsafe {
            command.pre_exec(move || {
                nix::unistd::setsid()?;
                if let Some(mut entrance) = entrance.as_ref() {
                    entrance.write_all(b"0")?;
                }
                let path = c"/proc/self/oom_score_adj";
                let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                if fd < 0 || libc::write(fd, b"0".as_ptr().cast(), 1) != 1 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let (exited, exit) = mpsc::channel();
        let mut child = {
            let mut waiting = held(&self.waiting);
            let spawned = command.spawn();
            let child = match spawned {
                Ok(child) => child,
                Err(error) => {
                    if let Some(group) = &group {
                        group.remove();
                    }
                    return Err(failed(&program.display().to_string())(error));
                }
            };
            waiting.insert(Pid::from_raw(child.id() as i32), exited);
            child
        };
        let (ended_reader, ended) = io::pipe().map_err(failed("pipe"))?;
        let running = Arc::new(Running {
            pid: Pid::from_raw(child.id() as i32),
            group,
            stdin: Mutex::new(None),
            stdout: Window::new(),
            stderr: Window::new(),
            ended: Mutex::new(Some(ended)),
        });
        let mut pumps = vec![];
        if let Some(stdin) = child.stdin.take() {
            let (to_stdin, from_port) = mpsc::channel();
            *held(&running.stdin) = Some(to_stdin);
            let port = self.port.clone();
            thread::spawn(move || feed(stdin, &from_port, &port, stream));
        }
        held(&self.running).insert(stream, running.clone());
        send(&self.port, &Frame::new(stream, Message::Started));
        if let Some(pipe) = child.stdout.take() {
            let pump = self.pump(stream, Stdio::Out, pipe, &running, &ended_reader);
            pumps.push(pump.map_err(failed("stdout"))?);
        }
        if let Some(pipe) = child.stderr.take() {
            let pump = self.pump(stream, Stdio::Err, pipe, &running, &ended_reader);
            pumps.push(pump.map_err(failed("stderr"))?);
        }
        let port = self.port.clone();
        let all = self.running.clone();
        thread::spawn(move || {
            let code = exit.recv().unwrap_or(255);
            match &running.group {
                _ if start.keep => {}
                Some(group) => {
                    let left = group.count();
                    if left > 0 {
                        group.kill();
                        eprintln!("testhost: killed {left} processes left by command {stream}");
                    }
                }
                None => {
                    let _ = killpg(running.pid, Signal::SIGKILL);
                }
            }
            *held(&running.ended) = None;
            for pump in pumps {
                let _ = pump.join();
            }
            *held(&running.stdin) = None;
            if let Some(group) = &running.group {
                group.remove();
            }
            held(&all).remove(&stream);
            send(&port, &Frame::new(stream, Message::Exit(code)));
        });
        Ok(())
    }

    /// Moves output to the port until its end, or until the command has ended and nothing more is there.
    fn pump(
        &self,
        stream: u32,
        stdio: Stdio,
        mut pipe: impl Read + AsFd + Send + 'static,
        running: &Arc<Running>,
        ended: &io::PipeReader,
    ) -> io::Result<thread::JoinHandle<()>> {
        let ended = ended.try_clone()?;
        let port = self.port.clone();
        let running = running.clone();
        Ok(thread::spawn(move || {
            let window = match stdio {
                Stdio::Err => &running.stderr,
                _ => &running.stdout,
            };
            let mut buffer = vec![0; CHUNK];
            let mut abandoned = false;
            loop {
                let room = match window.take() {
                    Some(room) => room,
                    None => {
                        abandoned = true;
                        CHUNK
                    }
                };
                let mut fds = [
                    PollFd::new(pipe.as_fd(), PollFlags::POLLIN),
                    PollFd::new(ended.as_fd(), PollFlags::POLLIN),
                ];
                match poll(&mut fds, PollTimeout::NONE) {
                    Ok(_) => {}
                    Err(nix::Error::EINTR) => continue,
                    Err(_) => break,
                }
                let something = fds[0].any().unwrap_or(false);
                let over = fds[1].any().unwrap_or(false);
                if !something && over {
                    break;
                }
                if !something {
                    continue;
                }
                match pipe.read(&mut buffer[..room.min(CHUNK)]) {
                    Ok(0) => break,
                    Ok(count) if !abandoned => {
                        window.used(count);
                        let data = Message::Data(stdio, buffer[..count].to_vec());
                        send(&port, &Frame::new(stream, data));
                    }
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
        }))
    }
}

/// Writes what came over the port to the command's standard input; closes it when the sender is dropped.
fn feed(mut stdin: ChildStdin, from_port: &mpsc::Receiver<Vec<u8>>, port: &Port, stream: u32) {
    let mut open = true;
    for data in from_port {
        // A command that reads no more still has its input acknowledged, or the client would wait for ever.
        open = open && stdin.write_all(&data).is_ok();
        let ack = Message::Ack(Stdio::In, data.len() as u32);
        send(port, &Frame::new(stream, ack));
    }
}

fn environment(given: &[Vec<u8>]) -> Vec<(&OsStr, &OsStr)> {
    let own: [(&str, &str); 6] = [
        (
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ),
        ("HOME", "/root"),
        ("USER", "root"),
        ("LANG", "C.UTF-8"),
        ("TMPDIR", "/tmp"),
        ("BULKHEAD_TESTHOST", "1"),
    ];
    let mut all: Vec<_> = own
        .into_iter()
        .map(|(key, value)| (OsStr::new(key), OsStr::new(value)))
        .collect();
    for entry in given {
        if let Some(at) = entry.iter().position(|b| *b == b'=') {
            let (key, value) = (&entry[..at], &entry[at + 1..]);
            all.push((OsStr::from_bytes(key), OsStr::from_bytes(value)));
        }
    }
    all
}

/// Takes the status of every child that ends, orphans included.
fn reap(signals: &SigSet, waiting: &Mutex<HashMap<Pid, Sender<i32>>>) {
    loop {
        while reap_one(&mut held(waiting)) {}
        let _ = signals.wait();
    }
}

/// The lock keeps away from a child that is being spawned: if its exec fails, the standard library waits for it.
fn reap_one(waiting: &mut HashMap<Pid, Sender<i32>>) -> bool {
    let mut status = 0;
    // SAFETY: `status` lives through the call. (nix refuses to report real-time signals.)
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
    if pid <= 0 {
        return false;
    }
    let code = if libc::WIFEXITED(status) {
        libc::WEXITSTATUS(status)
    } else {
        128 + libc::WTERMSIG(status)
    };
    if let Some(exited) = waiting.remove(&Pid::from_raw(pid)) {
        let _ = exited.send(code);
    }
    true
}

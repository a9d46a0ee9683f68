//! The process of the host that stands for a process of a container: its pid is the one in pid files.
//!
//! It holds the streams that the command has inherited, passes on signals, and exits with the container's code, so
//! that whoever waits for it (conmon, containerd's shim for runc) learns what runc would tell. It is forked from the command
//! before that has any thread, waits until the container is made, and stays when the command has gone.

use std::fs;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::Path;

use anyhow::Context;
use bulkhead_runtime::id::ContainerId;
use bulkhead_runtime::state::StateDir;
use bulkhead_runtime::stdio::Stdio;
use bulkhead_runtime::view::View;
use bulkhead_vmm::fault;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{ForkResult, fchdir, fork, setsid};

use super::attach::{Streams, follow};
use super::client::Server;
use super::descriptors::Descriptors;
use super::signals::Signals;
use super::terminal;

/// Exit code when the sandbox is lost.
const LOST: i32 = 255;

/// What a proxy stands for.
#[derive(Debug)]
pub struct Job<'a> {
    /// The sandbox's state directory.
    pub state: &'a StateDir,
    /// The container.
    pub id: &'a ContainerId,
    /// The exec'd process; empty for the init.
    pub exec_id: &'a str,
    /// Which streams it attaches.
    pub stdio: Stdio,
    /// Those beyond the standard ones.
    pub descriptors: Descriptors,
    /// The slave of its terminal.
    pub terminal: Option<BorrowedFd<'a>>,
    /// Namespaces that it makes for itself: those that a client looks at in `/proc/<pid>/ns`.
    pub namespaces: CloneFlags,
    /// The ids of its user namespace, if it makes one.
    pub id_maps: IdMaps,
    /// What is to be seen in its mount namespace, if it makes one.
    pub view: Option<View>,
}

/// Lines of `/proc/<pid>/uid_map` and `gid_map`.
#[derive(Debug, Default)]
pub struct IdMaps {
    /// Users.
    pub users: String,
    /// Groups.
    pub groups: String,
}

/// A proxy that waits for its container. Dropping this ends it.
#[derive(Debug)]
pub struct Proxy {
    /// Its pid.
    pub pid: u32,
    go: PipeWriter,
}

impl Proxy {
    /// Forks it. Call it while there is one thread, and before there is a runtime: what tokio keeps for signals is not for
    /// two processes.
    pub fn fork(job: Job) -> anyhow::Result<Self> {
        let (ready_reader, ready_writer) = io::pipe()?;
        let (go_reader, go_writer) = io::pipe()?;
        let own = fs::File::open("/proc/self/ns/pid")?;
        if job.namespaces.contains(CloneFlags::CLONE_NEWPID) {
            unshare(CloneFlags::CLONE_NEWPID).context("cannot make a pid namespace")?;
        }
        // SAFETY: this process has one thread, so its child may do whatever it could.
        match unsafe { fork() }.context("cannot fork")? {
            ForkResult::Child => {
                drop((ready_reader, go_writer, own));
                std::process::exit(main(job, ready_writer, go_reader));
            }
            ForkResult::Parent { child } => {
                // For the children that are still to come: without this, a thread could not even be made.
                setns(&own, CloneFlags::CLONE_NEWPID).context("cannot leave a pid namespace")?;
                drop((ready_writer, go_reader));
                let mut problem = String::new();
                { ready_reader }.read_to_string(&mut problem)?;
                if !problem.is_empty() {
                    anyhow::bail!(
                        "cannot set up the process that stands for the container's: {problem}"
                    );
                }
                let pid = child.as_raw().unsigned_abs();
                if job.namespaces.contains(CloneFlags::CLONE_NEWUSER) {
                    job.id_maps.write(pid);
                }
                Ok(Self { pid, go: go_writer })
            }
        }
    }

    /// Lets it stand for its container: it exists.
    pub fn go(mut self) -> anyhow::Result<()> {
        self.go.write_all(&[1]).with_context(|| {
            format!(
                "process {}, which stands for the container's, was ended before that was ready: try again",
                self.pid
            )
        })
    }
}

impl IdMaps {
    /// Gives the maps to the user namespace of a process. A host that allowed it none refuses them.
    fn write(&self, pid: u32) {
        for (name, lines) in [("uid_map", &self.users), ("gid_map", &self.groups)] {
            if !lines.is_empty() {
                let _ = fs::write(format!("/proc/{pid}/{name}"), lines);
            }
        }
    }
}

/// The proxy's whole life.
fn main(job: Job, mut ready: PipeWriter, mut go: PipeReader) -> i32 {
    fault::point("proxy: forked");
    let own = [ready.as_raw_fd(), go.as_raw_fd()];
    let terminal = job.terminal.map(|fd| fd.as_raw_fd());
    let keep = own
        .into_iter()
        .chain(terminal)
        .chain(job.descriptors.numbers())
        .chain(fault::descriptor());
    let keep = keep.collect();
    // Before anybody knows the pid: a signal that comes early is kept until there is who to pass it on to.
    let prepared = set_up(&job, keep).and_then(|()| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let context = runtime.enter();
        let signals = Signals::of_stand_in(job.stdio.terminal).context("cannot catch signals")?;
        drop(context);
        Ok((runtime, signals))
    });
    let (runtime, signals) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            let _ = write!(ready, "{error:#}");
            return LOST;
        }
    };
    fault::point("proxy: set up");
    drop(ready);
    let mut byte = [0];
    if !matches!(go.read(&mut byte), Ok(1)) {
        return LOST;
    }
    fault::point("proxy: told to go");
    drop(go);
    let code = runtime.block_on(stand(job, signals)).unwrap_or(LOST);
    // Input may still be waited for; the end of the process is its end.
    runtime.shutdown_background();
    code
}

fn set_up(job: &Job, keep: Vec<RawFd>) -> anyhow::Result<()> {
    close_others(keep)?;
    // Nobody looks at its name but users.
    let _ = nix::sys::prctl::set_name(c"bulkhead-proxy");
    setsid().context("cannot make a session")?;
    let state = fs::File::open(job.state.path()).context("cannot open the state directory")?;
    let namespaces = job.namespaces - CloneFlags::CLONE_NEWPID - CloneFlags::CLONE_NEWUSER;
    unshare(namespaces).context("cannot make namespaces")?;
    if namespaces.contains(CloneFlags::CLONE_NEWNS) {
        // Mounts of the host go away here too when they do there.
        mount(
            None::<&Path>,
            "/",
            None::<&Path>,
            MsFlags::MS_REC | MsFlags::MS_SLAVE,
            None::<&Path>,
        )
        .context("cannot separate the mounts")?;
    }
    if let Some(view) = &job.view {
        view.enter()
            .context("cannot make the container's root its own")?;
    }
    // Where the sockets are, which is outside of the container's root; and where the command was started is to be unmounted when its user likes.
    fchdir(&state).context("cannot enter the state directory")?;
    if let Some(slave) = job.terminal {
        terminal::take(slave).context("cannot take the terminal")?;
    }
    if job.namespaces.contains(CloneFlags::CLONE_NEWUSER) {
        // The last, as it takes the capabilities for all of the above, and only for those who look: the container's own is in
        // the guest, so that a host that allows none will do.
        let _ = unshare(CloneFlags::CLONE_NEWUSER);
    }
    Ok(())
}

/// Closes what the command had open: connections and pipes whose other ends wait for their end.
fn close_others(mut keep: Vec<RawFd>) -> io::Result<()> {
    keep.sort_unstable();
    let mut first: RawFd = 3;
    for last in keep.iter().map(|fd| fd - 1).chain([RawFd::MAX]) {
        if first <= last {
            // SAFETY: a system call on numbers. Whoever owns these descriptors is never dropped in this process, which leaves
            // by `exit`.
            let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = last.saturating_add(2);
    }
    Ok(())
}

/// From the container's creation to its end.
async fn stand(job: Job<'_>, mut signals: Signals) -> anyhow::Result<i32> {
    let state = job.state.in_current_directory();
    let connection = bulkhead_runtime::sock::connect(&state.task_socket())?;
    let server = Server::new(connection, job.id.as_str(), job.exec_id)?;
    fault::point("proxy: connected");
    let mut streams = Streams::attach(
        job.stdio,
        job.descriptors,
        &state.vsock(),
        job.id,
        job.exec_id,
    )?;
    fault::point("proxy: attaching streams");
    if job.stdio.terminal
        && let Some(size) = terminal::size(io::stdin().as_fd())
    {
        // The client may have set it before there was anybody to see the signal. A process that has ended needs none.
        let _ = server.resize(size).await;
    }
    let code = follow(None, &server, &mut signals, &mut streams).await?;
    fault::point("proxy: process ended");
    streams.written(&mut signals).await;
    fault::point("proxy: output written");
    if !job.exec_id.is_empty() {
        // The server forgets it with its container anyway.
        let _ = server.delete().await;
    }
    Ok(i32::try_from(code).unwrap_or(LOST))
}

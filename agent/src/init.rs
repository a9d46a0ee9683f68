//! A container's init, from the fork to the exec. Runs in the child only.
//!
//! It is the agent's own image: nothing here may touch the agent's runtime, log (its stderr is the container's), or
//! return.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::stat::{Mode, umask};
use nix::unistd::setsid;

use crate::devices::Nodes;
use crate::error::{Context, Result};
use crate::mounts::{Rootfs, Trees, is_dev};
use crate::process::{self, Program};
use crate::spec::{CLONE_NEWTIME, Plan};
use crate::terminal::Terminal;
use crate::{devices, handshake, sys, user_namespace};

/// What a child needs of the agent.
#[derive(Debug)]
pub struct Job<'a> {
    /// The container.
    pub id: &'a str,
    /// What to do.
    pub plan: &'a Plan,
    /// The child's ends of the standard streams; none is the null device.
    pub stdio: [Option<BorrowedFd<'a>>; 3],
    /// Columns and rows of the terminal to make in place of them.
    pub terminal: Option<(u16, u16)>,
    /// Mounts that the agent has made ready.
    pub trees: &'a Trees,
    /// The child's end of the handshake.
    pub socket: BorrowedFd<'a>,
}

/// Namespaces that the init makes itself, not the fork. A cgroup namespace's root is the cgroup that its maker is
/// in, and only after the fork is it the container's; a time namespace takes offsets only while nobody is in it, and
/// its maker enters it with the exec (time_namespaces(7)).
pub const MADE_BY_INIT: u64 = libc::CLONE_NEWCGROUP as u64 | CLONE_NEWTIME;

/// Exit status of an init that did not get to the exec; the agent has the reason by then.
const FAILED: i32 = 1;

/// Where the handshake's socket is moved to.
const SOCKET: RawFd = 3;

/// The child's whole life.
pub fn run(job: &Job<'_>) -> ! {
    let _guard = ExitOnUnwind;
    let socket = match arrange_descriptors(job) {
        Ok(socket) => socket,
        Err(error) => {
            handshake::send_failure(job.socket, &error);
            exit()
        }
    };
    let socket = socket.as_fd();
    if job.plan.id_maps.is_some() && !handshake::wait_for_admission(socket) {
        exit()
    }
    let program = match set_up(job).and_then(|(program, terminal)| {
        handshake::send_ready(socket, terminal.as_ref().map(AsFd::as_fd))
            .what(|| "cannot report to the agent")?;
        Ok(program)
    }) {
        Ok(program) => program,
        Err(error) => {
            handshake::send_failure(socket, &error);
            exit()
        }
    };
    if handshake::wait_for_start(socket) {
        let error = process::execute(&job.plan.process, &program, job.plan.seccomp.as_deref());
        handshake::send_failure(socket, &error);
    }
    exit()
}

fn exit() -> ! {
    // SAFETY: `_exit` runs no handlers and touches no memory.
    unsafe { libc::_exit(FAILED) }
}

/// A panic in the child must not unwind into the agent's runtime.
struct ExitOnUnwind;

impl Drop for ExitOnUnwind {
    fn drop(&mut self) {
        exit();
    }
}

/// Puts the standard streams and the socket in their places and closes everything else: a connection of the agent
/// that a waiting init held open would never end.
fn arrange_descriptors(job: &Job<'_>) -> Result<OwnedFd> {
    let what = || "cannot arrange the container's descriptors";
    let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).what(what)?;
    for (number, stream) in job.stdio.iter().enumerate() {
        process::replace_stdio(stream.unwrap_or(null.as_fd()), number).what(what)?;
    }
    // Closed below, or replaced by the socket: this owner must not close what takes its number.
    let _ = null.into_raw_fd();
    if job.socket.as_raw_fd() != SOCKET {
        // SAFETY: 3 is none of the standard streams; whatever the agent had there belongs to objects that this
        // process never drops.
        nix::errno::Errno::result(unsafe {
            libc::dup3(job.socket.as_raw_fd(), SOCKET, libc::O_CLOEXEC)
        })
        .what(what)?;
    }
    // SAFETY: as above: the owners of these descriptors are never dropped in this process.
    unsafe { sys::close_from(SOCKET + 1, &job.trees.descriptors()) }.what(what)?;
    // SAFETY: 3 is the socket, and nothing else here owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(SOCKET) })
}

fn set_up(job: &Job<'_>) -> Result<(Program, Option<OwnedFd>)> {
    let plan = job.plan;
    reset_signals()?;
    setsid().what(|| "cannot make a session")?;
    make_time_namespace(plan)?;
    // While this is still the guest's root: the way to the root filesystem need not be open to others.
    let rootfs = Rootfs::mount(plan, job.trees)?;
    if plan.id_maps.is_some() {
        user_namespace::become_root()?;
    }
    // Until the exec nobody in the container may look into this copy of the agent.
    nix::sys::prctl::set_dumpable(false).what(|| "cannot protect the container's init")?;
    umask(Mode::empty());
    match sys::new_session_keyring(&format!("_ses.{}", job.id)) {
        Ok(()) | Err(nix::errno::Errno::ENOSYS) => {}
        Err(errno) => {
            return Err(crate::error::Error::system(
                "cannot join a new session keyring",
                errno,
            ));
        }
    }
    if plan.namespaces & libc::CLONE_NEWCGROUP as u64 != 0 {
        unshare(CloneFlags::CLONE_NEWCGROUP).what(|| "cannot make a cgroup namespace")?;
    }
    if plan.namespaces & libc::CLONE_NEWNET as u64 != 0 {
        sys::loopback_up().what(|| "cannot bring up the loopback interface")?;
    }
    name_host(plan)?;
    // Through the guest's procfs, which shows each process its own namespaces; the container may have none.
    for (path, value) in &plan.sysctl {
        process::write_proc(&format!("/proc/sys/{path}"), value)
            .what(|| format!("linux.sysctl[{:?}]", path.replace('/', ".")))?;
    }
    // In a user namespace the agent has done it: a lower one takes a privilege of the guest.
    if let Some(value) = plan.process.oom_score_adj
        && plan.id_maps.is_none()
    {
        process::write_proc("/proc/self/oom_score_adj", &value.to_string())
            .what(|| "process.oomScoreAdj")?;
    }
    if let Some(domain) = plan.personality {
        // SAFETY: touches no memory.
        nix::errno::Errno::result(unsafe { libc::personality(domain) })
            .what(|| "linux.personality")?;
    }

    let terminal = build_root(job, rootfs)?;
    take_terminal(job, terminal.as_ref())?;
    let program = process::become_process(&plan.process, plan.seccomp.as_deref())?;
    Ok((program, terminal.map(|terminal| terminal.master)))
}

/// The offsets go through the guest's procfs, as long as it is there.
fn make_time_namespace(plan: &Plan) -> Result<()> {
    if plan.namespaces & CLONE_NEWTIME == 0 {
        return Ok(());
    }
    sys::unshare_time().what(|| "cannot make a time namespace")?;
    if let Some(offsets) = &plan.time_offsets {
        process::write_proc("/proc/self/timens_offsets", offsets).what(|| "linux.timeOffsets")?;
    }
    Ok(())
}

fn reset_signals() -> Result<()> {
    let what = || "cannot reset the signals";
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).what(what)?;
    // The one that the agent ignores; an exec resets handlers, not this.
    // SAFETY: the default action is no handler.
    unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigDfl) }.what(what)?;
    Ok(())
}

fn name_host(plan: &Plan) -> Result<()> {
    if let Some(name) = &plan.hostname {
        nix::unistd::sethostname(name).what(|| "hostname")?;
    }
    if let Some(name) = &plan.domainname {
        // SAFETY: the name lives across the call, and the length is its own.
        nix::errno::Errno::result(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) })
            .what(|| "domainname")?;
    }
    Ok(())
}

fn build_root(job: &Job<'_>, rootfs: Rootfs<'_>) -> Result<Option<Terminal>> {
    let plan = job.plan;
    let null =
        open("/dev/null", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).what(|| "/dev/null")?;
    for (index, mount) in plan.mounts.iter().enumerate() {
        rootfs.add(index, mount)?;
    }
    // A /dev that is bind-mounted is somebody's own, as in runc.
    let foreign_dev = plan
        .mounts
        .iter()
        .any(|mount| mount.options.bind && is_dev(&mount.destination));
    if !foreign_dev {
        let nodes = match plan.id_maps {
            None => Nodes::Made,
            Some(_) => Nodes::Bound,
        };
        for device in devices::defaults(&plan.devices) {
            devices::make(rootfs.root(), &device, nodes)?;
        }
        for device in &plan.devices {
            devices::make(rootfs.root(), device, nodes)?;
        }
        devices::make_links(rootfs.root())?;
    }
    let terminal = match job.terminal {
        Some((columns, rows)) => Some(Terminal::make(rootfs.root(), columns, rows)?),
        None => None,
    };
    rootfs.make_cwd(&plan.process.cwd)?;
    for path in &plan.readonly_paths {
        rootfs.make_read_only(path)?;
    }
    for path in &plan.masked_paths {
        rootfs.mask(path, null.as_fd())?;
    }
    rootfs.finish(&plan.mounts)?;
    rootfs.pivot(plan.root_readonly, plan.propagation)?;
    Ok(terminal)
}

fn take_terminal(job: &Job<'_>, terminal: Option<&Terminal>) -> Result<()> {
    match terminal {
        Some(terminal) => {
            let what = || "process.terminal: cannot become the controlling terminal";
            sys::set_controlling_terminal(terminal.slave.as_fd()).what(what)?;
            for number in 0..3 {
                process::replace_stdio(terminal.slave.as_fd(), number).what(what)?;
            }
        }
        None => {
            let Some(null) = process::container_null() else {
                return Ok(());
            };
            for (number, _) in job
                .stdio
                .iter()
                .enumerate()
                .filter(|(_, stream)| stream.is_none())
            {
                process::replace_stdio(null.as_fd(), number)
                    .what(|| "cannot open the container's /dev/null")?;
            }
        }
    }
    Ok(())
}

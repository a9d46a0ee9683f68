//! A container's init, from the fork to the exec. Runs in the child only.
//!
//! It is the agent's own image: nothing here may touch the agent's runtime, log (its stderr is the container's), or
//! return.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};
use nix::unistd::setsid;

use crate::devices::Nodes;
use crate::error::{Context, Error, Result};
use crate::mounts::{Rootfs, Trees, is_dev};
use crate::process::{self, Program};
use crate::spec::{CLONE_NEWTIME, Plan};
use crate::terminal::{Size, Terminal};
use crate::{devices, handshake, hooks, launch, sys, user_namespace};

/// What a child needs of the agent.
#[derive(Debug)]
pub struct Job<'a> {
    /// The container.
    pub id: &'a str,
    /// What to do.
    pub plan: &'a Plan,
    /// The child's ends of the standard streams; none is the null device.
    pub stdio: [Option<BorrowedFd<'a>>; 3],
    /// Size of the terminal to make in place of them.
    pub terminal: Option<Size>,
    /// Mounts that the agent has made ready.
    pub trees: &'a Trees,
    /// The child's end of the handshake.
    pub socket: BorrowedFd<'a>,
}

/// Namespaces that the init makes itself, not the fork. A cgroup namespace's root is the cgroup that its maker is
/// in, and only after the fork is it the container's; a time namespace takes offsets only while nobody is in it, and
/// its maker enters it with the exec (time_namespaces(7)).
pub const MADE_BY_INIT: u64 = libc::CLONE_NEWCGROUP as u64 | CLONE_NEWTIME;

/// The child's whole life.
pub fn run(job: &Job<'_>) -> ! {
    let _guard = launch::ExitOnUnwind;
    let [socket] =
        match launch::arrange_descriptors(job.stdio, [job.socket], &job.trees.descriptors()) {
            Ok(kept) => kept,
            Err(error) => {
                handshake::send_failure(job.socket, &error);
                launch::exit()
            }
        };
    let socket = socket.as_fd();
    if job.plan.id_maps.is_some() && !handshake::wait_for_admission(socket) {
        launch::exit()
    }
    let program = match set_up(job).and_then(|(program, terminal)| {
        handshake::send_ready(socket, terminal.as_ref().map(AsFd::as_fd))
            .what(|| "cannot report to the agent")?;
        Ok(program)
    }) {
        Ok(program) => program,
        Err(error) => {
            handshake::send_failure(socket, &error);
            launch::exit()
        }
    };
    if handshake::wait_for_start(socket) {
        handshake::send_failure(socket, &execute(job, &program));
    }
    launch::exit()
}

/// Becomes the user's program; returns only the error.
fn execute(job: &Job<'_>, program: &Program) -> Error {
    let plan = job.plan;
    let ready = process::go_under_filter(&plan.process, plan.seccomp.as_deref())
        .and_then(|()| hooks::run(&plan.hooks, job.id, program));
    match ready {
        Ok(()) => process::replace(&plan.process, program),
        Err(error) => error,
    }
}

fn set_up(job: &Job<'_>) -> Result<(Program, Option<OwnedFd>)> {
    let plan = job.plan;
    launch::reset_signals()?;
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
    launch::join_keyring(job.id)?;
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
    if plan.id_maps.is_none() {
        launch::set_oom_score(plan.process.oom_score_adj)?;
    }
    launch::set_personality(plan.personality)?;

    let terminal = build_root(job, rootfs)?;
    match &terminal {
        Some(terminal) => {
            launch::replace_streams(terminal.slave.as_fd())?;
            launch::take_terminal()?;
        }
        None => launch::use_containers_null(job.stdio)?,
    }
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
        Some(size) => {
            let terminal = Terminal::make(rootfs.root(), size)?;
            terminal.show_at_console(rootfs.root())?;
            Some(terminal)
        }
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

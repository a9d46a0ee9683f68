//! A container's init, from the fork to the exec. Runs in the child only.
//!
//! It is the agent's own image: nothing here may touch the agent's runtime, log (its stderr is the container's), or
//! return.

use std::os::fd::{AsFd, BorrowedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, umask};
use nix::unistd::setsid;

use crate::devices::Nodes;
use crate::error::{Context, Error, Result};
use crate::mounts::{Rootfs, Trees, is_dev, is_ptmx};
use crate::process::{self, Program};
use crate::spec::{CLONE_NEWTIME, Plan};
use crate::streams::BorrowedEnds;
use crate::sys::Fork;
use crate::terminal::{Size, Terminal};
use crate::{devices, fault, handshake, hooks, launch, read_ahead, sys, user_namespace};

/// What a child needs of the agent.
#[derive(Debug)]
pub struct Job<'a> {
    /// The container.
    pub id: &'a str,
    /// What to do.
    pub plan: &'a Plan,
    /// The child's ends of the streams.
    pub ends: BorrowedEnds<'a>,
    /// Size of the terminal to make in place of the standard ones.
    pub terminal: Option<Size>,
    /// Mounts that the agent has made ready.
    pub trees: &'a Trees,
    /// A new network namespace to enter, where the fork has not made one.
    pub network: Option<BorrowedFd<'a>>,
    /// The child's end of the handshake.
    pub socket: BorrowedFd<'a>,
}

/// Namespaces that the init makes itself, not the fork. A cgroup namespace's root is the cgroup that its maker is
/// in, and only after the fork is it the container's; a time namespace takes offsets only while nobody is in it
/// (time_namespaces(7)).
pub const MADE_BY_INIT: u64 = libc::CLONE_NEWCGROUP as u64 | CLONE_NEWTIME;

/// The first number of a descriptor of the agent's that an init does not need for something else.
pub fn first_free(ends: &BorrowedEnds<'_>) -> RawFd {
    launch::first_free(ends, 1)
}

/// The child's whole life.
pub fn run(job: &Job<'_>) -> ! {
    let _guard = launch::ExitOnUnwind;
    let [socket] = match enter_network(job).and_then(|()| {
        launch::arrange_descriptors(&job.ends, [job.socket], &job.trees.descriptors())
    }) {
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
    let (program, hooks) = match set_up(job, socket).and_then(|ready| {
        handshake::send_ready(socket).what(|| "cannot report to the agent")?;
        Ok(ready)
    }) {
        Ok(ready) => ready,
        Err(error) => {
            handshake::send_failure(socket, &error);
            launch::exit()
        }
    };
    if handshake::wait_for_start(socket) {
        handshake::send_failure(socket, &execute(job, &program, hooks, socket));
    }
    launch::exit()
}

/// Before the descriptors are arranged: its own is not kept.
fn enter_network(job: &Job<'_>) -> Result<()> {
    match job.network {
        Some(network) => setns(network, CloneFlags::CLONE_NEWNET)
            .what(|| "cannot enter the container's network namespace"),
        None => Ok(()),
    }
}

/// A namespace of another container that an init joins.
#[derive(Debug)]
pub struct Join<'a> {
    /// Who that is, for messages.
    pub container: &'a str,
    /// Its init.
    pub init: BorrowedFd<'a>,
    /// `CLONE_NEW*` of it.
    pub namespace: u64,
}

/// The whole life of a child that joins namespaces and forks the init into them: a pid namespace is entered only by
/// being born in it, and what is made anew is to belong to a user namespace that is joined.
pub fn join_and_run(job: &Job<'_>, joins: &[Join<'_>]) -> ! {
    let _guard = launch::ExitOnUnwind;
    let error = match join(joins).and_then(|()| {
        // SAFETY: this child of the agent has one thread, and its own child goes into `run`, which never returns.
        unsafe { sys::fork_sibling(job.plan.made() & !MADE_BY_INIT) }.map_err(|errno| {
            let pid = |join: &&Join<'_>| join.namespace & libc::CLONE_NEWPID as u64 != 0;
            match (errno, joins.iter().find(pid)) {
                // What the kernel says of a pid namespace without its init.
                (Errno::ENOMEM, Some(join)) => not_running(join),
                _ => Error::system("cannot make the container's init", errno),
            }
        })
    }) {
        Ok(Fork::Child) => run(job),
        Ok(Fork::Parent { pid, pidfd }) => {
            match handshake::send_forked(job.socket, pid, pidfd.as_fd(), None)
                .what(|| "cannot report to the agent")
            {
                Ok(()) => launch::end(0),
                Err(error) => error,
            }
        }
        Err(error) => error,
    };
    handshake::send_failure(job.socket, &error);
    launch::exit()
}

fn not_running(join: &Join<'_>) -> Error {
    Error::State(format!("container {} is not running", join.container))
}

fn join(joins: &[Join<'_>]) -> Result<()> {
    // Others may see the init in their pid namespace; it inherits this. From one that has CAP_SYS_PTRACE in the guest's user namespace
    // nothing keeps it: what that wins is the guest.
    nix::sys::prctl::set_dumpable(false).what(|| "cannot protect the container's init")?;
    let user = |join: &&Join<'_>| join.namespace & libc::CLONE_NEWUSER as u64 != 0;
    // The user namespace last: in it this process has no rights in those that others own.
    for join in joins
        .iter()
        .filter(|join| !user(join))
        .chain(joins.iter().filter(user))
    {
        sys::join_namespaces(join.init, join.namespace).map_err(|errno| match errno {
            Errno::ESRCH => not_running(join),
            errno => Error::system(
                format!("cannot join a namespace of container {}", join.container),
                errno,
            ),
        })?;
    }
    Ok(())
}

/// Becomes the user's program; returns only the error.
fn execute(
    job: &Job<'_>,
    program: &Program,
    hooks: hooks::Prepared<'_>,
    socket: BorrowedFd<'_>,
) -> Error {
    let plan = job.plan;
    let ready = process::go_under_filter(&plan.process, plan.seccomp.as_deref())
        .and_then(|()| hooks::run(hooks, program))
        .and_then(|()| await_scheduling(plan, socket));
    fault::point("init-executes");
    match ready {
        Ok(()) => process::replace(&plan.process, program),
        Err(error) => error,
    }
}

/// The hooks that this process has forked are not scheduled as it is to be; some schedulers would not let it fork.
fn await_scheduling(plan: &Plan, socket: BorrowedFd<'_>) -> Result<()> {
    if plan.is_scheduled_late() {
        handshake::send_hooked(socket).what(|| "cannot report to the agent")?;
        if !handshake::wait_for_start(socket) {
            launch::exit()
        }
    }
    Ok(())
}

fn set_up<'a>(job: &Job<'a>, socket: BorrowedFd<'_>) -> Result<(Program, hooks::Prepared<'a>)> {
    let plan = job.plan;
    fault::point("init-forked");
    launch::reset_signals()?;
    launch::end_on_request()?;
    setsid().what(|| "cannot make a session")?;
    make_time_namespace(plan)?;
    // While this is still the guest's root: the way to the root filesystem need not be open to others.
    let rootfs = Rootfs::mount(plan, job.trees)?;
    if plan.id_maps.is_some() {
        user_namespace::become_root()?;
    }
    // Until the exec nobody in the container may look into this copy of the agent, but for CAP_SYS_PTRACE in the guest's user namespace.
    nix::sys::prctl::set_dumpable(false).what(|| "cannot protect the container's init")?;
    umask(Mode::empty());
    launch::make_keyring(job.id)?;
    if plan.made() & libc::CLONE_NEWCGROUP as u64 != 0 {
        unshare(CloneFlags::CLONE_NEWCGROUP).what(|| "cannot make a cgroup namespace")?;
    }
    if plan.made() & libc::CLONE_NEWNET as u64 != 0 && job.network.is_none() {
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

    fault::point("init-namespaces");
    let terminal = build_root(job, rootfs)?;
    fault::point("init-root");
    launch::use_containers_null(&job.ends)?;
    if let Some(terminal) = terminal {
        handshake::send_terminal(socket, terminal.master.as_fd())
            .what(|| "cannot report to the agent")?;
        launch::replace_streams(terminal.slave.as_fd())?;
        launch::take_terminal()?;
    }
    read_ahead::program(&plan.process);
    let hooks = hooks::prepare(&plan.hooks, job.id)?;
    let program = process::become_process(
        &plan.process,
        job.ends.all().count(),
        plan.seccomp.as_deref(),
    )?;
    Ok((program, hooks))
}

/// The offsets go through the guest's procfs, as long as it is there.
fn make_time_namespace(plan: &Plan) -> Result<()> {
    if plan.made() & CLONE_NEWTIME == 0 {
        return Ok(());
    }
    sys::unshare_time().what(|| "cannot make a time namespace")?;
    if let Some(offsets) = &plan.time_offsets {
        process::write_proc("/proc/self/timens_offsets", offsets).what(|| "linux.timeOffsets")?;
    }
    // Made for children; newer kernels than the guest's enter it with the exec too.
    let made = open(
        "/proc/self/ns/time_for_children",
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .what(|| "cannot enter the time namespace")?;
    sys::enter_time(made.as_fd()).what(|| "cannot enter the time namespace")
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

fn build_root<'a>(job: &Job<'a>, mut rootfs: Rootfs<'a>) -> Result<Option<Terminal>> {
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
        // The multiplexer is a link to that of the container's own devpts, as in runc.
        for device in plan.devices.iter().filter(|device| !is_ptmx(&device.path)) {
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
    rootfs.finish()?;
    rootfs.pivot(plan.root_readonly, plan.propagation)?;
    Ok(terminal)
}

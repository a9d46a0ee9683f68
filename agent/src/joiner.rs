//! A process on its way into a container that runs, in children of the agent up to the exec.
//!
//! Two children take part. The first, the joiner, enters the container's cgroup, namespaces and root from outside its
//! pid namespace, where nobody in the container sees it, and there becomes what the process is to be: user,
//! capabilities, working directory. It then forks the second, a child of the agent too, which is the first that the
//! container sees: it has nothing of the agent but its memory, which is not dumpable, and waits for the agent's word
//! to execute the program.
//!
//! One step can't always be the joiner's. A seccomp profile without `no_new_privs` is loaded while the process still
//! has the capability for it, and may forbid the fork; the second child then becomes the process, at once.
//!
//! Not dumpable is no protection from CAP_SYS_PTRACE in the guest's user namespace: a container that has it, and shares its pid
//! namespace with the second child, can get hold of that, of the agent's memory in it and, where it becomes the process itself, of its
//! capabilities, as with runc. What it wins is the guest.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::setsid;

use crate::error::{Context, Error, Result};
use crate::process::{self, Program};
use crate::seccomp::Filter;
use crate::spec::Process;
use crate::streams::BorrowedEnds;
use crate::sys::{self, Fork};
use crate::terminal::{Size, Terminal};
use crate::{fault, handshake, launch, user_namespace};

/// What the children need of the agent.
#[derive(Debug)]
pub struct Job<'a> {
    /// The container.
    pub id: &'a str,
    /// What to become.
    pub process: &'a Process,
    /// `linux.personality` of the container.
    pub personality: Option<libc::c_ulong>,
    /// `linux.seccomp` of the container.
    pub seccomp: Option<&'a Filter>,
    /// `CLONE_NEW*` of the namespaces in which the container differs from the agent.
    pub namespaces: u64,
    /// The container's init.
    pub init: BorrowedFd<'a>,
    /// The child's ends of the streams.
    pub ends: BorrowedEnds<'a>,
    /// Size of the terminal to make in place of the standard ones.
    pub terminal: Option<Size>,
    /// The children's end of the handshake.
    pub socket: BorrowedFd<'a>,
}

impl Job<'_> {
    /// Whether the second child has to become the process, and not the joiner.
    fn becomes_late(&self) -> bool {
        self.seccomp.is_some() && !self.process.no_new_privileges
    }

    fn become_process(&self) -> Result<Program> {
        process::become_process(self.process, self.ends.all().count(), self.seccomp)
    }
}

/// The joiner's whole life, and that of its fork.
pub fn run(job: &Job<'_>) -> ! {
    let _guard = launch::ExitOnUnwind;
    fault::point("joiner-forked");
    let kept = protect(job)
        .and_then(|()| launch::arrange_descriptors(&job.ends, [job.socket, job.init], &[]));
    let [socket, init] = match kept {
        Ok(kept) => kept,
        Err(error) => {
            handshake::send_failure(job.socket, &error);
            launch::exit()
        }
    };
    match join(job, init).and_then(|joined| fork(job, joined, socket.as_fd())) {
        Ok(()) => launch::end(0),
        Err(error) => {
            handshake::send_failure(socket.as_fd(), &error);
            launch::exit()
        }
    }
}

/// What the joiner hands to its fork.
struct Joined {
    program: Option<Program>,
    master: Option<OwnedFd>,
}

/// What needs the agent's own view of the system.
fn protect(job: &Job<'_>) -> Result<()> {
    launch::reset_signals()?;
    // Until the exec nobody in the container may look into this copy of the agent; the fork inherits it.
    nix::sys::prctl::set_dumpable(false).what(|| "cannot protect the process")?;
    launch::set_oom_score(job.process.oom_score_adj)
}

fn join(job: &Job<'_>, init: OwnedFd) -> Result<Joined> {
    // In a user namespace they can't be raised any more; while the agent's descriptors were there, they were too low for those.
    process::set_limits(job.process)?;
    sys::join_namespaces(init.as_fd(), job.namespaces).map_err(|errno| match errno {
        Errno::ESRCH => stopped(),
        errno => Error::system("cannot join the container's namespaces", errno),
    })?;
    fault::point("joiner-joined");
    // With it a path of the container could lead to what only its owner may reach.
    drop(init);
    if job.namespaces & libc::CLONE_NEWUSER as u64 != 0 {
        user_namespace::become_root()?;
        nix::sys::prctl::set_dumpable(false).what(|| "cannot protect the process")?;
    }
    launch::join_keyring(job.id)?;
    launch::set_personality(job.personality)?;
    launch::use_containers_null(&job.ends)?;
    let master = match job.terminal {
        Some(size) => {
            let root = nix::fcntl::open(
                "/",
                nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC,
                nix::sys::stat::Mode::empty(),
            )
            .what(|| "cannot open the container's root")?;
            let terminal = Terminal::make(root.as_fd(), size)?;
            launch::replace_streams(terminal.slave.as_fd())?;
            Some(terminal.master)
        }
        None => None,
    };
    let program = if job.becomes_late() {
        None
    } else {
        Some(job.become_process()?)
    };
    Ok(Joined { program, master })
}

/// The container's init is gone, or the last of its pid namespace.
fn stopped() -> Error {
    Error::State("cannot exec in a stopped container".to_owned())
}

fn fork(job: &Job<'_>, joined: Joined, socket: BorrowedFd<'_>) -> Result<()> {
    let what = || "cannot fork into the container's pid namespace";
    // SAFETY: this child of the agent has one thread, and its own child goes into `enter`, which never returns.
    let sibling = unsafe { sys::fork_sibling(0) }.map_err(|errno| match errno {
        // What the kernel says of a pid namespace without its init.
        Errno::ENOMEM => stopped(),
        errno => Error::system(what(), errno),
    })?;
    match sibling {
        Fork::Child => {
            drop(joined.master);
            enter(job, joined.program, socket)
        }
        Fork::Parent { pid, pidfd } => {
            let master = joined.master.as_ref().map(AsFd::as_fd);
            handshake::send_forked(socket, pid, pidfd.as_fd(), master)
                .what(|| "cannot report to the agent")
        }
    }
}

/// The rest, in the container's pid namespace.
fn enter(job: &Job<'_>, program: Option<Program>, socket: BorrowedFd<'_>) -> ! {
    let _guard = launch::ExitOnUnwind;
    let ready = become_leader(job).and_then(|()| program.map_or_else(|| job.become_process(), Ok));
    let error = match ready {
        Err(error) => error,
        Ok(_) if !handshake::wait_for_start(socket) => launch::exit(),
        Ok(program) => {
            fault::point("process-executes");
            process::execute(job.process, &program, job.seccomp)
        }
    };
    handshake::send_failure(socket, &error);
    launch::exit()
}

fn become_leader(job: &Job<'_>) -> Result<()> {
    setsid().what(|| "cannot make a session")?;
    if job.terminal.is_some() {
        launch::take_terminal()?;
    }
    Ok(())
}

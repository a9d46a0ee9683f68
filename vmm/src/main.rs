//! `bulkhead-vmm`: one KVM guest, driven over the control socket on descriptor 3.

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use bulkhead_vmm::control::{CONTROL_FD, exit_code};
use bulkhead_vmm::rate::Log;
use bulkhead_vmm::server::Server;
use bulkhead_vmm::timeline::Timeline;
use clap::Parser;
use nix::sys::prctl::set_dumpable;
use tracing::error;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Runs one virtual machine. Started by bulkhead's sandbox server, not by hand: it expects its control socket on descriptor 3.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// What is logged on standard error: off, error, warn, info, debug, trace, or a list as `info,bulkhead_vmm::virtio=debug`.
    #[arg(long, default_value = "info")]
    log_level: Targets,
}

fn main() -> ExitCode {
    let timeline = Arc::new(Timeline::new());
    timeline.mark("vmm started");
    // What the standard library gives threads whose builder names no size, those of dependencies among them.
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("RUST_MIN_STACK", bulkhead_vmm::STACK_SIZE.to_string()) };
    let args = Args::parse();
    let format = tracing_subscriber::fmt::layer()
        .with_writer(Log::default())
        .with_ansi(false);
    tracing_subscriber::registry()
        .with(format)
        .with(args.log_level)
        .init();
    // A panic on any thread is a bug that must not leave half a VMM.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        std::process::abort();
    }));
    let code = run(timeline).unwrap_or_else(|error| {
        error!("{error:#}");
        exit_code::SETUP
    });
    // Not by returning: threads of a VM that has ended need no farewell, and its memory goes fastest with the process.
    std::process::exit(code)
}

fn run(timeline: Arc<Timeline>) -> Result<i32> {
    // What is in here is the guest's, and this process's own: not for others with the same credentials, as other VMMs' threads have them, whose
    // guests may be given the host's procfs as a volume. It takes CAP_SYS_PTRACE from now on, and there are no core dumps.
    set_dumpable(false).context("cannot close the memory to other processes")?;
    ignore_signals()?;
    let socket = control_socket()?;
    let mut server = Server::new(socket, timeline)?;
    let end = server.run()?;
    // Dropping the server would wait for the vCPUs.
    std::mem::forget(server);
    Ok(end.exit_code)
}

/// Has signals do nothing, since this process's life hangs on its control socket: one for the whole cgroup (a service manager's) is for
/// the containers, and where the caller has limited the size of files (RLIMIT_FSIZE) a write beyond that fails in the guest. Whoever
/// uses a signal, as the vCPUs do SIGRTMIN, takes it back. What the kernel says of a fault of this process's own still ends it.
fn ignore_signals() -> Result<()> {
    for number in (1..=libc::SIGSYS).chain(libc::SIGRTMIN()..=libc::SIGRTMAX()) {
        match number {
            // Nobody can, and nobody does for the latter two: the standard library tells of a stack that has overflown by them.
            libc::SIGKILL | libc::SIGSTOP | libc::SIGSEGV | libc::SIGBUS => continue,
            // To ignore it would be to have children vanish unwaited for.
            libc::SIGCHLD => continue,
            _ => {}
        }
        // SAFETY: no handler is installed, and none replaced: no other thread runs yet.
        if unsafe { libc::signal(number, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(std::io::Error::last_os_error())
                .with_context(|| format!("cannot ignore signal {number}"));
        }
    }
    Ok(())
}

/// Takes the control socket over.
fn control_socket() -> Result<OwnedFd> {
    // SAFETY: plain system call; it fails for a descriptor that is not open.
    if unsafe { libc::fcntl(CONTROL_FD, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        bail!(
            "no control socket on descriptor {CONTROL_FD}: bulkhead-vmm is started by bulkhead's sandbox server"
        );
    }
    // What the server leaked is none of this process's business.
    // SAFETY: nothing above CONTROL_FD is in use yet by this process.
    unsafe { libc::close_range(CONTROL_FD as u32 + 1, u32::MAX, 0) };
    // SAFETY: the descriptor is open, and by contract this process's alone.
    let socket = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    let kind = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::SockType)
        .context("descriptor 3 is not a socket")?;
    if kind != nix::sys::socket::SockType::SeqPacket {
        bail!("the control socket on descriptor {CONTROL_FD} is not of type SOCK_SEQPACKET");
    }
    Ok(socket)
}

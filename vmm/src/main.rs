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
use nix::sys::signal::{SigHandler, Signal, signal};
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
    // Where the caller has limited the size of files (RLIMIT_FSIZE), a write beyond that fails in the guest, and does not end the VMM.
    // SAFETY: no handler is installed or replaced.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.context("cannot ignore SIGXFSZ")?;
    let socket = control_socket()?;
    let mut server = Server::new(socket, timeline)?;
    let end = server.run()?;
    // Dropping the server would wait for the vCPUs.
    std::mem::forget(server);
    Ok(end.exit_code)
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

//! Boots a kernel and an initramfs in one VM until it ends, for development and the stress test: the serial port or nothing on standard
//! output, the boot timeline on standard error, the VMM's exit code.
//!
//! ```text
//! boot --vmm bulkhead-vmm --kernel vmlinux --initramfs initramfs.cpio [--serial] [--vcpus N] [--memory MIB] [--cmdline WORDS]
//! ```

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};

use anyhow::{Context, Result};
use bulkhead_vmm::client::{Client, VmmProcess};
use bulkhead_vmm::control::{BootConfig, Event, ShareConfig};
use bulkhead_vmm::timeline::{self, monotonic_ns};
use clap::Parser;

#[derive(Debug, Parser)]
struct Args {
    /// The VMM's binary.
    #[arg(
        long,
        default_value = "target/x86_64-unknown-linux-gnu/release/bulkhead-vmm"
    )]
    vmm: PathBuf,
    /// The kernel, an ELF vmlinux.
    #[arg(long)]
    kernel: PathBuf,
    /// The initramfs.
    #[arg(long)]
    initramfs: PathBuf,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1)]
    vcpus: u8,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 128)]
    memory: u64,
    /// Words added to the kernel's command line.
    #[arg(long, default_value = "")]
    cmdline: String,
    /// Spare virtio-mmio slots.
    #[arg(long, default_value_t = 0)]
    spare_slots: u8,
    /// Makes the serial port the guest's console, on standard output.
    #[arg(long)]
    serial: bool,
    /// A directory to share.
    #[arg(long)]
    share: Option<PathBuf>,
    /// Path of the hybrid vsock's unix socket; a temporary one if not given.
    #[arg(long)]
    vsock: Option<PathBuf>,
    /// The VMM's log level.
    #[arg(long, default_value = "info")]
    log_level: String,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let open = |path: &PathBuf| File::open(path).with_context(|| format!("{}", path.display()));
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("/dev/kvm")?;
    let kernel = open(&args.kernel)?;
    let initramfs = open(&args.initramfs)?;
    let stdout = std::io::stdout();

    let started_at = monotonic_ns();
    let mut vmm = VmmProcess::spawn(
        &args.vmm,
        &["--log-level", &args.log_level],
        Stdio::inherit(),
    )?;
    let mut client = Client::new(vmm.socket);
    let directory = tempfile::tempdir()?;
    let config = BootConfig {
        vcpus: args.vcpus,
        memory_mib: args.memory,
        cmdline: args.cmdline,
        vsock_path: args.vsock.unwrap_or_else(|| directory.path().join("vsock")),
        share: args.share.map(|directory| ShareConfig {
            tag: "bulkhead".into(),
            directory,
            queues: 1,
            files: 1 << 20,
        }),
        spare_slots: args.spare_slots,
        serial: args.serial,
        save_template: false,
    };
    let mut fds = vec![kvm.as_fd(), kernel.as_fd(), initramfs.as_fd()];
    if args.serial {
        fds.push(stdout.as_fd());
    }
    client.boot(config, &fds)?;
    let Event::Ended {
        exit_code,
        reason,
        timeline,
    } = client.next_event()?
    else {
        anyhow::bail!("another event than the end");
    };
    let ended_at = monotonic_ns();
    let status = vmm.child.wait()?;
    eprintln!("ended: {reason}; process: {status}");
    let start = timeline.first().map_or(started_at, |entry| entry.at_ns);
    eprintln!(
        "spawn to main {:.3} ms, {}, ended {:.3} ms",
        (start - started_at) as f64 / 1e6,
        timeline::summary(&timeline),
        (ended_at - start) as f64 / 1e6
    );
    Ok(ExitCode::from(exit_code as u8))
}

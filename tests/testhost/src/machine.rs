//! The emulated machine: QEMU's command line and process. Why each choice: see the README, "The bed".

use crate::frame::Bind;
use crate::packages::{Kernel, Qemu};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

/// What the user may choose about the machine.
#[derive(Debug, Clone)]
pub struct Hardware {
    /// MiB of memory.
    pub memory: u32,
    /// Virtual CPUs. More than one is known to fail: see the README.
    pub cpus: u32,
    /// QEMU's -accel.
    pub accel: String,
    /// QEMU's -cpu.
    pub cpu: String,
    /// Added to the kernel's command line.
    pub append: String,
    /// Added to QEMU's command line.
    pub qemu_args: Vec<OsString>,
    /// Folders of the machine shared writable.
    pub binds: Vec<(PathBuf, PathBuf)>,
}

impl Hardware {
    /// The shares as the init is told of them.
    pub fn bind_frames(&self) -> Vec<Bind> {
        let frame = |(n, (_, inside)): (usize, &(PathBuf, PathBuf))| Bind {
            tag: format!("bind{n}").into_bytes(),
            path: inside.as_os_str().as_bytes().to_vec(),
        };
        self.binds.iter().enumerate().map(frame).collect()
    }
}

/// A running QEMU and our ends of its channels.
#[derive(Debug)]
pub struct Machine {
    /// The process; it dies with the thread that made it.
    pub child: Child,
    /// The virtio-serial port.
    pub port: UnixStream,
    /// The serial console.
    pub console: UnixStream,
    /// QEMU's own control channel, to ask what the CPU does when nothing else answers.
    pub monitor: UnixStream,
}

/// Starts QEMU. The calling thread must live as long as the machine shall: the kernel kills QEMU with it.
pub fn start(
    qemu: &Qemu,
    kernel: &Kernel,
    initramfs: &[u8],
    hardware: &Hardware,
    log: &Path,
) -> io::Result<Machine> {
    let (port, port_there) = UnixStream::pair()?;
    let (console, console_there) = UnixStream::pair()?;
    let (monitor, monitor_there) = UnixStream::pair()?;
    let initrd = sealed_file(initramfs)?;
    let inherited = [
        port_there.as_raw_fd(),
        console_there.as_raw_fd(),
        monitor_there.as_raw_fd(),
        initrd.as_raw_fd(),
    ];
    let log = File::create(log)?;
    let mut command = qemu.command();
    command
        .args(arguments(hardware, &kernel.vmlinux, inherited))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // Ctrl-C is for the command inside, not for the machine.
        .process_group(0);
    let parent = nix::unistd::getpid();
    // SAFETY: only system calls that are async-signal-safe, on fds that the parent keeps open until after exec.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            if nix::unistd::getppid() != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            for fd in inherited {
                let fd = BorrowedFd::borrow_raw(fd);
                fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
            }
            // The 9p server holds a file open for each one that is in use inside.
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
            Ok(())
        });
    }
    Ok(Machine {
        child: command.spawn()?,
        port,
        console,
        monitor,
    })
}

fn arguments(hardware: &Hardware, vmlinux: &Path, fds: [RawFd; 4]) -> Vec<OsString> {
    let [port, console, monitor, initrd] = fds;
    let mut all: Vec<OsString> = [
        "-no-user-config",
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
        "-M",
        "q35",
    ]
    .map(OsString::from)
    .to_vec();
    let mut add = |option: &str, value: &dyn AsRef<OsStr>| {
        all.push(option.into());
        all.push(value.as_ref().into());
    };
    add("-accel", &hardware.accel);
    add("-cpu", &hardware.cpu);
    add("-smp", &hardware.cpus.to_string());
    add("-m", &hardware.memory.to_string());
    add("-kernel", &vmlinux);
    add("-initrd", &format!("/proc/self/fd/{initrd}"));
    add("-append", &kernel_command_line(&hardware.append));
    add(
        "-chardev",
        &format!("socket,id=console,fd={console},server=off"),
    );
    add("-serial", &"chardev:console");
    add(
        "-chardev",
        &format!("socket,id=monitor,fd={monitor},server=off"),
    );
    add("-mon", &"chardev=monitor,mode=control");
    add("-device", &"virtio-serial-pci,max_ports=2");
    add("-chardev", &format!("socket,id=port,fd={port},server=off"));
    add("-device", &"virtserialport,chardev=port,nr=1,name=testhost");
    add(
        "-fsdev",
        &"local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
    );
    add("-device", &"virtio-9p-pci,fsdev=root,mount_tag=host");
    for (n, (outside, _)) in hardware.binds.iter().enumerate() {
        let mut fsdev = OsString::from(format!("local,id=bind{n},path="));
        fsdev.push(escape_commas(outside));
        fsdev.push(",security_model=none,multidevs=remap");
        add("-fsdev", &fsdev);
        add(
            "-device",
            &format!("virtio-9p-pci,fsdev=bind{n},mount_tag=bind{n}"),
        );
    }
    all.extend(hardware.qemu_args.iter().cloned());
    all
}

fn kernel_command_line(append: &str) -> String {
    let fixed = "console=ttyS0 panic=-1 oops=panic mitigations=off quiet loglevel=5 \
                 random.trust_cpu=1 tsc=reliable nokaslr";
    format!("{fixed} {append}").trim_end().to_owned()
}

/// QEMU's option parser takes a doubled comma for a comma.
fn escape_commas(path: &Path) -> OsString {
    let bytes = path.as_os_str().as_bytes();
    let doubled: Vec<u8> = bytes
        .iter()
        .flat_map(|&b| std::iter::repeat_n(b, if b == b',' { 2 } else { 1 }))
        .collect();
    OsStr::from_bytes(&doubled).to_owned()
}

/// A file without a name: nothing has to be removed whatever happens.
fn sealed_file(bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = memfd_create(c"initramfs", MFdFlags::MFD_CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_shared_folders_do_not_end_the_option() {
        assert_eq!(escape_commas(Path::new("/a,b")), "/a,,b");
    }
}

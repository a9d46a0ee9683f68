//! Can this host run guests? Found out by trying: a `/dev/kvm` may be there and yet be unable to run a kernel, because the host is itself
//! a virtual machine whose hypervisor interprets a guest's kernel code, slowly and without many of the instructions.

use std::fmt::Write as _;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use crate::boot;
use crate::layout;
use crate::thread::{self, Kind};
use crate::vcpu::{self, Kick};

/// Capabilities of KVM that every machine of ours needs, by their names in the kernel's documentation.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    // The machine has no PIT: this is the only timer that needs no calibration.
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
];

/// How long the trial may take. It is a matter of milliseconds; a loaded host gets some patience.
const TIME_LIMIT: Duration = Duration::from_secs(10);
/// Iterations of the loop that is timed; two instructions each.
const ITERATIONS: u32 = 1_000_000;
/// Processor time that the loop may take. Hardware needs half a millisecond, an emulated host some ten, an interpreter two
/// seconds.
const LOOP_LIMIT: Duration = Duration::from_millis(500);

const MEMORY: usize = 64 << 10;
const STACK_AND_CODE: u64 = 0xd000;
/// Sixteen zero bytes for `cmpxchg16b`.
const OPERAND: u16 = 0xc000;
const PORT: u16 = layout::BOOT_MARK_PORT;
const MARK_FEATURES: u8 = 1;
const MARK_LOOP: u8 = 2;
const CR4_OSXSAVE: u64 = 1 << 18;

/// What a good `/dev/kvm` was found to be.
#[derive(Debug, Clone, Copy)]
pub struct Report {
    /// Processor time that a guest's loop of two million instructions took.
    pub loop_time: Duration,
}

/// Why this host can't run guests.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// There is no such file.
    #[error("{0} does not exist")]
    NoDevice(String),
    /// It may not be opened.
    #[error("{0} may not be opened for reading and writing")]
    Permission(String),
    /// It can't be opened.
    #[error("{path} cannot be opened")]
    Open {
        /// Its path.
        path: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Not KVM, or one from before 2007.
    #[error("its KVM has API version {0}, and {KVM_API_VERSION} is needed")]
    ApiVersion(i32),
    /// It lacks capabilities.
    #[error("its KVM lacks {}", .0.join(", "))]
    Capabilities(Vec<&'static str>),
    /// Setting the trial up failed.
    #[error("{operation} failed")]
    Setup {
        /// What failed.
        operation: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Memory for the trial.
    #[error("the trial's memory cannot be prepared")]
    Memory(#[source] GuestMemoryError),
    /// The trial's code did not run to its end.
    #[error("it cannot run a kernel: a few plain instructions in kernel mode ended in {0}")]
    CannotRun(String),
    /// The trial's code ran, but far too slowly.
    #[error(
        "it cannot run a kernel in reasonable time: a guest's kernel code is interpreted, {} million instructions took {:.1} s",
        ITERATIONS / 500_000, .0.as_secs_f64()
    )]
    Interpreted(Duration),
    /// The trial did not end.
    #[error(
        "it cannot run a kernel: a few plain instructions in kernel mode did not end within {TIME_LIMIT:?}"
    )]
    Timeout,
}

impl ProbeError {
    /// What the user can do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoDevice(_) => {
                "enable virtualization (VT-x or SVM) in the firmware, or nested virtualization if this is a virtual machine, and \
                 load the module: modprobe kvm_intel or kvm_amd"
            }
            Self::Permission(_) => "run as root",
            Self::CannotRun(_) | Self::Interpreted(_) | Self::Timeout => {
                "this machine is a virtual one whose hypervisor does not pass hardware virtualization on: use bare metal, \
                 or enable nested virtualization"
            }
            Self::ApiVersion(_) | Self::Capabilities(_) => "use a kernel of version 5.10 or later",
            Self::Open { .. } | Self::Setup { .. } | Self::Memory(_) => {
                "see the kernel's log for what KVM says"
            }
        }
    }
}

/// Tries the KVM device at `path`.
pub fn probe(path: &Path) -> Result<Report, ProbeError> {
    let kvm = open(path)?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(ProbeError::ApiVersion(version));
    }
    let missing = missing_capabilities(&kvm);
    if !missing.is_empty() {
        return Err(ProbeError::Capabilities(missing));
    }
    let trial = Trial::new(&kvm)?;
    trial.run()
}

/// Which of the capabilities that a machine needs are not there.
pub fn missing_capabilities(kvm: &Kvm) -> Vec<&'static str> {
    REQUIRED
        .iter()
        .filter(|(cap, _)| !kvm.check_extension(*cap))
        .map(|(_, name)| *name)
        .collect()
}

fn open(path: &Path) -> Result<Kvm, ProbeError> {
    let name = || path.display().to_string();
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ProbeError::NoDevice(name()),
            io::ErrorKind::PermissionDenied => ProbeError::Permission(name()),
            // The device node is there, the module is not.
            _ if matches!(source.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => {
                ProbeError::NoDevice(name())
            }
            _ => ProbeError::Open {
                path: name(),
                source,
            },
        })?;
    let fd = OwnedFd::from(file);
    // SAFETY: the descriptor is owned and given away. If it is not KVM's, every ioctl on it fails.
    Ok(unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) })
}

/// A tiny VM with one vCPU in 64-bit kernel mode.
struct Trial {
    vcpu: VcpuFd,
    // After the vCPU, in the order in which they may go.
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl Trial {
    fn new(kvm: &Kvm) -> Result<Self, ProbeError> {
        let setup = |operation| {
            move |source: kvm_ioctls::Error| ProbeError::Setup {
                operation,
                source: source.into(),
            }
        };
        let vm = kvm.create_vm().map_err(setup("creating a VM"))?;
        vm.set_tss_address(layout::KVM_TSS)
            .map_err(setup("setting the TSS address"))?;
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).map_err(|error| {
                ProbeError::Setup {
                    operation: "mapping memory",
                    source: io::Error::other(error),
                }
            })?;
        let start = memory
            .get_host_address(GuestAddress(0))
            .map_err(ProbeError::Memory)?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: start as u64,
        };
        // SAFETY: the memory is mapped, and goes after the VM.
        unsafe { vm.set_user_memory_region(region) }.map_err(setup("giving the VM memory"))?;
        boot::write_page_tables(&memory)
            .and_then(|()| boot::write_gdt(&memory))
            .and_then(|()| memory.write_slice(&code(), GuestAddress(STACK_AND_CODE)))
            .map_err(ProbeError::Memory)?;

        let vcpu = vm.create_vcpu(0).map_err(setup("creating a vCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(setup("reading the supported CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(setup("setting CPUID"))?;
        let mut sregs = vcpu
            .get_sregs()
            .map_err(setup("reading the system registers"))?;
        boot::set_long_mode(&mut sregs);
        sregs.cr4 |= CR4_OSXSAVE;
        vcpu.set_sregs(&sregs)
            .map_err(setup("setting the system registers"))?;
        let mut regs = boot::entry_registers(STACK_AND_CODE);
        regs.rsp = STACK_AND_CODE;
        vcpu.set_regs(&regs)
            .map_err(setup("setting the registers"))?;
        Ok(Self {
            vcpu,
            _vm: vm,
            _memory: memory,
        })
    }

    /// Runs the code on a thread of its own, which is kicked out of the guest if it takes too long.
    fn run(mut self) -> Result<Report, ProbeError> {
        vcpu::install_kick_handler().map_err(|error| ProbeError::Setup {
            operation: "setting the time limit up",
            source: io::Error::other(error),
        })?;
        let kick = Kick::new(&mut self.vcpu);
        let (done, is_done) = channel();
        let thread = thread::spawn(Kind::Probe, move || {
            let result = run(&mut self.vcpu);
            // Nobody listens any more after the time limit.
            let _ = done.send(());
            // The vCPU goes back to the thread that may still kick it.
            (self, result)
        })
        .map_err(|source| ProbeError::Setup {
            operation: "starting a thread",
            source,
        })?;
        if is_done.recv_timeout(TIME_LIMIT) == Err(RecvTimeoutError::Timeout) {
            kick.set(1);
            // Fails only if the thread has ended by now.
            let _ = thread.kill(SIGRTMIN());
        }
        match thread.join() {
            Ok((_trial, result)) => result,
            Err(_) => Err(ProbeError::CannotRun("a panic".into())),
        }
    }
}

/// Runs the trial's code to its end.
fn run(vcpu: &mut VcpuFd) -> Result<Report, ProbeError> {
    let mut started = None;
    loop {
        let mut what = match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, &[MARK_FEATURES])) => {
                started = Some(thread_time());
                continue;
            }
            Ok(VcpuExit::IoOut(PORT, &[MARK_LOOP])) => {
                let loop_time = thread_time().saturating_sub(started.unwrap_or_default());
                if loop_time > LOOP_LIMIT {
                    return Err(ProbeError::Interpreted(loop_time));
                }
                return Ok(Report { loop_time });
            }
            Ok(VcpuExit::InternalError) => vcpu::internal_error(vcpu),
            Ok(VcpuExit::Shutdown) => "a triple fault".into(),
            Ok(VcpuExit::Hlt) => "a wrong result".into(),
            Ok(other) => format!("{other:?}"),
            Err(error) if error.errno() == libc::EINTR => {
                if vcpu.get_kvm_run().immediate_exit == 0 {
                    // A signal of the process's that is none of ours.
                    continue;
                }
                return Err(ProbeError::Timeout);
            }
            Err(error) if error.errno() == libc::EAGAIN => continue,
            Err(error) => format!("an error of KVM_RUN ({error})"),
        };
        if let Ok(regs) = vcpu.get_regs() {
            let _ = write!(
                what,
                " at instruction byte {}",
                regs.rip.wrapping_sub(STACK_AND_CODE)
            );
        }
        return Err(ProbeError::CannotRun(what));
    }
}

/// Instructions that every Linux kernel needs and KVM's emulator lacks, then a loop.
fn code() -> Vec<u8> {
    let [operand_low, operand_high] = OPERAND.to_le_bytes();
    let [port_low, port_high] = PORT.to_le_bytes();
    let [i0, i1, i2, i3] = ITERATIONS.to_le_bytes();
    let mut code = Vec::new();
    // What fails a check jumps to the `hlt` at the end, which is told apart by its exit.
    let mut jumps = Vec::new();
    let jump_if_not_zero = |code: &mut Vec<u8>, jumps: &mut Vec<usize>| {
        code.extend([0x0f, 0x85, 0, 0, 0, 0]); // jnz fail
        jumps.push(code.len());
    };
    code.extend([0xb8, 0x0f, 0x0f, 0x00, 0x00]); // mov eax, 0x0f0f
    code.extend([0xf3, 0x0f, 0xb8, 0xc0]); // popcnt eax, eax
    code.extend([0x83, 0xf8, 0x08]); // cmp eax, 8
    jump_if_not_zero(&mut code, &mut jumps);
    code.extend([0x31, 0xc0, 0x31, 0xd2]); // xor eax, eax; xor edx, edx
    code.extend([0xbb, 1, 0, 0, 0, 0xb9, 2, 0, 0, 0]); // mov ebx, 1; mov ecx, 2
    code.extend([0xbf, operand_low, operand_high, 0, 0]); // mov edi, OPERAND
    code.extend([0xf0, 0x48, 0x0f, 0xc7, 0x0f]); // lock cmpxchg16b [rdi]
    jump_if_not_zero(&mut code, &mut jumps);
    code.extend([0x31, 0xc9, 0x0f, 0x01, 0xd0]); // xor ecx, ecx; xgetbv
    code.extend([0x24, 0x01, 0x34, 0x01]); // and al, 1; xor al, 1
    jump_if_not_zero(&mut code, &mut jumps);
    code.extend([0x66, 0xba, port_low, port_high]); // mov dx, PORT
    code.extend([0xb0, MARK_FEATURES, 0xee]); // mov al, MARK; out dx, al
    code.extend([0xb9, i0, i1, i2, i3]); // mov ecx, ITERATIONS
    code.extend([0xff, 0xc9, 0x75, 0xfc]); // dec ecx; jnz -4
    code.extend([0x66, 0xba, port_low, port_high]); // mov dx, PORT
    code.extend([0xb0, MARK_LOOP, 0xee]); // mov al, MARK; out dx, al
    let fail = code.len();
    code.push(0xf4); // fail: hlt
    for after in jumps {
        let distance = (fail - after) as u32;
        code[after - 4..after].copy_from_slice(&distance.to_le_bytes());
    }
    code
}

/// Processor time of this thread: unlike the time of day it does not grow while others have the processor.
fn thread_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid timespec that the call fills; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_told_apart_from_a_wrong_one() {
        assert!(matches!(
            probe(Path::new("/nonexistent/kvm")),
            Err(ProbeError::NoDevice(_))
        ));
        assert!(matches!(
            probe(Path::new("/dev/null")),
            Err(ProbeError::ApiVersion(_))
        ));
        assert!(matches!(
            probe(Path::new("/proc/version")),
            Err(ProbeError::Permission(_) | ProbeError::Open { .. } | ProbeError::ApiVersion(_))
        ));
    }

    #[test]
    fn every_error_has_one_line_and_a_remedy() {
        for error in [
            ProbeError::NoDevice("/dev/kvm".into()),
            ProbeError::Permission("/dev/kvm".into()),
            ProbeError::Capabilities(vec!["KVM_CAP_IRQFD", "KVM_CAP_IRQCHIP"]),
            ProbeError::CannotRun("a triple fault".into()),
            ProbeError::Interpreted(Duration::from_millis(2100)),
            ProbeError::Timeout,
        ] {
            assert_eq!(error.to_string().lines().count(), 1);
            assert!(!error.remedy().is_empty());
        }
    }
}

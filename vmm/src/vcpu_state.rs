//! What a vCPU is at, as KVM tells and takes it.

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, kvm_debugregs, kvm_device_attr, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::ioctl_with_ref;

/// Requests that kvm-ioctls has for vCPUs of other processors only.
#[allow(missing_docs)]
mod request {
    use kvm_bindings::{KVMIO, kvm_device_attr};
    use vmm_sys_util::ioctl_iow_nr;

    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);
}

/// The time-stamp counter. Writing it is guesswork for KVM, which takes values within a second of each other for the same, so the offset
/// from the host's is set in its place.
const MSR_TSC: u32 = 0x10;
/// The local APIC's timer: setting it arms the timer by the TSC, so it comes after that.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Nested VMX's capabilities, which a guest without VMX does not have though KVM names them.
const MSR_VMX: std::ops::RangeInclusive<u32> = 0x480..=0x491;

/// In the type of a task's segment: it runs.
const TASK_BUSY: u8 = 2;

/// Why a vCPU's state could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// An ioctl failed.
    #[error("{operation} failed")]
    Kvm {
        /// Which operation.
        operation: &'static str,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Before Linux 5.16.
    #[error("this host's KVM can't set the offset of a guest's TSC")]
    NoTscOffset,
    /// It has no time-stamp counter.
    #[error("the vCPU has no TSC")]
    NoTsc,
    /// KVM takes a register only with another value.
    #[error("KVM refused MSR {0:#x}")]
    Msr(u32),
    /// More MSRs than KVM takes.
    #[error("too many MSRs")]
    TooMany,
}

/// A vCPU that stands still.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Saves a vCPU, with those of the MSRs that it has. KVM must have completed the instruction of its last exit
    /// (Documentation/virt/kvm/api.rst, 5, KVM_EXIT_IO).
    pub fn save(fd: &VcpuFd, msrs: &[u32]) -> Result<Self, StateError> {
        let attribute = tsc_offset(&0);
        // SAFETY: `fd` is a vCPU's, and KVM reads the structure's numbers only.
        if unsafe { ioctl_with_ref(fd, request::KVM_HAS_DEVICE_ATTR(), &attribute) } != 0 {
            return Err(StateError::NoTscOffset);
        }
        Ok(Self {
            // First: it makes KVM take in what other vCPUs have sent.
            mp_state: fd.get_mp_state().map_err(kvm("reading the MP state"))?,
            regs: fd.get_regs().map_err(kvm("reading the registers"))?,
            sregs: fd
                .get_sregs()
                .map_err(kvm("reading the system registers"))?,
            xsave: fd.get_xsave().map_err(kvm("reading the FPU"))?,
            xcrs: fd.get_xcrs().map_err(kvm("reading the XCRs"))?,
            debug_regs: fd
                .get_debug_regs()
                .map_err(kvm("reading the debug registers"))?,
            lapic: fd.get_lapic().map_err(kvm("reading the local APIC"))?,
            msrs: save_msrs(fd, msrs)?,
            events: fd.get_vcpu_events().map_err(kvm("reading the events"))?,
        })
    }

    /// What the TSC was.
    pub fn tsc(&self) -> Result<u64, StateError> {
        let tsc = self.msrs.iter().find(|entry| entry.index == MSR_TSC);
        tsc.map(|entry| entry.data).ok_or(StateError::NoTsc)
    }

    /// Puts a new vCPU, which has its CPUID already, where the saved one was. Its TSC is the host's and `offset`, the same for all vCPUs
    /// of a machine.
    pub fn restore(&self, fd: &VcpuFd, offset: u64) -> Result<(), StateError> {
        fd.set_mp_state(self.mp_state)
            .map_err(kvm("setting the MP state"))?;
        fd.set_regs(&self.regs)
            .map_err(kvm("setting the registers"))?;
        let mut sregs = self.sregs;
        if is_amd() {
            // As an AMD processor itself saves it: the bit is KVM's addition (svm_get_segment), which Intel's insist on and QEMU's
            // emulation of AMD's takes for no task at all, so that no port is allowed to user mode.
            sregs.tr.type_ &= !TASK_BUSY;
        }
        fd.set_sregs(&sregs)
            .map_err(kvm("setting the system registers"))?;
        // SAFETY: `save` was refused if the guest's state were longer than the 4 KiB of this structure, and the guest has no features
        // (they would have to be asked for by arch_prctl) that make it longer now.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(kvm("setting the FPU"))?;
        fd.set_xcrs(&self.xcrs).map_err(kvm("setting the XCRs"))?;
        fd.set_debug_regs(&self.debug_regs)
            .map_err(kvm("setting the debug registers"))?;
        fd.set_lapic(&self.lapic)
            .map_err(kvm("setting the local APIC"))?;
        let attribute = tsc_offset(&offset);
        // SAFETY: `fd` is a vCPU's; KVM reads the structure and the number that it points to, which outlives the call.
        if unsafe { ioctl_with_ref(fd, request::KVM_SET_DEVICE_ATTR(), &attribute) } != 0 {
            return Err(StateError::NoTscOffset);
        }
        restore_msrs(fd, &self.msrs)?;
        fd.set_vcpu_events(&self.events)
            .map_err(kvm("setting the events"))
    }
}

/// Reads those of the MSRs that the vCPU has.
fn save_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let mut wanted: Vec<_> = indices
        .iter()
        .filter(|index| !MSR_VMX.contains(index))
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    wanted.sort_by_key(|entry| entry.index == MSR_TSC_DEADLINE);
    let mut saved = Vec::with_capacity(wanted.len());
    let mut rest = &wanted[..];
    while !rest.is_empty() {
        let mut msrs = Msrs::from_entries(rest).map_err(|_| StateError::TooMany)?;
        let count = fd.get_msrs(&mut msrs).map_err(kvm("reading the MSRs"))?;
        saved.extend_from_slice(&msrs.as_slice()[..count]);
        // KVM stops at the first one that this vCPU lacks.
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(saved)
}

/// Sets MSRs. KVM refuses to write some that it lets read; those must have the saved value anyway.
fn restore_msrs(fd: &VcpuFd, saved: &[kvm_msr_entry]) -> Result<(), StateError> {
    let saved: Vec<_> = saved
        .iter()
        .filter(|entry| entry.index != MSR_TSC)
        .copied()
        .collect();
    let mut rest = &saved[..];
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest).map_err(|_| StateError::TooMany)?;
        let count = fd.set_msrs(&msrs).map_err(kvm("setting the MSRs"))?;
        if let Some(refused) = rest.get(count) {
            let current = save_msrs(fd, &[refused.index])?;
            if current.first().map(|entry| entry.data) != Some(refused.data) {
                return Err(StateError::Msr(refused.index));
            }
        }
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(())
}

/// The attribute of a vCPU that is the offset of its TSC (Documentation/virt/kvm/devices/vcpu.rst, 4.1).
fn tsc_offset(offset: &u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_ref(offset) as u64,
        flags: 0,
    }
}

/// Whether the host's processor is one of AMD's, or of Hygon's.
fn is_amd() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    let vendor = [leaf.ebx, leaf.edx, leaf.ecx]
        .map(u32::to_le_bytes)
        .concat();
    matches!(&vendor[..], b"AuthenticAMD" | b"HygonGenuine")
}

fn kvm(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Kvm { operation, source }
}

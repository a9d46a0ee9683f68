//! What CPUID tells the guest: KVM's supported leaves with the topology of this machine, one socket of single-threaded cores.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Facts about the host and the machine that CPUID reports.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// Number of vCPUs, at least 1.
    pub vcpus: u8,
    /// Frequency of the guest's TSC, if KVM knows it.
    pub tsc_khz: Option<u32>,
    /// Whether KVM emulates the TSC deadline timer.
    pub tsc_deadline: bool,
}

/// Frequency of KVM's APIC timer bus in kHz: one tick a nanosecond.
const APIC_BUS_KHZ: u32 = 1_000_000;
/// Leaf with TSC and APIC bus frequency in kHz, as VMware defined it and KVM guests understand it.
const LEAF_TIMING: u32 = 0x4000_0010;

/// Features of KVM (Documentation/virt/kvm/x86/cpuid.rst): asynchronous page faults, as exits, by interrupt.
const KVM_ASYNC_PAGE_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// Leaf 1 ECX.
const ECX1_VMX: u32 = 1 << 5;
const ECX1_X2APIC: u32 = 1 << 21;
const ECX1_TSC_DEADLINE: u32 = 1 << 24;
const ECX1_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: more than one logical processor in the package.
const EDX1_HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001 ECX.
const ECX81_CMP_LEGACY: u32 = 1 << 1;
const ECX81_SVM: u32 = 1 << 2;
const ECX81_PERFCTR_CORE: u32 = 1 << 23;
const ECX81_PERFCTR_NB: u32 = 1 << 24;
const ECX81_PERFCTR_LLC: u32 = 1 << 28;

/// Subleaf flag of `kvm_cpuid_entry2`: the index counts.
const SIGNIFICANT_INDEX: u32 = kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

/// Turns KVM's supported CPUID into the entries common to every vCPU. [`for_vcpu`] adds what differs.
pub fn common(supported: &CpuId, machine: Machine) -> Vec<kvm_cpuid_entry2> {
    let vcpus = u32::from(machine.vcpus);
    let bits = core_bits(machine.vcpus);
    let mut entries: Vec<_> = supported
        .as_slice()
        .iter()
        .copied()
        // Rebuilt below: topology and timing. Intel's and AMD's newer topology leaves would only have to say the same again.
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_0026 | LEAF_TIMING))
        .collect();
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                // CLFLUSH line size stays; logical processors in the package.
                entry.ebx = entry.ebx & 0x0000_ff00 | vcpus << 16;
                entry.ecx |= ECX1_HYPERVISOR | ECX1_X2APIC;
                entry.ecx &= !ECX1_VMX;
                set(&mut entry.ecx, ECX1_TSC_DEADLINE, machine.tsc_deadline);
                set(&mut entry.edx, EDX1_HTT, vcpus > 1);
            }
            // Intel's cache leaf: the last level is shared by all cores, the others are each core's own.
            0x4 if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 0x7 >= 3 {
                    (1 << bits) - 1
                } else {
                    0
                };
                let cores = (1u32 << bits) - 1;
                entry.eax = entry.eax & 0x3fff | sharing << 14 | cores << 26;
            }
            // The performance monitor: none. It costs time at boot and on each entry, and shows the guest its neighbours' traces.
            0xa | 0x8000_0022 => clear(entry),
            // No page faults told to the guest while the host fetches the page: some of what KVM knows of those is in no state that it
            // tells, so that a guest made from a template could wait for ever. KVM waits for the page itself.
            0x4000_0001 => entry.eax &= !KVM_ASYNC_PAGE_FAULTS,
            0x4000_0000 => entry.eax = entry.eax.max(LEAF_TIMING),
            0x8000_0001 => {
                entry.ecx &=
                    !(ECX81_SVM | ECX81_PERFCTR_CORE | ECX81_PERFCTR_NB | ECX81_PERFCTR_LLC);
                set(&mut entry.ecx, ECX81_CMP_LEGACY, vcpus > 1);
            }
            // AMD: cores in the package, and how many bits of the APIC id count them.
            0x8000_0008 => entry.ecx = bits << 12 | (vcpus - 1),
            // Nested SVM is not offered.
            0x8000_000a => clear(entry),
            // AMD's cache leaf, as leaf 4.
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 0x7 >= 3 {
                    vcpus - 1
                } else {
                    0
                };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
            // AMD: one thread a core, one node.
            0x8000_001e => clear(entry),
            _ => {}
        }
    }
    entries.extend(topology(vcpus, bits));
    if let Some(tsc_khz) = machine.tsc_khz {
        entries.push(kvm_cpuid_entry2 {
            function: LEAF_TIMING,
            eax: tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        });
    }
    entries
}

/// The entries of one vCPU: [`common`] with its APIC id.
pub fn for_vcpu(common: &[kvm_cpuid_entry2], vcpu: u8) -> Vec<kvm_cpuid_entry2> {
    let id = u32::from(vcpu);
    let mut entries = common.to_vec();
    for entry in &mut entries {
        match entry.function {
            0x1 => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
            0xb => entry.edx = id,
            0x8000_001e => {
                entry.eax = id;
                // Core id; bits 15:8, threads a core less one, stay zero.
                entry.ebx = id;
            }
            _ => {}
        }
    }
    entries
}

/// Bits of the APIC id that number the cores: ids run from 0 without holes.
fn core_bits(vcpus: u8) -> u32 {
    u8::BITS - (vcpus - 1).leading_zeros()
}

/// Leaf 0xb (Intel SDM vol. 2, CPUID): a level of threads, one a core, a level of cores, and the end.
fn topology(vcpus: u32, bits: u32) -> [kvm_cpuid_entry2; 3] {
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    let level = |index: u32, kind: u32, shift, count| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: SIGNIFICANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        ..Default::default()
    };
    [
        level(0, THREADS, 0, 1),
        level(1, CORES, bits, vcpus),
        level(2, 0, 0, 0),
    ]
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    entry.eax = 0;
    entry.ebx = 0;
    entry.ecx = 0;
    entry.edx = 0;
}

fn set(register: &mut u32, bits: u32, on: bool) {
    if on {
        *register |= bits;
    } else {
        *register &= !bits;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let entry = |function, index, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        CpuId::from_entries(&[
            entry(0x1, 0, 0, 0xff20_0800, ECX1_VMX, EDX1_HTT),
            // Level 1 data cache and level 3, each said to be shared by 64 threads.
            entry(0x4, 0, 63 << 26 | 63 << 14 | 1 << 5 | 1, 0, 0, 0),
            entry(0x4, 1, 63 << 26 | 63 << 14 | 3 << 5 | 3, 0, 0, 0),
            entry(0xa, 0, 0x0830_0802, 0, 0, 0x603),
            entry(0xb, 0, 1, 2, 0x100, 77),
            entry(0x1f, 0, 1, 2, 0x100, 77),
            entry(0x4000_0000, 0, 0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d),
            entry(0x4000_0001, 0, 0x0100_7efb, 0, 0, 0),
            entry(0x8000_0001, 0, 0, 0, ECX81_SVM | ECX81_PERFCTR_CORE, 0),
            entry(0x8000_0008, 0, 0x3030, 0, 0x703f, 0),
            entry(0x8000_001e, 0, 77, 0x0101, 3, 0),
        ])
        .unwrap()
    }

    fn vcpu(vcpus: u8, id: u8) -> Vec<kvm_cpuid_entry2> {
        let machine = Machine {
            vcpus,
            tsc_khz: Some(2_500_000),
            tsc_deadline: true,
        };
        for_vcpu(&common(&supported(), machine), id)
    }

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = entries
            .iter()
            .filter(|e| e.function == function && e.index == index);
        let entry = *found.next().unwrap();
        assert!(found.next().is_none(), "leaf {function:#x} twice");
        entry
    }

    #[test]
    fn every_vcpu_is_a_core_of_one_package() {
        for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (17, 5), (32, 5)] {
            for id in 0..vcpus {
                let entries = vcpu(vcpus, id);
                let one = leaf(&entries, 1, 0);
                assert_eq!(
                    one.ebx,
                    u32::from(id) << 24 | u32::from(vcpus) << 16 | 0x0800
                );
                assert_eq!(one.edx & EDX1_HTT != 0, vcpus > 1);
                let threads = leaf(&entries, 0xb, 0);
                assert_eq!(
                    (threads.eax, threads.ebx, threads.ecx, threads.edx),
                    (0, 1, 0x100, u32::from(id))
                );
                let cores = leaf(&entries, 0xb, 1);
                assert_eq!(
                    (cores.eax, cores.ebx, cores.ecx, cores.edx),
                    (bits, u32::from(vcpus), 0x201, u32::from(id))
                );
                assert_eq!(leaf(&entries, 0xb, 2).ecx, 2);
                let amd = leaf(&entries, 0x8000_0008, 0);
                assert_eq!(amd.ecx, bits << 12 | (u32::from(vcpus) - 1));
                let ext = leaf(&entries, 0x8000_001e, 0);
                assert_eq!(
                    (ext.eax, ext.ebx, ext.ecx),
                    (u32::from(id), u32::from(id), 0)
                );
            }
        }
    }

    #[test]
    fn only_the_last_level_cache_is_shared() {
        let entries = vcpu(4, 0);
        assert_eq!(leaf(&entries, 4, 0).eax, 3 << 26 | 1 << 5 | 1);
        assert_eq!(leaf(&entries, 4, 1).eax, 3 << 26 | 3 << 14 | 3 << 5 | 3);
    }

    #[test]
    fn the_guest_sees_a_hypervisor_and_known_frequencies() {
        let entries = vcpu(2, 0);
        let features = leaf(&entries, 1, 0).ecx;
        assert_eq!(features, ECX1_HYPERVISOR | ECX1_X2APIC | ECX1_TSC_DEADLINE);
        assert_eq!(leaf(&entries, 0x4000_0000, 0).eax, LEAF_TIMING);
        let timing = leaf(&entries, LEAF_TIMING, 0);
        assert_eq!((timing.eax, timing.ebx), (2_500_000, 1_000_000));
    }

    #[test]
    fn kvm_tells_the_guest_of_no_page_faults() {
        let features = leaf(&vcpu(2, 0), 0x4000_0001, 0).eax;
        assert_eq!(features, 0x0100_7efb & !0x4410);
    }

    #[test]
    fn nested_virtualization_and_performance_counters_are_hidden() {
        let entries = vcpu(2, 0);
        assert_eq!(leaf(&entries, 0x8000_0001, 0).ecx, ECX81_CMP_LEGACY);
        assert_eq!(leaf(&entries, 0xa, 0).eax, 0);
        assert!(!entries.iter().any(|entry| entry.function == 0x1f));
    }
}

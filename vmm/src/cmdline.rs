//! The kernel's command line.

use std::ffi::CString;

use linux_loader::cmdline::{Cmdline, Error as InsertError};

use crate::layout;

/// Parameters of every guest:
/// - reset by the keyboard controller, at once after a panic;
/// - the TSC is what kvmclock says, and needs no watchdog;
/// - grace periods of RCU are waited for actively: the guest is small, and its namespaces and mounts wait for many of them;
/// - the processor's random numbers seed the generator, so nothing waits for entropy;
/// - an idle vCPU polls a little before it halts, which for a short wait is cheaper than an exit;
/// - no bounce buffers for devices that cannot reach high memory: there are none;
/// - lock prefixes stay even with one vCPU: to take out the 9,000 of them costs two changes of the address space each;
/// - memory is compacted when someone asks for it, and statistics are folded when a vCPU goes idle anyway: both would otherwise wake
///   an idle guest every second or more often.
const ALWAYS: &str = "reboot=k panic=-1 tsc=reliable rcupdate.rcu_expedited=1 \
                      random.trust_cpu=on cpuidle_haltpoll.force=1 swiotlb=noforce noreplace-smp \
                      sysctl.vm.compaction_proactiveness=0 sysctl.vm.stat_interval=120";
/// Console on virtio; no serial ports.
const QUIET: &str = "console=hvc0 quiet 8250.nr_uarts=0";
/// Console on the serial port, with every message.
const SERIAL: &str = "console=ttyS0 8250.nr_uarts=1";

/// Why a command line could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CmdlineError {
    /// Too long, or a byte that is not printable ASCII.
    #[error("the kernel command line does not fit {max} bytes or has a bad character", max = layout::CMDLINE_MAX)]
    Insert(#[source] InsertError),
    /// A NUL inside.
    #[error("the kernel command line contains a NUL")]
    Nul(#[source] InsertError),
}

/// The command line of a guest with `slots` virtio-mmio slots, `extra` at its end.
///
/// A kernel without ACPI and device tree learns of virtio-mmio devices by `virtio_mmio.device=<size>@<base>:<irq>` only, so the
/// spare slots must be named too.
pub fn build(slots: usize, serial: bool, extra: &str) -> Result<CString, CmdlineError> {
    let mut line = Cmdline::new(layout::CMDLINE_MAX).map_err(CmdlineError::Insert)?;
    let mut insert = |words: &str| line.insert_str(words).map_err(CmdlineError::Insert);
    insert(ALWAYS)?;
    insert(if serial { SERIAL } else { QUIET })?;
    for (slot, irq) in layout::VIRTIO_IRQS.iter().take(slots).enumerate() {
        insert(&format!(
            "virtio_mmio.device={}@{:#x}:{irq}",
            layout::VIRTIO_MMIO_SIZE,
            layout::slot_base(slot)
        ))?;
    }
    if !extra.trim().is_empty() {
        insert(extra.trim())?;
    }
    line.as_cstring().map_err(CmdlineError::Nul)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_is_named_with_its_line() {
        let line = build(2, false, "").unwrap();
        let line = line.to_str().unwrap();
        assert!(
            line.ends_with(
                "virtio_mmio.device=512@0xd0000000:5 virtio_mmio.device=512@0xd0000200:6"
            )
        );
        assert!(line.contains("console=hvc0") && !line.contains("ttyS0"));
    }

    #[test]
    fn serial_makes_it_the_console() {
        let line = build(0, true, "").unwrap();
        assert!(line.to_str().unwrap().contains("console=ttyS0"));
    }

    #[test]
    fn extra_words_come_last() {
        let line = build(layout::MAX_SLOTS, false, " debug init=/bin/sh ").unwrap();
        assert!(line.to_str().unwrap().ends_with(" debug init=/bin/sh"));
    }

    #[test]
    fn what_does_not_fit_or_is_not_text_is_refused() {
        for extra in ["a".repeat(2048).as_str(), "a\0b", "a\nb"] {
            assert!(build(4, false, extra).is_err());
        }
    }
}

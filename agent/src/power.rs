//! The two I/O ports of the machine: boot marks, and the power button.
//!
//! A machine without ACPI has no other way to end in order.

use bulkhead_protocol::{BOOT_MARK_PORT, POWER_OFF_PORT};
use nix::sys::reboot::{RebootMode, reboot};

/// Permission to write to both ports. Children inherit it: it must be given back before there are any.
#[derive(Debug)]
pub struct Ports(());

const FIRST_PORT: u16 = if POWER_OFF_PORT < BOOT_MARK_PORT {
    POWER_OFF_PORT
} else {
    BOOT_MARK_PORT
};
const PORTS: u16 = POWER_OFF_PORT.abs_diff(BOOT_MARK_PORT) + 1;

impl Ports {
    /// Asks the kernel for the ports.
    pub fn open() -> Option<Self> {
        // SAFETY: touches no memory; it changes which instructions this thread may execute.
        let result = unsafe { libc::ioperm(FIRST_PORT.into(), PORTS.into(), 1) };
        (result == 0).then_some(Self(()))
    }

    /// Puts a boot mark on the VMM's timeline.
    pub fn mark(&self, mark: u8) {
        out_byte(self, BOOT_MARK_PORT, mark);
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        // SAFETY: as in `open`.
        unsafe { libc::ioperm(FIRST_PORT.into(), PORTS.into(), 0) };
    }
}

fn out_byte(_permission: &Ports, port: u16, value: u8) {
    // SAFETY: `Ports` proves that the kernel allows this thread to write to the two ports, and the machine has
    // nothing there that could write to memory.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
    }
}

/// Ends the machine. Where the power button does not, a reset does.
pub fn off() -> ! {
    if let Some(ports) = Ports::open() {
        out_byte(&ports, POWER_OFF_PORT, 1);
    }
    loop {
        // Returns only if it failed; PID 1 has nowhere to go.
        let _ = reboot(RebootMode::RB_AUTOBOOT);
        nix::unistd::pause();
    }
}

//! The kernel's command line.

use std::ffi::CString;
use std::fs;
use std::path::Path;

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

/// Guards against the processor's own faults are off, all of them (Documentation/admin-guide/kernel-parameters.txt).
const NO_MITIGATIONS: &str = "mitigations=off";

/// Where a host says how it was booted.
const HOST_CMDLINE: &str = "/proc/cmdline";

/// Where a host has its settings (sysctl(8)).
const HOST_SETTINGS: &str = "/proc/sys";

/// The host's settings that hold for its containers, and that a guest's kernel would have other values of: which links and files of others
/// in shared directories a process may use (hosts are stricter than a kernel by itself), and how many mappings it may have.
const SETTINGS: [&str; 5] = [
    "fs.protected_hardlinks",
    "fs.protected_symlinks",
    "fs.protected_fifos",
    "fs.protected_regular",
    "vm.max_map_count",
];

/// What a guest has to know of its host: [`SETTINGS`]; and that an administrator who has switched mitigations off does not want them in guests
/// either, whose processes would be slower by them than those of other containers. Nothing of what can't be read.
pub fn inherited() -> String {
    let mut words = vec![of_host(&fs::read_to_string(HOST_CMDLINE).unwrap_or_default()).to_owned()];
    words.extend(settings(Path::new(HOST_SETTINGS)));
    words.retain(|word| !word.is_empty());
    words.join(" ")
}

/// Those settings of the host as words of a command line.
fn settings(folder: &Path) -> impl Iterator<Item = String> {
    SETTINGS.iter().filter_map(move |name| {
        let value = fs::read_to_string(folder.join(name.replace('.', "/"))).ok()?;
        let value: u64 = value.trim().parse().ok()?;
        Some(format!("sysctl.{name}={value}"))
    })
}

fn of_host(line: &str) -> &'static str {
    // What follows is for init. Of several the kernel takes the last.
    let words = line.split_whitespace().take_while(|word| *word != "--");
    let chosen = words.filter(|word| word.starts_with("mitigations=")).last();
    match chosen {
        Some(NO_MITIGATIONS) => NO_MITIGATIONS,
        _ => "",
    }
}

/// The command line of a guest with `slots` virtio-mmio slots, `inherited` from its host, and `extra` at its end.
///
/// A kernel without ACPI and device tree learns of virtio-mmio devices by `virtio_mmio.device=<size>@<base>:<irq>` only, so the
/// spare slots must be named too.
pub fn build(
    slots: usize,
    serial: bool,
    inherited: &str,
    extra: &str,
) -> Result<CString, CmdlineError> {
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
    for words in [inherited, extra.trim()] {
        if !words.is_empty() {
            insert(words)?;
        }
    }
    line.as_cstring().map_err(CmdlineError::Nul)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_is_named_with_its_line() {
        let line = build(2, false, "", "").unwrap();
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
        let line = build(0, true, "", "").unwrap();
        assert!(line.to_str().unwrap().contains("console=ttyS0"));
    }

    #[test]
    fn extra_words_come_last() {
        let line = build(
            layout::MAX_SLOTS,
            false,
            NO_MITIGATIONS,
            " debug init=/bin/sh ",
        );
        let line = line.unwrap();
        let line = line.to_str().unwrap();
        assert!(line.ends_with(" mitigations=off debug init=/bin/sh"));
    }

    #[test]
    fn mitigations_are_off_where_the_hosts_are() {
        for (host, expected) in [
            ("ro mitigations=off quiet\n", NO_MITIGATIONS),
            ("mitigations=auto mitigations=off", NO_MITIGATIONS),
            ("mitigations=off mitigations=auto,nosmt", ""),
            ("quiet -- mitigations=off", ""),
            ("my.mitigations=off mitigations=offer", ""),
            ("", ""),
        ] {
            assert_eq!(of_host(host), expected, "{host}");
        }
    }

    #[test]
    fn the_hosts_settings_are_handed_on() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["fs", "vm"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let write = |name: &str, value: &str| fs::write(folder.path().join(name), value).unwrap();
        write("fs/protected_regular", "2\n");
        write("vm/max_map_count", "1048576\n");
        write("fs/protected_fifos", "1 init=/bin/sh\n");
        let words: Vec<_> = settings(folder.path()).collect();
        assert_eq!(
            words,
            [
                "sysctl.fs.protected_regular=2",
                "sysctl.vm.max_map_count=1048576"
            ]
        );
    }

    #[test]
    fn the_longest_command_line_of_our_own_leaves_room_for_others() {
        let inherited = SETTINGS.map(|name| format!("sysctl.{name}={}", i32::MAX));
        let inherited = format!("{NO_MITIGATIONS} {}", inherited.join(" "));
        let line = build(layout::MAX_SLOTS, true, &inherited, "").unwrap();
        let left = layout::CMDLINE_MAX - line.as_bytes().len();
        assert!(left >= 700, "{left}");
    }

    #[test]
    fn what_does_not_fit_or_is_not_text_is_refused() {
        for extra in ["a".repeat(2048).as_str(), "a\0b", "a\nb"] {
            assert!(build(4, false, "", extra).is_err());
        }
    }
}

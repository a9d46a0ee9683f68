//! The machine in this process, with guests of a few instructions. Needs /dev/kvm (see `common`).

#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_vmm::control::{AttachConfig, BootConfig, exit_code};
use bulkhead_vmm::end::{End, EndSignal};
use bulkhead_vmm::layout;
use bulkhead_vmm::machine::Machine;
use bulkhead_vmm::timeline::Timeline;
use common::{CODE, POWER_OFF, RESET};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

/// A running machine with what hangs on it.
struct Guest {
    machine: Machine,
    end: Arc<EndSignal>,
    timeline: Arc<Timeline>,
    _folder: TempDir,
}

impl Guest {
    fn start(code: &[u8], change: impl FnOnce(&mut BootConfig)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = common::config(&folder);
        change(&mut config);
        let end = Arc::new(EndSignal::new().unwrap());
        let timeline = Arc::new(Timeline::new());
        let mut machine = Machine::new(
            &config,
            common::files(code),
            Arc::clone(&timeline),
            Arc::clone(&end),
        )
        .unwrap();
        machine.start().unwrap();
        Self {
            machine,
            end,
            timeline,
            _folder: folder,
        }
    }

    fn wait(&self) -> End {
        let mut poll = libc::pollfd {
            fd: self.end.event().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd.
        assert_eq!(unsafe { libc::poll(&mut poll, 1, 30_000) }, 1, "no end");
        self.end.get().unwrap()
    }

    fn word(&self, address: u32) -> u32 {
        self.machine
            .memory()
            .read_obj(GuestAddress(address.into()))
            .unwrap()
    }

    /// Waits until the guest has changed the word from `old`.
    fn await_change(&self, address: u32, old: u32) -> u32 {
        let limit = Instant::now() + Duration::from_secs(30);
        loop {
            let word = self.word(address);
            if word != old {
                return word;
            }
            assert!(Instant::now() < limit, "the guest does not run");
            std::thread::yield_now();
        }
    }
}

fn end_of(code: &[u8]) -> End {
    Guest::start(code, |_| ()).wait()
}

#[test]
fn the_power_button_and_the_reset_line_end_the_vm_with_codes_of_their_own() {
    assert_eq!(end_of(&POWER_OFF).exit_code, exit_code::POWER_OFF);
    assert_eq!(end_of(&RESET).exit_code, exit_code::RESET);
}

#[test]
fn a_triple_fault_is_a_crash_with_one_line() {
    // Without an IDT the first exception is the third.
    let end = end_of(&[0x0f, 0x01, 0x1c, 0x25, 0, 0, 0, 1, 0x0f, 0x0b]); // lidt [zeros]; ud2
    assert_eq!(end.exit_code, exit_code::CRASH);
    assert!(
        end.reason.starts_with("vCPU 0: triple fault"),
        "{}",
        end.reason
    );
    assert_eq!(end.reason.lines().count(), 1);
}

#[test]
fn a_jump_to_where_no_memory_is_ends_the_vm() {
    // The page tables of the boot protocol map 1 GiB; memory ends before it. KVM can't fetch instructions from MMIO.
    let end = end_of(&[0xb8, 0, 0, 0, 0x20, 0xff, 0xe0]); // mov eax, 0x2000_0000; jmp rax
    assert_eq!(end.exit_code, exit_code::CRASH);
    assert!(end.reason.starts_with("vCPU 0: "), "{}", end.reason);
}

#[test]
fn memory_and_ports_where_nothing_is_read_all_ones_and_swallow_writes() {
    let mut code = vec![0xbf, 0, 0, 0, 0x20]; // mov edi, 0x2000_0000
    code.extend([0xc7, 0x07, 1, 2, 3, 4]); // mov dword [rdi], ..
    code.extend([0x8b, 0x07, 0x83, 0xf8, 0xff]); // mov eax, [rdi]; cmp eax, -1
    code.extend([0x75, 16]); // jne wrong
    code.extend([0xe7, 0xf8, 0xe5, 0xf8]); // out 0xf8, eax; in eax, 0xf8
    code.extend([0x83, 0xf8, 0xff, 0x75, 7]); // cmp eax, -1; jne wrong
    code.extend(POWER_OFF);
    code.extend(RESET); // wrong:
    assert_eq!(end_of(&code).exit_code, exit_code::POWER_OFF);
}

#[test]
fn boot_marks_come_after_the_first_run_on_the_timeline() {
    let mut code = vec![0x66, 0xba, 0x01, 0x06]; // mov dx, 0x601
    code.extend([0xb0, 1, 0xee, 0xb0, 2, 0xee]); // out 1, out 2
    code.extend(POWER_OFF);
    let guest = Guest::start(&code, |_| ());
    assert_eq!(guest.wait().exit_code, exit_code::POWER_OFF);
    let names: Vec<_> = guest
        .timeline
        .entries()
        .into_iter()
        .map(|entry| entry.name)
        .collect();
    let tail = ["first KVM_RUN", "init started", "agent ready"];
    assert_eq!(names[names.len() - 3..], tail, "{names:?}");
}

#[test]
fn a_paused_vcpu_stands_still_and_goes_on_when_resumed() {
    let counter = CODE + 0x1000;
    let guest = Guest::start(&common::count_at(counter), |_| ());
    let mut seen = guest.await_change(counter, 0);
    for _ in 0..100 {
        guest.machine.pause().unwrap();
        let stopped = guest.word(counter);
        for _ in 0..1000 {
            std::hint::black_box(guest.word(counter));
        }
        assert_eq!(guest.word(counter), stopped);
        guest.machine.resume();
        seen = guest.await_change(counter, stopped.max(seen));
    }
}

#[test]
fn pause_and_resume_take_repetition() {
    let guest = Guest::start(&common::count_at(CODE + 0x1000), |_| ());
    guest.machine.pause().unwrap();
    guest.machine.pause().unwrap();
    guest.machine.resume();
    guest.machine.resume();
    let now = guest.word(CODE + 0x1000);
    guest.await_change(CODE + 0x1000, now);
}

#[test]
fn vcpus_that_wait_for_their_start_can_be_paused_and_dropped() {
    let counter = CODE + 0x1000;
    let guest = Guest::start(&common::count_at(counter), |config| config.vcpus = 8);
    guest.await_change(counter, 0);
    guest.machine.pause().unwrap();
    guest.machine.resume();
    let now = guest.word(counter);
    guest.await_change(counter, now);
    let started = Instant::now();
    drop(guest);
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_spare_slot_becomes_a_device_while_the_guest_runs() {
    let slot = layout::slot_base(3) as u32;
    let counter = CODE + 0x1000;
    // The page tables of the boot protocol end at 1 GiB. The page after them becomes a directory for 3 GiB and on.
    let directory = layout::PAGE_DIRECTORY as u32 + 0x1000;
    let mut code = Vec::new();
    for (address, entry) in [
        (layout::PDPT as u32 + 3 * 8, directory | 3),
        (directory + 128 * 8, layout::VIRTIO_MMIO_BASE as u32 | 0x83),
    ] {
        code.extend([0xc7, 0x04, 0x25]); // mov dword [address], entry
        code.extend(address.to_le_bytes());
        code.extend(entry.to_le_bytes());
    }
    code.push(0xbf); // mov edi, slot
    code.extend(slot.to_le_bytes());
    code.extend([0x81, 0x3f, b'v', b'i', b'r', b't']); // look: cmp dword [rdi], "virt"
    code.extend([0x75, 20]); // jne wrong
    code.extend([0xff, 0x04, 0x25]); // inc dword [counter]
    code.extend(counter.to_le_bytes());
    code.extend([0x83, 0x7f, 0x08, 0x04]); // cmp dword [rdi + 8], 4: an entropy device
    code.extend([0x75, 0xeb]); // jne look
    code.extend(POWER_OFF);
    code.extend(RESET); // wrong:
    let mut guest = Guest::start(&code, |_| ());
    guest.await_change(counter, 0);
    assert!(guest.end.get().is_none());
    assert_eq!(
        guest.machine.attach(&AttachConfig::Rng).unwrap(),
        layout::slot_base(3)
    );
    assert_eq!(guest.wait().exit_code, exit_code::POWER_OFF);
    assert!(
        guest.machine.attach(&AttachConfig::Rng).is_err(),
        "no slot is left"
    );
}

//! The VMM as its server sees it: the process and its control socket. Needs /dev/kvm (see `common`).

#![allow(clippy::unwrap_used)]

mod common;

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use bulkhead_vmm::client::{Client, ClientError, VmmProcess};
use bulkhead_vmm::control::{AttachConfig, BootConfig, Event, ShareConfig, VmState, exit_code};
use bulkhead_vmm::layout;
use common::{CODE, POWER_OFF, RESET};
use tempfile::TempDir;

/// A VMM under test.
struct Vmm {
    client: Client,
    process: Child,
    folder: TempDir,
}

impl Vmm {
    fn spawn() -> Self {
        let vmm = VmmProcess::spawn(
            Path::new(env!("CARGO_BIN_EXE_bulkhead-vmm")),
            &["--log-level", "debug"],
            Stdio::piped(),
        )
        .unwrap();
        Self {
            client: Client::new(vmm.socket),
            process: vmm.child,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn config(&self) -> BootConfig {
        common::config(&self.folder)
    }

    fn boot(&mut self, code: &[u8]) -> Result<(), ClientError> {
        self.boot_with(code, self.config())
    }

    fn boot_with(&mut self, code: &[u8], config: BootConfig) -> Result<(), ClientError> {
        let files = common::files(code);
        let fds = [
            files.kvm.as_fd(),
            files.kernel.as_fd(),
            files.initramfs.as_fd(),
        ];
        self.client.boot(config, &fds)
    }

    /// The reason, the exit code of event and process, and the log.
    fn end(mut self) -> (String, i32, String) {
        let mut log = String::new();
        let mut stderr = self.process.stderr.take().unwrap();
        stderr.read_to_string(&mut log).unwrap();
        let Event::Ended {
            exit_code, reason, ..
        } = self.client.next_event().unwrap()
        else {
            panic!("another event than the end");
        };
        let status = self.process.wait().unwrap();
        assert_eq!(status.code(), Some(exit_code), "{log}");
        (reason, exit_code, log)
    }

    fn refusal(&mut self, config: BootConfig, fds: &[BorrowedFd]) -> String {
        match self.client.boot(config, fds) {
            Err(ClientError::Refused(message)) => message,
            other => panic!("not refused: {other:?}"),
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Both fail when the process has ended, which is what is wanted.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const SPIN: [u8; 2] = [0xeb, 0xfe];

#[test]
fn the_memory_is_closed_to_processes_with_the_same_credentials() {
    let folder = tempfile::tempdir().unwrap();
    // No capabilities on either side: with them Linux would ask for CAP_SYS_PTRACE anyway.
    let without = ["--inh-caps=-all", "--bounding-set=-all"];
    let script = format!(
        "#!/bin/sh\nexec setpriv {} {}\n",
        without.join(" "),
        env!("CARGO_BIN_EXE_bulkhead-vmm")
    );
    let wrapper = folder.path().join("vmm");
    std::fs::write(&wrapper, script).unwrap();
    std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755)).unwrap();
    let vmm = VmmProcess::spawn(&wrapper, &[], Stdio::inherit()).unwrap();
    let (mut client, mut process) = (Client::new(vmm.socket), vmm.child);
    let maps_of = |pid: u32| {
        let mut reader = Command::new("setpriv");
        reader.args(without).arg("cat");
        reader.arg(format!("/proc/{pid}/maps"));
        reader.stdout(Stdio::null()).stderr(Stdio::null());
        reader.status().unwrap().success()
    };
    // It answers, so it is past its beginning.
    client.info().unwrap();
    assert!(!maps_of(process.id()));
    // The same of a process that has not shut itself off.
    let mut open = Command::new("setpriv");
    let open = open.args(without).args(["cat"]).stdin(Stdio::piped());
    let mut open = open.spawn().unwrap();
    let executed = || std::fs::read_to_string(format!("/proc/{}/comm", open.id())).unwrap();
    while executed() != "cat\n" {
        std::thread::yield_now();
    }
    assert!(maps_of(open.id()));
    open.kill().unwrap();
    open.wait().unwrap();
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn a_guest_boots_runs_and_ends_with_its_exit_code() {
    for (code, expected) in [
        (&POWER_OFF[..], exit_code::POWER_OFF),
        (&RESET, exit_code::RESET),
    ] {
        let mut vmm = Vmm::spawn();
        vmm.boot(code).unwrap();
        let (reason, code, _) = vmm.end();
        assert_eq!(code, expected);
        assert_eq!(reason.lines().count(), 1);
    }
}

#[test]
fn a_crash_is_one_line_and_a_register_dump_at_debug_level() {
    let mut vmm = Vmm::spawn();
    let code = [0x0f, 0x01, 0x1c, 0x25, 0, 0, 0, 1, 0x0f, 0x0b]; // lidt [zeros]; ud2
    vmm.boot(&code).unwrap();
    let (reason, code, log) = vmm.end();
    assert_eq!(code, exit_code::CRASH);
    assert!(
        reason.starts_with("vCPU 0: triple fault, rip 0x"),
        "{reason}"
    );
    let errors: Vec<_> = log.lines().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(errors.len(), 1, "{log}");
    assert!(log.contains("rflags") && log.contains("cr3"), "{log}");
}

#[test]
fn states_follow_the_requests() {
    let mut vmm = Vmm::spawn();
    assert_eq!(vmm.client.info().unwrap().state, VmState::Idle);
    assert!(matches!(
        vmm.client.pause(),
        Err(ClientError::Refused(message)) if message == "the machine has not been booted"
    ));
    vmm.boot(&SPIN).unwrap();
    let info = vmm.client.info().unwrap();
    assert_eq!(
        (info.state, info.vcpus, info.memory_mib, info.pid),
        (VmState::Running, 1, 64, vmm.process.id())
    );
    vmm.client.pause().unwrap();
    assert_eq!(vmm.client.info().unwrap().state, VmState::Paused);
    vmm.client.resume().unwrap();
    assert_eq!(vmm.client.info().unwrap().state, VmState::Running);
    let names: Vec<_> = info.timeline.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names[..2], ["vmm started", "boot requested"], "{names:?}");
    assert!(info.timeline.is_sorted_by_key(|entry| entry.at_ns));
    vmm.client.shutdown().unwrap();
    let (reason, code, _) = vmm.end();
    assert_eq!(
        (reason.as_str(), code),
        ("shut down by request", exit_code::POWER_OFF)
    );
}

#[test]
fn a_paused_machine_can_be_shut_down() {
    let mut vmm = Vmm::spawn();
    vmm.boot(&common::count_at(CODE + 0x1000)).unwrap();
    vmm.client.pause().unwrap();
    vmm.client.shutdown().unwrap();
    assert_eq!(vmm.end().1, exit_code::POWER_OFF);
}

#[test]
fn a_spare_slot_can_be_filled_once() {
    let mut vmm = Vmm::spawn();
    vmm.boot(&SPIN).unwrap();
    assert_eq!(
        vmm.client.attach(AttachConfig::Rng).unwrap(),
        layout::slot_base(3)
    );
    assert!(matches!(
        vmm.client.attach(AttachConfig::Rng),
        Err(ClientError::Refused(message)) if message.contains("spare")
    ));
}

#[test]
fn a_refused_boot_names_the_cause_and_can_be_repeated() {
    let mut vmm = Vmm::spawn();
    let kvm = common::kvm();
    let kernel = common::kernel(&SPIN);
    let initramfs = common::file(b"");
    let not_elf = common::file(b"MZ not a vmlinux, but long enough for a header ................");
    let good = [kvm.as_fd(), kernel.as_fd(), initramfs.as_fd()];
    let config = vmm.config();
    let with = |change: fn(&mut BootConfig)| {
        let mut config = config.clone();
        change(&mut config);
        config
    };
    let table: [(BootConfig, &[BorrowedFd], &str); 9] = [
        (with(|c| c.vcpus = 0), &good, "vcpus is 0"),
        (with(|c| c.vcpus = 33), &good, "vcpus is 33"),
        (with(|c| c.memory_mib = 8), &good, "memory_mib is 8"),
        (with(|c| c.spare_slots = 17), &good, "spare_slots is 17"),
        (
            with(|c| c.serial = true),
            &good,
            "3 descriptors and takes 4",
        ),
        (config.clone(), &good[..2], "2 descriptors and takes 3"),
        (
            config.clone(),
            &[good[0], not_elf.as_fd(), good[2]],
            "not an uncompressed x86-64 ELF",
        ),
        (config.clone(), &[good[1], good[1], good[2]], "KVM"),
        (
            with(|c| c.vsock_path = "/proc/nonexistent/vsock".into()),
            &good,
            "vsock_path",
        ),
    ];
    for (config, fds, expected) in table {
        let message = vmm.refusal(config, fds);
        assert!(message.contains(expected), "{message}");
        assert_eq!(message.lines().count(), 1);
    }
    // Refused after the socket was made.
    let no_share = with(|c| {
        c.share = Some(ShareConfig {
            tag: "share".into(),
            directory: "/proc/nonexistent".into(),
            queues: 1,
            files: 1 << 20,
        });
    });
    let vsock_path = no_share.vsock_path.clone();
    assert!(vmm.refusal(no_share, &good).contains("/proc/nonexistent"));
    assert!(!vsock_path.exists());
    vmm.boot(&SPIN).unwrap();
    let config = vmm.config();
    let again = vmm.refusal(config, &good);
    assert!(again.contains("already"), "{again}");
}

#[test]
fn a_message_that_is_none_is_refused_and_the_vmm_lives_on() {
    let mut vmm = Vmm::spawn();
    nix::unistd::write(&vmm.client, b"{\"request\":\"dance\"}").unwrap();
    // Its refusal is the answer to the next call, whose own answer follows.
    assert!(matches!(vmm.client.info(), Err(ClientError::Refused(_))));
}

#[test]
fn a_vmm_ends_when_its_server_closes_the_socket() {
    for booted in [false, true] {
        let mut vmm = Vmm::spawn();
        if booted {
            vmm.boot(&SPIN).unwrap();
        }
        let (other, _) = bulkhead_vmm::socket::pair().unwrap();
        vmm.client = Client::new(other);
        assert_eq!(
            vmm.process.wait().unwrap().code(),
            Some(exit_code::ORPHANED)
        );
    }
}

#[test]
fn a_vmm_without_control_socket_says_so() {
    let output = Command::new(env!("CARGO_BIN_EXE_bulkhead-vmm"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(exit_code::SETUP));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("no control socket"), "{stderr}");
}

#[test]
fn a_program_that_does_not_exist_is_an_error_of_spawn() {
    let spawned = VmmProcess::spawn(Path::new("/proc/nonexistent/vmm"), &[], Stdio::null());
    assert!(matches!(spawned, Err(ClientError::Spawn(_))));
}

#[test]
fn the_serial_port_reaches_the_descriptor_that_was_passed() {
    let mut vmm = Vmm::spawn();
    let mut config = vmm.config();
    config.serial = true;
    let mut code = Vec::new();
    for byte in b"hello\n" {
        code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, *byte, 0xee]); // mov dx, 0x3f8; mov al, byte; out dx, al
    }
    code.extend(POWER_OFF);
    let (mut reader, writer) = std::io::pipe().unwrap();
    let writer = OwnedFd::from(writer);
    let files = common::files(&code);
    let fds = [
        files.kvm.as_fd(),
        files.kernel.as_fd(),
        files.initramfs.as_fd(),
        writer.as_fd(),
    ];
    vmm.client.boot(config, &fds).unwrap();
    drop(writer);
    let mut output = String::new();
    reader.read_to_string(&mut output).unwrap();
    assert_eq!(output, "hello\n");
    assert_eq!(vmm.end().1, exit_code::POWER_OFF);
}

#[test]
fn a_limit_of_the_size_of_files_fails_writes_and_kills_nobody() {
    let mut vmm = Vmm::spawn();
    // Once it answers it is set up.
    vmm.client.info().unwrap();
    let status = std::fs::read_to_string(format!("/proc/{}/status", vmm.process.id())).unwrap();
    let (_, ignored) = status.split_once("SigIgn:\t").unwrap();
    let ignored = u64::from_str_radix(&ignored[..16], 16).unwrap();
    assert_ne!(ignored & 1 << (libc::SIGXFSZ - 1), 0, "{ignored:#x}");
    vmm.process.kill().unwrap();
    vmm.process.wait().unwrap();
}

#[test]
fn a_signal_that_can_be_ignored_ends_no_vm_and_stops_none() {
    let mut vmm = Vmm::spawn();
    vmm.boot(&SPIN).unwrap();
    for number in (1..=libc::SIGSYS).chain(libc::SIGRTMIN()..=libc::SIGRTMAX()) {
        let fatal = [libc::SIGKILL, libc::SIGSTOP, libc::SIGSEGV, libc::SIGBUS];
        if !fatal.contains(&number) {
            // SAFETY: a system call on numbers; the process is a child that has not been waited for.
            let sent = unsafe { libc::kill(vmm.process.id().cast_signed(), number) };
            assert_eq!(sent, 0, "{number}");
        }
    }
    // What the vCPUs use one for goes on.
    vmm.client.pause().unwrap();
    vmm.client.resume().unwrap();
    assert_eq!(vmm.client.info().unwrap().state, VmState::Running);
    vmm.client.shutdown().unwrap();
    assert_eq!(vmm.end().1, exit_code::POWER_OFF);
}

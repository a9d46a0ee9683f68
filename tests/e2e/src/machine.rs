//! A VM without server or agent: the VMM under test, its kernel, and the tests' own probe as PID 1.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Stdio};

use bulkhead_vmm::client::{Client, ClientError, VmmProcess};
use bulkhead_vmm::control::{BootConfig, Event};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;

use crate::{dist, initramfs};

/// A VM under test.
pub struct Machine {
    /// The VMM process.
    pub process: Child,
    /// Its control socket.
    pub client: Client,
    /// What the guest writes to its serial port.
    pub serial: BufReader<std::io::PipeReader>,
    /// Where its template is to be saved.
    template: Option<File>,
    folder: TempDir,
}

/// How a VM ended.
#[derive(Debug)]
pub struct MachineEnd {
    /// Exit code of the VMM's process.
    pub exit_code: i32,
    /// The reason in its last event.
    pub reason: String,
    /// What it logged.
    pub log: String,
    /// What the guest wrote to the serial port and nobody has read.
    pub serial: String,
}

/// The machine that the tests boot when they care for nothing special.
pub fn config() -> BootConfig {
    BootConfig {
        vcpus: 1,
        memory_mib: 128,
        cmdline: String::new(),
        vsock_path: PathBuf::new(),
        share: None,
        spare_slots: 0,
        serial: true,
        save_template: false,
    }
}

impl Machine {
    /// Starts a VMM; its machine is not there yet, so that listeners can be made first.
    ///
    /// # Panics
    /// When it can't be started, as everything here.
    pub fn spawn() -> Self {
        let vmm = VmmProcess::spawn(
            &dist().join("bin/bulkhead-vmm"),
            &["--log-level", "debug"],
            Stdio::piped(),
        )
        .unwrap();
        // Replaced when the machine starts; until then it reads as ended.
        let (serial, _) = std::io::pipe().unwrap();
        Self {
            process: vmm.child,
            client: Client::new(vmm.socket),
            serial: BufReader::new(serial),
            template: None,
            folder: tempfile::Builder::new()
                .prefix("machine")
                .tempdir()
                .unwrap(),
        }
    }

    /// A machine that runs the probe in the mode that it knows by this name.
    ///
    /// # Panics
    /// When it can't be booted.
    pub fn with_probe(mode: &str, config: BootConfig) -> Self {
        let mut machine = Self::spawn();
        machine.boot_probe(mode, config);
        machine
    }

    /// Boots the probe in the mode that it knows by this name.
    ///
    /// # Panics
    /// When it can't be booted.
    pub fn boot_probe(&mut self, mode: &str, mut config: BootConfig) {
        let probe =
            std::env::var_os("BULKHEAD_PROBE").expect("BULKHEAD_PROBE names the guest's probe");
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&initramfs::with_init(&std::fs::read(probe).unwrap()))
            .unwrap();
        config.cmdline = format!("{} probe={mode}", config.cmdline);
        self.boot(config, &file);
    }

    /// Boots the initramfs of the build under test, with the agent.
    ///
    /// # Panics
    /// When it can't be booted.
    pub fn boot_agent(&mut self, config: BootConfig) {
        self.boot(
            config,
            &File::open(dist().join("lib/bulkhead/initramfs.cpio")).unwrap(),
        );
    }

    /// Boots the probe in a mode in which it says that it is prepared, and waits for the template that is saved of it.
    ///
    /// # Panics
    /// When there is none.
    pub fn template_of_probe(&mut self, mode: &str, config: BootConfig) -> File {
        let template = tempfile::tempfile().unwrap();
        self.template = Some(template.try_clone().unwrap());
        let config = BootConfig {
            save_template: true,
            ..config
        };
        self.boot_probe(mode, config);
        match self.client.next_event().unwrap() {
            Event::Template { error: None } => template,
            other => panic!("no template: {other:?}"),
        }
    }

    /// Starts the machine from a template of the probe in the mode that it knows by this name.
    ///
    /// # Errors
    /// When the VMM refuses.
    pub fn restore_probe(
        &mut self,
        mode: &str,
        mut config: BootConfig,
        template: &File,
    ) -> Result<(), ClientError> {
        config.cmdline = format!("{} probe={mode}", config.cmdline);
        config.vsock_path = self.vsock_path();
        self.client
            .restore(config, &[kvm().as_fd(), template.as_fd()])
    }

    fn boot(&mut self, mut config: BootConfig, initramfs: &File) {
        config.vsock_path = self.vsock_path();
        let kvm = kvm();
        let kernel = File::open(dist().join("lib/bulkhead/vmlinux")).unwrap();
        let (serial, serial_end) = std::io::pipe().unwrap();
        self.serial = BufReader::new(serial);
        let mut fds = vec![kvm.as_fd(), kernel.as_fd(), initramfs.as_fd()];
        if config.serial {
            fds.push(serial_end.as_fd());
        }
        if let Some(template) = &self.template {
            fds.push(template.as_fd());
        }
        self.client.boot(config, &fds).unwrap();
    }

    /// Path of the hybrid vsock's socket.
    pub fn vsock_path(&self) -> PathBuf {
        self.folder.path().join("vsock")
    }

    /// A listener for what the guest dials on this port of the host.
    ///
    /// # Panics
    /// When it can't be made.
    pub fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(format!("{}_{port}", self.vsock_path().display())).unwrap()
    }

    /// Waits for the guest's call.
    ///
    /// # Panics
    /// When the VM ends before.
    pub fn accept(&mut self, listener: &UnixListener) -> UnixStream {
        let mut polled = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            // An event, or the end of the VMM.
            PollFd::new(self.client.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut polled, PollTimeout::NONE).unwrap();
        if polled[0].any() == Some(true) {
            return listener.accept().unwrap().0;
        }
        panic!("the VM ended: {:?}", self.client.next_event());
    }

    /// Connects to a port of the guest; `None` when the guest refuses.
    ///
    /// # Panics
    /// When the VMM breaks the protocol.
    pub fn dial(&self, port: u32) -> Option<UnixStream> {
        let mut stream = UnixStream::connect(self.vsock_path()).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        let mut answer = Vec::new();
        let mut byte = [0];
        // Byte by byte, since what follows the line belongs to the connection.
        while !answer.ends_with(b"\n") {
            match stream.read(&mut byte) {
                Ok(1) => answer.extend(byte),
                _ => return None,
            }
        }
        assert!(answer.starts_with(b"OK "), "{answer:?}");
        Some(stream)
    }

    /// Reads the serial port up to a line that ends with these words.
    ///
    /// # Panics
    /// When the port closes before.
    pub fn await_line(&mut self, words: &str) {
        let mut seen = String::new();
        loop {
            let start = seen.len();
            assert_ne!(
                self.serial.read_line(&mut seen).unwrap(),
                0,
                "no {words:?} in: {seen}"
            );
            if seen[start..].trim_end().ends_with(words) {
                return;
            }
        }
    }

    /// Waits for the VM's end.
    ///
    /// # Panics
    /// When the VMM ends without its event.
    pub fn wait(mut self) -> MachineEnd {
        let mut log = String::new();
        let mut serial = Vec::new();
        let mut stderr = self.process.stderr.take().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| stderr.read_to_string(&mut log).unwrap());
            scope.spawn(|| self.serial.read_to_end(&mut serial).unwrap());
        });
        let status = self.process.wait().unwrap();
        let Event::Ended {
            exit_code, reason, ..
        } = self.client.next_event().unwrap()
        else {
            panic!("another event than the end");
        };
        assert_eq!(status.code(), Some(exit_code), "log: {log}");
        MachineEnd {
            exit_code,
            reason,
            log,
            serial: String::from_utf8_lossy(&serial).into_owned(),
        }
    }
}

fn kvm() -> File {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap()
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail when the VMM has ended, which is what is wanted.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

//! The control socket's messages: how the sandbox server drives one VMM.
//!
//! The socket is the VMM's file descriptor 3: a connected `SOCK_SEQPACKET` unix socket, one JSON message a packet (at most
//! [`MAX_MESSAGE`] bytes), file descriptors as `SCM_RIGHTS`. Each request gets one response, in order; events come
//! unasked in between. When the peer closes the socket the VM is killed: a VMM never outlives its server.

use serde::{Deserialize, Serialize};

/// Longest message, in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// File descriptor on which a VMM finds its control socket.
pub const CONTROL_FD: i32 = 3;

/// Process exit codes of `bulkhead-vmm`.
pub mod exit_code {
    /// The guest powered itself off, or was shut down over the control socket.
    pub const POWER_OFF: i32 = 0;
    /// The VMM was called wrongly or could not set the machine up.
    pub const SETUP: i32 = 1;
    /// The guest reset itself (`reboot`, or a panic with `panic=-1`).
    pub const RESET: i32 = 10;
    /// A vCPU ended abnormally: triple fault, KVM internal error, failed entry, impossible exit.
    pub const CRASH: i32 = 11;
    /// The control socket's peer went away.
    pub const ORPHANED: i32 = 12;
}

/// What the server asks of the VMM.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Builds and starts the machine. Descriptors, in order: `/dev/kvm`, the kernel (ELF `vmlinux`), the initramfs; if `serial` is set,
    /// where the serial port's output goes; if `save_template` is set, an empty file for the template. Answered once the vCPUs run.
    Boot(BootConfig),
    /// Builds and starts the machine where a template of the same shape was saved. Descriptors, in order: `/dev/kvm`, the template.
    /// Answered once the vCPUs run. When it is refused, the machine can still be booted.
    Restore(BootConfig),
    /// Stops every vCPU. Answered when all stand still.
    Pause,
    /// Lets the vCPUs run again.
    Resume,
    /// Asks for [`Info`].
    Info,
    /// Fills a spare virtio-mmio slot with a device. The guest's agent then binds it to its driver.
    Attach(AttachConfig),
    /// Ends the VM at once.
    Shutdown,
}

/// The machine to build.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// Number of vCPUs, 1 to 32.
    pub vcpus: u8,
    /// Guest memory in MiB, at least 64.
    pub memory_mib: u64,
    /// Words added to the kernel's command line after the VMM's own.
    pub cmdline: String,
    /// Path of the hybrid vsock's unix socket, which the VMM creates: a host program connects to it and says `CONNECT <port>\n`; for
    /// a guest's connection to host port P the VMM connects to `<path>_P`.
    pub vsock_path: std::path::PathBuf,
    /// The virtio-fs share, if there is one.
    pub share: Option<ShareConfig>,
    /// Spare virtio-mmio slots for devices that arrive later, 0 to 16.
    pub spare_slots: u8,
    /// A serial port (8250 at 0x3f8) for debugging, whose output goes to the fourth descriptor.
    pub serial: bool,
    /// Save a template when the agent says that it is prepared ([`crate::layout::BOOT_MARK_PREPARED`]). The guest stands still meanwhile;
    /// [`Event::Template`] tells when it is done.
    #[serde(default)]
    pub save_template: bool,
}

/// A virtio-fs share.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// Mount tag, 1 to 36 bytes.
    pub tag: String,
    /// The directory tree to share.
    pub directory: std::path::PathBuf,
    /// Request queues, 1 to 8, each with a thread.
    pub queues: u8,
    /// Most files that the guest may have cached or open at a time, for each of which the VMM holds a descriptor; fewer if the host lets no
    /// process have as many. One more is refused with `ENFILE`; long before that comes [`Event::ManyFiles`].
    pub files: u32,
}

/// A device for a spare slot.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "device", rename_all = "snake_case", deny_unknown_fields)]
pub enum AttachConfig {
    /// A second entropy device.
    Rng,
    /// One more virtio-fs share.
    Fs(ShareConfig),
}

/// The VMM's answer to a request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    /// Done.
    Ok,
    /// Answer to [`Request::Info`].
    Info(Info),
    /// Answer to [`Request::Attach`]: where the device is.
    Attached {
        /// Guest physical address of the slot's MMIO window.
        mmio_base: u64,
    },
    /// The request failed; one sentence with the cause.
    Error {
        /// The sentence.
        message: String,
    },
}

/// What the VMM says unasked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The template is whole and the VMM has closed its file, or there is none. The guest goes on in both cases.
    Template {
        /// One sentence, if there is none.
        error: Option<String>,
    },
    /// The guest holds half of the files that it may of a share, and should be asked to forget those that it does not use. It does so by itself
    /// only for want of its own memory. Comes again when it has forgotten some and holds many again, or holds half of what was left.
    ManyFiles,
    /// The VM has ended; the process exits with `exit_code` right after.
    Ended {
        /// One of [`exit_code`].
        exit_code: i32,
        /// One line: what ended it and where.
        reason: String,
        /// Boot steps reached, in order: the last chance to read them.
        timeline: Vec<TimelineEntry>,
    },
}

/// One packet from the VMM.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// An answer.
    Response(Response),
    /// An event.
    Event(Event),
}

/// State of the VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Info {
    /// Process id of the VMM.
    pub pid: u32,
    /// Life-cycle state.
    pub state: VmState,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Boot steps in order.
    pub timeline: Vec<TimelineEntry>,
}

/// Life cycle of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// No `Boot` yet.
    Idle,
    /// vCPUs run.
    Running,
    /// vCPUs stand still.
    Paused,
}

/// One step of the boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineEntry {
    /// What was reached.
    pub name: String,
    /// When: `CLOCK_MONOTONIC` in nanoseconds, so that entries of several processes of a host compare.
    pub at_ns: u64,
}

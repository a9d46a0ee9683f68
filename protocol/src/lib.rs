//! The agent's API: the generated ttrpc code of `proto/agent.proto`, and the few constants and rules that both ends need.
//!
//! The host (`runtime`) is the client, the guest's PID 1 (`agent`) the server. Nothing else belongs here.

use std::path::{Component, Path, PathBuf};

#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub mod limits;

pub use generated::{agent, agent_ttrpc};

/// Version of this API. The two ends refuse each other when it differs.
pub const PROTOCOL_VERSION: u32 = 5;

/// Vsock port on the host (CID 2) that the agent dials once it is ready to serve.
pub const CONTROL_PORT: u32 = 1024;

/// Vsock port on which the agent accepts the connections that carry standard streams.
pub const STREAM_PORT: u32 = 1025;

/// Most descriptors that a process may have beyond its standard streams.
pub const MAX_DESCRIPTORS: usize = 64;

/// Number of the first of them.
pub const FIRST_DESCRIPTOR: u32 = 3;

/// Longest encoded `StreamHeader`, in bytes.
pub const MAX_STREAM_HEADER: u32 = 1024;

/// Tag of the virtio-fs share.
pub const SHARE_TAG: &str = "bulkhead";

/// Where the guest mounts the share.
pub const GUEST_SHARE: &str = "/run/bulkhead/share";

/// The devices that every container has: path, major, minor; all character devices that everybody may use. A bind mount of one of
/// the host's is one of the guest's own.
pub const DEFAULT_DEVICES: &[(&str, u32, u32)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// The name that the `oci_spec` crate has for a scheduler's flag: two are not the spec's.
pub fn scheduler_flag(name: &str) -> &str {
    match name {
        "SCHED_FLAG_RESET_ON_FORK" => "SCHED_RESET_ON_FORK",
        "SCHED_FLAG_DL_OVERRUN" => "SCHED_FLAG_D_L_OVERRUN",
        name => name,
    }
}

/// runc's linear map of cgroup v1's weights of block I/O, 10 to 1000, to those of cgroup v2's `io.weight`, 1 to 10000.
pub fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9_999 / 990
}

/// I/O port of the machine's power button: a one-byte write of any value ends the VM in order. A machine without
/// ACPI has no other way to tell power-off from reset.
pub const POWER_OFF_PORT: u16 = 0x600;

/// I/O port for boot marks: a one-byte write is put on the VMM's boot timeline with the time of its arrival.
pub const BOOT_MARK_PORT: u16 = 0x601;

/// Boot mark: the first instructions of PID 1.
pub const BOOT_MARK_INIT: u8 = 1;

/// Boot mark: the agent is about to dial the host.
pub const BOOT_MARK_READY: u8 = 2;

/// Boot mark: the agent has done everything that is the same in every guest. Templates are saved here, so what comes before it
/// must know nothing of the sandbox, and keep nothing secret.
pub const BOOT_MARK_PREPARED: u8 = 3;

/// Name of that moment on the agent's timeline.
pub const STEP_PREPARED: &str = "prepared";

/// Length of the seed that a Hello brings, in bytes.
pub const SEED_LENGTH: usize = 32;

/// Longest id of a container: it becomes a directory's name.
pub const MAX_CONTAINER_ID: usize = 255;

/// Whether a container can have this id: a file's name of those that runc takes, in whose `^[\w+-\.]+$` the middle is the range from
/// `+` to `.`, hence the comma.
pub fn is_container_id(id: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_+,-.".contains(c);
    (1..=MAX_CONTAINER_ID).contains(&id.len()) && id != "." && id != ".." && id.chars().all(allowed)
}

/// An absolute path without `.`, `..` and superfluous slashes, as Go's `filepath.Clean` has it for runc: links do not count. One that is
/// relative is taken from the root.
pub fn cleaned(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(part) => clean.push(part),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::io_weight;

    #[test]
    fn the_weights_of_block_io_span_those_of_cgroup_v2() {
        assert_eq!(
            [0, 10, 17, 100, 500, 1000, u16::MAX].map(io_weight),
            [1, 1, 71, 910, 4950, 10_000, 10_000]
        );
    }
}

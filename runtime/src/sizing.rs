//! How big a guest is.
//!
//! Guest memory is touched lazily, so what a guest does not use costs the host nothing.

use oci_spec::runtime::Spec;

use crate::config::Config;

/// vCPUs of a guest by default.
pub const DEFAULT_VCPUS: u8 = 1;

/// Most vCPUs of a guest.
pub const MAX_VCPUS: u8 = 32;

/// Memory of a guest by default, in MiB.
pub const DEFAULT_MEMORY_MIB: u64 = 256;

/// Least memory that a guest boots with, in MiB.
pub const MIN_MEMORY_MIB: u64 = 64;

/// What the guest's kernel, its page tables and the agent take beside the container, in MiB.
pub const BASE_MEMORY_MIB: u64 = 64;

/// The size of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
}

impl Size {
    /// The size for the container of `spec`: its memory limit and the guest's own base, or the configured default.
    pub fn of(spec: &Spec, config: &Config) -> Self {
        let limit = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref())
            .and_then(|resources| resources.memory().as_ref())
            .and_then(|memory| memory.limit())
            .and_then(|bytes| u64::try_from(bytes).ok())
            .filter(|bytes| *bytes > 0);
        let memory_mib = match limit {
            Some(bytes) => bytes.div_ceil(1 << 20).saturating_add(BASE_MEMORY_MIB),
            None => config.memory_mib,
        };
        Self {
            vcpus: config.vcpus,
            memory_mib: memory_mib.min(host_memory_mib().unwrap_or(u64::MAX)),
        }
    }
}

/// The host's memory: a limit above it, as some clients write for "none", must not size the guest.
fn host_memory_mib() -> Option<u64> {
    let info = nix::sys::sysinfo::sysinfo().ok()?;
    Some((info.ram_total() >> 20).max(MIN_MEMORY_MIB))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory_of(resources: &str) -> u64 {
        let spec: Spec = serde_json::from_str(&format!(
            r#"{{"ociVersion":"1.0.2","linux":{{"resources":{resources}}}}}"#
        ))
        .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        std::fs::write(&file, "memory_mib = 128").unwrap();
        Size::of(&spec, &Config::load(Some(&file)).unwrap()).memory_mib
    }

    #[test]
    fn a_memory_limit_sizes_the_guest_and_its_absence_does_not() {
        assert_eq!(memory_of("{}"), 128);
        assert_eq!(memory_of(r#"{"memory":{"limit":-1}}"#), 128);
        assert_eq!(memory_of(r#"{"memory":{"limit":33554432}}"#), 32 + 64);
        assert_eq!(memory_of(r#"{"memory":{"limit":33554433}}"#), 33 + 64);
    }

    #[test]
    fn a_limit_beyond_the_hosts_memory_is_the_hosts_memory() {
        let most = host_memory_mib().unwrap();
        assert_eq!(
            memory_of(r#"{"memory":{"limit":9223372036854771712}}"#),
            most
        );
    }
}

//! How big a guest is.
//!
//! Guest memory is touched lazily, so what a guest does not use costs the host nothing.

use oci_spec::runtime::{LinuxCpu, LinuxResources, Spec};

use crate::annotations::Overrides;
use crate::config::Config;
use crate::spec::SpecError;

/// The period of a quota that names none, in microseconds (Documentation/admin-guide/cgroup-v2.rst, cpu.max).
const DEFAULT_PERIOD: u64 = 100_000;

/// Most vCPUs of a guest by default: those of the host, up to here.
pub const DEFAULT_VCPUS: u8 = 4;

/// Most vCPUs of a guest.
pub const MAX_VCPUS: u8 = 32;

/// Memory of a guest by default, in MiB.
pub const DEFAULT_MEMORY_MIB: u64 = 512;

/// Least memory that a guest boots with, in MiB.
pub const MIN_MEMORY_MIB: u64 = 64;

/// What the guest's kernel, its page tables and the agent take beside the container, in MiB.
pub const BASE_MEMORY_MIB: u64 = 64;

/// Memory of the host, in bytes, that is set aside for each file of the share that a guest may have cached. The VMM holds a descriptor for it, and
/// that the host's inodes and names: 2 to 3 KiB, and more for directories of many layers.
pub const FILE_BYTES: u64 = 4 << 10;

/// How many files of the share a guest of this memory may have cached or open at a time: as many as take a quarter of it on the host, and enough
/// for small guests. The guest itself takes about 1 KiB for each.
pub fn most_files(memory_mib: u64) -> u32 {
    let files = memory_mib.saturating_mul((1 << 20) / 4 / FILE_BYTES);
    // Both bounds fit.
    files.clamp(16 << 10, 1 << 20) as u32
}

/// The size of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
}

impl Size {
    /// The size for the container of `spec`: what its annotations say, or its limits and the guest's own base, or the
    /// configured defaults.
    pub fn of(spec: &Spec, config: &Config) -> Result<Self, SpecError> {
        Ok(Self::with(spec, config, &Overrides::of(spec)?, host_cpus()))
    }

    /// The same on a host of so many processors.
    fn with(spec: &Spec, config: &Config, overrides: &Overrides, host_cpus: u8) -> Self {
        let resources = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref());
        let limit = resources
            .and_then(|resources| resources.memory().as_ref())
            .and_then(|memory| memory.limit())
            .and_then(|bytes| u64::try_from(bytes).ok())
            .filter(|bytes| *bytes > 0);
        let memory_mib = match limit {
            Some(bytes) => bytes.div_ceil(1 << 20).saturating_add(BASE_MEMORY_MIB),
            None => config.memory_mib,
        };
        let memory_mib = memory_mib.min(most_memory_mib());
        let vcpus = resources
            .and_then(limited_vcpus)
            .unwrap_or(config.vcpus)
            .min(host_cpus);
        Self {
            vcpus: overrides.vcpus.unwrap_or(vcpus),
            memory_mib: overrides.memory_mib.unwrap_or(memory_mib),
        }
    }
}

/// As many vCPUs as a container may use: its quota, rounded up, or the processors that it is bound to, whichever is less.
fn limited_vcpus(resources: &LinuxResources) -> Option<u8> {
    let cpu = resources.cpu().as_ref();
    // 0 is what clients write that mean nothing by it.
    let period = cpu.and_then(LinuxCpu::period).filter(|&period| period != 0);
    let quota = cpu.and_then(LinuxCpu::quota).filter(|&quota| quota > 0);
    let quota = quota.map(|quota| {
        quota
            .unsigned_abs()
            .div_ceil(period.unwrap_or(DEFAULT_PERIOD))
    });
    // `unified` wins over the rest.
    let unified = resources.unified().as_ref();
    let cpus = unified
        .and_then(|unified| unified.get("cpuset.cpus"))
        .or(cpu.and_then(|cpu| cpu.cpus().as_ref()));
    let bound = cpus.and_then(|list| count(list));
    let vcpus = quota.into_iter().chain(bound).min()?;
    Some(u8::try_from(vcpus).unwrap_or(MAX_VCPUS).clamp(1, MAX_VCPUS))
}

/// How many processors a list such as `0-3,7` names.
fn count(list: &str) -> Option<u64> {
    let mut total: u64 = 0;
    for part in list.split(',').filter(|part| !part.trim().is_empty()) {
        let (first, last) = part
            .trim()
            .split_once('-')
            .unwrap_or((part.trim(), part.trim()));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        total = total.saturating_add(last.checked_sub(first)?.saturating_add(1));
    }
    (total > 0).then_some(total)
}

/// Processors of the host that this process may use.
pub fn host_cpus() -> u8 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u8::try_from(cpus).unwrap_or(MAX_VCPUS).min(MAX_VCPUS)
}

/// The host's memory in MiB: a limit above it, as some clients write for "none", must not size the guest.
pub fn most_memory_mib() -> u64 {
    nix::sys::sysinfo::sysinfo().map_or(u64::MAX >> 20, |info| {
        (info.ram_total() >> 20).max(MIN_MEMORY_MIB)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(resources: &str) -> Spec {
        let text = format!(r#"{{"ociVersion":"1.0.2","linux":{{"resources":{resources}}}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    fn config(text: &str) -> Config {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        std::fs::write(&file, text).unwrap();
        Config::load(Some(&file)).unwrap()
    }

    fn memory_of(resources: &str) -> u64 {
        Size::of(&spec(resources), &config("memory_mib = 128"))
            .unwrap()
            .memory_mib
    }

    #[test]
    fn an_annotation_counts_the_vcpus_before_a_limit_and_that_before_the_configuration() {
        const HOST: u8 = 8;
        let two = r#"{"cpu":{"quota":200000,"period":100000}}"#;
        let many = r#"{"cpu":{"quota":2000000,"period":100000}}"#;
        for (vcpus, resources, configured, expected) in [
            (None, "{}", 3, 3),
            (None, "{}", 32, HOST),
            (None, two, 3, 2),
            (None, two, 1, 2),
            (None, many, 3, HOST),
            (Some(5), "{}", 3, 5),
            (Some(5), two, 3, 5),
            (Some(1), many, 3, 1),
        ] {
            let overrides = Overrides {
                vcpus,
                ..Overrides::default()
            };
            let config = config(&format!("vcpus = {configured}"));
            let size = Size::with(&spec(resources), &config, &overrides, HOST);
            assert_eq!(
                size.vcpus, expected,
                "{vcpus:?}, {resources}, {configured} configured"
            );
        }
    }

    #[test]
    fn a_memory_limit_sizes_the_guest_and_its_absence_does_not() {
        assert_eq!(memory_of("{}"), 128);
        assert_eq!(memory_of(r#"{"memory":{"limit":-1}}"#), 128);
        assert_eq!(memory_of(r#"{"memory":{"limit":33554432}}"#), 32 + 64);
        assert_eq!(memory_of(r#"{"memory":{"limit":33554433}}"#), 33 + 64);
    }

    #[test]
    fn a_quota_or_a_set_of_processors_counts_the_vcpus() {
        let vcpus = |cpu: &str| {
            let resources = format!(r#"{{"cpu":{cpu}}}"#);
            limited_vcpus(&serde_json::from_str(&resources).unwrap())
        };
        for (cpu, expected) in [
            ("{}", None),
            (r#"{"quota":-1,"period":100000}"#, None),
            (r#"{"quota":150000,"period":100000}"#, Some(2)),
            (r#"{"quota":100000}"#, Some(1)),
            (r#"{"quota":150000,"period":0}"#, Some(2)),
            (r#"{"quota":0,"period":0}"#, None),
            (r#"{"cpus":"0-3,7"}"#, Some(5)),
            (r#"{"cpus":"2","quota":400000}"#, Some(1)),
            (r#"{"cpus":"x"}"#, None),
            (
                r#"{"quota":9223372036854775807,"period":1}"#,
                Some(MAX_VCPUS),
            ),
        ] {
            assert_eq!(vcpus(cpu), expected, "{cpu}");
        }
    }

    #[test]
    fn a_guest_may_cache_files_for_a_quarter_of_its_memory() {
        for (memory_mib, expected) in [
            (64, 16_384),
            (256, 16_384),
            (512, 32_768),
            (513, 32_832),
            (16_384, 1 << 20),
            (u64::MAX, 1 << 20),
        ] {
            assert_eq!(most_files(memory_mib), expected, "{memory_mib}");
        }
        assert_eq!(u64::from(most_files(512)) * FILE_BYTES, 128 << 20);
    }

    #[test]
    fn a_limit_beyond_the_hosts_memory_is_the_hosts_memory() {
        let most = most_memory_mib();
        assert_eq!(
            memory_of(r#"{"memory":{"limit":9223372036854771712}}"#),
            most
        );
    }

    #[test]
    fn a_unified_set_of_processors_counts_the_vcpus_and_wins() {
        for (resources, expected) in [
            (r#"{"unified":{"cpuset.cpus":"0-1"}}"#, Some(2)),
            (
                r#"{"unified":{"cpuset.cpus":"4"},"cpu":{"cpus":"0-3"}}"#,
                Some(1),
            ),
            (
                r#"{"unified":{"cpuset.cpus":"0-7"},"cpu":{"quota":200000}}"#,
                Some(2),
            ),
            (r#"{"unified":{"cpuset.mems":"0"}}"#, None),
        ] {
            let vcpus = limited_vcpus(&serde_json::from_str(resources).unwrap());
            assert_eq!(vcpus, expected, "{resources}");
        }
    }
}

//! From the kernel's first call of /init to a system that can run containers.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::Context;
use bulkhead_protocol::{GUEST_SHARE, SHARE_TAG};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, major, minor, stat};
use nix::unistd::{chdir, chroot, mkdir};
use tracing::level_filters::LevelFilter;

use crate::cgroup::Hierarchy;
use crate::device_filter::DeviceFilter;
use crate::network::SpareNetwork;
use crate::timeline::Timeline;

/// Where the unified hierarchy is mounted.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// As systemd mounts them on hosts: a container that may write to its cgroup changes no limits of its own, and what protects its memory
/// protects that of the cgroups below it.
const CGROUP_OPTIONS: &str = "nsdelegate,memory_recursiveprot";

/// Processes and pending signals that a user may have whose container sets no limit of them. Linux derives its own from the memory, of
/// which a guest has too little for that.
const MAX_PROCESSES: u64 = 65_536;

/// Descriptors that the agent may have open, and the hard limit of containers whose spec sets none.
pub const MAX_FILES: u64 = 524_288;

/// What the kernel derives from the memory or has small defaults for, of which a container of a small guest would notice that it is not
/// on its host: there systemd raises most of them, and memory is limited by cgroups. Of those that are the host's own see
/// docs/oci-spec.md. Sources: Documentation/admin-guide/sysctl/{kernel,fs,vm}.rst.
const SETTINGS: &[(&str, &str)] = &[
    ("kernel/threads-max", "131072"),
    ("kernel/pid_max", "4194304"),
    ("fs/file-max", "9223372036854775807"),
    ("fs/nr_open", "1073741816"),
    ("fs/inotify/max_user_watches", "1048576"),
    // What a program only reserves is not to fail for the size of the guest.
    ("vm/overcommit_memory", "1"),
];

/// How much is read ahead in a file of the share, in KiB: what one request can carry. The kernel's own 128 KiB suit a disk, not a request to
/// the host.
const READ_AHEAD_KIB: &str = "1024";

const NO_DATA: Option<&str> = None;

/// Leaves the initramfs for a tmpfs of directories, with /proc, /sys and /dev.
///
/// The kernel refuses `pivot_root` in a process whose root is the initramfs itself, and a container that got back
/// to the old root would find the agent's file there.
pub fn enter_root(timeline: &mut Timeline) -> anyhow::Result<()> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    make_dir("/new")?;
    mount(
        Some("tmpfs"),
        "/new",
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=0755"),
    )
    .context("cannot mount a tmpfs")?;
    chdir("/new").context("cannot enter the new root")?;
    for dir in ["proc", "sys", "dev", "run", "tmp"] {
        make_dir(dir)?;
    }
    mount(Some("proc"), "proc", Some("proc"), plain, NO_DATA).context("cannot mount /proc")?;
    mount(Some("sysfs"), "sys", Some("sysfs"), plain, NO_DATA).context("cannot mount /sys")?;
    mount(
        Some("dev"),
        "dev",
        Some("devtmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        NO_DATA,
    )
    .context("cannot mount /dev")?;
    mount(Some("."), "/", NO_DATA, MsFlags::MS_MOVE, NO_DATA)
        .context("cannot move the new root")?;
    chroot(".").context("cannot change the root")?;
    timeline.mark("root");
    Ok(())
}

fn make_dir(path: &str) -> anyhow::Result<()> {
    match mkdir(path, Mode::from_bits_truncate(0o755)) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(errno) => Err(errno).with_context(|| format!("cannot make {path}")),
    }
}

/// Puts the console at the standard descriptors, or the null device where there is none. The kernel leaves them
/// closed if the initramfs has no /dev/console; nothing else may get their numbers.
pub fn open_console() -> anyhow::Result<()> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let console = open("/dev/console", flags, Mode::empty())
        .or_else(|_| open("/dev/null", flags, Mode::empty()))
        .context("cannot open /dev/console or /dev/null")?;
    for number in 0..3 {
        crate::process::replace_stdio(console.as_fd(), number)
            .context("cannot replace the standard descriptors")?;
    }
    Ok(())
}

/// Logs to the console, at the level that `bulkhead.log=` on the kernel's command line asks for.
pub fn start_log() {
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    crate::log::start(log_level(&command_line));
}

fn log_level(command_line: &str) -> LevelFilter {
    command_line
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix("bulkhead.log="))
        .find_map(|level| level.parse().ok())
        .unwrap_or(LevelFilter::INFO)
}

/// What containers need and is the same in every guest.
pub fn prepare_for_containers(timeline: &mut Timeline) -> anyhow::Result<Hierarchy> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("cgroup2"),
        CGROUP_ROOT,
        Some("cgroup2"),
        plain,
        Some(CGROUP_OPTIONS),
    )
    .context("cannot mount the cgroups")?;
    let hierarchy =
        Hierarchy::set_up(Path::new(CGROUP_ROOT)).context("cannot set up the cgroups")?;
    timeline.mark("cgroups");
    for (resource, limit) in [
        // More descriptors than the kernel's 1024: each stream takes two.
        (Resource::RLIMIT_NOFILE, MAX_FILES),
        (Resource::RLIMIT_NPROC, MAX_PROCESSES),
        (Resource::RLIMIT_SIGPENDING, MAX_PROCESSES),
    ] {
        if let Err(errno) = setrlimit(resource, limit, limit) {
            tracing::warn!(?resource, %errno, "cannot raise a limit");
        }
    }
    for (name, value) in SETTINGS {
        if let Err(error) = fs::write(Path::new("/proc/sys").join(name), value) {
            tracing::warn!(name, %error, "cannot change a setting of the kernel");
        }
    }
    make_dir("/run/bulkhead")?;
    make_dir(GUEST_SHARE)?;
    Ok(hierarchy)
}

/// Makes what the first container will want and the kernel takes long to make: guests of a template find it there. Without it that
/// container makes its own.
pub fn make_ahead(hierarchy: &Hierarchy) -> SpareNetwork {
    if let Err(error) = hierarchy.make_ahead() {
        tracing::warn!(%error, "no cgroup was made ahead");
    }
    if let Err(errno) = DeviceFilter::load_ahead() {
        tracing::warn!(%errno, "no device filter was loaded ahead");
    }
    SpareNetwork::make().unwrap_or_else(|error| {
        tracing::warn!(%error, "no network namespace was made ahead");
        SpareNetwork::default()
    })
}

/// Mounts the share. Returns whether there is one.
pub fn mount_share(timeline: &mut Timeline) -> bool {
    let share = mount(
        Some(SHARE_TAG),
        GUEST_SHARE,
        Some("virtiofs"),
        MsFlags::empty(),
        NO_DATA,
    );
    match &share {
        Ok(()) => {
            if let Err(error) = read_ahead(Path::new(GUEST_SHARE)) {
                tracing::warn!("{error:#}");
            }
            timeline.mark("share");
        }
        // A guest without a share can still be asked for its version, and shut down; containers are refused.
        Err(errno) => tracing::warn!(%errno, "cannot mount the virtio-fs share {SHARE_TAG:?}"),
    }
    share.is_ok()
}

/// Lets the kernel read [`READ_AHEAD_KIB`] ahead in files of a file system.
fn read_ahead(root: &Path) -> anyhow::Result<()> {
    let device = stat(root).context("cannot look at the share")?.st_dev;
    // Documentation/ABI/testing/sysfs-class-bdi
    let setting = format!(
        "/sys/class/bdi/{}:{}/read_ahead_kb",
        major(device),
        minor(device)
    );
    fs::write(&setting, READ_AHEAD_KIB).with_context(|| format!("cannot write {setting}"))
}

/// Writes everything back. Nothing is unmounted: the share's server ends with the guest.
pub fn write_back() {
    nix::unistd::sync();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_level_comes_from_the_command_line() {
        assert_eq!(
            log_level("quiet bulkhead.log=debug panic=-1\n"),
            LevelFilter::DEBUG
        );
        assert_eq!(log_level("bulkhead.log=off"), LevelFilter::OFF);
        assert_eq!(log_level("quiet"), LevelFilter::INFO);
        assert_eq!(log_level("bulkhead.log=nonsense"), LevelFilter::INFO);
    }
}

//! Control groups as systemd would leave them: every controller enabled from the root, no process in an inner
//! group, and one leaf per command, by which all of a command's processes are found.

use super::{Result, step};
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";
const COMMANDS: &str = "/sys/fs/cgroup/testhost";
const FLAGS: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// Mounts the hierarchy (or hierarchies) and moves the init out of the root.
pub fn set_up(v1: bool) -> Result<()> {
    if v1 {
        return set_up_v1();
    }
    mount(
        Some("cgroup2"),
        ROOT,
        Some("cgroup2"),
        FLAGS,
        Some("nsdelegate,memory_recursiveprot"),
    )
    .map_err(step("mounting cgroup2"))?;
    let leaf = Path::new(ROOT).join("init");
    fs::create_dir(&leaf).map_err(step("cgroup init"))?;
    fs::write(leaf.join("cgroup.procs"), "1").map_err(step("cgroup init"))?;
    fs::create_dir(COMMANDS).map_err(step("cgroup testhost"))?;
    enable_all(Path::new(ROOT))?;
    enable_all(Path::new(COMMANDS))
}

fn enable_all(group: &Path) -> Result<()> {
    let what = "enabling controllers";
    let all = fs::read_to_string(group.join("cgroup.controllers")).map_err(step(what))?;
    for name in all.split_whitespace() {
        let plus = format!("+{name}");
        fs::write(group.join("cgroup.subtree_control"), plus).map_err(step(what))?;
    }
    Ok(())
}

fn set_up_v1() -> Result<()> {
    let attach = |source: &str, target: &Path, kind: &str, data: &str| {
        mount(Some(source), target, Some(kind), FLAGS, Some(data))
            .map_err(step(format!("mounting {}", target.display())))
    };
    attach("tmpfs", Path::new(ROOT), "tmpfs", "mode=0755")?;
    let table = fs::read_to_string("/proc/cgroups").map_err(step("/proc/cgroups"))?;
    for line in table.lines().filter(|line| !line.starts_with('#')) {
        // name, hierarchy, number of groups, enabled
        let fields: Vec<_> = line.split_whitespace().collect();
        if let [name, _, _, "1"] = fields[..] {
            let target = Path::new(ROOT).join(name);
            fs::create_dir(&target).map_err(step("cgroup"))?;
            attach("cgroup", &target, "cgroup", name)?;
        }
    }
    let target = Path::new(ROOT).join("systemd");
    fs::create_dir(&target).map_err(step("cgroup"))?;
    attach("cgroup", &target, "cgroup", "none,name=systemd")
}

/// One command's group.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
}

impl Group {
    /// A new group, empty.
    pub fn new(stream: u32) -> Result<Self> {
        let path = Path::new(COMMANDS).join(format!("command-{stream}"));
        fs::create_dir(&path).map_err(step("cgroup of the command"))?;
        Ok(Self { path })
    }

    /// The file into which a process writes "0" to become a member.
    pub fn entrance(&self) -> Result<File> {
        File::options()
            .write(true)
            .open(self.path.join("cgroup.procs"))
            .map_err(step("cgroup of the command"))
    }

    /// The members, of groups below too.
    pub fn count(&self) -> usize {
        fn members(path: &Path) -> usize {
            let own = fs::read_to_string(path.join("cgroup.procs"));
            let own = own.map(|text| text.lines().count()).unwrap_or(0);
            let below = fs::read_dir(path).into_iter().flatten().flatten();
            let below = below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
            own + below.map(|e| members(&e.path())).sum::<usize>()
        }
        members(&self.path)
    }

    /// Sends SIGKILL to every member and waits, within limits, until none is left.
    pub fn kill(&self) {
        if fs::write(self.path.join("cgroup.kill"), "1").is_ok() {
            // A process in uninterruptible sleep may stay; then the group stays too.
            let _ = self.wait_until_empty();
        }
    }

    fn wait_until_empty(&self) -> std::io::Result<()> {
        let mut events = File::open(self.path.join("cgroup.events"))?;
        loop {
            let mut text = String::new();
            events.seek(SeekFrom::Start(0))?;
            events.read_to_string(&mut text)?;
            if text.contains("populated 0") {
                return Ok(());
            }
            // The file is modified, which poll reports as POLLPRI, when the last member goes (cgroup-v2.rst).
            let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
            if poll(&mut fds, PollTimeout::from(10_000u16))? == 0 {
                return Ok(());
            }
        }
    }

    /// Removes the group and those below it, as far as they are empty.
    pub fn remove(&self) {
        fn prune(path: &Path) {
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    prune(&entry.path());
                }
            }
            let _ = fs::remove_dir(path);
        }
        prune(&self.path);
    }
}

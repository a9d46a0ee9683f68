//! Control groups: one leaf of the unified hierarchy for each container.

mod limits;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, chown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use tokio::io::Interest;

use crate::error::{Context, Result, errno_of};

pub use limits::{Limits, is_list};

/// What a kernel without /sys/kernel/cgroup/delegate lets a user own (cgroups(7), "Delegating").
const DELEGATED: &str = "cgroup.procs\ncgroup.subtree_control\ncgroup.threads\n";

/// Where containers' cgroups are.
#[derive(Debug)]
pub struct Hierarchy {
    root: PathBuf,
}

impl Hierarchy {
    /// Enables every controller for the children of the cgroup at `root`.
    ///
    /// The agent stays in the root cgroup, which may hold processes beside children: moving it to a leaf would
    /// cost an RCU grace period at boot, and there is nothing to limit it with. Containers are direct children: a
    /// level in between would double the work for each controller.
    pub fn set_up(root: &Path) -> io::Result<Self> {
        let available = fs::read_to_string(root.join("cgroup.controllers"))?;
        let mut enable = String::with_capacity(2 * available.len());
        for controller in available.split_ascii_whitespace() {
            enable.push('+');
            enable.push_str(controller);
            enable.push(' ');
        }
        if !enable.is_empty() {
            write_file(&root.join("cgroup.subtree_control"), &enable)?;
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// Makes the cgroup of a container and sets its limits.
    pub fn make(&self, id: &str, limits: &Limits) -> Result<Cgroup> {
        // The prefix keeps ids and the kernel's own files apart.
        let path = self.root.join(format!("container-{id}"));
        fs::create_dir(&path).what(|| "cannot make the container's cgroup")?;
        let dir = open(&path, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .what(|| "cannot open the container's cgroup");
        let cgroup = match dir {
            Ok(dir) => Cgroup { path, dir },
            Err(error) => {
                let _ = fs::remove_dir(&path);
                return Err(error);
            }
        };
        // Dropping the cgroup on a failure removes it.
        cgroup.limit(limits)?;
        Ok(cgroup)
    }
}

fn write_file(path: &Path, value: &str) -> io::Result<()> {
    // Not `fs::write`, which would create a file where the kernel has none.
    File::options()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

/// The cgroup of one container; removed when this is dropped, if not before.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    dir: OwnedFd,
}

impl Cgroup {
    /// Sets what the limits name; the rest stays.
    pub fn limit(&self, limits: &Limits) -> Result<()> {
        limits.write(&self.path)?;
        match &limits.devices {
            Some(devices) => devices.attach(self.dir()),
            None => Ok(()),
        }
    }

    /// The directory, to fork into.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Lets a user divide it: gives it away, and those of its files that the kernel says belong to that.
    pub fn give_to(&self, owner: u32) -> Result<()> {
        let what = || "cannot give the container its cgroup";
        let files = fs::read_to_string("/sys/kernel/cgroup/delegate");
        let files = files.as_deref().unwrap_or(DELEGATED);
        chown(&self.path, Some(owner), None).what(what)?;
        for file in files.lines() {
            match chown(self.path.join(file), Some(owner), None) {
                // A file of a controller that the cgroup has not.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result.what(what)?,
            }
        }
        Ok(())
    }

    /// Whether its processes are frozen, or about to be.
    pub fn is_freezing(&self) -> Result<bool> {
        fs::read_to_string(self.path.join("cgroup.freeze"))
            .map(|text| text.trim_end() == "1")
            .what(|| "cannot tell whether the container is paused")
    }

    /// Kills every process in it.
    pub fn kill(&self) -> Result<()> {
        write_file(&self.path.join("cgroup.kill"), "1")
            .what(|| "cannot kill the container's processes")
    }

    /// The processes in it and below it: a container may divide its cgroup.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let what = || "cannot list the container's processes";
        let mut processes = Vec::new();
        for cgroup in self.subtree().what(what)? {
            match fs::read_to_string(cgroup.join("cgroup.procs")) {
                Ok(list) => {
                    processes.extend(list.lines().filter_map(|line| line.parse::<i32>().ok()))
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                // A threaded cgroup; the processes of its threads are in the list of the domain above.
                Err(error) if errno_of(&error) == Errno::EOPNOTSUPP => {}
                Err(error) => return Err(error).what(what),
            }
        }
        Ok(processes)
    }

    /// Removes it with everything below, which must be empty of processes.
    pub fn remove(&self) -> Result<()> {
        let what = || "cannot remove the container's cgroup";
        for cgroup in self.subtree().what(what)?.iter().rev() {
            match fs::remove_dir(cgroup) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).what(what);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// It and the cgroups below it, parents before children. None if it is gone.
    fn subtree(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = vec![self.path.clone()];
        let mut next = 0;
        while let Some(cgroup) = found.get(next) {
            let entries = match fs::read_dir(cgroup) {
                // Gone since it was found, or with it all.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    found.remove(next);
                    continue;
                }
                entries => entries?,
            };
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    found.push(entry.path());
                }
            }
            next += 1;
        }
        Ok(found)
    }

    /// Waits until the last process has left it.
    ///
    /// The kernel announces changes of `cgroup.events` as exceptional conditions, so that nothing polls.
    pub async fn emptied(&self) -> io::Result<()> {
        let file = crate::sys::watch_fd(
            File::open(self.path.join("cgroup.events"))?,
            Interest::PRIORITY,
        )?;
        let mut buffer = [0u8; 128];
        loop {
            // A read of this very file re-arms its notification, so the order is: read, then wait.
            let length = file.get_ref().read_at(&mut buffer, 0)?;
            let mut lines = buffer
                .get(..length)
                .unwrap_or_default()
                .split(|&byte| byte == b'\n');
            if lines.any(|line| line == b"populated 0") {
                return Ok(());
            }
            file.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!(cgroup = %self.path.display(), %error, "cannot remove a container's cgroup");
        }
    }
}

//! Control groups: one leaf of the unified hierarchy for each container.

mod files;
mod limits;
mod stats;
mod tree;

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bulkhead_protocol::agent::ContainerStatsResponse;
use bulkhead_protocol::limits::write_file;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use self::files::{flat_keyed, read};
use crate::error::{Context, Error, Kind, Result};
use crate::handshake::{self, Report};
use crate::launch;
use crate::sys::{self, Fork};

pub use bulkhead_protocol::limits::is_list;
pub use files::EventFile;
pub use limits::Limits;

/// How long a container may take to freeze: a process that waits for its disk does not stop at once.
const FREEZE_TIME: Duration = Duration::from_secs(10);

/// What a kernel without /sys/kernel/cgroup/delegate lets a user own (cgroups(7), "Delegating").
const DELEGATED: &str = "cgroup.procs\ncgroup.subtree_control\ncgroup.threads\n";

/// How deep a container may nest cgroups in its own, and how many it may make there: far more than systemd makes for a machine, and no
/// more than the agent, with its one thread for all containers, can look through.
const MOST_LEVELS: &str = "64";
const MOST_BELOW: &str = "4096";

/// Where containers' cgroups are.
#[derive(Debug)]
pub struct Hierarchy {
    root: PathBuf,
    /// The next container's.
    ahead: Mutex<Option<Cgroup>>,
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
            ahead: Mutex::new(None),
        })
    }

    /// Makes the cgroup of the first container, whoever that will be, before it is asked for: each controller takes its time.
    pub fn make_ahead(&self) -> Result<()> {
        // No container's cgroup has that name.
        let cgroup = Cgroup::make(self.root.join("first"))?;
        *self.ahead.lock().unwrap_or_else(PoisonError::into_inner) = Some(cgroup);
        Ok(())
    }

    /// Makes the cgroup of a container and sets its limits.
    pub fn make(&self, id: &str, limits: &Limits) -> Result<Cgroup> {
        let ahead = self
            .ahead
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let cgroup = match ahead {
            Some(cgroup) => cgroup,
            // The prefix keeps ids and the kernel's own files apart.
            None => Cgroup::make(self.root.join(format!("container-{id}")))?,
        };
        // Dropping the cgroup on a failure removes it.
        cgroup.limit(limits)?;
        Ok(cgroup)
    }
}

/// The cgroup of one container; removed when this is dropped, if not before.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    dir: OwnedFd,
    /// Held while limits are changed.
    changing: tokio::sync::Mutex<()>,
    /// Another one may have its path by now.
    removed: AtomicBool,
}

impl Cgroup {
    fn make(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path).what(|| "cannot make the container's cgroup")?;
        let dir = open(&path, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .what(|| "cannot open the container's cgroup");
        match dir {
            Ok(dir) => {
                for (file, most) in [
                    ("cgroup.max.depth", MOST_LEVELS),
                    ("cgroup.max.descendants", MOST_BELOW),
                ] {
                    // One without that bound costs others no more than time.
                    if let Err(error) = write_file(&path.join(file), most) {
                        tracing::warn!(file, %error, "a container's cgroups are not bounded");
                    }
                }
                Ok(Self {
                    path,
                    dir,
                    changing: tokio::sync::Mutex::default(),
                    removed: AtomicBool::new(false),
                })
            }
            Err(error) => {
                let _ = fs::remove_dir(&path);
                Err(error)
            }
        }
    }

    /// Sets what the limits name; the rest stays.
    pub fn limit(&self, limits: &Limits) -> Result<()> {
        limits.write(&self.path)?;
        self.filter(limits)
    }

    fn filter(&self, limits: &Limits) -> Result<()> {
        match &limits.devices {
            Some(devices) => devices.attach(self.dir()),
            None => Ok(()),
        }
    }

    /// As [`Cgroup::limit`], once processes are in it, one change after the other. The kernel takes memory back before it says that a limit
    /// is set, so a child waits for that.
    pub async fn change(&self, limits: &Limits) -> Result<()> {
        let _alone = self.changing.lock().await;
        let what = || "cannot change the container's limits";
        let (mine, theirs) = handshake::pair().what(what)?;
        let socket = handshake::Agent::new(mine).what(what)?;
        // SAFETY: the agent has one thread, and the child ends here.
        if let Fork::Child = unsafe { sys::fork_aside(0) }.what(what)? {
            let _guard = launch::ExitOnUnwind;
            let changed = launch::close_all_but(&theirs)
                .and_then(|()| limits.write(&self.path))
                .and_then(|()| handshake::send_ready(theirs.as_fd()).what(what));
            if let Err(error) = changed {
                handshake::send_failure(theirs.as_fd(), &error);
            }
            launch::exit()
        }
        drop(theirs);
        match socket.report().await.what(what)? {
            Report::Ready => self.filter(limits),
            Report::Failed(error) => Err(error),
            _ => Err(Error::setup(Kind::Internal, what())),
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
        let mut processes = Vec::new();
        let visited = tree::visit::<()>(self.dir(), &mut |cgroup| {
            processes.append(&mut tree::processes(cgroup)?);
            Ok(ControlFlow::Continue(()))
        });
        visited
            .map(|_| processes)
            .what(|| "cannot list the container's processes")
    }

    /// Whether a process is in it or below it.
    pub fn has(&self, pid: i32) -> bool {
        // Wherever the hierarchy is mounted: the agent makes no second one of this name.
        let own = self.path.file_name();
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let mut paths = text.lines().filter_map(|line| line.strip_prefix("0::/"));
        paths.any(|path| Path::new(path).iter().any(|part| Some(part) == own))
    }

    /// The cgroup below at `path`.
    pub fn below(&self, path: &str) -> Result<OwnedFd> {
        // `/` is the container's own. What is no directory is no cgroup.
        let relative = format!("./{path}/.");
        sys::open_below(self.dir(), relative.as_bytes()).map_err(|errno| match errno {
            Errno::ENOENT | Errno::ENOTDIR => Error::setup(
                Kind::NotFound,
                format!("cgroup {path}: the container has none of that path below its own: make it in the container first"),
            ),
            Errno::EXDEV => Error::Request(format!(
                "cgroup {path}: it leads out of the container's own cgroup: name one below"
            )),
            errno => Error::system(format!("cannot open the cgroup {path}"), errno),
        })
    }

    /// The cgroup below that a process is in.
    pub fn below_of(&self, pid: i32) -> Result<Option<OwnedFd>> {
        let found = tree::visit(self.dir(), &mut |cgroup| {
            if tree::processes(cgroup)?.contains(&pid) {
                return Ok(ControlFlow::Break(cgroup.try_clone_to_owned()?));
            }
            Ok(ControlFlow::Continue(()))
        });
        Ok(found
            .what(|| "cannot find the cgroup of the container's init")?
            .break_value())
    }

    /// Removes it with everything below, which must be empty of processes.
    pub fn remove(&self) -> Result<()> {
        tree::remove_below(self.dir())
            .and_then(|()| match fs::remove_dir(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            })
            .what(|| "cannot remove the container's cgroup")?;
        self.removed.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Waits until the last process has left it.
    pub async fn emptied(&self) -> io::Result<()> {
        self.events("cgroup.events")?.becomes("populated", 0).await
    }

    /// Freezes its processes and waits until they are frozen.
    pub async fn freeze(&self) -> Result<()> {
        let what = || "cannot freeze the container";
        let events = self.events("cgroup.events").what(what)?;
        write_file(&self.path.join("cgroup.freeze"), "1").what(what)?;
        match tokio::time::timeout(FREEZE_TIME, events.becomes("frozen", 1)).await {
            Ok(frozen) => frozen.what(what),
            Err(_) => {
                self.start_thaw()?;
                Err(Error::setup(
                    Kind::Internal,
                    format!(
                        "cannot freeze the container: a process of it does not stop within {} s; it runs on",
                        FREEZE_TIME.as_secs()
                    ),
                ))
            }
        }
    }

    /// Lets its processes run again.
    pub async fn thaw(&self) -> Result<()> {
        let what = || "cannot thaw the container";
        let events = self.events("cgroup.events").what(what)?;
        self.start_thaw()?;
        events.becomes("frozen", 0).await.what(what)
    }

    fn start_thaw(&self) -> Result<()> {
        write_file(&self.path.join("cgroup.freeze"), "0").what(|| "cannot thaw the container")
    }

    /// Whether its processes are frozen.
    pub fn is_frozen(&self) -> Result<bool> {
        let events = read(&self.path.join("cgroup.events"))
            .what(|| "cannot tell whether the container is paused")?;
        let events = flat_keyed(&events.unwrap_or_default());
        Ok(events.get("frozen") == Some(&1) && self.is_freezing()?)
    }

    /// What it has used.
    pub fn stats(&self) -> Result<ContainerStatsResponse> {
        stats::of(&self.path)
    }

    /// How its memory went short; none if the kernel does not count that.
    pub fn memory_events(&self) -> Result<Option<EventFile>> {
        match self.events("memory.events") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            events => events
                .map(Some)
                .what(|| "cannot watch the container's memory"),
        }
    }

    fn events(&self, file: &str) -> io::Result<EventFile> {
        EventFile::open(&self.path.join(file))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if !*self.removed.get_mut()
            && let Err(error) = self.remove()
        {
            tracing::warn!(cgroup = %self.path.display(), %error, "cannot remove a container's cgroup");
        }
    }
}

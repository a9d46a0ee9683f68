//! The state directory of a sandbox: `<root>/<id>`, mode 0700.
//!
//! | entry | what |
//! | --- | --- |
//! | `task.sock` | the server's socket (Task API over ttrpc) |
//! | `vsock`, `vsock_<port>` | the VMM's hybrid vsock |
//! | `share/` | where the server mounts the shared tree, in its own mount namespace |
//! | `server.pid` | the server's process, for those whom it does not answer |
//! | `server.log` | warnings of a server whose client does not wait for its end |
//! | `state.json` | what outlives a crash of the server: see [`Record`] |
//!
//! Directories are made and removed under a lock on the root, so a directory that is there has its socket, and one whose
//! socket nobody listens on is what a killed server left. With a record in it, it is a container's that is to be deleted; without
//! one, its making was cut short, and the next container of that id takes its place.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg, OFlag, openat};
use nix::sys::stat::Mode;
use oci_spec::runtime::Hook;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::host_cgroup::HostCgroup;
use crate::id::ContainerId;
use crate::sandbox::Status;
use crate::sock;

/// What went wrong with the state directory.
#[derive(Debug, Error)]
pub enum StateError {
    /// The id is taken.
    #[error("container with id {0} already exists: choose another id or delete that container")]
    Exists(ContainerId),
    /// A file operation failed.
    #[error("cannot {what} {}: {cause}", path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What went wrong.
        cause: io::Error,
    },
}

/// Content of `state.json`: what is to be known of a container when its server is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The spec's version.
    pub oci_version: String,
    /// The container's id.
    pub id: String,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// The root filesystem on the host.
    pub rootfs: PathBuf,
    /// When it was made.
    pub created: SystemTime,
    /// The spec's annotations.
    pub annotations: HashMap<String, String>,
    /// The process of the host that stands for its init.
    pub pid: u32,
    /// Where in its life it is, for those whom its server does not answer.
    pub status: Status,
    /// The host's cgroup.
    pub cgroup: Option<HostCgroup>,
    /// The spec's poststop hooks, which are to run even if the server can't.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub poststop: Vec<Hook>,
    /// Why the sandbox ended, if not by its container's exit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

const RECORD: &str = "state.json";
const SHARE: &str = "share";
const TASK_SOCKET: &str = "task.sock";

/// A sandbox's state directory.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
    path: PathBuf,
    /// The directory as it was found: ids are used again, and another directory of that path is another container's.
    found: Option<Arc<File>>,
}

impl StateDir {
    /// The directory of `id`, which need not exist.
    pub fn of(root: &Path, id: &ContainerId) -> Self {
        let path = root.join(id);
        let found = open_dir(&path).ok().map(Arc::new);
        Self {
            root: root.to_path_buf(),
            path,
            found,
        }
    }

    /// The same directory for a process whose current directory it is, wherever that process's root is.
    pub fn in_current_directory(&self) -> Self {
        Self {
            root: "..".into(),
            path: PathBuf::new(),
            found: self.found.clone(),
        }
    }

    /// Makes the directory and binds the server's socket in it. At most one caller gets it.
    pub fn claim(root: &Path, id: &ContainerId) -> Result<(Self, UnixListener), StateError> {
        let mut this = Self::of(root, id);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(|cause| this.error("make the directory", root, cause))?;
        let lock = this.lock()?;
        if this.path.symlink_metadata().is_ok() {
            if this.is_listened_to() || this.path.join(RECORD).symlink_metadata().is_ok() {
                return Err(StateError::Exists(id.clone()));
            }
            if this.task_socket().symlink_metadata().is_ok() {
                this.remove_locked(&lock)?;
            } else if fs::remove_dir(&this.path).is_err() {
                // What is neither empty nor has a socket is nothing of ours.
                return Err(StateError::Exists(id.clone()));
            }
        }
        DirBuilder::new()
            .mode(0o700)
            .create(&this.path)
            .map_err(|cause| this.error("make the directory", &this.path, cause))?;
        let bound = open_dir(&this.path).and_then(|dir| {
            this.found = Some(Arc::new(dir));
            sock::bind(&this.task_socket())
        });
        match bound {
            Ok(listener) => Ok((this, listener)),
            Err(cause) => {
                let error = this.error("bind the socket", &this.task_socket(), cause);
                let _ = this.remove_locked(&lock);
                Err(error)
            }
        }
    }

    /// Removes the directory, for the server that it is of; it is no error when there is none.
    pub fn remove(&self) -> Result<(), StateError> {
        if !self.is_there() {
            return Ok(());
        }
        let lock = self.lock()?;
        if self.is_there() {
            self.remove_locked(&lock)?;
        }
        Ok(())
    }

    /// Whether the directory that was found is still there.
    pub fn is_there(&self) -> bool {
        let found = self.found.as_ref().and_then(|dir| dir.metadata().ok());
        let there = self.path.symlink_metadata().ok();
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        found.is_some() && found.map(identity) == there.map(identity)
    }

    /// What its server has left, if that has ended and not in order. Waits for whoever else sees to that.
    pub fn left(&self) -> Result<Option<Left<'_>>, StateError> {
        // A description of its own: locks are not between copies of one.
        let Ok(dir) = self.open(".") else {
            return Ok(None);
        };
        let lock = Flock::lock(dir, FlockArg::LockExclusive)
            .map_err(|(_, errno)| self.error("lock", &self.path, errno.into()))?;
        let left = self.is_there() && !self.is_listened_to();
        Ok(left.then_some(Left {
            state: self,
            _lock: lock,
        }))
    }

    /// Whether there is a server, which need not answer.
    fn is_listened_to(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotADirectory, NotFound};
        !matches!(
            sock::connect(&self.task_socket()),
            Err(error) if matches!(error.kind(), ConnectionRefused | NotADirectory | NotFound)
        )
    }

    /// Removes the directory's own entries one by one, and never what is below one: in the server's mount namespace the share
    /// is the containers' file systems. What the server could not unmount it does not remove, nor the record then.
    fn remove_locked(&self, _lock: &Flock<File>) -> Result<(), StateError> {
        let remove = |path: &Path| {
            let removed = match path.symlink_metadata() {
                Ok(metadata) if metadata.is_dir() => fs::remove_dir(path),
                Ok(_) => fs::remove_file(path),
                Err(error) => Err(error),
            };
            match removed {
                Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                    Err(self.error("remove", path, cause))
                }
                _ => Ok(()),
            }
        };
        remove(&self.share())?;
        remove(&self.path.join(RECORD))?;
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(cause) => return Err(self.error("list", &self.path, cause)),
        };
        for entry in entries {
            let entry = entry.map_err(|cause| self.error("list", &self.path, cause))?;
            if entry.file_name() != TASK_SOCKET {
                remove(&entry.path())?;
            }
        }
        remove(&self.task_socket())?;
        remove(&self.path)
    }

    /// The lock under which directories come and go. It is held for a few file operations, and for as long as a listener that
    /// takes no calls is given ([`sock::connect`]).
    fn lock(&self) -> Result<Flock<File>, StateError> {
        let dir = File::open(&self.root).map_err(|cause| self.error("open", &self.root, cause))?;
        Flock::lock(dir, FlockArg::LockExclusive)
            .map_err(|(_, errno)| self.error("lock", &self.root, errno.into()))
    }

    /// Opens an entry of the directory that was found, whatever has its path now.
    fn open(&self, name: &str) -> io::Result<File> {
        let dir = self.found.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        Ok(openat(dir, name, flags, Mode::empty())?.into())
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The server's socket.
    pub fn task_socket(&self) -> PathBuf {
        self.path.join(TASK_SOCKET)
    }

    /// The VMM's hybrid vsock.
    pub fn vsock(&self) -> PathBuf {
        self.path.join("vsock")
    }

    /// Where connections of the guest to the host's `port` arrive.
    pub fn vsock_port(&self, port: u32) -> PathBuf {
        self.path.join(format!("vsock_{port}"))
    }

    /// Where the share is mounted.
    pub fn share(&self) -> PathBuf {
        self.path.join(SHARE)
    }

    /// Where a server logs that has no client.
    pub fn server_log(&self) -> PathBuf {
        self.path.join("server.log")
    }

    /// Notes which process the server is.
    pub fn save_server_pid(&self, pid: u32) -> io::Result<()> {
        fs::write(self.path.join("server.pid"), pid.to_string())
    }

    /// Which process the server is.
    pub fn server_pid(&self) -> Result<u32, StateError> {
        let path = self.path.join("server.pid");
        let text = self.open("server.pid").and_then(io::read_to_string);
        let text = text.map_err(|cause| self.error("read", &path, cause))?;
        let pid = text
            .parse()
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e));
        pid.map_err(|cause| self.error("read", &path, cause))
    }

    /// Writes `state.json`, whole or not at all.
    pub fn save(&self, record: &Record) -> Result<(), StateError> {
        let path = self.path.join(RECORD);
        let new = self.path.join("state.json.new");
        let fail = |cause: io::Error| self.error("write", &path, cause);
        let text = serde_json::to_vec(record).map_err(|e| fail(e.into()))?;
        fs::write(&new, text).map_err(fail)?;
        fs::rename(&new, &path).map_err(fail)
    }

    /// Reads `state.json`.
    pub fn load(&self) -> Result<Record, StateError> {
        let path = self.path.join(RECORD);
        let text = self.open(RECORD).and_then(io::read_to_string);
        let text = text.map_err(|cause| self.error("read", &path, cause))?;
        serde_json::from_str(&text).map_err(|e| self.error("read", &path, e.into()))
    }

    fn error(&self, what: &'static str, path: &Path, cause: io::Error) -> StateError {
        StateError::Io {
            what,
            path: path.to_path_buf(),
            cause,
        }
    }
}

/// The state directory of a server that has ended otherwise than in order. While one has this, nobody else cleans it up.
#[derive(Debug)]
pub struct Left<'a> {
    state: &'a StateDir,
    _lock: Flock<File>,
}

impl Left<'_> {
    /// Removes the directory.
    pub fn remove(self) -> Result<(), StateError> {
        let lock = self.state.lock()?;
        // It may have been found before there was a socket in it, or been taken over for want of a record.
        if self.state.is_there() && !self.state.is_listened_to() {
            self.state.remove_locked(&lock)?;
        }
        Ok(())
    }
}

fn open_dir(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    use nix::sys::socket::{Shutdown, shutdown};

    use crate::share::tests::in_namespace;

    /// Ends a listener as its process's end does, though another test may be forking.
    fn end(listener: UnixListener) {
        shutdown(listener.as_raw_fd(), Shutdown::Both).unwrap();
    }

    fn record() -> Record {
        Record {
            oci_version: "1.0.2".into(),
            id: "c1".into(),
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: SystemTime::UNIX_EPOCH,
            annotations: HashMap::from([("a".into(), "b".into())]),
            pid: 7,
            status: Status::Running,
            cgroup: None,
            poststop: vec![],
            failure: Some("the VM crashed".into()),
        }
    }

    fn id() -> ContainerId {
        ContainerId::new("c1").unwrap()
    }

    #[test]
    fn an_id_is_claimed_once_until_it_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().join("run");
        let (state, _listener) = StateDir::claim(&root, &id()).unwrap();
        let error = StateDir::claim(&root, &id()).unwrap_err();
        assert!(matches!(error, StateError::Exists(_)), "{error}");
        state.remove().unwrap();
        state.remove().unwrap();
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
        StateDir::claim(&root, &id()).unwrap();
    }

    #[test]
    fn what_a_server_left_that_was_killed_before_it_made_anything_is_taken_over() {
        let root = tempfile::tempdir().unwrap();
        let (state, listener) = StateDir::claim(root.path(), &id()).unwrap();
        fs::create_dir(state.share()).unwrap();
        end(listener);
        let (state, _listener) = StateDir::claim(root.path(), &id()).unwrap();
        assert!(!state.share().exists());
    }

    #[test]
    fn an_id_on_record_is_taken_until_what_is_left_of_it_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let (state, listener) = StateDir::claim(root.path(), &id()).unwrap();
        state.save(&record()).unwrap();
        assert!(state.left().unwrap().is_none());
        end(listener);
        let error = StateDir::claim(root.path(), &id()).unwrap_err();
        assert!(matches!(error, StateError::Exists(_)), "{error}");
        assert_eq!(state.load().unwrap(), record());
        state.left().unwrap().unwrap().remove().unwrap();
        StateDir::claim(root.path(), &id()).unwrap();
    }

    #[test]
    fn who_removes_a_directory_spares_the_next_one_of_that_id_even_if_its_server_has_ended_too() {
        let root = tempfile::tempdir().unwrap();
        let (ended, listener) = StateDir::claim(root.path(), &id()).unwrap();
        end(listener);
        let (next, listener) = StateDir::claim(root.path(), &id()).unwrap();
        next.save(&record()).unwrap();
        end(listener);
        assert!(!ended.is_there());
        assert!(ended.left().unwrap().is_none());
        ended.remove().unwrap();
        ended.load().unwrap_err();
        assert_eq!(next.load().unwrap(), record());
        next.left().unwrap().unwrap().remove().unwrap();
        assert!(!next.path().exists());
    }

    #[test]
    fn what_is_mounted_on_the_share_is_never_removed_and_its_record_stays() {
        in_namespace(|| {
            let root = tempfile::tempdir().unwrap();
            let volume = tempfile::tempdir().unwrap();
            fs::write(volume.path().join("precious"), "").unwrap();
            let (state, _listener) = StateDir::claim(root.path(), &id()).unwrap();
            state.save(&record()).unwrap();
            fs::create_dir(state.share()).unwrap();
            let (none, bind) = (None::<&str>, nix::mount::MsFlags::MS_BIND);
            nix::mount::mount(Some(volume.path()), &state.share(), none, bind, none).unwrap();
            let removed = state.remove();
            nix::mount::umount(&state.share()).unwrap();
            assert!(volume.path().join("precious").exists());
            removed.unwrap_err();
            assert_eq!(state.load().unwrap(), record());
            state.remove().unwrap();
        });
    }

    #[test]
    fn a_directory_of_others_in_the_root_is_not_taken_over() {
        let root = tempfile::tempdir().unwrap();
        let others = root.path().join("c1");
        fs::create_dir(&others).unwrap();
        fs::write(others.join("precious"), "").unwrap();
        let error = StateDir::claim(root.path(), &id()).unwrap_err();
        assert!(matches!(error, StateError::Exists(_)), "{error}");
        assert!(others.join("precious").exists());
    }

    #[test]
    fn the_record_comes_back_as_it_was_saved() {
        let root = tempfile::tempdir().unwrap();
        let (state, _listener) = StateDir::claim(root.path(), &id()).unwrap();
        state.save(&record()).unwrap();
        assert_eq!(state.load().unwrap(), record());
    }
}

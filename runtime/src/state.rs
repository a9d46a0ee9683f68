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
//! socket nobody listens on is what a killed server left and may be taken over.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};
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

/// A sandbox's state directory.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
    path: PathBuf,
}

impl StateDir {
    /// The directory of `id`, which need not exist.
    pub fn of(root: &Path, id: &ContainerId) -> Self {
        Self {
            root: root.to_path_buf(),
            path: root.join(id),
        }
    }

    /// Makes the directory and binds the server's socket in it. At most one caller gets it.
    pub fn claim(root: &Path, id: &ContainerId) -> Result<(Self, UnixListener), StateError> {
        let this = Self::of(root, id);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(|cause| this.error("make the directory", root, cause))?;
        let lock = this.lock()?;
        if this.path.symlink_metadata().is_ok() {
            match sock::connect(&this.task_socket()) {
                // Nobody listens, or there is no socket: what a killed server left.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
                    ) =>
                {
                    this.remove_locked(&lock)?;
                }
                _ => return Err(StateError::Exists(id.clone())),
            }
        }
        DirBuilder::new()
            .mode(0o700)
            .create(&this.path)
            .map_err(|cause| this.error("make the directory", &this.path, cause))?;
        let listener = match sock::bind(&this.task_socket()) {
            Ok(listener) => listener,
            Err(cause) => {
                let error = this.error("bind the socket", &this.task_socket(), cause);
                let _ = this.remove_locked(&lock);
                return Err(error);
            }
        };
        Ok((this, listener))
    }

    /// Removes the directory with everything in it; it is no error when there is none.
    pub fn remove(&self) -> Result<(), StateError> {
        if self.path.symlink_metadata().is_err() {
            return Ok(());
        }
        let lock = self.lock()?;
        self.remove_locked(&lock)
    }

    /// Whether this is what a server has left that did not end in order.
    pub fn is_left(&self) -> bool {
        self.path.symlink_metadata().is_ok() && sock::connect(&self.task_socket()).is_err()
    }

    /// Removes the directory of a server that has ended. The id may have been claimed anew since; then what is there is
    /// another's, whose socket somebody listens on.
    pub fn remove_ended(&self) -> Result<(), StateError> {
        if self.path.symlink_metadata().is_err() {
            return Ok(());
        }
        let lock = self.lock()?;
        if sock::connect(&self.task_socket()).is_ok() {
            return Ok(());
        }
        self.remove_locked(&lock)
    }

    fn remove_locked(&self, _lock: &Flock<File>) -> Result<(), StateError> {
        match fs::remove_dir_all(&self.path) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                Err(self.error("remove", &self.path, cause))
            }
            _ => Ok(()),
        }
    }

    /// The lock under which directories come and go. It is held for a few file operations only.
    fn lock(&self) -> Result<Flock<File>, StateError> {
        let dir = File::open(&self.root).map_err(|cause| self.error("open", &self.root, cause))?;
        Flock::lock(dir, FlockArg::LockExclusive)
            .map_err(|(_, errno)| self.error("lock", &self.root, errno.into()))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The server's socket.
    pub fn task_socket(&self) -> PathBuf {
        self.path.join("task.sock")
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
        self.path.join("share")
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
        let text = fs::read_to_string(&path).map_err(|cause| self.error("read", &path, cause))?;
        let pid = text
            .parse()
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e));
        pid.map_err(|cause| self.error("read", &path, cause))
    }

    /// Writes `state.json`, whole or not at all.
    pub fn save(&self, record: &Record) -> Result<(), StateError> {
        let path = self.path.join("state.json");
        let new = self.path.join("state.json.new");
        let fail = |cause: io::Error| self.error("write", &path, cause);
        let text = serde_json::to_vec(record).map_err(|e| fail(e.into()))?;
        fs::write(&new, text).map_err(fail)?;
        fs::rename(&new, &path).map_err(fail)
    }

    /// Reads `state.json`.
    pub fn load(&self) -> Result<Record, StateError> {
        let path = self.path.join("state.json");
        let text = fs::read(&path).map_err(|cause| self.error("read", &path, cause))?;
        serde_json::from_slice(&text).map_err(|e| self.error("read", &path, e.into()))
    }

    fn error(&self, what: &'static str, path: &Path, cause: io::Error) -> StateError {
        StateError::Io {
            what,
            path: path.to_path_buf(),
            cause,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn what_a_killed_server_left_is_taken_over() {
        let root = tempfile::tempdir().unwrap();
        let (state, listener) = StateDir::claim(root.path(), &id()).unwrap();
        fs::create_dir(state.share()).unwrap();
        drop(listener);
        let (state, _listener) = StateDir::claim(root.path(), &id()).unwrap();
        assert!(!state.share().exists());
    }

    #[test]
    fn who_cleans_up_after_an_ended_server_spares_the_next_one() {
        let root = tempfile::tempdir().unwrap();
        let (ended, listener) = StateDir::claim(root.path(), &id()).unwrap();
        drop(listener);
        let (next, listener) = StateDir::claim(root.path(), &id()).unwrap();
        ended.remove_ended().unwrap();
        assert!(next.path().exists());
        drop(listener);
        ended.remove_ended().unwrap();
        assert!(!next.path().exists());
    }

    #[test]
    fn the_record_comes_back_as_it_was_saved() {
        let root = tempfile::tempdir().unwrap();
        let (state, _listener) = StateDir::claim(root.path(), &id()).unwrap();
        let record = Record {
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
        };
        state.save(&record).unwrap();
        assert_eq!(state.load().unwrap(), record);
    }
}

//! Where things are kept: the cache folder, and one folder per host, chosen by its name, so that several run
//! side by side. A host's folder is locked for as long as its supervisor lives, however it ends.

use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong with the folders.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Neither `XDG_CACHE_HOME` nor `HOME` is set.
    #[error("neither XDG_CACHE_HOME nor HOME is set: no place for the cache")]
    NoCache,
    /// Not a name for a host.
    #[error("{0:?} is no name for a host: use 1 to 40 letters, digits, '-' and '_'")]
    Name(String),
    /// Another supervisor has it.
    #[error("the host {0} is already up; `testhost down --name {0}` ends it")]
    Busy(String),
    /// A file or folder could not be made, locked or removed.
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
}

/// `~/.cache/bulkhead/testhost`, or its place by `XDG_CACHE_HOME`.
pub fn cache_root() -> Result<PathBuf, StateError> {
    let not_empty = |key| std::env::var_os(key).filter(|v| !v.is_empty());
    let cache = match not_empty("XDG_CACHE_HOME") {
        Some(cache) => PathBuf::from(cache),
        None => PathBuf::from(not_empty("HOME").ok_or(StateError::NoCache)?).join(".cache"),
    };
    Ok(cache.join("bulkhead/testhost"))
}

/// A lock that is given back when dropped, or by the end of the process.
pub type Lock = Flock<File>;

/// Waits for a lock on a file that is made if need be.
pub fn lock(path: &Path) -> Result<Lock, StateError> {
    flock(path, FlockArg::LockExclusive)
        .map_err(|(_, errno)| StateError::Io(path.into(), errno.into()))
}

fn flock(path: &Path, how: FlockArg) -> Result<Lock, (Option<File>, nix::Error)> {
    let to_errno = |e: io::Error| nix::Error::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|e| (None, to_errno(e)))?;
    }
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(|e| (None, to_errno(e)))?;
    Flock::lock(file, how).map_err(|(file, errno)| (Some(file), errno))
}

/// A host's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    /// Checks that it can be a file's name.
    pub fn new(name: &str) -> Result<Self, StateError> {
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > 40 || !name.chars().all(fits) {
            return Err(StateError::Name(name.into()));
        }
        Ok(Self(name.into()))
    }

    /// A name for the host of one `testhost run`.
    pub fn transient() -> Self {
        Self(format!("{TRANSIENT}{}", std::process::id()))
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

const TRANSIENT: &str = "run-";

/// File beside the folders whose lock is held by whoever takes one, or looks for those to remove.
const TURN: &str = ".turn";

/// One host's folder.
#[derive(Debug, Clone)]
pub struct Folder {
    /// The host's name.
    pub name: Name,
    root: PathBuf,
}

impl Folder {
    /// The folder of that name, whether it exists or not.
    pub fn new(cache: &Path, name: Name) -> Self {
        let root = cache.join("hosts").join(&name.0);
        Self { name, root }
    }

    /// The supervisor's socket.
    pub fn socket(&self) -> PathBuf {
        self.root.join("socket")
    }

    /// The emulated host's console.
    pub fn console(&self) -> PathBuf {
        self.root.join("console.log")
    }

    /// What QEMU says itself.
    pub fn qemu_log(&self) -> PathBuf {
        self.root.join("qemu.log")
    }

    /// What the supervisor in the background says.
    pub fn supervisor_log(&self) -> PathBuf {
        self.root.join("supervisor.log")
    }

    /// Takes the folder for this process.
    pub fn claim(&self) -> Result<Lock, StateError> {
        // A sweep that saw the folder before it is locked would take it for that of one who was killed.
        let _turn = lock(&self.root.with_file_name(TURN))?;
        self.try_claim()
    }

    fn try_claim(&self) -> Result<Lock, StateError> {
        let path = self.root.join("lock");
        match flock(&path, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(lock),
            Err((Some(_), nix::Error::EWOULDBLOCK)) => Err(StateError::Busy(self.name.0.clone())),
            Err((_, errno)) => Err(StateError::Io(path, errno.into())),
        }
    }

    /// Removes the folder and all in it.
    pub fn remove(&self) -> Result<(), StateError> {
        match fs::remove_dir_all(&self.root) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(StateError::Io(self.root.clone(), e))
            }
            _ => Ok(()),
        }
    }
}

/// Removes the folders of `testhost run`s that were killed.
pub fn sweep(cache: &Path) {
    let hosts = cache.join("hosts");
    let (Ok(_turn), Ok(entries)) = (lock(&hosts.join(TURN)), fs::read_dir(&hosts)) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with(TRANSIENT) {
            continue;
        }
        let folder = Folder {
            name: Name(name),
            root: entry.path(),
        };
        if let Ok(_lock) = folder.try_claim() {
            // Whoever removes it first has done the work.
            let _ = folder.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn names_are_file_names() {
        for good in ["default", "a-b_9"] {
            assert!(Name::new(good).is_ok());
        }
        for bad in ["", "a/b", "..", "a b", &"x".repeat(41)] {
            assert!(Name::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_folder_has_one_owner_at_a_time() {
        let cache = tempfile::tempdir().unwrap();
        let folder = Folder::new(cache.path(), Name::new("x").unwrap());
        let lock = folder.claim().unwrap();
        assert!(matches!(folder.claim(), Err(StateError::Busy(_))));
        drop(lock);
        assert!(folder.claim().is_ok());
    }

    #[test]
    fn a_sweep_takes_what_killed_runs_left_and_nothing_else() {
        let cache = tempfile::tempdir().unwrap();
        let at = |name: &str| Folder::new(cache.path(), Name::new(name).unwrap());
        let alive = at("run-1").claim().unwrap();
        drop(at("run-2").claim().unwrap());
        drop(at("named").claim().unwrap());
        sweep(cache.path());
        assert!(at("run-1").root.exists());
        assert!(!at("run-2").root.exists());
        assert!(at("named").root.exists());
        drop(alive);
    }

    #[test]
    fn a_sweep_does_not_get_in_the_way_of_one_who_begins() {
        let cache = tempfile::tempdir().unwrap();
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    sweep(cache.path());
                }
            });
            for n in 0..10_000 {
                let folder = Folder::new(cache.path(), Name::new(&format!("run-{n}")).unwrap());
                let claimed = folder.claim().map(|lock| (folder.root.exists(), lock));
                let fine = matches!(claimed, Ok((true, _)));
                if !fine {
                    ended.store(true, Ordering::Relaxed);
                }
                assert!(fine, "{n}: {claimed:?}");
            }
            ended.store(true, Ordering::Relaxed);
        });
    }
}

//! What the guest knows by number: inodes it has looked up, and files it has opened. Both hold descriptors, and share one budget of
//! them.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use fuse_backend_rs::api::filesystem::ROOT_ID;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::host::{Listing, Metadata};
use crate::sync::lock;

/// How many descriptors the guest may make the VMM hold.
///
/// The guest gives none back by itself as long as it has memory left. So whoever can have it forget files is told when half of the
/// budget is taken; and again when half of what was left at the fewest since then is taken too, so that neither a guest that forgets
/// nothing nor one that needs most of them makes more than a few such calls.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
    /// How few were taken since that was told last.
    fewest: AtomicUsize,
    many: EventFd,
}

impl Budget {
    /// A budget of `limit` descriptors.
    pub fn new(limit: usize) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            limit,
            used: AtomicUsize::new(0),
            fewest: AtomicUsize::new(0),
            many: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        }))
    }

    /// Readable when many are taken.
    pub fn many(&self) -> &EventFd {
        &self.many
    }

    /// Whether few are left: less than a quarter.
    pub fn is_scarce(&self) -> bool {
        self.used.load(Ordering::Relaxed) > self.limit - self.limit / 4
    }

    /// A permit for one, or `ENFILE`.
    pub fn take(self: &Arc<Self>) -> io::Result<Permit> {
        let permit = Permit(self.clone());
        let used = self.used.fetch_add(1, Ordering::Relaxed) + 1;
        if used > self.limit {
            // Dropping the permit takes the count back.
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        let fewest = self.fewest.load(Ordering::Relaxed);
        let rise = (self.limit.saturating_sub(fewest) / 2).max(self.limit / 16);
        // One of those who get here together tells.
        if used >= fewest.saturating_add(rise.max(1))
            && self
                .fewest
                .compare_exchange(fewest, used, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            // Fails only when the counter is full: then it is readable already.
            let _ = self.many.write(1);
        }
        Ok(permit)
    }
}

/// The right to hold one descriptor.
#[derive(Debug)]
pub struct Permit(Arc<Budget>);

impl Drop for Permit {
    fn drop(&mut self) {
        let used = self.0.used.fetch_sub(1, Ordering::Relaxed) - 1;
        self.0.fewest.fetch_min(used, Ordering::Relaxed);
    }
}

/// What makes two files the same one. The mount is part of it: what one mount lets write, another may not.
///
/// An inode in the table is open, so the host can't give its numbers to another file, nor those of its mount to another mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    dev: u64,
    ino: u64,
    mount: u64,
}

impl From<&Metadata> for Key {
    fn from(metadata: &Metadata) -> Self {
        Self {
            dev: metadata.stat.st_dev,
            ino: metadata.stat.st_ino,
            mount: metadata.mount,
        }
    }
}

/// What tells whether a file's content may have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    size: i64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl From<&Metadata> for Stamp {
    fn from(metadata: &Metadata) -> Self {
        let stat = &metadata.stat;
        Self {
            size: stat.st_size,
            mtime: (stat.st_mtime, stat.st_mtime_nsec),
            ctime: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

/// A file that the guest has looked up.
#[derive(Debug)]
pub struct Inode {
    /// The number by which the guest knows it. Never given to another file.
    pub id: u64,
    /// File type bits of its mode; they never change.
    pub kind: u32,
    fd: OwnedFd,
    key: Key,
    seen: Mutex<Option<Stamp>>,
    _permit: Permit,
}

impl Inode {
    /// The device it is on.
    pub fn device(&self) -> u64 {
        self.key.dev
    }

    /// Notes the file's state at an open; returns whether it was the same at the last one.
    pub fn unchanged(&self, stamp: Stamp) -> bool {
        lock(&self.seen).replace(stamp) == Some(stamp)
    }
}

impl AsFd for Inode {
    /// A descriptor without access rights (`O_PATH`).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[derive(Debug)]
struct Known {
    inode: Arc<Inode>,
    /// How often the guest has been told of it, less how often it has forgotten that.
    lookups: u64,
}

#[derive(Debug, Default)]
struct InodeMaps {
    by_id: HashMap<u64, Known>,
    by_key: HashMap<Key, u64>,
    last: u64,
}

/// The inodes.
#[derive(Debug)]
pub struct Inodes {
    maps: Mutex<InodeMaps>,
    budget: Arc<Budget>,
    root: Arc<Inode>,
}

impl Inodes {
    /// A table with the root, which is never forgotten.
    pub fn new(root: OwnedFd, metadata: &Metadata, budget: Arc<Budget>) -> io::Result<Self> {
        let root = Arc::new(Inode {
            id: ROOT_ID,
            kind: metadata.kind(),
            fd: root,
            key: metadata.into(),
            seen: Mutex::new(None),
            _permit: budget.take()?,
        });
        let inodes = Self {
            maps: Mutex::default(),
            budget,
            root,
        };
        inodes.clear();
        Ok(inodes)
    }

    /// Forgets all but the root.
    pub fn clear(&self) {
        let mut maps = InodeMaps {
            last: ROOT_ID,
            ..InodeMaps::default()
        };
        maps.by_key.insert(self.root.key, ROOT_ID);
        maps.by_id.insert(
            ROOT_ID,
            Known {
                inode: self.root.clone(),
                lookups: 1,
            },
        );
        let mut guard = lock(&self.maps);
        // Numbers are not used again, whatever is still under way.
        maps.last = maps.last.max(guard.last);
        let before = std::mem::replace(&mut *guard, maps);
        drop(guard);
        drop(before);
    }

    /// An inode that the guest names.
    pub fn get(&self, id: u64) -> io::Result<Arc<Inode>> {
        lock(&self.maps)
            .by_id
            .get(&id)
            .map(|known| known.inode.clone())
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// The inode of a file that the guest is told of. `fd` is an `O_PATH` descriptor of it.
    pub fn look_up(&self, fd: OwnedFd, metadata: &Metadata) -> io::Result<Arc<Inode>> {
        let key = Key::from(metadata);
        let mut maps = lock(&self.maps);
        if let Some(id) = maps.by_key.get(&key).copied()
            && let Some(known) = maps.by_id.get_mut(&id)
        {
            known.lookups = known.lookups.saturating_add(1);
            return Ok(known.inode.clone());
        }
        let permit = self.budget.take()?;
        maps.last += 1;
        let inode = Arc::new(Inode {
            id: maps.last,
            kind: metadata.kind(),
            fd,
            key,
            seen: Mutex::new(None),
            _permit: permit,
        });
        maps.by_key.insert(key, inode.id);
        maps.by_id.insert(
            inode.id,
            Known {
                inode: inode.clone(),
                lookups: 1,
            },
        );
        Ok(inode)
    }

    /// The guest has forgotten `count` of the times that it was told of an inode.
    pub fn forget(&self, id: u64, count: u64) {
        if id == ROOT_ID {
            return;
        }
        let mut maps = lock(&self.maps);
        let Some(known) = maps.by_id.get_mut(&id) else {
            return;
        };
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups == 0 {
            let key = known.inode.key;
            let gone = maps.by_id.remove(&id);
            maps.by_key.remove(&key);
            drop(maps);
            // Closing may take long; nobody waits for it.
            drop(gone);
        }
    }

    /// What they take descriptors from.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        lock(&self.maps).by_id.len()
    }
}

/// A file or directory that the guest has opened.
#[derive(Debug)]
pub struct Handle {
    /// The inode it was opened by.
    pub inode: u64,
    /// How far a directory has been read.
    pub listing: Mutex<Listing>,
    fd: OwnedFd,
    _permit: Permit,
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[derive(Debug, Default)]
struct HandleMap {
    by_id: HashMap<u64, Arc<Handle>>,
    last: u64,
}

/// The open files.
#[derive(Debug)]
pub struct Handles {
    map: Mutex<HandleMap>,
    budget: Arc<Budget>,
}

impl Handles {
    /// An empty table.
    pub fn new(budget: Arc<Budget>) -> Self {
        Self {
            map: Mutex::default(),
            budget,
        }
    }

    /// A permit for a file that is about to be opened.
    pub fn permit(&self) -> io::Result<Permit> {
        self.budget.take()
    }

    /// Adds an open file; returns its number.
    pub fn insert(&self, inode: u64, fd: OwnedFd, permit: Permit) -> u64 {
        let mut map = lock(&self.map);
        map.last += 1;
        let id = map.last;
        map.by_id.insert(
            id,
            Arc::new(Handle {
                inode,
                listing: Mutex::default(),
                fd,
                _permit: permit,
            }),
        );
        id
    }

    /// An open file of an inode.
    pub fn get(&self, id: u64, inode: u64) -> io::Result<Arc<Handle>> {
        lock(&self.map)
            .by_id
            .get(&id)
            .filter(|handle| handle.inode == inode)
            .cloned()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// The guest has closed a file.
    pub fn remove(&self, id: u64, inode: u64) -> io::Result<()> {
        let handle = self.get(id, inode)?;
        lock(&self.map).by_id.remove(&id);
        drop(handle);
        Ok(())
    }

    /// Closes all.
    pub fn clear(&self) {
        let before = std::mem::take(&mut lock(&self.map).by_id);
        drop(before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_files_are_told_of_at_half_of_what_was_left() {
        const NONE: [usize; 0] = [];
        let budget = Budget::new(160).unwrap();
        let mut held = Vec::new();
        let mut told_at = |held: &mut Vec<Permit>, count: usize| {
            let mut told = Vec::new();
            held.truncate(count);
            while held.len() < count {
                held.push(budget.take().unwrap());
                if budget.many().read().is_ok() {
                    told.push(held.len());
                }
            }
            told
        };
        // Who forgets nothing is told of ever more rarely, and in the end no more.
        assert_eq!(told_at(&mut held, 160), [80, 120, 140, 150, 160]);
        for (fewest, expected) in [
            // What falls by one and rises by one is no news.
            (159, NONE.as_slice()),
            (149, &[159]),
            (100, &[130, 145, 155]),
            (0, &[80, 120, 140, 150, 160]),
        ] {
            assert_eq!(told_at(&mut held, fewest), NONE);
            assert_eq!(told_at(&mut held, 160), expected, "{fewest}");
        }
        // Around the threshold too.
        assert_eq!(told_at(&mut held, 0), NONE);
        assert_eq!(told_at(&mut held, 80), [80]);
        for _ in 0..3 {
            assert_eq!(told_at(&mut held, 79), NONE);
            assert_eq!(told_at(&mut held, 81), NONE);
        }
        assert_eq!(told_at(&mut held, 119), [119]);
    }

    #[test]
    fn threads_that_take_together_tell_once() {
        const THREADS: usize = 4;
        const EACH: usize = 2_000;
        let budget = Budget::new(2 * THREADS * EACH).unwrap();
        let held: Vec<Vec<Permit>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|_| scope.spawn(|| (0..EACH).map(|_| budget.take().unwrap()).collect()))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(budget.many().read().unwrap(), 1);
        assert!(!budget.is_scarce());
        drop(held);
        assert!(budget.many().read().is_err());
    }
}

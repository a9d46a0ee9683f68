//! What the guest knows by number: inodes it has looked up, and files it has opened. Both hold descriptors, and share one budget of
//! them.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use fuse_backend_rs::api::filesystem::ROOT_ID;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::host::{self, Listing, Metadata, Place};
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
        self.take_as(1)
    }

    /// A permit for one that counts as `count` of them, since it takes the memory of as many.
    fn take_as(self: &Arc<Self>, count: usize) -> io::Result<Permit> {
        let permit = Permit {
            budget: self.clone(),
            count,
        };
        let used = self.used.fetch_add(count, Ordering::Relaxed) + count;
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
pub struct Permit {
    budget: Arc<Budget>,
    count: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let used = self.budget.used.fetch_sub(self.count, Ordering::Relaxed) - self.count;
        self.budget.fewest.fetch_min(used, Ordering::Relaxed);
    }
}

/// What makes two files the same one.
///
/// An inode in the table is open, so the host can't give its numbers to another file, nor those of its mount to another mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    dev: u64,
    ino: u64,
    /// Of a directory, since to the guest's kernel it is in one place only. Any other file is the same by every mount: by the
    /// inode the guest's kernel finds sockets, FIFOs, locks and shared mappings.
    mount: Option<u64>,
    /// Of any other file: what one mount lets write, another may not.
    place: Place,
    /// Tells names apart that have their numbers in common and nothing else, see [`Inodes::look_up`]; zero for all other files.
    twin: u64,
}

impl Key {
    fn new(fd: BorrowedFd<'_>, metadata: &Metadata, parent: &Inode) -> Self {
        if metadata.kind() == libc::S_IFDIR {
            return Self::of_directory(metadata);
        }
        Self {
            dev: metadata.stat.st_dev,
            ino: metadata.stat.st_ino,
            mount: None,
            place: parent.place_of(fd, metadata),
            twin: 0,
        }
    }

    /// Whether it may be that of several names of a file in a layer of overlayfs.
    fn is_linked(&self, metadata: &Metadata) -> bool {
        self.place.overlay && metadata.stat.st_nlink > 1
    }

    fn of_directory(metadata: &Metadata) -> Self {
        Self {
            dev: metadata.stat.st_dev,
            ino: metadata.stat.st_ino,
            mount: Some(metadata.mount),
            place: Place::default(),
            twin: 0,
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

impl Stamp {
    /// The stamp of a file with these attributes, read after the moment `now`. None for one that may still change without another
    /// stamp: the host's clock for files goes in ticks, of up to 10 ms, and some file systems store whole seconds, or every other one.
    pub fn of(size: i64, mtime: (i64, i64), ctime: (i64, i64), now: (i64, i64)) -> Option<Self> {
        const TWO_TICKS: i64 = 20_000_000;
        let grain = if ctime.1 == 0 { (2, 0) } else { (0, TWO_TICKS) };
        let nanoseconds = ctime.1 + grain.1;
        let settled = (
            ctime
                .0
                .saturating_add(grain.0 + nanoseconds / 1_000_000_000),
            nanoseconds % 1_000_000_000,
        );
        (now > settled).then_some(Self { size, mtime, ctime })
    }

    /// The same of what the host tells.
    pub fn new(metadata: &Metadata, now: (i64, i64)) -> Option<Self> {
        let stat = &metadata.stat;
        let mtime = (stat.st_mtime, stat.st_mtime_nsec);
        let ctime = (stat.st_ctime, stat.st_ctime_nsec);
        Self::of(stat.st_size, mtime, ctime, now)
    }
}

/// A file that the guest has looked up.
#[derive(Debug)]
pub struct Inode {
    /// The number by which the guest knows it. Never given to another file.
    pub id: u64,
    /// File type bits of its mode; they never change.
    pub kind: u32,
    /// The mount that `fd` belongs to.
    pub mount: u64,
    fd: OwnedFd,
    /// What it was first known by.
    key: Key,
    /// The name that it was first told of by, if there may be others that are no names of it, see [`Inodes::look_up`].
    name: AtomicU64,
    /// Of a directory: what is true of all files on its mount.
    place: OnceLock<Place>,
    seen: Mutex<Option<Stamp>>,
    /// The same file by other mounts.
    elsewhere: Mutex<Vec<Elsewhere>>,
    _permit: Permit,
}

#[derive(Debug)]
struct Elsewhere {
    mount: u64,
    fd: Arc<OwnedFd>,
    _permit: Permit,
}

impl Inode {
    fn new(id: u64, fd: OwnedFd, metadata: &Metadata, key: Key, permit: Permit) -> Self {
        Self {
            id,
            kind: metadata.kind(),
            mount: metadata.mount,
            fd,
            key,
            name: AtomicU64::new(0),
            place: OnceLock::new(),
            seen: Mutex::default(),
            elsewhere: Mutex::default(),
            _permit: permit,
        }
    }

    /// The device it is on.
    pub fn device(&self) -> u64 {
        self.key.dev
    }

    /// What is true of it as of all files on its mount; nothing is known of a directory.
    pub fn place(&self) -> Place {
        self.key.place
    }

    /// Whether it is for one look: a symbolic link whose target is made up. The guest keeps targets as long as it keeps inodes.
    pub fn is_fleeting(&self) -> bool {
        self.kind == libc::S_IFLNK && self.place().made_up
    }

    /// Notes the file's state at an open; returns whether it was the same at the last one.
    pub fn unchanged(&self, stamp: Option<Stamp>) -> bool {
        let before = std::mem::replace(&mut *lock(&self.seen), stamp);
        stamp.is_some() && before == stamp
    }

    /// A descriptor of it by another mount than that of [`AsFd`], if the guest has reached it by that one.
    pub fn by_mount(&self, mount: u64) -> Option<Arc<OwnedFd>> {
        let elsewhere = lock(&self.elsewhere);
        let found = elsewhere.iter().find(|other| other.mount == mount);
        found.map(|other| other.fd.clone())
    }

    /// Where a file is that this directory names.
    fn place_of(&self, fd: BorrowedFd<'_>, metadata: &Metadata) -> Place {
        if metadata.mount == self.mount {
            self.place_of_files()
        } else {
            Place::of(fd)
        }
    }

    /// Where the files of this directory are, but for what is mounted on them.
    pub fn place_of_files(&self) -> Place {
        *self.place.get_or_init(|| Place::of(self.as_fd()))
    }

    /// Keeps a descriptor by another mount. Without a permit for one it is done without, at the price of hard links there.
    fn reached_by(&self, mount: u64, fd: OwnedFd, permit: impl FnOnce() -> io::Result<Permit>) {
        if mount == self.mount {
            return;
        }
        let mut elsewhere = lock(&self.elsewhere);
        if elsewhere.iter().all(|other| other.mount != mount)
            && let Ok(permit) = permit()
        {
            elsewhere.push(Elsewhere {
                mount,
                fd: Arc::new(fd),
                _permit: permit,
            });
        }
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
    /// What it is found by.
    key: Key,
    /// How often the guest has been told of it, less how often it has forgotten that.
    lookups: u64,
}

#[derive(Debug, Default)]
struct InodeMaps {
    by_id: HashMap<u64, Known>,
    by_key: HashMap<Key, u64>,
    /// Files of which it has turned out that each name is one of its own, and how many of those names are known.
    parted: HashMap<Key, usize>,
    last: u64,
}

impl InodeMaps {
    /// The inode of a key.
    fn find(&self, key: &Key) -> Option<Arc<Inode>> {
        let id = self.by_key.get(key)?;
        self.by_id.get(id).map(|known| known.inode.clone())
    }

    /// Counts one more time that the guest is told of an inode.
    fn tell(&mut self, key: &Key) -> Option<Arc<Inode>> {
        let id = self.by_key.get(key)?;
        let known = self.by_id.get_mut(id)?;
        known.lookups = known.lookups.saturating_add(1);
        Some(known.inode.clone())
    }

    /// Has an inode be found by a key, unless another is.
    fn enter(&mut self, id: u64, key: Key) {
        if let Some(known) = self.by_id.get_mut(&id) {
            known.key = key;
        }
        if let Entry::Vacant(place) = self.by_key.entry(key) {
            place.insert(id);
            if key.twin != 0 {
                *self.parted.entry(Key { twin: 0, ..key }).or_default() += 1;
            }
        }
    }

    /// The reverse.
    fn leave(&mut self, id: u64, key: Key) {
        if self.by_key.get(&key) != Some(&id) {
            return;
        }
        self.by_key.remove(&key);
        if key.twin != 0
            && let Entry::Occupied(mut names) = self.parted.entry(Key { twin: 0, ..key })
        {
            *names.get_mut() -= 1;
            if *names.get() == 0 {
                names.remove();
            }
        }
    }

    /// Has an inode be found by another key.
    fn change(&mut self, id: u64, change: impl FnOnce(Key) -> Key) {
        if let Some(key) = self.by_id.get(&id).map(|known| known.key) {
            self.leave(id, key);
            self.enter(id, change(key));
        }
    }
}

/// The inodes.
#[derive(Debug)]
pub struct Inodes {
    maps: Mutex<InodeMaps>,
    names: RandomState,
    budget: Arc<Budget>,
    root: Arc<Inode>,
}

impl Inodes {
    /// A table with the root, which is never forgotten.
    pub fn new(root: OwnedFd, metadata: &Metadata, budget: Arc<Budget>) -> io::Result<Self> {
        let key = Key::of_directory(metadata);
        let root = Arc::new(Inode::new(ROOT_ID, root, metadata, key, budget.take()?));
        let inodes = Self {
            maps: Mutex::default(),
            names: RandomState::new(),
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
                key: self.root.key,
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

    /// A permit for a file that is about to be made.
    pub fn permit(&self) -> io::Result<Permit> {
        self.budget.take()
    }

    /// An inode that the guest names.
    pub fn get(&self, id: u64) -> io::Result<Arc<Inode>> {
        lock(&self.maps)
            .by_id
            .get(&id)
            .map(|known| known.inode.clone())
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// The inode of a file that the guest is told of. `fd` is an `O_PATH` descriptor of it, `parent` names it. Takes a permit if none
    /// is given.
    ///
    /// On overlayfs without an index the hard links of a file in a lower layer have its numbers in common, but each is an inode of its
    /// own, which gets a file of its own when it is first written to. Hard links in the upper layer are one inode as elsewhere. The numbers
    /// do not tell which it is, so the first two names that come are compared.
    pub fn look_up(
        &self,
        fd: OwnedFd,
        metadata: &Metadata,
        parent: &Inode,
        name: &CStr,
        mut permit: Option<Permit>,
    ) -> io::Result<Arc<Inode>> {
        let key = Key::new(fd.as_fd(), metadata, parent);
        let linked = key.is_linked(metadata);
        let name = if linked {
            self.name_of(parent, name)
        } else {
            0
        };
        let mut compared = None;
        loop {
            let mut maps = lock(&self.maps);
            let twin = if maps.parted.contains_key(&key) {
                name
            } else {
                0
            };
            let known = maps.find(&Key { twin, ..key });
            if let Some(inode) = known.filter(|inode| !inode.is_fleeting()) {
                let first = inode.name.load(Ordering::Relaxed);
                if linked && twin == 0 && first != 0 && first != name {
                    match compared.take() {
                        Some((id, true)) if id == inode.id => {
                            inode.name.store(0, Ordering::Relaxed);
                        }
                        // Each name is found by itself from now on.
                        Some((id, false)) if id == inode.id => {
                            maps.change(inode.id, |key| Key { twin: first, ..key });
                            continue;
                        }
                        _ => {
                            // That takes a while.
                            drop(maps);
                            let same = host::is_same_inode(inode.as_fd(), fd.as_fd());
                            // Where the host has no watch left: two inodes for one file are not always of one mind, but one for two files
                            // would have what is meant for one written to the other.
                            let same = same.unwrap_or_else(|error| {
                                tracing::debug!(%error, "cannot compare two inodes, and takes them for two");
                                false
                            });
                            compared = Some((inode.id, same));
                            continue;
                        }
                    }
                }
                maps.tell(&Key { twin, ..key });
                drop(maps);
                inode.reached_by(metadata.mount, fd, || {
                    permit.take().map_or_else(|| self.budget.take(), Ok)
                });
                return Ok(inode);
            }
            let permit = match permit.take() {
                Some(permit) => permit,
                None => self.budget.take()?,
            };
            maps.last += 1;
            let inode = Arc::new(Inode::new(maps.last, fd, metadata, key, permit));
            inode.name.store(name, Ordering::Relaxed);
            let key = Key { twin, ..key };
            maps.by_id.insert(
                inode.id,
                Known {
                    inode: inode.clone(),
                    key,
                    lookups: 1,
                },
            );
            maps.enter(inode.id, key);
            return Ok(inode);
        }
    }

    /// A number for a name. Not zero, which is for no name.
    fn name_of(&self, parent: &Inode, name: &CStr) -> u64 {
        self.names.hash_one((parent.key, parent.mount, name)) | 1
    }

    /// The inode that the guest knows by a name which is about to be changed, if the change may give it other numbers: [`Self::renumber`] is
    /// to be told of those.
    pub fn about_to_move(&self, parent: &Inode, name: &CStr) -> Option<Arc<Inode>> {
        // Elsewhere no numbers change, and nothing is to be asked for.
        if !parent
            .place
            .get_or_init(|| Place::of(parent.as_fd()))
            .overlay
        {
            return None;
        }
        let (fd, metadata) = host::look_up(parent.as_fd(), name).ok()?;
        let key = Key::new(fd.as_fd(), &metadata, parent);
        if !key.is_linked(&metadata) {
            return None;
        }
        let maps = lock(&self.maps);
        let twin = if maps.parted.contains_key(&key) {
            self.name_of(parent, name)
        } else {
            0
        };
        maps.find(&Key { twin, ..key })
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
            let key = known.key;
            maps.leave(id, key);
            let gone = maps.by_id.remove(&id);
            drop(maps);
            // Closing may take long; nobody waits for it.
            drop(gone);
        }
    }

    /// Takes note of an inode's numbers after something that may have changed them: on overlayfs a hard link of a lower layer gets those of
    /// its own file when it is first written to. Its names have to lead to this inode still, and with them those that it is given.
    pub fn renumber(&self, inode: &Inode, metadata: &Metadata) {
        let numbers = (metadata.stat.st_dev, metadata.stat.st_ino);
        if !inode.key.place.overlay || numbers == (inode.key.dev, inode.key.ino) {
            return;
        }
        let (dev, ino) = numbers;
        let mut maps = lock(&self.maps);
        // In the upper layer they tell files apart.
        inode.name.store(0, Ordering::Relaxed);
        maps.change(inode.id, |key| Key {
            dev,
            ino,
            twin: 0,
            ..key
        });
    }

    /// One file of each file system that the guest knows something of: a directory, or else a regular file.
    pub fn file_systems(&self) -> Vec<Arc<Inode>> {
        let maps = lock(&self.maps);
        let mut by_mount: HashMap<u64, &Arc<Inode>> = HashMap::new();
        for known in maps.by_id.values() {
            match known.inode.kind {
                libc::S_IFDIR => drop(by_mount.insert(known.inode.mount, &known.inode)),
                // Nothing of these is ever to be written back, and some can't be opened.
                libc::S_IFREG if known.inode.place().made_up => {}
                libc::S_IFREG => drop(by_mount.entry(known.inode.mount).or_insert(&known.inode)),
                _ => {}
            }
        }
        let mut found: Vec<_> = by_mount.into_values().cloned().collect();
        drop(maps);
        // Directories first: all of overlayfs's have its own device number.
        found.sort_by_key(|inode| (inode.kind != libc::S_IFDIR, inode.id));
        let mut devices = HashSet::new();
        found.retain(|inode| devices.insert(inode.device()));
        found
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

    /// The same for a directory: of one that has been read in part the entries read ahead are held, which are no smaller than a file.
    pub fn permit_of_directory(&self) -> io::Result<Permit> {
        self.budget.take_as(2)
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
        let told_at = |held: &mut Vec<Permit>, count: usize| {
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

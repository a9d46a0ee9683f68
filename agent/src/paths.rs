//! Places inside a container's root filesystem.
//!
//! The image is hostile: any component may be a symbolic link to anywhere. Every look-up here is openat2 with
//! RESOLVE_IN_ROOT and ends in a descriptor, so that what was checked is what is used.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::{Mode, mkdirat};

use crate::sys::open_in_root;

/// What to make of a place that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Make {
    /// A directory.
    Directory,
    /// An empty file.
    File,
}

/// Dangling symbolic links followed at most; the kernel's own bound for all links is 40.
const MAX_LINKS: u32 = 40;

/// Opens a place, without making anything.
pub fn open(root: BorrowedFd<'_>, path: &[u8]) -> nix::Result<OwnedFd> {
    open_in_root(root, path, OFlag::O_PATH)
}

/// Opens a place, making it and the directories that lead to it (mode 0755) where they don't exist. A dangling
/// symbolic link is followed inside the root, and its target made.
pub fn open_or_make(root: BorrowedFd<'_>, path: &[u8], make: Make) -> nix::Result<OwnedFd> {
    open_or_make_bounded(root, path, make, MAX_LINKS)
}

fn open_or_make_bounded(
    root: BorrowedFd<'_>,
    path: &[u8],
    make: Make,
    links: u32,
) -> nix::Result<OwnedFd> {
    match open(root, path) {
        Err(Errno::ENOENT) => {}
        other => return other,
    }
    let (parent_path, name) = split(path).ok_or(Errno::ENOENT)?;
    let parent = open_or_make_bounded(root, parent_path, Make::Directory, links)?;
    let made = match make {
        Make::Directory => mkdirat(&parent, name, Mode::from_bits_truncate(0o755)),
        Make::File => openat(
            &parent,
            name,
            OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW,
            Mode::from_bits_truncate(0o644),
        )
        .map(drop),
    };
    match made {
        Ok(()) => openat(
            &parent,
            name,
            OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
            Mode::empty(),
        ),
        // It exists now and did not resolve before: a dangling link.
        Err(Errno::EEXIST) => {
            let links = links.checked_sub(1).ok_or(Errno::ELOOP)?;
            let target = readlinkat(&parent, name)?;
            let target = target.as_encoded_bytes();
            let target = if target.starts_with(b"/") {
                target.to_vec()
            } else {
                [parent_path, b"/", target].concat()
            };
            open_or_make_bounded(root, &target, make, links)
        }
        Err(errno) => Err(errno),
    }
}

/// Opens the directory that holds `path`, making what is missing, and names the last component.
pub fn open_parent<'a>(root: BorrowedFd<'_>, path: &'a [u8]) -> nix::Result<(OwnedFd, &'a [u8])> {
    let (parent, name) = split(path).ok_or(Errno::EINVAL)?;
    Ok((open_or_make(root, parent, Make::Directory)?, name))
}

/// Splits off the last component. `None` if there is none that could be made: `/`, or one that ends in `..`.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = path.iter().rposition(|&byte| byte != b'/')? + 1;
    let path = path.get(..end)?;
    let start = path
        .iter()
        .rposition(|&byte| byte == b'/')
        .map_or(0, |slash| slash + 1);
    let (parent, name) = path.split_at_checked(start)?;
    if name == b"." || name == b".." {
        return None;
    }
    Some((if parent.is_empty() { b"/" } else { parent }, name))
}

/// Whether an open file is a directory.
pub fn is_directory(file: BorrowedFd<'_>) -> nix::Result<bool> {
    let stat = nix::sys::stat::fstat(file.as_fd())?;
    Ok(stat.st_mode & libc::S_IFMT == libc::S_IFDIR)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let fd = nix::fcntl::open(
            dir.path(),
            OFlag::O_PATH | OFlag::O_DIRECTORY,
            Mode::empty(),
        )
        .unwrap();
        (dir, fd)
    }

    #[test]
    fn missing_directories_and_the_file_are_made() {
        let (dir, root) = root();
        open_or_make(root.as_fd(), b"/a/b//c", Make::File).unwrap();
        assert!(dir.path().join("a/b/c").is_file());
        open_or_make(root.as_fd(), b"d/e/", Make::Directory).unwrap();
        assert!(dir.path().join("d/e").is_dir());
    }

    #[test]
    fn links_out_of_the_root_stay_inside() {
        let (dir, root) = root();
        symlink("/outside", dir.path().join("absolute")).unwrap();
        symlink("../../../../outside2", dir.path().join("relative")).unwrap();
        open_or_make(root.as_fd(), b"/absolute/x", Make::Directory).unwrap();
        open_or_make(root.as_fd(), b"/relative/y", Make::File).unwrap();
        assert!(dir.path().join("outside/x").is_dir());
        assert!(dir.path().join("outside2/y").is_file());
        assert!(!std::path::Path::new("/outside").exists());
    }

    #[test]
    fn a_loop_of_links_is_an_error() {
        let (dir, root) = root();
        symlink("b", dir.path().join("a")).unwrap();
        symlink("a", dir.path().join("b")).unwrap();
        assert_eq!(
            open_or_make(root.as_fd(), b"/a/x", Make::File).unwrap_err(),
            Errno::ELOOP
        );
    }

    #[test]
    fn a_file_in_the_way_is_an_error() {
        let (dir, root) = root();
        fs::write(dir.path().join("file"), "").unwrap();
        assert_eq!(
            open_or_make(root.as_fd(), b"/file/x", Make::File).unwrap_err(),
            Errno::ENOTDIR
        );
    }

    #[test]
    fn paths_are_split_at_the_last_component() {
        assert_eq!(split(b"/a/b/"), Some((&b"/a/"[..], &b"b"[..])));
        assert_eq!(split(b"a"), Some((&b"/"[..], &b"a"[..])));
        assert_eq!(split(b"/"), None);
        assert_eq!(split(b""), None);
        assert_eq!(split(b"/a/.."), None);
    }
}

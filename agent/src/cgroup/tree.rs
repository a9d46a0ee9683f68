//! A cgroup and those below it. Who made these may have nested them so deeply that their paths are too long for a system call, so the
//! way to each is by descriptors.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Visits a cgroup and those below it, parents before children, until a visit breaks off.
pub fn visit<T>(
    cgroup: BorrowedFd<'_>,
    see: &mut dyn FnMut(BorrowedFd<'_>) -> io::Result<ControlFlow<T>>,
) -> io::Result<ControlFlow<T>> {
    if let found @ ControlFlow::Break(_) = see(cgroup)? {
        return Ok(found);
    }
    for name in children(cgroup)? {
        if let Some(child) = there(openat(cgroup, name.as_c_str(), FLAGS, Mode::empty()))?
            && let found @ ControlFlow::Break(_) = visit(child.as_fd(), see)?
        {
            return Ok(found);
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// Removes the cgroups below one.
pub fn remove_below(cgroup: BorrowedFd<'_>) -> io::Result<()> {
    for name in children(cgroup)? {
        if let Some(child) = there(openat(cgroup, name.as_c_str(), FLAGS, Mode::empty()))? {
            remove_below(child.as_fd())?;
            there(unlinkat(cgroup, name.as_c_str(), UnlinkatFlags::RemoveDir))?;
        }
    }
    Ok(())
}

/// The processes in a cgroup; none if it is gone, or has threads only.
pub fn processes(cgroup: BorrowedFd<'_>) -> io::Result<Vec<i32>> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let mut list = String::new();
    let read = openat(cgroup, c"cgroup.procs", flags, Mode::empty())
        .map_err(io::Error::from)
        .and_then(|file| File::from(file).read_to_string(&mut list));
    match read.map_err(|error| crate::error::errno_of(&error)) {
        // Those of a threaded cgroup are in the list of the domain above.
        Ok(_) | Err(Errno::ENOENT | Errno::ENODEV | Errno::EOPNOTSUPP) => {}
        Err(errno) => return Err(errno.into()),
    }
    Ok(list.lines().filter_map(|line| line.parse().ok()).collect())
}

const FLAGS: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

/// What a call found; none if it was gone by then.
fn there<T>(found: nix::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn children(cgroup: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let Some(own) = there::<OwnedFd>(openat(cgroup, c".", FLAGS, Mode::empty()))? else {
        return Ok(Vec::new());
    };
    let mut names = Vec::new();
    for entry in Dir::from_fd(own)?.iter() {
        let Some(entry) = there(entry)? else {
            break;
        };
        let name = entry.file_name();
        if entry.file_type() == Some(Type::Directory) && name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: &str = "a-name-that-is-not-short-but-may-well-be-the-one-of-a-systemd-scope";

    fn names(dir: BorrowedFd<'_>) -> usize {
        let mut count = 0;
        let walked = visit::<()>(dir, &mut |_| {
            count += 1;
            Ok(ControlFlow::Continue(()))
        });
        assert_eq!(walked.unwrap(), ControlFlow::Continue(()));
        count
    }

    #[test]
    fn a_tree_deeper_than_a_path_is_long_is_visited_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let root = File::open(root.path()).unwrap();
        let mut deepest = root.try_clone().map(OwnedFd::from).unwrap();
        for _ in 0..100 {
            nix::sys::stat::mkdirat(&deepest, LONG, Mode::S_IRWXU).unwrap();
            deepest = openat(&deepest, LONG, FLAGS, Mode::empty()).unwrap();
        }
        assert_eq!(names(root.as_fd()), 101);
        remove_below(root.as_fd()).unwrap();
        assert_eq!(names(root.as_fd()), 1);
    }

    #[test]
    fn a_visit_that_has_found_what_it_wants_is_the_last() {
        let root = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            std::fs::create_dir(root.path().join(name)).unwrap();
        }
        let root = File::open(root.path()).unwrap();
        let mut seen = 0;
        let found = visit(root.as_fd(), &mut |_| {
            seen += 1;
            Ok(if seen == 2 {
                ControlFlow::Break(seen)
            } else {
                ControlFlow::Continue(())
            })
        });
        assert_eq!((found.unwrap(), seen), (ControlFlow::Break(2), 2));
    }
}

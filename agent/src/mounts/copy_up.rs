//! `tmpcopyup`: a tmpfs that begins with what the image has at its place.
//!
//! Goes through descriptors only, and follows no link: the image is hostile.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{
    FchmodatFlags, FileStat, Mode, SFlag, fchmod, fchmodat, fstat, fstatat, mkdirat, mknodat,
};
use nix::unistd::{Gid, Uid, fchown, fchownat, symlinkat};

/// Levels of directories, at most: each takes descriptors and stack.
const MAX_DEPTH: u32 = 128;

/// Copies what is in one directory into another, with owners and modes.
pub fn copy_directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    copy_entries(from, to, MAX_DEPTH)
}

fn copy_entries(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: u32) -> io::Result<()> {
    let depth = depth.checked_sub(1).ok_or(Errno::ELOOP)?;
    let mut list = Dir::openat(
        from,
        ".",
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    for entry in list.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = fstatat(from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let kind = SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT);
        let no_follow = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match kind {
            SFlag::S_IFDIR => {
                mkdirat(to, name, Mode::S_IRWXU)?;
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | no_follow;
                let below = openat(from, name, flags, Mode::empty())?;
                let copy = openat(to, name, flags, Mode::empty())?;
                copy_entries(below.as_fd(), copy.as_fd(), depth)?;
                own(copy.as_fd(), &stat)?;
            }
            SFlag::S_IFREG => {
                let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | no_follow;
                let mut source = File::from(openat(from, name, flags, Mode::empty())?);
                let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | no_follow;
                let mut copy = File::from(openat(to, name, flags, Mode::S_IRWXU)?);
                // What was looked at and what was opened may be two things.
                let stat = fstat(&source)?;
                if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
                    return Err(Errno::EINVAL.into());
                }
                io::copy(&mut source, &mut copy)?;
                own(copy.as_fd(), &stat)?;
            }
            SFlag::S_IFLNK => {
                symlinkat(readlinkat(from, name)?.as_os_str(), to, name)?;
                own_name(to, name, &stat)?;
            }
            // Nobody listens at a copy of a socket.
            SFlag::S_IFSOCK => {}
            kind => {
                mknodat(to, name, kind, Mode::S_IRWXU, stat.st_rdev)?;
                own_name(to, name, &stat)?;
                fchmodat(to, name, mode(&stat), FchmodatFlags::FollowSymlink)?;
            }
        }
    }
    Ok(())
}

fn mode(stat: &FileStat) -> Mode {
    Mode::from_bits_truncate(stat.st_mode & 0o7777)
}

/// The owner first: a change of it takes set-user-id bits away.
pub fn own(copy: BorrowedFd<'_>, stat: &FileStat) -> nix::Result<()> {
    let owner = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    fchown(copy, Some(owner.0), Some(owner.1))?;
    fchmod(copy, mode(stat))
}

fn own_name(dir: BorrowedFd<'_>, name: &std::ffi::CStr, stat: &FileStat) -> nix::Result<()> {
    let owner = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    fchownat(
        dir,
        name,
        Some(owner.0),
        Some(owner.1),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    #[test]
    fn files_directories_and_links_are_copied_as_they_are() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(from.path().join("a/b")).unwrap();
        fs::write(from.path().join("a/b/file"), "text").unwrap();
        fs::set_permissions(
            from.path().join("a/b/file"),
            fs::Permissions::from_mode(0o4711),
        )
        .unwrap();
        fs::set_permissions(from.path().join("a"), fs::Permissions::from_mode(0o1777)).unwrap();
        symlink("/etc/passwd", from.path().join("link")).unwrap();
        nix::unistd::mkfifo(&from.path().join("fifo"), Mode::S_IRUSR).unwrap();
        let open = |dir: &tempfile::TempDir| File::open(dir.path()).unwrap();
        copy_directory(open(&from).as_fd(), open(&to).as_fd()).unwrap();
        let at = |name: &str| to.path().join(name);
        assert_eq!(fs::read_to_string(at("a/b/file")).unwrap(), "text");
        assert_eq!(
            fs::metadata(at("a/b/file")).unwrap().mode() & 0o7777,
            0o4711
        );
        assert_eq!(fs::metadata(at("a")).unwrap().mode() & 0o7777, 0o1777);
        assert_eq!(
            fs::read_link(at("link")).unwrap().to_str(),
            Some("/etc/passwd")
        );
        assert_eq!(
            fs::metadata(at("fifo")).unwrap().mode(),
            libc::S_IFIFO | 0o400
        );
    }

    #[test]
    fn a_tree_without_bottom_is_an_error() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let deep = "d/".repeat(MAX_DEPTH as usize + 1);
        fs::create_dir_all(from.path().join(deep)).unwrap();
        let open = |dir: &tempfile::TempDir| File::open(dir.path()).unwrap();
        let error = copy_directory(open(&from).as_fd(), open(&to).as_fd()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }
}

//! The host's mounts that the root filesystem and the sources of bind mounts are on, and what is mounted below the source of a
//! recursive one. In the share all are part of one tree, as the guest sees it: it is told the attributes, and what is to be a
//! mount in the container too takes a bind mount of its own there.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Attributes of a mount that a bind mount of it inherits.
const INHERITED: [&str; 8] = [
    "ro",
    "nosuid",
    "nodev",
    "noexec",
    "noatime",
    "nodiratime",
    "relatime",
    "nosymfollow",
];

/// What the container's mounts inherit from the host's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inherited {
    /// Attributes of the root's mount, as options of a bind mount.
    pub root: Vec<String>,
    /// The mounts that bind mounts are of.
    pub binds: Vec<MountBelow>,
}

/// The mount that a bind mount's source is on, or one below that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountBelow {
    /// Index of the bind mount in the spec's `mounts`.
    pub mount: usize,
    /// Where it is, relative to that one's source; empty if the source is on it.
    pub path: PathBuf,
    /// Its attributes, as options of a bind mount.
    pub options: Vec<String>,
}

/// The mounts of this thread's namespace, in the order in which they were made.
#[derive(Debug)]
pub struct Mounts(Vec<Listed>);

/// A line of mountinfo.
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    id: u64,
    place: PathBuf,
    /// Its attributes, as options of a bind mount.
    options: Vec<String>,
}

impl Mounts {
    /// Those of this moment.
    pub fn now() -> io::Result<Self> {
        let mountinfo = fs::read("/proc/thread-self/mountinfo")?;
        let lines = mountinfo.split(|byte| *byte == b'\n');
        Ok(Self(lines.filter_map(parse).collect()))
    }

    /// Attributes of the mount that `source` is on, as options of a bind mount.
    pub fn options_of(&self, source: &Path) -> io::Result<Vec<String>> {
        // By its number: what has the longest place that leads to `source` may be hidden by another.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(source)?;
        let info = format!("/proc/thread-self/fdinfo/{}", file.as_raw_fd());
        let info = fs::read_to_string(info)?;
        let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        let id = id.and_then(|id| id.trim().parse().ok());
        let found = self.0.iter().find(|mount| Some(mount.id) == id);
        let found = found.ok_or_else(|| io::Error::other("it is on a mount that is not listed"))?;
        Ok(found.options.clone())
    }

    /// The mounts below `source`, which is that of the spec's mount number `mount`.
    pub fn below(&self, mount: usize, source: &Path) -> io::Result<Vec<MountBelow>> {
        let source = fs::canonicalize(source)?;
        let inside = self.0.iter().filter_map(|listed| {
            let path = listed.place.strip_prefix(&source).ok()?.to_path_buf();
            (!path.as_os_str().is_empty()).then(|| MountBelow {
                mount,
                path,
                options: listed.options.clone(),
            })
        });
        Ok(inside.collect())
    }
}

/// Number, mount point and inherited attributes of a line of mountinfo (proc(5)).
fn parse(line: &[u8]) -> Option<Listed> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let mut fields = fields.skip(3);
    let place = PathBuf::from(OsString::from_vec(unescape(fields.next()?)));
    let options = std::str::from_utf8(fields.next()?).ok()?;
    let mut inherited: Vec<_> = options
        .split(',')
        .filter(|option| INHERITED.contains(option))
        .map(str::to_owned)
        .collect();
    if !inherited
        .iter()
        .any(|option| option.ends_with("elatime") || option == "noatime")
    {
        inherited.push("strictatime".to_owned());
    }
    Some(Listed {
        id,
        place,
        options: inherited,
    })
}

/// Undoes what the kernel does to spaces, tabs, line feeds and backslashes: three octal digits behind a backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let code = tail.get(..3).filter(|_| *first == b'\\');
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                plain.push(*first);
                rest = tail;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::mount::MsFlags;

    #[test]
    fn a_line_has_a_place_and_attributes() {
        let line = br"36 35 98:0 /mnt1 /mnt/a\040b\134c rw,nosuid,noatime master:1 - ext4 /dev/root rw,errors=continue";
        let listed = parse(line).unwrap();
        assert_eq!(listed.id, 36);
        assert_eq!(listed.place, Path::new(r"/mnt/a b\c"));
        assert_eq!(listed.options, ["nosuid", "noatime"]);
        let listed = parse(b"36 35 98:0 / /x ro - tmpfs tmpfs rw").unwrap();
        assert_eq!(listed.options, ["ro", "strictatime"]);
        let listed = parse(b"36 35 98:0 / /a\xffb rw - tmpfs tmpfs rw").unwrap();
        assert_eq!(listed.place.as_os_str().as_encoded_bytes(), b"/a\xffb");
        assert_eq!(parse(b""), None);
    }

    #[test]
    fn what_is_no_escape_stays() {
        assert_eq!(unescape(br"a\9\04"), br"a\9\04");
    }

    #[test]
    fn the_mounts_below_a_directory_are_found() {
        let mounts = Mounts::now().unwrap();
        let below = mounts.below(3, Path::new("/")).unwrap();
        let proc = below.iter().find(|below| below.path == Path::new("proc"));
        assert_eq!(proc.unwrap().mount, 3);
        assert!(below.iter().all(|below| below.path.is_relative()));
        let none = tempfile::tempdir().unwrap();
        assert_eq!(mounts.below(0, none.path()).unwrap(), []);
    }

    #[test]
    fn a_path_has_the_attributes_of_the_mount_it_is_on() {
        assert!(nix::unistd::geteuid().is_root(), "the test needs root");
        let dir = tempfile::tempdir().unwrap();
        let test = || {
            crate::share::private_mount_namespace().unwrap();
            let tmpfs = |place: &Path, flags| {
                fs::create_dir(place).unwrap();
                let none = None::<&str>;
                nix::mount::mount(Some("x"), place, Some("tmpfs"), flags, none).unwrap();
            };
            let outer = dir.path().join("outer");
            tmpfs(&outer, MsFlags::MS_NOSUID | MsFlags::MS_NODEV);
            fs::write(outer.join("file"), "").unwrap();
            tmpfs(&outer.join("inner"), MsFlags::MS_NOEXEC);
            std::os::unix::fs::symlink("inner", outer.join("link")).unwrap();
            let mounts = Mounts::now().unwrap();
            let outers = ["nosuid", "nodev", "relatime"];
            for (path, options) in [
                ("", &outers[..]),
                ("file", &outers),
                ("inner", &["noexec", "relatime"]),
                ("link", &["noexec", "relatime"]),
            ] {
                let found = mounts.options_of(&outer.join(path)).unwrap();
                assert_eq!(found, options, "{path:?}");
            }
        };
        std::thread::scope(|scope| {
            let thread = scope.spawn(test);
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        });
    }
}

//! What is mounted below the source of a recursive bind mount. In the share it is part of one tree, as the guest sees it; that the
//! container finds a mount there too, with attributes of its own, takes a bind mount of its own in the guest.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
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

/// A mount below another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountBelow {
    /// Index of the bind mount in the spec's `mounts`.
    pub mount: usize,
    /// Where it is, relative to that one's source.
    pub path: PathBuf,
    /// Its attributes, as options of a bind mount.
    pub options: Vec<String>,
}

/// The mounts of this process's namespace: where each is, and its attributes, in the order in which they were made.
#[derive(Debug)]
pub struct Mounts(Vec<(PathBuf, Vec<String>)>);

impl Mounts {
    /// Those of this moment.
    pub fn now() -> io::Result<Self> {
        let mountinfo = fs::read("/proc/self/mountinfo")?;
        let lines = mountinfo.split(|byte| *byte == b'\n');
        Ok(Self(lines.filter_map(parse).collect()))
    }

    /// The mounts below `source`, which is that of the spec's mount number `mount`.
    pub fn below(&self, mount: usize, source: &Path) -> io::Result<Vec<MountBelow>> {
        let source = fs::canonicalize(source)?;
        let inside = self.0.iter().filter_map(|(place, options)| {
            let path = place.strip_prefix(&source).ok()?.to_path_buf();
            (!path.as_os_str().is_empty()).then(|| MountBelow {
                mount,
                path,
                options: options.clone(),
            })
        });
        Ok(inside.collect())
    }
}

/// Mount point and inherited attributes of a line of mountinfo (proc(5)).
fn parse(line: &[u8]) -> Option<(PathBuf, Vec<String>)> {
    let mut fields = line.split(|byte| *byte == b' ').skip(4);
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
    Some((place, inherited))
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

    #[test]
    fn a_line_has_a_place_and_attributes() {
        let line = br"36 35 98:0 /mnt1 /mnt/a\040b\134c rw,nosuid,noatime master:1 - ext4 /dev/root rw,errors=continue";
        let (place, options) = parse(line).unwrap();
        assert_eq!(place, Path::new(r"/mnt/a b\c"));
        assert_eq!(options, ["nosuid", "noatime"]);
        let (_, options) = parse(b"36 35 98:0 / /x ro - tmpfs tmpfs rw").unwrap();
        assert_eq!(options, ["ro", "strictatime"]);
        let (place, _) = parse(b"36 35 98:0 / /a\xffb rw - tmpfs tmpfs rw").unwrap();
        assert_eq!(place.as_os_str().as_encoded_bytes(), b"/a\xffb");
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
}

//! The options of a mount in the OCI spec (config.md, "Linux mount options"), told apart: attributes of the mount,
//! propagation, what is meant for the runtime, and data for the file system.

use crate::error::{Error, Result};
use crate::sys::attr;

/// A mount's options, parsed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// `bind` or `rbind`.
    pub bind: bool,
    /// `rbind`: with the mounts below the source.
    pub bind_recursive: bool,
    /// `remount`: change what is mounted there.
    pub remount: bool,
    /// `tmpcopyup`: a tmpfs that begins with what it covers.
    pub copy_up: bool,
    /// `idmap` (false) or `ridmap` (true).
    pub map_ids: Option<bool>,
    /// Attributes to set on the mount itself.
    pub set: u64,
    /// Attributes to clear first.
    pub clear: u64,
    /// Attributes to set on the mount and everything below it (`rro` and its like).
    pub set_recursive: u64,
    /// Attributes to clear first, in the same way.
    pub clear_recursive: u64,
    /// Propagation types, in the order given, with whether they hold for everything below too.
    pub propagation: Vec<(libc::c_ulong, bool)>,
    /// Parameters of the file system.
    pub data: Vec<(String, Option<String>)>,
}

/// Name, attributes to set, attributes to clear first.
const ATTRIBUTES: &[(&str, u64, u64)] = &[
    ("ro", attr::RDONLY, 0),
    ("rw", 0, attr::RDONLY),
    ("nosuid", attr::NOSUID, 0),
    ("suid", 0, attr::NOSUID),
    ("nodev", attr::NODEV, 0),
    ("dev", 0, attr::NODEV),
    ("noexec", attr::NOEXEC, 0),
    ("exec", 0, attr::NOEXEC),
    ("noatime", attr::NOATIME, attr::ATIME),
    ("atime", 0, attr::ATIME),
    ("relatime", 0, attr::ATIME),
    ("norelatime", 0, attr::ATIME),
    ("strictatime", attr::STRICTATIME, attr::ATIME),
    ("nostrictatime", 0, attr::ATIME),
    ("nodiratime", attr::NODIRATIME, 0),
    ("diratime", 0, attr::NODIRATIME),
    ("nosymfollow", attr::NOSYMFOLLOW, 0),
    ("symfollow", 0, attr::NOSYMFOLLOW),
];

const PROPAGATION: &[(&str, libc::c_ulong)] = &[
    ("private", libc::MS_PRIVATE),
    ("shared", libc::MS_SHARED),
    ("slave", libc::MS_SLAVE),
    ("unbindable", libc::MS_UNBINDABLE),
];

/// Options that mean something to `mount(8)` or to the old mount call, and nothing here: the default, or flags that
/// no file system of the guest's kernel looks at.
const WITHOUT_EFFECT: &[&str] = &[
    "defaults",
    "acl",
    "noacl",
    "iversion",
    "noiversion",
    "silent",
    "loud",
    "nofail",
    "_netdev",
];

impl MountOptions {
    /// Parses the options of a mount.
    pub fn parse(options: &[String]) -> Self {
        let mut parsed = Self::default();
        for option in options {
            parsed.add(option);
        }
        parsed
    }

    /// Adds what a bind mount keeps of the mount that it is of. As with runc's remount, options that set attributes take the place of
    /// the source's, but for those of access times as long as none is named, and for read-only, which the host holds to. In a user
    /// namespace all are `locked`, and stay.
    pub fn inherit(&mut self, source: &Self, locked: bool) {
        const TIMES: u64 = attr::ATIME | attr::NODIRATIME;
        let mut kept = attr::RDONLY | TIMES;
        if self.set == 0 || locked {
            kept = !0;
        }
        if (self.set | self.clear) & TIMES != 0 {
            kept &= !TIMES;
        }
        let (set, clear) = (source.set & kept, source.clear & kept);
        self.clear = (self.clear & !set) | clear;
        self.set |= set;
    }

    fn add(&mut self, option: &str) {
        if let Some((set, clear)) = attribute(option) {
            let known = set | clear;
            self.set = (self.set & !known) | set;
            self.clear = (self.clear & !known) | clear;
            return;
        }
        if let Some((set, clear)) = option.strip_prefix('r').and_then(attribute) {
            let known = set | clear;
            self.set_recursive = (self.set_recursive & !known) | set;
            self.clear_recursive = (self.clear_recursive & !known) | clear;
            return;
        }
        if let Some(kind) = propagation(option) {
            self.propagation.push((kind, false));
            return;
        }
        if let Some(kind) = option.strip_prefix('r').and_then(propagation) {
            self.propagation.push((kind, true));
            return;
        }
        match option {
            "bind" => self.bind = true,
            "rbind" => {
                self.bind = true;
                self.bind_recursive = true;
            }
            "remount" => self.remount = true,
            "tmpcopyup" => self.copy_up = true,
            "idmap" => self.map_ids = Some(false),
            "ridmap" => self.map_ids = Some(true),
            _ if WITHOUT_EFFECT.contains(&option) => {}
            "" => {}
            _ => self.data.extend(parameters(option).map(
                |parameter| match parameter.split_once('=') {
                    Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                    None => (parameter.to_owned(), None),
                },
            )),
        }
    }
}

/// The parameters that one option holds. As `mount(2)`, to which runc gives all of them in one text, tells them apart: a comma that is
/// escaped (overlayfs) or in a list of numbers (tmpfs's `mpol`) parts nothing.
fn parameters(option: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(option);
    std::iter::from_fn(move || {
        let text = rest?;
        let bytes = text.as_bytes();
        let parts = |&(at, _): &(usize, &str)| {
            let escaped = at > 0 && bytes.get(at - 1) == Some(&b'\\');
            !escaped && !bytes.get(at + 1).is_some_and(u8::is_ascii_digit)
        };
        match text.match_indices(',').find(parts) {
            Some((at, _)) => {
                rest = text.get(at + 1..);
                text.get(..at)
            }
            None => {
                rest = None;
                Some(text)
            }
        }
    })
    .filter(|parameter| !parameter.is_empty())
}

fn attribute(option: &str) -> Option<(u64, u64)> {
    ATTRIBUTES
        .iter()
        .find(|(name, ..)| *name == option)
        .map(|&(_, set, clear)| (set, clear))
}

fn propagation(option: &str) -> Option<libc::c_ulong> {
    PROPAGATION
        .iter()
        .find(|(name, _)| *name == option)
        .map(|&(_, kind)| kind)
}

/// `linux.rootfsPropagation`: the type, and whether it holds for everything below the root too.
pub fn rootfs_propagation(value: &str) -> Result<(libc::c_ulong, bool)> {
    propagation(value)
        .map(|kind| (kind, false))
        .or_else(|| value.strip_prefix('r').and_then(propagation).map(|kind| (kind, true)))
        .ok_or_else(|| {
            Error::spec(
                "linux.rootfsPropagation",
                format!("{value:?} is none of private, shared, slave, unbindable and their recursive forms"),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> MountOptions {
        let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        MountOptions::parse(&options)
    }

    #[test]
    fn the_mounts_that_runc_spec_writes_are_told_apart() {
        let dev = parse(&["nosuid", "strictatime", "mode=755", "size=65536k"]);
        assert_eq!(dev.set, attr::NOSUID | attr::STRICTATIME);
        assert_eq!(
            dev.data,
            [
                ("mode".to_owned(), Some("755".to_owned())),
                ("size".to_owned(), Some("65536k".to_owned()))
            ]
        );
        let joined = parse(&["size=1m,mode=700,,mpol=bind:0,2", "lowerdir=/a\\,b:/c"]);
        let names: Vec<_> = joined
            .data
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_deref().unwrap()))
            .collect();
        assert_eq!(
            names,
            [
                ("size", "1m"),
                ("mode", "700"),
                ("mpol", "bind:0,2"),
                ("lowerdir", "/a\\,b:/c")
            ]
        );
        let pts = parse(&[
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
            "gid=5",
        ]);
        assert_eq!(pts.data.len(), 4);
        assert_eq!(pts.data.first(), Some(&("newinstance".to_owned(), None)));
        let sys = parse(&["nosuid", "noexec", "nodev", "ro"]);
        assert_eq!(
            sys.set,
            attr::NOSUID | attr::NOEXEC | attr::NODEV | attr::RDONLY
        );
        assert!(sys.data.is_empty());
    }

    #[test]
    fn the_last_of_two_opposite_options_counts() {
        assert_eq!(parse(&["ro", "rw"]).set, 0);
        assert_eq!(parse(&["ro", "rw"]).clear, attr::RDONLY);
        let ro = parse(&["rw", "ro"]);
        assert_eq!((ro.set, ro.clear), (attr::RDONLY, 0));
        let atime = parse(&["noatime", "strictatime"]);
        assert_eq!(
            (atime.set, atime.clear),
            (
                attr::STRICTATIME,
                attr::ATIME & !attr::STRICTATIME | attr::STRICTATIME
            )
        );
    }

    #[test]
    fn recursive_options_are_kept_apart_from_plain_ones() {
        let options = parse(&["rbind", "rro", "nosuid", "rslave", "private"]);
        assert!(options.bind && options.bind_recursive);
        assert_eq!(options.set_recursive, attr::RDONLY);
        assert_eq!(options.set, attr::NOSUID);
        assert_eq!(
            options.propagation,
            [(libc::MS_SLAVE, true), (libc::MS_PRIVATE, false)]
        );
    }

    #[test]
    fn options_that_set_attributes_take_the_place_of_the_sources() {
        let source = ["nosuid", "nodev", "noexec", "noatime"];
        for (own, source, locked, expected) in [
            (&["rbind", "rprivate"][..], &source[..], false, &source[..]),
            (&["exec", "rw"], &["noexec", "ro"], false, &["noexec", "ro"]),
            (&["rw"], &source, false, &[&source[..], &["rw"]].concat()),
            (&["ro"], &source, false, &["ro", "noatime"]),
            (&["nodev"], &["ro", "noexec"], false, &["nodev", "ro"]),
            (&["strictatime"], &source, false, &["strictatime"]),
            (&["ro"], &source, true, &[&source[..], &["ro"]].concat()),
            (&["rexec"], &["noexec"], false, &["rexec", "noexec"]),
            (&["ro"], &["relatime"], false, &["ro", "relatime"]),
        ] {
            let mut options = parse(own);
            options.inherit(&parse(source), locked);
            let expected = parse(expected);
            let attributes = |of: &MountOptions| (of.set, of.clear, of.clear_recursive);
            assert_eq!(
                attributes(&options),
                attributes(&expected),
                "{own:?} of {source:?}"
            );
        }
    }

    #[test]
    fn names_that_begin_with_r_are_not_taken_for_recursive_forms() {
        let options = parse(&["relatime", "rw", "ro"]);
        assert_eq!((options.set_recursive, options.clear_recursive), (0, 0));
        assert_eq!(parse(&["rrelatime"]).clear_recursive, attr::ATIME);
        assert_eq!(parse(&["rrw"]).clear_recursive, attr::RDONLY);
    }

    #[test]
    fn unknown_options_are_data_for_the_file_system() {
        let options = parse(&["lowerdir=/a:/b", "index=off", "sync", "x"]);
        assert_eq!(options.data.len(), 4);
    }

    #[test]
    fn options_for_the_runtime_are_no_data() {
        let options = parse(&["remount", "ridmap", "tmpcopyup"]);
        assert!(options.remount && options.copy_up && options.data.is_empty());
        assert_eq!(options.map_ids, Some(true));
        assert_eq!(parse(&["idmap"]).map_ids, Some(false));
    }

    #[test]
    fn rootfs_propagation_takes_the_types_of_the_spec_only() {
        assert_eq!(
            rootfs_propagation("rslave").unwrap(),
            (libc::MS_SLAVE, true)
        );
        assert_eq!(
            rootfs_propagation("shared").unwrap(),
            (libc::MS_SHARED, false)
        );
        assert!(rootfs_propagation("rro").is_err());
        assert!(rootfs_propagation("").is_err());
    }
}

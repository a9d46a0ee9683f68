//! The leak checker: everything a sandbox could leave on the host, compared before and after a test.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::container::{reap, reap_all};
use crate::processes;

/// What is on the host at one moment, each thing as one line, and how often it is there: one mount can hide an equal one.
#[derive(Debug, PartialEq, Eq)]
pub struct Host(BTreeMap<String, usize>);

impl Host {
    /// Looks at processes of ours, mounts, cgroups, network devices, unix sockets, and the files below the run-time folders.
    pub fn now() -> Self {
        let mut things = Things::new();
        processes(&mut things);
        lines("/proc/self/mountinfo", "mount", &mut things, |line| {
            // The first two fields are ids that change with every mount; what matters is what is mounted where.
            line.splitn(5, ' ').last().map(str::to_owned)
        });
        lines("/proc/net/dev", "network device", &mut things, |line| {
            line.split_once(':').map(|(name, _)| name.trim().to_owned())
        });
        lines("/proc/net/unix", "unix socket", &mut things, |line| {
            line.split_whitespace().nth(7).map(str::to_owned)
        });
        folders(Path::new("/sys/fs/cgroup"), "cgroup", &mut things);
        for root in ["/run/bulkhead", "/var/run/bulkhead", "/var/lib/bulkhead"] {
            files(Path::new(root), &mut things);
        }
        Self(things)
    }

    /// What is on the host now, and is to be there at the end of the test whose first value this is.
    ///
    /// # Panics
    /// When orphans can't be had.
    pub fn unchanged() -> Unchanged {
        // Whatever loses its parent ends up as a child of the test, and not as somebody else's zombie.
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        Unchanged(Self::now())
    }

    /// Checks that nothing has come since.
    ///
    /// # Panics
    /// When something has, naming it.
    #[track_caller]
    pub fn assert_nothing_new(&self) {
        // What a test's process has inherited from killed ones and has ended is its own to take away.
        reap();
        let now = Self::now();
        let before = |thing| self.0.get(thing).copied().unwrap_or(0);
        let new: Vec<_> = now
            .0
            .iter()
            .filter(|(thing, count)| **count > before(*thing))
            .collect();
        assert!(new.is_empty(), "left on the host: {new:#?}");
    }
}

/// Checks when it goes that nothing has come to the host since it was made, once what is about to end has ended.
#[derive(Debug)]
pub struct Unchanged(Host);

impl Drop for Unchanged {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        processes::wait_for_end(&processes::of_the_build_under_test());
        reap_all();
        self.0.assert_nothing_new();
    }
}

type Things = BTreeMap<String, usize>;

fn add(things: &mut Things, thing: String) {
    *things.entry(thing).or_default() += 1;
}

fn processes(things: &mut Things) {
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name
            .to_str()
            .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        else {
            continue;
        };
        // A process that ends while we look is no leak. Kernel threads have no executable.
        let Ok(comm) = fs::read_to_string(entry.path().join("comm")) else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let zombie = stat
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('Z'));
        if zombie || fs::read_link(entry.path().join("exe")).is_ok() {
            let state = if zombie { " (zombie)" } else { "" };
            add(things, format!("process {pid} {}{state}", comm.trim()));
        }
    }
}

fn lines(path: &str, kind: &str, things: &mut Things, pick: impl Fn(&str) -> Option<String>) {
    let text = fs::read_to_string(path).unwrap_or_default();
    for what in text.lines().filter_map(pick) {
        add(things, format!("{kind} {what}"));
    }
}

fn folders(path: &Path, kind: &str, things: &mut Things) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            add(things, format!("{kind} {}", entry.path().display()));
            folders(&entry.path(), kind, things);
        }
    }
}

fn files(path: &Path, things: &mut Things) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        add(things, format!("file {}", entry.path().display()));
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&entry.path(), things);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    #[test]
    fn every_end_to_end_test_looks_for_what_it_has_left() {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
        let mut count = 0;
        for entry in fs::read_dir(tests).unwrap() {
            let text = fs::read_to_string(entry.unwrap().path()).unwrap();
            for test in text.split("#[test]").skip(1) {
                let (test, _) = test.split_once("\n}\n").unwrap();
                let looks =
                    test.contains("Host::unchanged()") || test.contains("assert_nothing_new()");
                assert!(looks, "{}", test.trim().lines().next().unwrap());
                count += 1;
            }
        }
        assert!(count > 100, "{count}");
    }
}

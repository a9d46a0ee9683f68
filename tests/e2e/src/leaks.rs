//! The leak checker: everything a sandbox could leave on the host, compared before and after a test.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::container::{reap, reap_all};
use crate::processes;

/// How a thing's line begins that may be a file of the test's own as long as the test runs.
const TEMPORARY: &str = "temporary file";

/// What was on the host before a test. It goes at the test's end, where it waits for what is about to end, and checks that nothing else
/// has come. Every test has one, before all else.
#[derive(Debug)]
#[must_use = "what is dropped at once has seen nothing"]
pub struct Host(Things);

impl Host {
    /// What is on the host now, and is to be all that is there when this goes.
    ///
    /// # Panics
    /// When orphans can't be had.
    pub fn unchanged() -> Self {
        // Whatever loses its parent ends up as a child of the test, and not as somebody else's zombie.
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        Self(look())
    }

    /// Checks between the steps of a test that nothing has come but files of the test's own, without waiting for anything.
    ///
    /// # Panics
    /// When something has, naming it and the step.
    #[track_caller]
    pub fn at_once(&self, step: &str) {
        // What a test's process has inherited from killed ones and has ended is its own to take away.
        reap();
        let mut new = self.new_things();
        new.retain(|thing| !thing.starts_with(TEMPORARY));
        assert!(new.is_empty(), "left on the host by {step:?}: {new:#?}");
    }

    fn new_things(&self) -> Vec<String> {
        look()
            .into_iter()
            .filter(|(thing, count)| *count > self.0.get(thing).copied().unwrap_or(0))
            .map(|(thing, _)| thing)
            .collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        processes::wait_for_end(&processes::of_the_build_under_test());
        reap_all();
        let new = self.new_things();
        assert!(new.is_empty(), "left on the host: {new:#?}");
    }
}

/// Each thing as one line, and how often it is there: one mount can hide an equal one.
type Things = BTreeMap<String, usize>;

/// Looks at processes, mounts, cgroups, network devices, unix sockets, the files below the run-time folders, temporary files, and
/// templates that were not finished.
fn look() -> Things {
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
    entries(&std::env::temp_dir(), TEMPORARY, &mut things, |_| true);
    // A finished one is there for the next guest.
    entries(
        Path::new("/var/cache/bulkhead"),
        "unfinished template",
        &mut things,
        |name| name.ends_with(".unfinished"),
    );
    things
}

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

fn entries(path: &Path, kind: &str, things: &mut Things, pick: impl Fn(&str) -> bool) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if pick(&entry.file_name().to_string_lossy()) {
            add(things, format!("{kind} {}", entry.path().display()));
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

    /// Whether a test, from its `fn` on, looks at the host before all else and has what it saw until the end: `let _ = ...` would not.
    fn looks(test: &str) -> bool {
        let body = test.split_once("{\n").map_or("", |(_, body)| body);
        let first = body.trim_start().lines().next().unwrap_or_default();
        ["let _unchanged =", "let unchanged ="]
            .iter()
            .any(|name| first == format!("{name} Host::unchanged();"))
    }

    #[test]
    fn every_end_to_end_test_looks_for_what_it_has_left() {
        let test = |line: &str| format!("\nfn a_test() {{\n    {line}\n    run();\n");
        assert!(looks(&test("let _unchanged = Host::unchanged();")));
        for line in [
            "let _ = Host::unchanged();",
            "Host::unchanged();",
            "// let _unchanged = Host::unchanged();",
            "run(); let _unchanged = Host::unchanged();",
        ] {
            assert!(!looks(&test(line)), "{line}");
        }

        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
        let mut count = 0;
        for entry in fs::read_dir(tests).unwrap() {
            let text = fs::read_to_string(entry.unwrap().path()).unwrap();
            for test in text.split("#[test]").skip(1) {
                let (test, _) = test.split_once("\n}\n").unwrap();
                assert!(looks(test), "{}", test.trim().lines().next().unwrap());
                count += 1;
            }
        }
        assert!(count > 100, "{count}");
    }
}

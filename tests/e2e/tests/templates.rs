//! Guests made from a template, as their users see them.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{Ended, bulkhead, finish, fresh_id};
use bulkhead_e2e::leaks::Host;
use serde_json::Value;
use tempfile::TempDir;

/// A folder of templates, and a configuration that names it.
struct Templates(TempDir);

impl Templates {
    fn new() -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        let text = format!(
            "template_directory = \"{}\"\nmemory_mib = 128\n",
            this.folder().display()
        );
        fs::write(this.0.path().join("config.toml"), text).unwrap();
        this
    }

    fn folder(&self) -> PathBuf {
        self.0.path().join("templates")
    }

    fn files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.folder()).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// Runs a bundle, and tells whether its guest was made from a template.
    fn run(&self, bundle: &Bundle, flags: &[&str]) -> (Ended, bool) {
        let timeline = self.0.path().join("timeline.json");
        let mut command = Command::new(bulkhead());
        command
            .arg("--config")
            .arg(self.0.path().join("config.toml"))
            .args(flags)
            .args(["run", "--timeline"])
            .arg(&timeline)
            .arg("--bundle")
            .arg(bundle.path())
            .arg(fresh_id());
        let ended = finish(&mut command);
        (ended, steps(&timeline).contains(&"template mapped".into()))
    }
}

fn steps(timeline: &Path) -> Vec<String> {
    let record: Value = serde_json::from_slice(&fs::read(timeline).unwrap()).unwrap();
    let entries = record["entries"].as_array().unwrap();
    entries
        .iter()
        .map(|entry| entry["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn guests_of_one_template_have_their_own_files_clock_and_random_numbers() {
    let _unchanged = Host::unchanged();
    let templates = Templates::new();
    let script = "cat /name; cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; \
                  head -c 16 /dev/urandom | md5sum; busybox date +%s; touch /made";
    let mut seen = Vec::new();
    for number in 0..3 {
        let bundle = Bundle::shell(script);
        bundle.write();
        fs::write(bundle.in_root("/name"), format!("container {number}\n")).unwrap();
        let (ended, from_template) = templates.run(&bundle, &[]);
        let ended = ended.expect_code(0);
        assert_eq!(from_template, number > 0);
        assert_eq!(ended.stderr, "");
        let mut lines: Vec<_> = ended.stdout.lines().map(str::to_owned).collect();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let clock: u64 = lines.pop().unwrap().parse().unwrap();
        assert!(now.as_secs().abs_diff(clock) < 60, "{clock}");
        assert_eq!(lines.remove(0), format!("container {number}"));
        assert_eq!(lines.len(), 3);
        assert!(bundle.in_root("/made").exists());
        seen.extend(lines);
        assert_eq!(templates.files().len(), 1);
    }
    let total = seen.len();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), total, "guests draw the same numbers: {seen:?}");
}

#[test]
fn a_damaged_template_is_replaced_and_nobody_notices() {
    let _unchanged = Host::unchanged();
    let templates = Templates::new();
    let bundle = Bundle::busybox(&["true"]);
    bundle.write();
    let damages: [fn(&Path); 3] = [
        |path| File::create(path).map(drop).unwrap(),
        |path| fs::write(path, vec![b'x'; 200 << 20]).unwrap(),
        // The guest's memory, with the rest as it was: what KVM then runs is nothing but zeros.
        |path| {
            let bytes = fs::read(path).unwrap();
            let (memory, state) = bytes.split_at(128 << 20);
            fs::write(path, [&vec![0; memory.len()], state].concat()).unwrap();
        },
    ];
    for (n, damage) in damages.into_iter().enumerate() {
        let (ended, from_template) = templates.run(&bundle, &[]);
        ended.expect_code(0);
        assert_eq!(from_template, n > 0);
        let files = templates.files();
        assert_eq!(files.len(), 1);
        damage(&files[0]);
        let (ended, _) = templates.run(&bundle, &[]);
        if n < 2 {
            assert_eq!(ended.expect_code(0).stderr, "");
        } else {
            // Nothing can tell before it runs; the next one boots.
            assert_eq!(ended.code, 1, "{ended:?}");
            assert!(templates.files().is_empty());
        }
    }
}

/// A setting of the host that is as it was when this goes.
struct Setting(&'static str, String);

impl Setting {
    fn set(path: &'static str, value: &str) -> Self {
        let this = Self(path, fs::read_to_string(path).unwrap());
        fs::write(path, value).unwrap();
        this
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        fs::write(self.0, &self.1).unwrap();
    }
}

#[test]
fn a_template_of_other_settings_of_the_host_is_replaced() {
    let _unchanged = Host::unchanged();
    let templates = Templates::new();
    let bundle = Bundle::shell("cat /proc/sys/vm/max_map_count /proc/sys/fs/protected_regular");
    bundle.write();
    let _regular = Setting::set("/proc/sys/fs/protected_regular", "2");
    for (mappings, expected) in [("77777", false), ("77777", true), ("88888", false)] {
        let _mappings = Setting::set("/proc/sys/vm/max_map_count", mappings);
        let (ended, from_template) = templates.run(&bundle, &[]);
        assert_eq!(ended.expect_code(0).stdout, format!("{mappings}\n2\n"));
        assert_eq!(from_template, expected, "{mappings}");
        assert_eq!(templates.files().len(), 1);
    }
}

#[test]
fn debugging_and_kernel_arguments_of_ones_own_boot_and_leave_no_template() {
    let _unchanged = Host::unchanged();
    let templates = Templates::new();
    let mut bundle = Bundle::busybox(&["true"]);
    bundle.write();
    let (ended, from_template) = templates.run(&bundle, &["--debug"]);
    ended.expect_code(0);
    assert!(!from_template && !templates.folder().exists());
    bundle.config["annotations"] =
        serde_json::json!({"io.bulkhead.kernel_arguments": "loglevel=4"});
    bundle.write();
    let (ended, from_template) = templates.run(&bundle, &[]);
    ended.expect_code(0);
    assert!(!from_template && !templates.folder().exists());
}

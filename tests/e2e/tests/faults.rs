//! What is left when the server, the VMM, a stand-in or the guest's agent is killed at any step of a container's life. The build under test has fault
//! points (`vmm/src/fault.rs`, `agent/src/fault.rs`), which the build that is installed must not have.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{Ended, bulkhead, fresh_id};
use bulkhead_e2e::container::{reap_all, wait_for};
use bulkhead_e2e::leaks::Host;
use bulkhead_e2e::steps::{AGENT, CGROUP_MADE, JOINER, PROXY, RESTORING, SAVING, VMM};
use bulkhead_e2e::{dist, processes, watch};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long a command may take at most, on an emulated CPU.
const LIMIT_S: &str = "120";

/// How long a container may be known as another than stopped at most: 5 seconds, were it not for the emulated CPU.
const PATIENCE: Duration = Duration::from_secs(60);

/// The steps of the server at which it has a guest.
const SERVER: [&str; 12] = [
    "server: agent called",
    "server: agent greeted",
    "server: container created",
    "server: container started",
    "server: process described",
    "server: process executed",
    "server: process exited",
    "server: process deleted",
    "server: signal delivered",
    "server: container exited",
    "server: deletion asked",
    "server: sandbox ends",
];

/// The commands of a life, and what comes after the container's id.
const LIFE: [(&[&str], &[&str]); 6] = [
    (&["create"], &[]),
    (&["start"], &[]),
    (&["exec"], &["true"]),
    (&["exec", "--detach"], &["true"]),
    (&["kill"], &["KILL"]),
    (&["delete"], &[]),
];

/// Which process ends where.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// One of the host's, at a step of a process that this command of a life has started.
    Host(&'static str, usize),
    /// One of the guest's.
    Guest(&'static str),
}

struct Sandbox {
    bundle: Bundle,
    id: String,
    files: TempDir,
    /// Where its templates are; there are none without.
    templates: Option<PathBuf>,
    fault: Fault,
}

impl Sandbox {
    fn new(fault: Fault) -> Self {
        Self::with_templates(fault, None)
    }

    fn with_templates(fault: Fault, templates: Option<&Path>) -> Self {
        let mut bundle = Bundle::busybox(&["sleep", "1000"]);
        if let Fault::Guest(step) = fault {
            let word = format!("BULKHEAD_FAULT={step}");
            bundle.config["annotations"] = json!({"io.bulkhead.kernel_arguments": word});
        }
        bundle.write();
        let files = tempfile::tempdir().unwrap();
        let folder = templates.unwrap_or(Path::new("")).display();
        let config = format!("template_directory = \"{folder}\"");
        fs::write(files.path().join("config.toml"), config).unwrap();
        Self {
            bundle,
            id: fresh_id(),
            files,
            templates: templates.map(Path::to_owned),
            fault,
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.file(name)).unwrap_or_default()
    }

    /// Runs the command line with `before` and `after` around the id, for a bounded time. One that fails says why in one sentence.
    fn run(&self, before: &[&str], after: &[&str], fault: Option<&str>) -> Ended {
        let mut command = Command::new("timeout");
        command.args(["-k", "5", LIMIT_S]).arg(bulkhead());
        command.env("BULKHEAD_CONFIG", self.file("config.toml"));
        command.args(before);
        if before == ["create"] {
            command.arg("--bundle").arg(self.bundle.path());
            command.arg("--pid-file").arg(self.file("pid"));
        }
        command.arg(&self.id).args(after);
        if let Some(fault) = fault {
            command
                .env("BULKHEAD_FAULT", fault)
                .env("BULKHEAD_FAULT_LOG", self.file("fault"));
        }
        // Not pipes, which what lives on would hold open.
        let output = |name: &str| Stdio::from(File::create(self.file(name)).unwrap());
        let status = command
            .stdin(Stdio::null())
            .stdout(output("stdout"))
            .stderr(output("stderr"))
            .status()
            .unwrap();
        let ended = Ended {
            code: status.code().unwrap_or(-1),
            stdout: self.read("stdout"),
            stderr: self.read("stderr"),
        };
        let sentences = ended.stderr.lines().count();
        assert!(
            ended.code == 0 && sentences == 0
                || ended.code < 124
                    && sentences == 1
                    && ended.stderr.starts_with("error: bulkhead ")
                || ended.code == 255 && sentences == 1
                // The process itself has ended so, which is nothing to talk about.
                || ended.code == 137 && sentences == 0 && before == ["exec"],
            "{:?}, {before:?}: {ended:?}",
            self.fault
        );
        ended
    }

    /// What `state` says; `gone` where there is no container.
    fn status(&self) -> String {
        let ended = self.run(&["state"], &[], None);
        if ended.code != 0 {
            assert!(
                ended.stderr.contains("does not exist"),
                "{:?}: {ended:?}",
                self.fault
            );
            return "gone".into();
        }
        let state: Value = serde_json::from_str(&ended.stdout).unwrap();
        state["status"].as_str().unwrap().to_owned()
    }

    fn has_ended(&self) -> bool {
        ["stopped", "gone"].contains(&self.status().as_str())
    }

    /// Waits until it has stopped, or is not there.
    fn await_end(&self) {
        let began = Instant::now();
        loop {
            if self.has_ended() {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{:?}: it has not", self.fault);
        }
    }

    /// Leads it through its life up to the first command that fails of its machine's end. Returns those that failed.
    fn live(&self) -> Vec<&'static str> {
        let mut failed = Vec::new();
        for (n, (before, after)) in LIFE.into_iter().enumerate() {
            let fault = match self.fault {
                Fault::Host(step, at) if at == n => Some(step),
                _ => None,
            };
            if self.run(before, after, fault).code != 0 {
                failed.push(before[0]);
                if self.has_ended() {
                    break;
                }
            }
            if before == ["kill"] {
                self.await_end();
            }
        }
        failed
    }

    /// Checks that the container has stopped, that who waits for it knows, and that nothing is left of it once it is deleted.
    fn end(self, unchanged: &Host) {
        self.await_end();
        if let Ok(pid) = self.read("pid").parse() {
            processes::wait_for_end(&[pid]);
            let code = wait_for(Pid::from_raw(pid.cast_signed()));
            assert_ne!(code, 0, "{:?}", self.fault);
        }
        self.run(&["delete", "--force"], &[], None).expect_code(0);
        if let Fault::Host(step, _) = self.fault {
            assert_eq!(self.read("fault").lines().next(), Some(step));
        }
        for file in self
            .templates
            .iter()
            .flat_map(|path| fs::read_dir(path).unwrap())
        {
            let name = file.unwrap().file_name();
            assert!(!name.to_string_lossy().contains("unfinished"), "{name:?}");
        }
        reap_all();
        unchanged.at_once(&format!("{:?}", self.fault));
    }
}

/// A life with a fault, and its end. Returns the commands that failed.
fn check(fault: Fault) -> Vec<&'static str> {
    let unchanged = Host::unchanged();
    let sandbox = Sandbox::new(fault);
    let failed = sandbox.live();
    sandbox.end(&unchanged);
    failed
}

#[test]
fn a_vmm_that_is_killed_at_any_of_its_steps_leaves_nothing() {
    let _unchanged = Host::unchanged();
    for step in VMM {
        let failed = check(Fault::Host(step, 0));
        let late = ["vmm: shutdown requested", "vmm: ended"].contains(&step);
        assert_eq!(failed.is_empty(), late, "{step}: {failed:?}");
    }
}

#[test]
fn a_vmm_that_is_killed_while_it_saves_a_template_or_uses_one_leaves_nothing_but_a_good_one() {
    let unchanged = Host::unchanged();
    let folder = tempfile::tempdir().unwrap();
    let count = || fs::read_dir(folder.path()).unwrap().count();
    let life = |step, command: usize| {
        let fault = Fault::Host(step, command);
        let sandbox = Sandbox::with_templates(fault, Some(folder.path()));
        let failed = sandbox.live();
        sandbox.end(&unchanged);
        failed
    };
    for step in SAVING {
        assert_eq!(life(step, 0), ["create"], "{step}");
        assert_eq!(count(), 0, "{step}");
    }
    for step in RESTORING {
        assert!(life("vmm: ended", 0).is_empty());
        assert_eq!(count(), 1, "a whole life leaves a template");
        assert_eq!(life(step, 0), ["create"], "{step}");
        assert_eq!(count(), 0, "{step}: a template that may be to blame stays");
    }
}

#[test]
fn a_vmm_that_is_killed_at_any_step_of_its_server_leaves_nothing() {
    let _unchanged = Host::unchanged();
    for step in SERVER {
        let step = format!("children at {step}");
        check(Fault::Host(step.leak(), 0));
    }
}

#[test]
fn a_server_that_is_killed_leaves_nothing() {
    let _unchanged = Host::unchanged();
    // Its other steps are gone through without a guest, by the server's own tests.
    for step in [
        CGROUP_MADE,
        "server: mounts made",
        "server: container created",
        "server: container exited",
        "server: sandbox ends",
        "server: VM ended",
        "server: cleaned",
    ] {
        check(Fault::Host(step, 0));
    }
}

#[test]
fn a_stand_in_that_is_killed_at_any_of_its_steps_takes_its_container_along() {
    let _unchanged = Host::unchanged();
    for step in PROXY {
        check(Fault::Host(step, 0));
    }
}

#[test]
fn a_stand_in_of_an_executed_process_that_is_killed_at_any_of_its_steps_takes_nothing_else_along() {
    let unchanged = Host::unchanged();
    let sandbox = Sandbox::new(Fault::Host(PROXY[0], 3));
    for (before, after) in &LIFE[..2] {
        sandbox.run(before, after, None).expect_code(0);
    }
    let (before, after) = LIFE[3];
    for (n, step) in PROXY.into_iter().enumerate() {
        let code = sandbox.run(before, after, Some(step)).code;
        assert_eq!(code, if n < 2 { 255 } else { 0 }, "{step}");
        // All that is left of this one is for us to take away.
        watch::until(sandbox.files.path(), &[], || {
            sandbox.read("fault").lines().count() > n
        });
        assert_eq!(sandbox.status(), "running");
    }
    sandbox.run(&["exec"], &["true"], None).expect_code(0);
    sandbox.run(&["kill"], &["KILL"], None).expect_code(0);
    sandbox.end(&unchanged);
}

#[test]
fn an_agent_that_ends_at_any_of_its_steps_leaves_nothing() {
    let _unchanged = Host::unchanged();
    for (step, command) in AGENT {
        let failed = check(Fault::Guest(step));
        let first = failed.first().copied().unwrap_or_default();
        assert_eq!(first, command, "{step}: {failed:?}");
    }
}

#[test]
fn a_process_that_ends_on_its_way_into_a_container_takes_nothing_else_along() {
    let _unchanged = Host::unchanged();
    for (step, failed) in JOINER {
        assert_eq!(check(Fault::Guest(step)), failed, "{step}");
    }
}

#[test]
fn what_answers_nothing_is_deleted_by_force() {
    let unchanged = Host::unchanged();
    // The stand-in is `bulkhead` itself.
    for program in ["containerd-shim-bulkhead-v2", "bulkhead-vmm", "bulkhead"] {
        let sandbox = Sandbox::new(Fault::Guest("none"));
        for (before, after) in &LIFE[..2] {
            sandbox.run(before, after, None).expect_code(0);
        }
        let pids = processes::named(program);
        assert_eq!(pids.len(), 1, "{program}");
        kill(Pid::from_raw(pids[0].cast_signed()), Signal::SIGSTOP).unwrap();
        assert_eq!(sandbox.status(), "running", "{program}");
        sandbox
            .run(&["delete", "--force"], &[], None)
            .expect_code(0);
        sandbox.end(&unchanged);
    }
}

#[test]
fn what_is_installed_has_no_fault_points() {
    let _unchanged = Host::unchanged();
    let installed = std::env::var_os("BULKHEAD_INSTALLED").unwrap();
    for name in [
        "bin/bulkhead",
        "bin/bulkhead-vmm",
        "bin/containerd-shim-bulkhead-v2",
        "lib/bulkhead/initramfs.cpio",
    ] {
        let has = |folder: &Path| {
            let bytes = fs::read(folder.join(name)).unwrap();
            let mut windows = bytes.windows(14);
            windows.any(|window| window == b"BULKHEAD_FAULT")
        };
        assert!(!has(Path::new(&installed)), "{name}");
        assert!(has(&dist()), "the build under test, {name}");
    }
}

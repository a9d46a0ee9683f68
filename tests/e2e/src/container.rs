//! A container that a test drives through its life, command by command, under any runtime with runc's command line.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::bundle::Bundle;
use crate::command::{Ended, finish, fresh_id};
use crate::watch;

/// A runtime under another command line: `script` is what a shell runs in its place, with the runtime's arguments. It lies in `folder`.
///
/// # Panics
/// When it can't be written.
pub fn wrapped(folder: &Path, name: &str, script: &str) -> PathBuf {
    let wrapper = folder.join(name);
    fs::write(&wrapper, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&wrapper, Permissions::from_mode(0o755)).unwrap();
    wrapper
}

/// A bundle that lives as long as its container, or longer.
pub enum Held<'a> {
    /// The container's own.
    Owned(Bundle),
    /// Somebody else's.
    Lent(&'a Bundle),
}

impl From<Bundle> for Held<'_> {
    fn from(bundle: Bundle) -> Self {
        Self::Owned(bundle)
    }
}

impl<'a> From<&'a Bundle> for Held<'a> {
    fn from(bundle: &'a Bundle) -> Self {
        Self::Lent(bundle)
    }
}

/// A container. Dropping it deletes it by force.
pub struct Container<'a> {
    /// The bundle it is made from.
    _bundle: Held<'a>,
    /// Its id.
    pub id: String,
    runtime: PathBuf,
    files: TempDir,
    /// Process of the host that stands for it; a child of this test, which is a subreaper.
    pub pid: Pid,
}

impl<'a> Container<'a> {
    /// `create`s a container; its output goes to files ([`Container::stdout`]).
    ///
    /// # Panics
    /// When that fails.
    #[track_caller]
    pub fn create(runtime: PathBuf, bundle: impl Into<Held<'a>>) -> Self {
        Self::create_with(runtime, bundle, &[])
    }

    /// `create` with further flags.
    ///
    /// # Panics
    /// When that fails.
    #[track_caller]
    pub fn create_with(runtime: PathBuf, bundle: impl Into<Held<'a>>, flags: &[&str]) -> Self {
        Self::try_create(runtime, bundle, flags).unwrap_or_else(|ended| panic!("create: {ended:?}"))
    }

    /// `create`, which may fail.
    pub fn try_create(
        runtime: PathBuf,
        bundle: impl Into<Held<'a>>,
        flags: &[&str],
    ) -> Result<Self, Ended> {
        let files = tempfile::tempdir().unwrap();
        let file = |name: &str| File::create(files.path().join(name)).unwrap().into();
        let streams = [Stdio::null(), file("stdout"), file("stderr")];
        Self::create_in(files, runtime, bundle.into(), flags, streams)
    }

    /// `create` with standard input, output and error of the caller's, as engines do.
    ///
    /// # Panics
    /// When that fails.
    #[track_caller]
    pub fn create_on(runtime: PathBuf, bundle: impl Into<Held<'a>>, streams: [Stdio; 3]) -> Self {
        let files = tempfile::tempdir().unwrap();
        Self::create_in(files, runtime, bundle.into(), &[], streams)
            .unwrap_or_else(|ended| panic!("create: {ended:?}"))
    }

    fn create_in(
        files: TempDir,
        runtime: PathBuf,
        held: Held<'a>,
        flags: &[&str],
        [stdin, stdout, stderr]: [Stdio; 3],
    ) -> Result<Self, Ended> {
        // Whoever stands for the container is to be ours to wait for, as conmon's and containerd's shim's are.
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let bundle = match &held {
            Held::Owned(bundle) => bundle,
            Held::Lent(bundle) => bundle,
        };
        bundle.write();
        let id = fresh_id();
        let status = Command::new(&runtime)
            .arg("create")
            .args(flags)
            .arg("--bundle")
            .arg(bundle.path())
            .arg("--pid-file")
            .arg(files.path().join("pid"))
            .arg(&id)
            .stdin(stdin)
            .stdout(stdout)
            .stderr(stderr)
            .status()
            .unwrap();
        let read = |name: &str| fs::read_to_string(files.path().join(name)).unwrap_or_default();
        if !status.success() {
            return Err(Ended {
                code: status.code().unwrap_or(-1),
                stdout: read("stdout"),
                stderr: read("stderr"),
            });
        }
        let pid = read("pid");
        Ok(Self {
            id,
            runtime,
            pid: Pid::from_raw(pid.parse().unwrap()),
            files,
            _bundle: held,
        })
    }

    /// A created and started container.
    ///
    /// # Panics
    /// When that fails.
    #[track_caller]
    pub fn running(runtime: PathBuf, bundle: impl Into<Held<'a>>) -> Self {
        let container = Self::create(runtime, bundle);
        container.command(&["start"]).expect_code(0);
        container
    }

    /// The runtime with `words` before the id.
    pub fn command(&self, words: &[&str]) -> Ended {
        self.command_with(words, &[])
    }

    /// The runtime with `before` and `after` around the id.
    pub fn command_with(&self, before: &[&str], after: &[&str]) -> Ended {
        finish(self.prepare(before, after).stdin(Stdio::null()))
    }

    /// The same, not run yet.
    pub fn prepare(&self, before: &[&str], after: &[&str]) -> Command {
        let mut command = Command::new(&self.runtime);
        command.args(before).arg(&self.id).args(after);
        command
    }

    /// `update` to `resources`, the spec's `linux.resources`.
    ///
    /// # Panics
    /// When it can't be run.
    pub fn update(&self, resources: &Value) -> Ended {
        let file = self.files.path().join("resources");
        fs::write(&file, resources.to_string()).unwrap();
        self.command(&["update", "--resources", file.to_str().unwrap()])
    }

    /// `exec` of a program.
    pub fn exec(&self, args: &[&str]) -> Ended {
        self.command_with(&["exec"], args)
    }

    /// `exec` of a shell script.
    pub fn shell(&self, script: &str) -> Ended {
        self.exec(&["sh", "-c", script])
    }

    /// What `state` prints.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn state(&self) -> Value {
        let ended = self.command(&["state"]).expect_code(0);
        serde_json::from_str(&ended.stdout).unwrap()
    }

    /// Its status.
    #[track_caller]
    pub fn status(&self) -> String {
        self.state()["status"].as_str().unwrap().to_owned()
    }

    /// What it has written so far.
    pub fn stdout(&self) -> String {
        fs::read_to_string(self.files.path().join("stdout")).unwrap()
    }

    /// Waits until it has written `text`.
    ///
    /// # Panics
    /// When that takes too long.
    #[track_caller]
    pub fn await_output(&self, text: &str) {
        watch::until(self.files(), &[], || self.stdout().contains(text));
    }

    /// What it, and `create`, have written on standard error so far.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.files.path().join("stderr")).unwrap()
    }

    /// A folder for a test's own files.
    pub fn files(&self) -> &Path {
        self.files.path()
    }

    /// Waits for the process that stands for it, as a client does; returns the exit code, 128 + N by signal N.
    ///
    /// # Panics
    /// When it is not a child.
    #[track_caller]
    pub fn wait(&self) -> i32 {
        wait_for(self.pid)
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // Whatever of it has become a child of ours, its server among them, ends with it and is ours to take away.
        let children = children_about(&self.id);
        let _ = self.command(&["delete", "--force"]);
        for child in children {
            while let Ok(status) = waitpid(child, None) {
                if matches!(status, WaitStatus::Exited(..) | WaitStatus::Signaled(..)) {
                    break;
                }
            }
        }
        reap();
    }
}

/// Children of this process whose command line names `id`, and those that have ended already.
fn children_about(id: &str) -> Vec<Pid> {
    let about = |pid: &Pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        line.is_empty() || words.any(|word| word == id.as_bytes())
    };
    children().into_iter().filter(about).collect()
}

/// Children of this process.
fn children() -> Vec<Pid> {
    let own = std::process::id().to_string();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let ours = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split(' ').nth(1));
        parent == Some(&own)
    };
    pids.filter(ours).map(Pid::from_raw).collect()
}

/// Waits for a process that has become this one's child.
///
/// # Panics
/// When it has not.
#[track_caller]
pub fn wait_for(pid: Pid) -> i32 {
    loop {
        match waitpid(pid, None) {
            Ok(WaitStatus::Exited(_, code)) => return code,
            Ok(WaitStatus::Signaled(_, signal, _)) => return 128 + signal as i32,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => panic!("cannot wait for {pid}: {errno}"),
        }
    }
}

/// Takes away what has ended and became this process's child.
pub fn reap() {
    use nix::sys::wait::WaitPidFlag;
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            break;
        }
    }
}

/// Waits until every child of this process has ended, and takes them away: no container of the test's lives any more.
///
/// # Panics
/// When one goes on.
#[track_caller]
pub fn reap_all() {
    loop {
        reap();
        let left = children();
        if left.is_empty() {
            return;
        }
        let pids: Vec<u32> = left.iter().map(|pid| pid.as_raw().unsigned_abs()).collect();
        crate::processes::wait_for_end(&pids);
    }
}

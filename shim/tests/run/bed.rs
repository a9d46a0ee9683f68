//! A bundle, a configuration and a state root of a test's own.

use std::fs;
use std::io::{Read, Seek};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use bulkhead_e2e::{processes, watch};
use nix::mount::{MsFlags, mount};
use nix::sched::CloneFlags;
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Long enough for a loaded machine; nothing waits that long when all is well.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The command line, which another package builds. The stand-in for the VMM is built with it: cargo does that for all tests, and not
/// for some that are asked for.
pub fn bulkhead() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let server = Path::new(env!("CARGO_BIN_EXE_containerd-shim-bulkhead-v2"));
        for target in [
            ["-p", "bulkhead-runtime", "--bin", "bulkhead"],
            ["-p", "containerd-shim-bulkhead-v2", "--example", "fake-vmm"],
        ] {
            let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
            let mut build = Command::new(cargo);
            let status = build.args(["build", "--quiet"]).args(target).status();
            assert!(status.unwrap().success());
        }
        server.with_file_name("bulkhead")
    })
}

/// The server opens /dev/kvm for its VMM, and the stand-in for that makes nothing of it. Where there is none, this thread and all that
/// it starts see a null device in its place.
fn have_kvm() {
    if Path::new("/dev/kvm").exists() {
        return;
    }
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    let bind = |from: &Path, to: &Path, flags| mount(Some(from), to, none, flags, none).unwrap();
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(none, "/", none, private, none).unwrap();
    let dev = tempfile::tempdir().unwrap();
    mount(
        Some("dev"),
        dev.path(),
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    )
    .unwrap();
    for entry in fs::read_dir("/dev").unwrap() {
        let entry = entry.unwrap();
        let (path, kind) = (
            dev.path().join(entry.file_name()),
            entry.file_type().unwrap(),
        );
        if kind.is_symlink() {
            symlink(fs::read_link(entry.path()).unwrap(), path).unwrap();
            continue;
        }
        if kind.is_dir() {
            fs::create_dir(&path).unwrap();
        } else {
            fs::write(&path, "").unwrap();
        }
        bind(&entry.path(), &path, MsFlags::MS_BIND | MsFlags::MS_REC);
    }
    let null = fs::metadata("/dev/null").unwrap().rdev();
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    mknod(&dev.path().join("kvm"), SFlag::S_IFCHR, mode, null).unwrap();
    bind(dev.path(), Path::new("/dev"), MsFlags::MS_MOVE);
}

pub struct Bed {
    dir: TempDir,
    mode: &'static str,
}

impl Bed {
    /// A bundle that runs `args`, a configuration and a state root of its own.
    pub fn new(args: &[&str]) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "the tests need root");
        have_kvm();
        let bed = Self {
            dir: tempfile::tempdir().unwrap(),
            mode: "",
        };
        fs::create_dir_all(bed.path("bundle/rootfs")).unwrap();
        fs::write(bed.path("bundle/rootfs/marker"), "").unwrap();
        for file in ["kernel", "initramfs"] {
            fs::write(bed.path(file), "").unwrap();
        }
        bed.configure("");
        bed.spec(|spec| spec["process"]["args"] = json!(args));
        bed
    }

    pub fn mode(mut self, mode: &'static str) -> Self {
        self.mode = mode;
        self
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn configure(&self, more: &str) {
        let server = Path::new(env!("CARGO_BIN_EXE_containerd-shim-bulkhead-v2"));
        let vmm = server.with_file_name("examples").join("fake-vmm");
        let config = format!(
            "kernel = {:?}\ninitramfs = {:?}\nvmm = {vmm:?}\nserver = {server:?}\nruntime_root = {:?}\ntemplate_directory = \"\"\n{more}",
            self.path("kernel"),
            self.path("initramfs"),
            self.path("state"),
        );
        fs::write(self.path("config.toml"), config).unwrap();
    }

    pub fn spec(&self, change: impl FnOnce(&mut Value)) {
        let mut spec = json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["/bin/true"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": [
                {"type": "mount"}, {"type": "pid"}, {"type": "network"}, {"type": "ipc"}
            ]}
        });
        change(&mut spec);
        fs::write(self.path("bundle/config.json"), spec.to_string()).unwrap();
    }

    /// The command line, in the bundle, with this bed's configuration.
    pub fn bulkhead(&self) -> Command {
        let mut command = Command::new(bulkhead());
        command
            .env("FAKE_VMM", self.mode)
            .env("FAKE_VMM_LOG", self.path("agent.log"))
            .arg("--config")
            .arg(self.path("config.toml"))
            .current_dir(self.path("bundle"));
        command
    }

    /// A container in the foreground.
    pub fn command(&self) -> Command {
        let mut command = self.bulkhead();
        command
            .args(["run", "c1"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Another command about the container.
    pub fn about(&self, words: &[&str]) -> Output {
        finish(self.bulkhead().args(words))
    }

    /// How often the guest's agent has been asked this.
    pub fn asked(&self, what: &str) -> usize {
        let log = fs::read_to_string(self.path("agent.log")).unwrap_or_default();
        log.lines().filter(|line| *line == what).count()
    }

    /// Runs it to its end.
    pub fn run(&self) -> Output {
        let output = self.command().output().unwrap();
        self.assert_clean();
        output
    }

    /// Nothing is left: no state, no mount, no process.
    pub fn assert_clean(&self) {
        let state = self.path("state");
        if state.exists() {
            let left: Vec<_> = fs::read_dir(&state).unwrap().collect();
            assert!(left.is_empty(), "{left:?}");
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(state.to_str().unwrap()), "{mounts}");
        assert_eq!(self.processes(), []);
    }

    /// Servers and VMMs of this bed: their command lines or working directories name it.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let proc = entry.path();
            let cwd = fs::read_link(proc.join("cwd")).unwrap_or_default();
            let line = fs::read(proc.join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let serves =
                line.contains(" serve ") && line.contains(self.path("state").to_str().unwrap());
            if cwd.starts_with(self.path("state")) || serves {
                let pid = entry.file_name().to_str().unwrap().parse().unwrap();
                found.push((pid, line));
            }
        }
        found
    }

    /// Their pids.
    pub fn pids(&self) -> Vec<u32> {
        self.processes().into_iter().map(|(pid, _)| pid).collect()
    }

    /// Waits until everything is gone that was left to itself.
    pub fn await_clean(&self) {
        let state = self.path("state/c1");
        watch::until(&self.path(""), &[], || !state.exists());
        processes::wait_for_end(&self.pids());
        self.assert_clean();
    }

    pub fn pid_of(&self, name: &str) -> Pid {
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let proc = entry.path();
            let line = fs::read(proc.join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            let cwd = fs::read_link(proc.join("cwd")).unwrap_or_default();
            let program = line.split('\0').next().unwrap_or_default();
            if cwd == self.path("state/c1") && program.ends_with(name) {
                return Pid::from_raw(entry.file_name().to_str().unwrap().parse().unwrap());
            }
        }
        panic!("no {name}");
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a command whose streams others may hold longer than it lives: to its own end, and not for ever.
pub fn finish(command: &mut Command) -> Output {
    let mut files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
    let mut child = command
        .stdin(Stdio::null())
        .stdout(files[0].try_clone().unwrap())
        .stderr(files[1].try_clone().unwrap())
        .spawn()
        .unwrap();
    processes::wait_for_end(&[child.id()]);
    let status = child.wait().unwrap();
    let [stdout, stderr] = files.each_mut().map(|file| {
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    });
    Output {
        status,
        stdout,
        stderr,
    }
}

//! OCI bundles for the tests: Debian's static busybox as root file system and a config.json that a test edits.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

const APPLETS: &[&str] = &[
    "cat",
    "chmod",
    "cp",
    "dd",
    "df",
    "echo",
    "env",
    "false",
    "grep",
    "head",
    "hostname",
    "id",
    "kill",
    "ln",
    "ls",
    "md5sum",
    "mkdir",
    "mount",
    "nproc",
    "ps",
    "pwd",
    "readlink",
    "rm",
    "sh",
    "sha256sum",
    "sleep",
    "stat",
    "stty",
    "cut",
    "tail",
    "touch",
    "tr",
    "true",
    "tty",
    "umask",
    "uname",
    "wc",
    "yes",
    "mknod",
    "mv",
    "sed",
    "sync",
    "seq",
];

/// A bundle in a folder of its own, removed when dropped.
pub struct Bundle {
    folder: TempDir,
    /// The configuration, written to config.json by [`Bundle::write`].
    pub config: Value,
}

impl Bundle {
    /// A bundle that runs `args` on busybox, configured as `runc spec` would, without a terminal.
    ///
    /// # Panics
    /// When the bundle can't be made.
    pub fn busybox(args: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("bundle").tempdir().unwrap();
        let root = folder.path().join("rootfs");
        for dir in ["bin", "dev", "etc", "proc", "root", "sys", "tmp"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for applet in APPLETS {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )
        .unwrap();
        fs::write(root.join("etc/group"), "root:x:0:\nuser:x:1000:\n").unwrap();
        Self {
            folder,
            config: default_config(args),
        }
    }

    /// A bundle that runs a shell script.
    pub fn shell(script: &str) -> Self {
        Self::busybox(&["sh", "-c", script])
    }

    /// A bundle whose container says that it is ready, and does nothing until it is told to end (SIGTERM, exit code 5) or to say something
    /// (SIGUSR1).
    pub fn idle() -> Self {
        Self::shell(
            "trap 'exit 5' TERM; trap 'echo usr1' USR1; echo ready; while :; do sleep 1000 & wait $!; done",
        )
    }

    /// Lets the container write its cgroup, and limits its processes to 50.
    ///
    /// # Panics
    /// When the configuration has no cgroup mount.
    pub fn with_own_cgroups(&mut self) {
        let mounts = self.config["mounts"].as_array_mut().unwrap();
        let cgroups = mounts
            .iter_mut()
            .find(|mount| mount["type"] == "cgroup")
            .unwrap();
        cgroups["options"] = json!(["nosuid", "noexec", "nodev", "relatime", "rw"]);
        self.config["linux"]["resources"]["pids"] = json!({"limit": 50});
    }

    /// The bundle's folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A path inside the root file system, as seen on the host.
    pub fn in_root(&self, path: &str) -> PathBuf {
        self.path()
            .join("rootfs")
            .join(path.trim_start_matches('/'))
    }

    /// Writes config.json.
    ///
    /// # Panics
    /// When it can't.
    pub fn write(&self) -> &Self {
        self.write_raw(&self.config.to_string())
    }

    /// Writes any text as config.json.
    ///
    /// # Panics
    /// When it can't.
    pub fn write_raw(&self, text: &str) -> &Self {
        fs::write(self.path().join("config.json"), text).unwrap();
        self
    }
}

fn default_config(args: &[&str]) -> Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "bulkhead",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "cgroup"}],
            "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

//! Configuration: where the programs and the guest's files are, and the few defaults of a sandbox.
//!
//! Everything has a default; `/etc/bulkhead/config.toml` overrides, another file is named by the flag `--config` or the
//! variable `BULKHEAD_CONFIG`. Unknown keys are errors.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use thiserror::Error;

use crate::sizing;

/// The configuration file that is read when it exists.
pub const DEFAULT_FILE: &str = "/etc/bulkhead/config.toml";

/// Environment variable that names another configuration file.
pub const FILE_VARIABLE: &str = "BULKHEAD_CONFIG";

/// Where the guest's files are when the programs are not installed under a prefix of their own.
const SYSTEM_LIB_DIR: &str = "/usr/lib/bulkhead";

/// Where templates are kept.
const TEMPLATE_DIRECTORY: &str = "/var/cache/bulkhead";

/// File name of the VMM.
const VMM_PROGRAM: &str = "bulkhead-vmm";

/// File name of the sandbox server.
const SERVER_PROGRAM: &str = "containerd-shim-bulkhead-v2";

/// The configuration in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The guest's kernel, an ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
    /// The VMM.
    pub vmm: PathBuf,
    /// The sandbox server.
    pub server: PathBuf,
    /// Directory of the sandboxes' state, unless `--root` names another.
    pub runtime_root: PathBuf,
    /// Where templates of guests are kept, if any are.
    pub template_directory: Option<PathBuf>,
    /// vCPUs of a guest.
    pub vcpus: u8,
    /// Memory of a guest whose spec sets no limit, in MiB.
    pub memory_mib: u64,
    /// How long a guest may take to boot and make its container.
    pub boot_timeout: Duration,
    /// Whether servers and VMMs log at debug level, and guests write to a serial console.
    pub debug: bool,
    /// Where debug logs and guest consoles go, as files named by the container's id; stderr when not set.
    pub debug_directory: Option<PathBuf>,
}

/// Why there is no configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}: {cause}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        cause: io::Error,
    },
    /// The file is not what it should be.
    #[error("configuration file {path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and what.
        message: String,
    },
    /// A key's value is out of its range.
    #[error("configuration file {path}: `{key}` {problem}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong with it and what is right.
        problem: String,
    },
    /// The running program's own path is unknown, so its siblings are too.
    #[error("cannot tell where this program is installed: {0}")]
    Executable(io::Error),
}

/// The file, as written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    vmm: Option<PathBuf>,
    server: Option<PathBuf>,
    runtime_root: Option<PathBuf>,
    template_directory: Option<PathBuf>,
    vcpus: Option<u8>,
    memory_mib: Option<u64>,
    boot_timeout_s: Option<u64>,
    debug: Option<bool>,
    debug_directory: Option<PathBuf>,
}

impl Config {
    /// Reads `file`, which must then exist, or [`DEFAULT_FILE`] if there is one.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let from_environment = std::env::var_os(FILE_VARIABLE).map(PathBuf::from);
        let named = file.map(Path::to_path_buf).or(from_environment);
        let path = named.as_deref().unwrap_or(Path::new(DEFAULT_FILE));
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound && named.is_none() => String::new(),
            Err(cause) => {
                return Err(ConfigError::Read {
                    path: path.to_path_buf(),
                    cause,
                });
            }
        };
        let executable = std::env::current_exe().map_err(ConfigError::Executable)?;
        Self::parse(&text, path, &executable)
    }

    /// The configuration that `text` makes of the defaults for a program at `executable`.
    fn parse(text: &str, path: &Path, executable: &Path) -> Result<Self, ConfigError> {
        let file: File = if text.is_empty() {
            File::default()
        } else {
            toml::from_str(text).map_err(|e| ConfigError::Parse {
                path: path.to_path_buf(),
                message: one_line(&e, text),
            })?
        };
        let template_directory = file
            .template_directory
            .unwrap_or_else(|| PathBuf::from(TEMPLATE_DIRECTORY));
        let template_directory =
            Some(template_directory).filter(|directory| !directory.as_os_str().is_empty());
        let value_error = |key, problem: String| ConfigError::Value {
            path: path.to_path_buf(),
            key,
            problem,
        };
        for (key, value) in [
            ("kernel", &file.kernel),
            ("initramfs", &file.initramfs),
            ("vmm", &file.vmm),
            ("server", &file.server),
            ("runtime_root", &file.runtime_root),
            ("template_directory", &template_directory),
            ("debug_directory", &file.debug_directory),
        ] {
            if let Some(value) = value.as_deref().filter(|value| !value.is_absolute()) {
                return Err(value_error(
                    key,
                    format!("is {value:?}: give an absolute path"),
                ));
            }
        }
        let vcpus = file
            .vcpus
            .unwrap_or_else(|| sizing::DEFAULT_VCPUS.min(sizing::host_cpus()));
        if !(1..=sizing::MAX_VCPUS).contains(&vcpus) {
            return Err(value_error(
                "vcpus",
                format!("is {vcpus}: give 1 to {}", sizing::MAX_VCPUS),
            ));
        }
        let memory_mib = file.memory_mib.unwrap_or(sizing::DEFAULT_MEMORY_MIB);
        if memory_mib < sizing::MIN_MEMORY_MIB {
            return Err(value_error(
                "memory_mib",
                format!("is {memory_mib}: give at least {}", sizing::MIN_MEMORY_MIB),
            ));
        }
        let programs = executable.parent().unwrap_or(Path::new("/"));
        let lib = lib_dir(programs);
        Ok(Self {
            kernel: file.kernel.unwrap_or_else(|| lib.join("vmlinux")),
            initramfs: file.initramfs.unwrap_or_else(|| lib.join("initramfs.cpio")),
            vmm: file.vmm.unwrap_or_else(|| programs.join(VMM_PROGRAM)),
            server: file.server.unwrap_or_else(|| programs.join(SERVER_PROGRAM)),
            runtime_root: file
                .runtime_root
                .unwrap_or_else(|| PathBuf::from("/run/bulkhead")),
            template_directory,
            vcpus,
            memory_mib,
            boot_timeout: Duration::from_secs(file.boot_timeout_s.unwrap_or(60)),
            debug: file.debug.unwrap_or(false),
            debug_directory: file.debug_directory,
        })
    }
}

/// `../lib/bulkhead` of the programs' directory when it exists, so that a build tree or a prefix such as
/// `/usr/local` works as it is; the system's otherwise.
fn lib_dir(programs: &Path) -> PathBuf {
    let own = programs.parent().map(|prefix| prefix.join("lib/bulkhead"));
    own.filter(|dir| dir.is_dir())
        .unwrap_or_else(|| PathBuf::from(SYSTEM_LIB_DIR))
}

/// A TOML error without its multi-line excerpt; an unknown key comes with the one that was meant.
fn one_line(error: &toml::de::Error, text: &str) -> String {
    let mut message = error.message().replace('\n', " ");
    if let Some((unknown, known)) = message
        .strip_prefix("unknown field `")
        .and_then(|rest| rest.split_once("`, expected one of "))
    {
        let known = known.split(", ").map(|key| key.trim_matches('`'));
        let nearest = known.max_by(|a, b| {
            strsim::jaro_winkler(a, unknown).total_cmp(&strsim::jaro_winkler(b, unknown))
        });
        message = format!(
            "unknown key `{unknown}`: did you mean `{}`?",
            nearest.unwrap_or_default()
        );
    }
    match error.span() {
        Some(span) => {
            let before = text.get(..span.start).unwrap_or_default();
            format!("line {}: {message}", before.matches('\n').count() + 1)
        }
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(
            text,
            Path::new("/c.toml"),
            Path::new("/opt/bh/bin/bulkhead"),
        )
        .map_err(|e| e.to_string())
    }

    #[test]
    fn an_empty_file_gives_the_defaults() {
        let config = parse("").unwrap();
        assert_eq!(config.vmm, Path::new("/opt/bh/bin/bulkhead-vmm"));
        assert_eq!(config.kernel, Path::new("/usr/lib/bulkhead/vmlinux"));
        assert_eq!(config.boot_timeout, Duration::from_secs(60));
        assert!(!config.debug);
        let templates = config.template_directory.as_deref();
        assert_eq!(templates, Some(Path::new("/var/cache/bulkhead")));
    }

    #[test]
    fn an_empty_template_directory_means_no_templates() {
        let config = parse("template_directory = \"\"").unwrap();
        assert_eq!(config.template_directory, None);
        let error = parse("template_directory = \"templates\"").unwrap_err();
        assert!(error.contains("`template_directory`"), "{error}");
    }

    #[test]
    fn guest_files_of_the_same_prefix_come_before_the_systems() {
        let prefix = tempfile::tempdir().unwrap();
        fs::create_dir_all(prefix.path().join("lib/bulkhead")).unwrap();
        let config =
            Config::parse("", Path::new("c"), &prefix.path().join("bin/bulkhead")).unwrap();
        assert_eq!(config.kernel, prefix.path().join("lib/bulkhead/vmlinux"));
    }

    #[test]
    fn keys_override_the_defaults() {
        let config = parse("kernel = \"/k\"\nboot_timeout_s = 5\ndebug = true\n").unwrap();
        assert_eq!(config.kernel, Path::new("/k"));
        assert_eq!(config.boot_timeout, Duration::from_secs(5));
        assert!(config.debug);
    }

    #[test]
    fn broken_files_are_refused_in_one_line_that_names_file_and_key() {
        for (text, expected) in [
            (
                "\nkernal = \"/k\"",
                "line 2: unknown key `kernal`: did you mean `kernel`?",
            ),
            ("memory = 5", "did you mean `memory_mib`?"),
            ("kernel = 1", "line 1: invalid type"),
            ("kernel = \"k\"", "`kernel` is \"k\": give an absolute path"),
            ("vcpus = 0", "`vcpus` is 0: give 1 to 32"),
            ("memory_mib = 1", "`memory_mib` is 1: give at least 64"),
            ("kernel", "line 1: "),
        ] {
            let message = parse(text).unwrap_err();
            assert!(
                message.starts_with("configuration file /c.toml: "),
                "{message}"
            );
            assert!(message.contains(expected), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn the_shipped_file_shows_every_key_with_its_default() {
        let shipped = include_str!("../config.toml");
        assert_eq!(parse(shipped), parse(""));
        let shown: String = shipped
            .lines()
            .filter_map(|line| line.strip_prefix('#'))
            .filter(|line| !line.starts_with(' '))
            .map(|line| format!("{line}\n"))
            .collect();
        let keys = |text: &str| toml::from_str::<toml::Table>(text).unwrap().len();
        // Those that serde would name for an unknown key.
        let error = toml::from_str::<File>("x = 1").unwrap_err();
        assert_eq!(keys(&shown), error.message().matches('`').count() / 2 - 1);
        let config = Config::parse(&shown, Path::new("c"), Path::new("/usr/bin/bulkhead")).unwrap();
        let defaults = Config::parse("", Path::new("c"), Path::new("/usr/bin/bulkhead")).unwrap();
        let expected = Config {
            vcpus: config.vcpus,
            debug_directory: config.debug_directory.clone(),
            ..defaults
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn a_named_file_must_exist() {
        let error = Config::load(Some(Path::new("/nonexistent/c.toml"))).unwrap_err();
        assert!(matches!(error, ConfigError::Read { .. }));
    }
}

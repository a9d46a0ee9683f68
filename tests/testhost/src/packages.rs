//! Fetches the emulated host's kernel and QEMU from the machine's own Debian mirror and unpacks them into the
//! user's cache folder. apt is given package lists and sources of its own below that folder, so that nothing
//! on the machine's own system changes; apt still checks signatures and hashes.

use crate::payload;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// What can go wrong while the host is being fetched.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// A file or folder could not be made, read or written.
    #[error("{what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program failed or is missing.
    #[error("`{command}` failed: {why}")]
    Command {
        /// The program and its first arguments.
        command: String,
        /// Its last words.
        why: String,
    },
    /// apt has no mirror of Debian to offer.
    #[error("apt knows no mirror of Debian {0}; are its sources configured?")]
    NoMirror(String),
    /// The mirror lacks a package.
    #[error("the Debian mirror has no package {0}")]
    NoPackage(&'static str),
    /// The kernel package holds something unexpected.
    #[error("kernel image {path}: {source}")]
    Kernel {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        source: payload::PayloadError,
    },
    /// The kernel package lacks a file.
    #[error("the kernel package has no {0}")]
    KernelFile(&'static str),
}

type Result<T> = std::result::Result<T, PackageError>;

/// An unpacked kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Its release, as `uname -r` says.
    pub release: String,
    /// The uncompressed ELF file.
    pub vmlinux: PathBuf,
    /// `lib/modules/RELEASE`, with depmod's files.
    pub modules_dir: PathBuf,
}

/// A QEMU that runs.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// The program.
    pub program: PathBuf,
    /// The root of the unpacked packages; none for the machine's own QEMU.
    pub unpacked: Option<PathBuf>,
    /// The first line of `--version`.
    pub version: String,
}

impl Qemu {
    /// The program with the libraries, modules and firmware of its own packages.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(root) = &self.unpacked {
            let lib = "lib/x86_64-linux-gnu";
            let paths = [root.join("usr").join(lib), root.join(lib)];
            let joined = paths.map(|p| p.display().to_string()).join(":");
            command.env("LD_LIBRARY_PATH", joined);
            command.env("QEMU_MODULE_DIR", root.join("usr").join(lib).join("qemu"));
            for data in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
                command.arg("-L").arg(root.join(data));
            }
        }
        command
    }

    fn probe(program: PathBuf, unpacked: Option<PathBuf>) -> Option<Self> {
        let mut qemu = Self {
            program,
            unpacked,
            version: String::new(),
        };
        let output = qemu
            .command()
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .ok()
            .filter(|o| o.status.success())?;
        let text = String::from_utf8_lossy(&output.stdout);
        qemu.version = text.lines().next()?.to_owned();
        Some(qemu)
    }
}

/// The cache folder and what is in it.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// A store below `root`.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The newest kernel of the 6.1 series in the cache, fetched if there is none or `refresh` asks for it.
    pub fn kernel(&self, refresh: bool, say: &dyn Fn(&str)) -> Result<Kernel> {
        let folder = self.root.join("kernel");
        if !refresh && let Some(kernel) = newest_complete(&folder).and_then(|p| Kernel::at(&p)) {
            return Ok(kernel);
        }
        say("fetching Debian's generic kernel 6.1");
        let apt = self.apt(false)?;
        let meta = apt.newest("linux-image-amd64", "6.1.")?;
        let package = apt
            .run_cache(&["show", &format!("linux-image-amd64={meta}")])?
            .lines()
            .filter_map(|line| line.strip_prefix("Depends:"))
            .flat_map(|list| list.split(','))
            .filter_map(|item| item.split_whitespace().next())
            .find(|name| name.starts_with("linux-image-6.1."))
            .map(str::to_owned)
            .ok_or(PackageError::NoPackage("linux-image-6.1.*-amd64"))?;
        let target = folder.join(format!("{package}_{meta}"));
        if !complete(&target) {
            apt.unpack(&[package], &target, |root| {
                let boot = root.join("boot");
                let image = only_entry(&boot, "vmlinuz-")?;
                let bytes = fs::read(&image).map_err(file("reading", &image))?;
                let elf = payload::vmlinux(&bytes).map_err(|source| PackageError::Kernel {
                    path: image.clone(),
                    source,
                })?;
                let vmlinux = root.join("vmlinux");
                fs::write(&vmlinux, elf).map_err(file("writing", &vmlinux))?;
                let release = only_entry(&root.join("lib/modules"), "6.1.")?;
                let mut depmod = Command::new("/sbin/depmod");
                depmod.arg("-b").arg(root).args(release.file_name());
                run(&mut depmod).map(drop)
            })?;
        }
        Kernel::at(&target).ok_or(PackageError::KernelFile("lib/modules"))
    }

    /// QEMU 10 from Debian's backports, or else the machine's own with a warning.
    pub fn qemu(&self, refresh: bool, say: &dyn Fn(&str)) -> Result<Qemu> {
        let folder = self.root.join("qemu");
        if !refresh
            && let Some(root) = newest_complete(&folder)
            && let Some(qemu) = unpacked_qemu(&root)
        {
            return Ok(qemu);
        }
        match self.fetch_qemu(&folder, say) {
            Ok(qemu) => Ok(qemu),
            Err(error) => {
                let own = Qemu::probe("qemu-system-x86_64".into(), None).ok_or(error)?;
                say(&format!(
                    "WARNING: no QEMU 10 from backports; using the machine's own ({}): expect failures of the bed",
                    own.version
                ));
                Ok(own)
            }
        }
    }

    fn fetch_qemu(&self, folder: &Path, say: &dyn Fn(&str)) -> Result<Qemu> {
        say("fetching QEMU from Debian's backports");
        let apt = self.apt(true)?;
        let version = apt.newest("qemu-system-x86", "1:10.")?;
        let target = folder.join(version.replace(':', "_"));
        if complete(&target) {
            if let Some(qemu) = unpacked_qemu(&target) {
                return Ok(qemu);
            }
            // A library it once found on the machine is gone: fetch it all again.
            fs::remove_dir_all(&target).map_err(file("removing", &target))?;
        }
        let packages = apt.missing(&format!("qemu-system-x86={version}"))?;
        apt.unpack(&packages, &target, |_| Ok(()))?;
        unpacked_qemu(&target).ok_or(PackageError::Command {
            command: "qemu-system-x86_64 --version".into(),
            why: "the unpacked QEMU does not run here".into(),
        })
    }

    fn apt(&self, backports: bool) -> Result<Apt> {
        Apt::new(&self.root, backports)
    }
}

impl Kernel {
    fn at(root: &Path) -> Option<Self> {
        let modules_dir = only_entry(&root.join("lib/modules"), "6.1.").ok()?;
        Some(Self {
            release: modules_dir.file_name()?.to_str()?.to_owned(),
            vmlinux: root.join("vmlinux"),
            modules_dir,
        })
    }
}

fn unpacked_qemu(root: &Path) -> Option<Qemu> {
    Qemu::probe(root.join("usr/bin/qemu-system-x86_64"), Some(root.into()))
}

/// apt with lists, sources and archives of our own; the machine's package status is only read.
struct Apt {
    options: Vec<String>,
    work: PathBuf,
}

impl Apt {
    fn new(root: &Path, backports: bool) -> Result<Self> {
        let kind = if backports { "apt-backports" } else { "apt" };
        let work = root.join(kind);
        for folder in ["lists/partial", "cache/archives/partial"] {
            let folder = work.join(folder);
            fs::create_dir_all(&folder).map_err(file("making", &folder))?;
        }
        let codename = codename()?;
        let mirror = mirror(&codename)?;
        let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let signed = if Path::new(keys).exists() {
            format!("[signed-by={keys}] ")
        } else {
            String::new()
        };
        let mut sources = format!("deb {signed}{mirror} {codename} main\n");
        if backports {
            sources += &format!("deb {signed}{mirror} {codename}-backports main\n");
        }
        let list = work.join("sources.list");
        fs::write(&list, sources).map_err(file("writing", &list))?;
        let mut options = vec![];
        for (key, value) in [
            ("Dir::Etc::sourcelist", list.display().to_string()),
            ("Dir::Etc::sourceparts", "-".into()),
            (
                "Dir::State::lists",
                work.join("lists").display().to_string(),
            ),
            ("Dir::Cache", work.join("cache").display().to_string()),
            // The cache folder may be one that apt's own user can't enter.
            ("APT::Sandbox::User", "root".into()),
        ] {
            options.extend(["-o".into(), format!("{key}={value}")]);
        }
        let apt = Self { options, work };
        apt.run("apt-get", &["-q", "update", "--error-on=any"])?;
        Ok(apt)
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        command.args(&self.options).args(arguments);
        run(&mut command)
    }

    fn run_cache(&self, arguments: &[&str]) -> Result<String> {
        self.run("apt-cache", arguments)
    }

    /// The newest version of a package that starts so. (apt lists the newest first.)
    fn newest(&self, package: &'static str, prefix: &str) -> Result<String> {
        self.run_cache(&["madison", package])?
            .lines()
            .filter_map(|line| line.split('|').nth(1))
            .map(str::trim)
            .find(|version| version.starts_with(prefix))
            .map(str::to_owned)
            .ok_or(PackageError::NoPackage(package))
    }

    /// A package and what it needs that the machine doesn't have, as `name=version`. Nothing is installed.
    fn missing(&self, package: &str) -> Result<Vec<String>> {
        let release = format!("{}-backports", codename()?);
        let plan = self.run(
            "apt-get",
            &[
                "-s",
                "-t",
                &release,
                "--no-install-recommends",
                "install",
                package,
            ],
        )?;
        Ok(plan.lines().filter_map(planned).collect())
    }

    /// Downloads packages and unpacks them to `target`, which appears only when it is whole.
    fn unpack(
        &self,
        packages: &[String],
        target: &Path,
        finish: impl Fn(&Path) -> Result<()>,
    ) -> Result<()> {
        let downloads = self.work.join("download");
        let partial = self.work.join("partial");
        for folder in [&downloads, &partial] {
            if folder.exists() {
                fs::remove_dir_all(folder).map_err(file("removing", folder))?;
            }
            fs::create_dir_all(folder).map_err(file("making", folder))?;
        }
        let mut get = Command::new("apt-get");
        get.args(&self.options)
            .args(["-q", "download"])
            .args(packages)
            .current_dir(&downloads);
        run(&mut get)?;
        for entry in fs::read_dir(&downloads).map_err(file("reading", &downloads))? {
            let deb = entry.map_err(file("reading", &downloads))?.path();
            run(Command::new("dpkg").arg("-x").arg(&deb).arg(&partial))?;
        }
        finish(&partial)?;
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(file("making", parent))?;
        }
        fs::rename(&partial, target).map_err(file("placing", target))?;
        // The lists alone are larger than what was fetched by them.
        fs::remove_dir_all(&self.work).map_err(file("removing", &self.work))
    }
}

/// `Inst NAME [OLD] (VERSION ARCHIVE [ARCH])` -> `NAME=VERSION`
fn planned(line: &str) -> Option<String> {
    let rest = line.strip_prefix("Inst ")?;
    let name = rest.split_whitespace().next()?;
    let version = rest.split_once('(')?.1.split_whitespace().next()?;
    Some(format!("{name}={version}"))
}

fn codename() -> Result<String> {
    let path = Path::new("/etc/os-release");
    let text = fs::read_to_string(path).map_err(file("reading", path))?;
    let field = text
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(field.unwrap_or("bookworm").trim_matches('"').to_owned())
}

/// The mirror that the machine's own apt uses.
fn mirror(codename: &str) -> Result<String> {
    let mut targets = Command::new("apt-get");
    targets.args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(CODENAME) $(COMPONENT)",
        "Created-By: Packages",
    ]);
    let wanted = [codename, "main"];
    run(&mut targets)?
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(_, rest)| rest.split(' ').eq(wanted))
        .map(|(uri, _)| uri.to_owned())
        .ok_or_else(|| PackageError::NoMirror(codename.into()))
}

/// Runs to the end; its standard output, or an error with its last words.
fn run(command: &mut Command) -> Result<String> {
    let name = || {
        let arguments = command.get_args().map(|a| a.to_string_lossy());
        let plain: Vec<_> = arguments.filter(|a| !a.contains("Dir::")).collect();
        format!(
            "{} {}",
            command.get_program().to_string_lossy(),
            plain.join(" ")
        )
    };
    let name = name();
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| PackageError::Command {
            command: name.clone(),
            why: e.to_string(),
        })?;
    if !status.success() {
        let text = String::from_utf8_lossy(&stderr);
        let last: Vec<_> = text.lines().rev().take(3).collect();
        return Err(PackageError::Command {
            command: name,
            why: format!("{status}: {}", last.join("; ")),
        });
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}

fn complete(root: &Path) -> bool {
    // unpack() renames whole trees into place.
    root.is_dir()
}

/// The folder unpacked last.
fn newest_complete(folder: &Path) -> Option<PathBuf> {
    fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| entry.ok())
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .max()
        .map(|(_, path)| path)
}

/// The first entry of a folder whose name starts so.
fn only_entry(folder: &Path, prefix: &str) -> Result<PathBuf> {
    fs::read_dir(folder)
        .map_err(file("reading", folder))?
        .filter_map(|entry| entry.ok())
        .find(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .ok_or(PackageError::KernelFile("kernel of the 6.1 series"))
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PackageError + use<> {
    let path = path.to_owned();
    move |source| PackageError::File { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_of_apt_names_packages_and_versions() {
        assert_eq!(
            planned("Inst qemu-system-x86 [1:7.2] (1:10.0.2+ds Debian Backports:x [amd64])"),
            Some("qemu-system-x86=1:10.0.2+ds".into())
        );
        assert_eq!(
            planned("Inst libfdt1 (1.6.1-4+b1 Debian:12 [amd64])"),
            Some("libfdt1=1.6.1-4+b1".into())
        );
        assert_eq!(planned("Conf libfdt1 (1.6.1-4+b1 Debian:12 [amd64])"), None);
        assert_eq!(planned("Reading package lists..."), None);
    }
}

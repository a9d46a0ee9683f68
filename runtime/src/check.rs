//! `bulkhead check`: can this machine run guests? Each finding is tried, not guessed, and says what to do.

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

use bulkhead_vmm::probe::probe;

use crate::config::Config;
use crate::preflight::{self, PreflightError};

/// One thing that was looked at.
#[derive(Debug)]
pub struct Finding {
    /// What it is.
    pub what: &'static str,
    /// What was found; the problem with its remedy if guests can't run because of it.
    pub result: Result<String, String>,
}

/// Looks at everything that a guest needs.
pub fn findings(config: &Config) -> Vec<Finding> {
    let user = preflight::require_root().map(|()| "root".into());
    let mut findings = vec![finding("user", user)];
    for (what, result) in [
        ("/dev/kvm", kvm()),
        ("kernel", kernel(config)),
        ("initramfs", initramfs(config)),
    ] {
        findings.push(Finding { what, result });
    }
    for (what, key, path) in [
        ("VMM", "vmm", &config.vmm),
        ("sandbox server", "server", &config.server),
    ] {
        let result = preflight::require_program(what, key, path);
        findings.push(finding(what, result.map(|()| path.display().to_string())));
    }
    findings
}

fn finding(what: &'static str, result: Result<String, PreflightError>) -> Finding {
    Finding {
        what,
        result: result.map_err(|error| error.to_string()),
    }
}

/// KVM has to run a guest's kernel code, and at a speed that is not an interpreter's.
fn kvm() -> Result<String, String> {
    match probe(Path::new(preflight::KVM)) {
        Ok(report) => {
            let ms = report.loop_time.as_secs_f64() * 1000.0;
            Ok(format!(
                "runs a guest's kernel code (trial loop: {ms:.1} ms)"
            ))
        }
        Err(error) => {
            let remedy = error.remedy();
            Err(match error.source() {
                Some(cause) => format!("{error}: {cause}: {remedy}"),
                None => format!("{error}: {remedy}"),
            })
        }
    }
}

/// The kernel has to be an uncompressed ELF file for x86-64.
fn kernel(config: &Config) -> Result<String, String> {
    let path = config.kernel.display();
    let start = start_of(preflight::open("guest kernel", "kernel", &config.kernel))?;
    // e_ident: magic, 64 bit, little-endian; e_machine (offset 18): EM_X86_64.
    let is_elf = start.starts_with(b"\x7fELF\x02\x01") && start.get(18..20) == Some(&[62, 0]);
    if is_elf {
        return Ok(path.to_string());
    }
    Err(format!(
        "{path} is not an x86-64 ELF file: set `kernel` in the configuration file to an uncompressed vmlinux"
    ))
}

/// The initramfs has to be a cpio archive ("newc"), compressed or not; the kernel says the rest.
fn initramfs(config: &Config) -> Result<String, String> {
    let path = config.initramfs.display();
    let opened = preflight::open("guest initramfs", "initramfs", &config.initramfs);
    let start = start_of(opened)?;
    let formats: [&[u8]; 3] = [b"070701", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"];
    if formats.iter().any(|magic| start.starts_with(magic)) {
        return Ok(path.to_string());
    }
    Err(format!(
        "{path} is not a cpio archive: set `initramfs` in the configuration file to the one of this release"
    ))
}

fn start_of(file: Result<OwnedFd, PreflightError>) -> Result<Vec<u8>, String> {
    let file = File::from(file.map_err(|error| error.to_string())?);
    let mut start = Vec::new();
    file.take(64)
        .read_to_end(&mut start)
        .map_err(|error| error.to_string())?;
    Ok(start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn config(dir: &std::path::Path) -> Config {
        let file = dir.join("c.toml");
        let path = |name: &str| format!("{name} = {:?}\n", dir.join(name));
        fs::write(
            &file,
            ["kernel", "initramfs", "vmm", "server"].map(path).concat(),
        )
        .unwrap();
        Config::load(Some(&file)).unwrap()
    }

    fn failures(config: &Config) -> Vec<&'static str> {
        let findings = findings(config).into_iter();
        let ours = findings.filter(|f| !["user", "/dev/kvm"].contains(&f.what));
        ours.filter(|f| f.result.is_err()).map(|f| f.what).collect()
    }

    #[test]
    fn missing_and_wrong_files_are_findings_and_good_ones_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let all = ["kernel", "initramfs", "VMM", "sandbox server"];
        assert_eq!(failures(&config), all);

        fs::write(&config.kernel, "bzImage").unwrap();
        fs::write(&config.initramfs, "").unwrap();
        assert_eq!(failures(&config), all);

        let elf = fs::read(std::env::current_exe().unwrap()).unwrap();
        fs::write(&config.kernel, &elf[..64]).unwrap();
        fs::write(&config.initramfs, "070701").unwrap();
        for program in [&config.vmm, &config.server] {
            std::os::unix::fs::symlink("/bin/true", program).unwrap();
        }
        assert_eq!(failures(&config), [""; 0]);
    }
}

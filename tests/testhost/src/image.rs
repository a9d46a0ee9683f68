//! The initramfs: this very program as `/init` (it is linked statically) and the modules in the order in which
//! it loads them.

use crate::cpio::Archive;
use crate::modules::{self, Dependencies, ModuleError};
use crate::packages::Kernel;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the init finds its modules: `000.ko`, `001.ko`, ...
pub const MODULES: &str = "/modules";

/// What can go wrong while the initramfs is made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file could not be read.
    #[error("reading {0}: {1}")]
    Read(PathBuf, io::Error),
    /// The kernel's modules are not as expected.
    #[error(transparent)]
    Modules(#[from] ModuleError),
    /// This program needs a dynamic linker, which the initramfs doesn't have.
    #[error(
        "this program is not linked statically: build it from the checkout, whose settings say so"
    )]
    Dynamic,
    /// A compressed module could not be decompressed.
    #[error("decompressing {0} failed")]
    Decompress(PathBuf),
}

/// Assembles the archive.
pub fn initramfs(kernel: &Kernel) -> Result<Vec<u8>, ImageError> {
    let own = Path::new("/proc/self/exe");
    let init = read(own)?;
    if is_dynamic(&init) {
        return Err(ImageError::Dynamic);
    }
    let text = |name: &str| {
        let path = kernel.modules_dir.join(name);
        fs::read_to_string(&path).map_err(|e| ImageError::Read(path, e))
    };
    let dep = text("modules.dep")?;
    let builtin = text("modules.builtin")?;
    let names = [modules::BOOT, modules::EXTRA].concat();
    let order = Dependencies::parse(&dep, &builtin).load_order(&names)?;

    let mut archive = Archive::default();
    for folder in ["dev", "modules", "proc", "sys", "host"] {
        archive.folder(folder);
    }
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.file("init", 0o755, &init);
    for (n, path) in order.iter().enumerate() {
        let module = read_module(&kernel.modules_dir.join(path))?;
        archive.file(&format!("modules/{n:03}.ko"), 0o644, &module);
    }
    Ok(archive.finish())
}

fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    fs::read(path).map_err(|e| ImageError::Read(path.into(), e))
}

fn read_module(path: &Path) -> Result<Vec<u8>, ImageError> {
    let program = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return read(path),
    };
    let output = Command::new(program)
        .arg("-dc")
        .arg(path)
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => Ok(output.stdout),
        _ => Err(ImageError::Decompress(path.into())),
    }
}

/// Whether an ELF64 file has a PT_INTERP program header.
fn is_dynamic(elf: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let u16_at = |at: usize| {
        elf.get(at..at + 2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]))
    };
    let Some(offset) = elf
        .get(0x20..0x28)
        .and_then(|b| b.try_into().ok())
        .map(|b| u64::from_le_bytes(b) as usize)
    else {
        return true;
    };
    let (Some(size), Some(count)) = (u16_at(0x36), u16_at(0x38)) else {
        return true;
    };
    (0..usize::from(count)).any(|n| {
        let at = offset.saturating_add(n * usize::from(size));
        let kind = elf.get(at..at.saturating_add(4));
        kind.is_none_or(|b| b == PT_INTERP.to_le_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_elf_file_that_asks_for_an_interpreter_is_dynamic() {
        let mut elf = vec![0; 256];
        elf[0x20] = 64;
        elf[0x36] = 56;
        elf[0x38] = 2;
        assert!(!is_dynamic(&elf));
        elf[64 + 56] = 3;
        assert!(is_dynamic(&elf));
        assert!(is_dynamic(b"#!/bin/sh"));
    }
}

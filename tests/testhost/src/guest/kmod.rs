//! Loads kernel modules in the order in which they lie in the initramfs.

use super::{Result, step, timed};
use nix::kmod::{ModuleInitFlags, finit_module};
use std::fs::{self, File};
use std::path::Path;

/// Loads all of them; a host that lacks one is no host to trust results of.
pub fn load_all(folder: &Path) -> Result<()> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .map_err(step("modules"))?
        .filter_map(|entry| entry.ok())
        .map(|entry| entry.path())
        .collect();
    files.sort();
    timed("modules", || {
        for path in &files {
            let file = File::open(path).map_err(step("module"))?;
            let what = || format!("loading {}", path.display());
            finit_module(&file, c"", ModuleInitFlags::empty()).map_err(step(what()))?;
            // The initramfs is memory.
            let _ = fs::remove_file(path);
        }
        Ok(())
    })
}

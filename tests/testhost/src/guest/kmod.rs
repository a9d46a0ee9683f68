//! Loads kernel modules in the order in which they lie in the initramfs.

use super::{Result, step, timed};
use nix::kmod::{ModuleInitFlags, finit_module};
use std::fs::{self, File};
use std::path::Path;

/// Loads all of them. One that doesn't fit the machine is reported on the console and skipped: what is
/// indispensable shows by what follows.
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
            if let Err(errno) = finit_module(&file, c"", ModuleInitFlags::empty()) {
                eprintln!("testhost: module {}: {errno}", path.display());
            }
            drop(file);
            // The initramfs is memory.
            let _ = fs::remove_file(path);
        }
        Ok(())
    })
}

//! Where templates are kept: guests that have booted as far as all guests of a size are alike, to start others from.
//!
//! The first guest of a size leaves one ([`bulkhead_vmm::template`]). Its name says what it was made from: the host's boot, the guest's files,
//! the VMM, the size. A directory that others than root can write to is not used: who can write a template owns every guest made from it.

use std::fs::{self, DirBuilder, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bulkhead_vmm::control::BootConfig;
use nix::fcntl::{Flock, FlockArg};

use crate::config::Config;

/// Templates that are kept; the one that was not used for the longest time goes first.
const MOST_TEMPLATES: usize = 8;

/// Memory of the largest guests that leave a template, in MiB: of each 64 bytes the kernel writes one at boot, for its map of the rest.
const MOST_MEMORY_MIB: u64 = 8 << 10;

/// Ending of a template's name.
const SUFFIX: &str = ".template";

/// What follows it while the template is being saved.
const UNFINISHED: &str = ".unfinished";

/// Tells one boot of the host from another (Documentation/admin-guide/sysctl/kernel.rst, random).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The place of the template for one kind of guest, whether it is there or not.
#[derive(Debug, Clone)]
pub struct Template {
    directory: PathBuf,
    /// How the names of this boot's templates begin.
    boot: String,
    name: String,
}

impl Template {
    /// The template for guests of this description, which must be everything that a guest knows before its agent is prepared. None if the
    /// configuration wants none, or if it would be large.
    pub fn of(config: &Config, guest: &BootConfig) -> io::Result<Option<Self>> {
        let Some(directory) = config.template_directory.clone() else {
            return Ok(None);
        };
        if guest.memory_mib > MOST_MEMORY_MIB {
            return Ok(None);
        }
        // Processor, KVM and clocks stay as they are until the next boot.
        let boot = fs::read_to_string(BOOT_ID)?.trim().to_owned();
        let mut hasher = DefaultHasher::new();
        env!("CARGO_PKG_VERSION").hash(&mut hasher);
        for file in [&config.kernel, &config.initramfs, &config.vmm] {
            let file = fs::metadata(file)?;
            let changed = (
                file.mtime(),
                file.mtime_nsec(),
                file.ctime(),
                file.ctime_nsec(),
            );
            (file.dev(), file.ino(), file.size(), changed).hash(&mut hasher);
        }
        let queues = guest.share.as_ref().map(|share| share.queues);
        (guest.vcpus, guest.memory_mib, &guest.cmdline).hash(&mut hasher);
        (guest.spare_slots, queues).hash(&mut hasher);
        let name = format!("{boot}-{:016x}{SUFFIX}", hasher.finish());
        Ok(Some(Self {
            directory,
            boot,
            name,
        }))
    }

    /// Opens it, if it is there.
    pub fn open(&self) -> io::Result<Option<File>> {
        match self.check_directory() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            result => result?,
        }
        let opened = File::options()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(self.path());
        match opened {
            Ok(file) => {
                file.set_modified(SystemTime::now())?;
                Ok(Some(file))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// An empty file to save it in. None if another server is at it.
    pub fn create(&self) -> io::Result<Option<Unfinished>> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)?;
        self.check_directory()?;
        let path = self.directory.join(format!("{}{UNFINISHED}", self.name));
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)?;
        // Whoever saves holds the lock. One that was killed has left its file and no lock.
        let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            return Ok(None);
        };
        let opened = lock.metadata()?;
        match fs::symlink_metadata(&path) {
            Ok(named) if (named.dev(), named.ino()) == (opened.dev(), opened.ino()) => {}
            // It has been finished, or given up, since it was opened.
            _ => return Ok(None),
        }
        lock.set_len(0)?;
        Ok(Some(Unfinished {
            template: self.clone(),
            file: lock,
            path,
        }))
    }

    /// Removes it: guests can't be made from it.
    pub fn discard(&self) {
        if let Err(error) = fs::remove_file(self.path())
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "cannot remove the template {}", self.path().display());
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    fn check_directory(&self) -> io::Result<()> {
        let directory = fs::symlink_metadata(&self.directory)?;
        if directory.is_dir() && directory.uid() == 0 && directory.mode() & 0o022 == 0 {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "{} is not a directory that root alone can write to",
                self.directory.display()
            ),
        ))
    }

    /// Removes what was saved before the host's last boot, and of the rest what is too much.
    fn tidy_up(&self) -> io::Result<()> {
        let mut current = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|name| name.contains(SUFFIX)) else {
                continue;
            };
            if !name.starts_with(&self.boot) {
                remove(&entry.path())?;
            } else if name.ends_with(SUFFIX) {
                current.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        current.sort();
        let surplus = current.len().saturating_sub(MOST_TEMPLATES);
        for (_, path) in &current[..surplus] {
            remove(path)?;
        }
        Ok(())
    }
}

/// A template that is being saved. It goes unless it is kept.
#[derive(Debug)]
pub struct Unfinished {
    template: Template,
    file: Flock<File>,
    path: PathBuf,
}

impl Unfinished {
    /// Where to save it.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file its name.
    pub fn keep(self) -> io::Result<()> {
        fs::rename(&self.path, self.template.path())?;
        self.template.tidy_up()
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Under the lock. A file that was kept is not here any more.
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes a file that another server may have removed already.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Discards a template unless the guest made from it turns out well.
#[derive(Debug)]
pub struct Trial(Option<Template>);

impl Trial {
    /// Puts a template to the test.
    pub fn new(template: Template) -> Self {
        Self(Some(template))
    }

    /// It has passed.
    pub fn pass(mut self) {
        self.0 = None;
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if let Some(template) = &self.0 {
            template.discard();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn template(directory: &Path, name: &str) -> Template {
        Template {
            directory: directory.to_owned(),
            boot: "boot".into(),
            name: format!("{name}{SUFFIX}"),
        }
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn nothing_is_there_before_it_is_kept_or_after_it_is_discarded() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("new/folder");
        let template = template(&directory, "boot-1");
        assert!(template.open().unwrap().is_none());
        drop(template.create().unwrap().unwrap());
        assert!(names(&directory).is_empty());
        let unfinished = template.create().unwrap().unwrap();
        assert!(template.open().unwrap().is_none());
        assert!(template.create().unwrap().is_none(), "two at it");
        unfinished.keep().unwrap();
        assert!(template.open().unwrap().is_some());
        Trial::new(template.clone()).pass();
        assert!(template.open().unwrap().is_some());
        drop(Trial::new(template.clone()));
        assert!(template.open().unwrap().is_none());
    }

    #[test]
    fn what_a_killed_server_has_left_is_used_again() {
        let folder = tempfile::tempdir().unwrap();
        let template = template(folder.path(), "boot-1");
        let left = folder.path().join("boot-1.template.unfinished");
        fs::write(&left, "half").unwrap();
        let unfinished = template.create().unwrap().unwrap();
        assert_eq!(unfinished.file().metadata().unwrap().len(), 0);
        drop(unfinished);
        assert!(!left.exists());
    }

    #[test]
    fn those_of_another_boot_go_and_of_this_one_the_last_used_stay() {
        let folder = tempfile::tempdir().unwrap();
        let keep = |name: &str| {
            let template = template(folder.path(), name);
            template.create().unwrap().unwrap().keep().unwrap();
        };
        fs::write(folder.path().join("before-0.template"), "").unwrap();
        fs::write(folder.path().join("before-1.template.unfinished"), "").unwrap();
        fs::write(folder.path().join("README"), "").unwrap();
        for number in 0..MOST_TEMPLATES {
            keep(&format!("boot-{number}"));
        }
        let used = template(folder.path(), "boot-0");
        used.open().unwrap().unwrap();
        keep("boot-new");
        let names = names(folder.path());
        assert_eq!(names.len(), MOST_TEMPLATES + 1);
        assert!(names.contains(&"README".to_owned()));
        assert!(names.contains(&"boot-0.template".to_owned()));
        assert!(!names.contains(&"boot-1.template".to_owned()));
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let template = template(folder.path(), "boot-1");
        template.create().unwrap().unwrap().keep().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = template.open().unwrap_err().to_string();
        assert!(error.contains("root alone"), "{error}");
        assert!(template.create().is_err());
    }
}

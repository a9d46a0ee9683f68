//! The forms of a cgroup's files: numbers, and lines of names and numbers. Source: the kernel's
//! Documentation/admin-guide/cgroup-v2.rst, "Interface Files".

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::errno_of;

/// Reads a file. None if the kernel does not keep it: the controller is absent or, for pressure, switched off.
pub fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if matches!(errno_of(&error), Errno::ENOENT | Errno::EOPNOTSUPP) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A number, or the greatest one for `max`.
pub fn number(text: &str) -> Option<u64> {
    match text.trim_end() {
        "max" => Some(u64::MAX),
        digits => digits.parse().ok(),
    }
}

/// Lines of a name and a number.
pub fn flat_keyed(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, value)| Some((name.to_owned(), number(value)?)))
        .collect()
}

/// Lines of a key and `name=value` pairs.
pub fn nested_keyed(
    text: &str,
) -> impl Iterator<Item = (&str, impl Iterator<Item = (&str, &str)>)> {
    text.lines().filter_map(|line| {
        let (key, pairs) = line.split_once(' ')?;
        let pairs = pairs
            .split_ascii_whitespace()
            .filter_map(|pair| pair.split_once('='));
        Some((key, pairs))
    })
}

/// A file of lines of names and numbers whose changes the kernel announces, as exceptional conditions: nobody polls.
#[derive(Debug)]
pub struct EventFile(AsyncFd<File>);

impl EventFile {
    /// Opens it.
    pub fn open(path: &Path) -> io::Result<Self> {
        crate::sys::watch_fd(File::open(path)?, Interest::PRIORITY).map(Self)
    }

    /// What it says. Changes after this end the next [`EventFile::changed`].
    pub fn read(&self) -> io::Result<HashMap<String, u64>> {
        // A read of this very file re-arms its notification, so the order is: read, then wait.
        let mut buffer = [0u8; 1024];
        let length = self.0.get_ref().read_at(&mut buffer, 0)?;
        let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
        Ok(flat_keyed(&text))
    }

    /// Waits for a change.
    pub async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }

    /// Waits until `name` has this value.
    pub async fn becomes(&self, name: &str, value: u64) -> io::Result<()> {
        while self.read()?.get(name) != Some(&value) {
            self.changed().await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_max_are_told() {
        for (text, value) in [
            ("0\n", Some(0)),
            ("max\n", Some(u64::MAX)),
            ("18446744073709551615", Some(u64::MAX)),
            ("", None),
            ("-1", None),
            ("many\n", None),
        ] {
            assert_eq!(number(text), value, "{text:?}");
        }
    }

    #[test]
    fn lines_of_names_and_numbers_become_a_map() {
        let map = flat_keyed("usage_usec 12\nuser_usec 7\n\nbroken\nodd x\n");
        assert_eq!(
            map,
            HashMap::from([("usage_usec".to_owned(), 12), ("user_usec".to_owned(), 7)])
        );
    }

    #[test]
    fn a_file_that_the_kernel_does_not_keep_is_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(&dir.path().join("memory.peak")).unwrap(), None);
        assert!(read(dir.path()).is_err());
    }
}

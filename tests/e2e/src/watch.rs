//! Waiting until something shows in files or by the end of a process, without polling.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::processes;

/// How long anything may take, on an emulated CPU.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `done`, which is asked again whenever something changes in a folder or below it, or one of `pids` ends.
///
/// # Panics
/// When it takes too long.
#[track_caller]
pub fn until(folder: &Path, pids: &[u32], mut done: impl FnMut() -> bool) {
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).unwrap();
    let mut running: Vec<OwnedFd> = pids
        .iter()
        .filter_map(|&pid| processes::open(pid))
        .collect();
    let end = Instant::now() + PATIENCE;
    loop {
        // First, so that no change is missed after the question.
        watch_below(&watch, folder);
        if done() {
            return;
        }
        let left = end.saturating_duration_since(Instant::now());
        assert!(
            !left.is_zero(),
            "too long nothing has come in {}",
            folder.display()
        );
        let mut polled: Vec<_> = running
            .iter()
            .map(AsFd::as_fd)
            .chain([watch.as_fd()])
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        poll(&mut polled, PollTimeout::try_from(left).unwrap()).unwrap();
        let ready: Vec<_> = polled.iter().map(|fd| fd.any() == Some(true)).collect();
        // Nothing to read is fine.
        let _ = watch.read_events();
        let mut ready = ready.into_iter();
        running.retain(|_| ready.next() == Some(false));
    }
}

/// Watches a folder and those below it. What goes away meanwhile need not be watched.
fn watch_below(watch: &Inotify, folder: &Path) {
    let flags = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_ONLYDIR;
    if watch.add_watch(folder, flags).is_err() {
        return;
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            watch_below(watch, &entry.path());
        }
    }
}

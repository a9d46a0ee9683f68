//! The file-system device (virtio 1.2, 5.11): shares one directory tree of the host with the guest, as FUSE.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`worker`] | the threads that serve the queues |
//! | [`requests`] | what the library that decodes requests does not know |
//! | [`share`] | the file system, with everything a hostile guest could try |
//! | [`tables`] | inodes and open files that the guest knows, within a budget |
//! | [`host`] | the system calls behind it |
//! | [`identity`] | whose rights they are made with |
//!
//! The protocol's messages are decoded by `fuse-backend-rs`. Its own passthrough file system is not used: without its mount layer
//! it checks no names, it keeps a record of every file ever seen, it wants `CAP_DAC_READ_SEARCH` for hard links, passes the guest's open
//! flags on, and supplementary groups have no effect.

mod host;
mod identity;
mod requests;
mod share;
mod tables;
#[cfg(test)]
mod tests;
mod worker;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use self::share::Share;
use self::worker::{Channel, Crew};
use super::driver_queue::DriverQueue;
use super::{ActivateError, Activation, VirtioDevice};
use crate::control::ShareConfig;

/// Length of each queue. A driver's requests are at most as long as the queue, less a few headers: a megabyte is 256 pages.
const QUEUE_SIZE: u16 = 512;
/// Length of the mount tag's field.
const TAG_LEN: usize = 36;
/// Most request queues.
const MAX_QUEUES: u8 = 8;
/// Descriptors that are left to the rest of the VMM, if there are as many.
const RESERVED_DESCRIPTORS: usize = 4096;

/// Why a share can't be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The mount tag does not fit its field.
    #[error("the mount tag {0:?} has not 1 to 36 bytes without a zero byte")]
    Tag(String),
    /// The number of queues is out of range.
    #[error("{0} request queues: 1 to 8 are possible")]
    Queues(u8),
    /// The directory can't be shared.
    #[error("cannot share the directory {}", .directory.display())]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The device.
pub struct Fs {
    share: Arc<Share>,
    config: Vec<u8>,
    queue_sizes: Vec<u16>,
    running: Option<Arc<Crew>>,
}

impl Fs {
    /// Shares a directory tree. Raises the process's limit of open files to the most it may: each file that the guest has in its caches
    /// takes one.
    pub fn new(config: &ShareConfig) -> Result<Self, FsError> {
        let tag = config.tag.as_bytes();
        if tag.is_empty() || tag.len() > TAG_LEN || tag.contains(&0) {
            return Err(FsError::Tag(config.tag.clone()));
        }
        if config.queues == 0 || config.queues > MAX_QUEUES {
            return Err(FsError::Queues(config.queues));
        }
        let files = usize::try_from(config.files).unwrap_or(usize::MAX);
        let share = most_descriptors()
            .and_then(|most| Share::new(&config.directory, files.min(most)))
            .map_err(|source| FsError::Directory {
                directory: config.directory.clone(),
                source,
            })?;
        // struct virtio_fs_config (virtio 1.2, 5.11.4): the tag, padded with zeros, and the number of request queues.
        let mut bytes = tag.to_vec();
        bytes.resize(TAG_LEN, 0);
        bytes.extend(u32::from(config.queues).to_le_bytes());
        Ok(Self {
            share: Arc::new(share),
            config: bytes,
            queue_sizes: vec![QUEUE_SIZE; 1 + usize::from(config.queues)],
            running: None,
        })
    }

    #[cfg(test)]
    fn threads(&self) -> usize {
        self.running.as_ref().map_or(0, |crew| crew.len())
    }

    /// Readable when the guest holds many files and should be asked to forget those that it does not use.
    pub fn many_files(&self) -> &EventFd {
        self.share.many_files()
    }
}

/// How many descriptors the guest's files may take at most: what the host allows any process (`fs.nr_open`) as far as this one may.
fn most_descriptors() -> io::Result<usize> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let most = fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse().ok());
    let raise = |limit| setrlimit(Resource::RLIMIT_NOFILE, limit, limit).map(|()| limit);
    let limit = raise(most.unwrap_or(hard))
        .or_else(|_| raise(hard))
        .unwrap_or(soft);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    Ok(limit - RESERVED_DESCRIPTORS.min(limit / 2))
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn name(&self) -> &'static str {
        "fs"
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let wanted = self.queue_sizes.len();
        let got = activation
            .queues
            .iter()
            .filter(|active| active.queue.ready())
            .count();
        if got < wanted || activation.queues.len() > wanted {
            return Err(ActivateError::MissingQueues { got, wanted });
        }
        let mut channels = Vec::with_capacity(wanted);
        for queue in activation.queues {
            let queue = DriverQueue::new(queue, activation.features, "fs");
            channels.push(Channel::new(queue).map_err(ActivateError::Worker)?);
        }
        let crew = Crew::start(
            channels,
            activation.memory,
            activation.interrupt,
            self.share.clone(),
        );
        self.running = Some(crew.map_err(ActivateError::Worker)?);
        Ok(())
    }

    /// Ends the threads, once what they are at is done, and closes all that the guest had open.
    fn reset(&mut self) {
        if let Some(running) = self.running.take() {
            running.end();
            self.share.clear();
        }
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.reset();
    }
}

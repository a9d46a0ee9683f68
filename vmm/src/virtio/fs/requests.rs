//! Requests of the guest that the library does not know.

use std::io;

use fuse_backend_rs::abi::fuse_abi::{InHeader, OutHeader};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};

/// `FUSE_SYNCFS`. Linux takes a refusal for the word that there is never anything to write back.
const SYNCFS: u32 = 50;
/// Length of that request: a header, and 8 bytes without a meaning.
const SYNCFS_LEN: usize = size_of::<InHeader>() + 8;

/// The header of a request to write everything back, if it is one.
pub fn syncfs(message: &Reader<'_>) -> Option<InHeader> {
    if message.available_bytes() != SYNCFS_LEN {
        return None;
    }
    let header = message.clone().read_obj::<InHeader>().ok()?;
    (header.opcode == SYNCFS).then_some(header)
}

/// Answers a request whose reply has no content; returns the reply's length.
pub fn answer(mut writer: VirtioFsWriter<'_>, request: &InHeader, result: io::Result<()>) -> u32 {
    let errno = |error: io::Error| error.raw_os_error().unwrap_or(libc::EIO);
    let header = OutHeader {
        len: size_of::<OutHeader>() as u32,
        error: result.map_or_else(|error| -errno(error), |()| 0),
        unique: request.unique,
    };
    writer.write_obj(header).map_or(0, |()| header.len)
}

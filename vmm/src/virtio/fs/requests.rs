//! Requests of the guest that the library does not know, or knows an older form of.
//!
//! Nothing is remembered of what was negotiated: a guest that was made from a template negotiated with another VMM. The forms tell
//! themselves apart.

use std::ffi::CStr;
use std::io::{self, Read};

use fuse_backend_rs::abi::fuse_abi::{InHeader, InitIn, Opcode, OutHeader, SetxattrIn};
use fuse_backend_rs::api::filesystem::FsOptions;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};

use super::share::{Share, WANTED};

/// `FUSE_SYNCFS`. Linux takes a refusal for the word that there is never anything to write back.
const SYNCFS: u32 = 50;
/// `FUSE_SETXATTR_EXT` of the negotiation: requests to set an attribute have flags.
const SETXATTR_EXT: u32 = 1 << 29;
/// `FUSE_SETXATTR_ACL_KILL_SGID` among these: who sets the access list may not keep the file's set-group-ID bit.
const KILL_SGID: u32 = 1;
/// Longest of these requests: an attribute with its name.
const LONGEST: usize = (64 << 10) + 1024;
/// Where the flags are in the reply to a negotiation: behind its header, the version and the number of bytes read ahead.
const INIT_OUT_FLAGS: usize = size_of::<OutHeader>() + 12;

/// One of these requests.
pub enum Request<'a> {
    /// Write back all files.
    SyncFs(InHeader),
    /// Set an attribute of a file: what follows the header.
    SetAttribute(InHeader, Reader<'a>),
    /// Negotiate. The library does, and these are the flags of its reply, with its own and ours.
    Init(u32),
}

impl<'a> Request<'a> {
    /// What a message asks for, if it is one of these.
    pub fn of(message: &Reader<'a>) -> Option<Self> {
        if message.available_bytes() > LONGEST {
            return None;
        }
        let mut message = message.clone();
        let header: InHeader = message.read_obj().ok()?;
        if header.opcode == SYNCFS {
            Some(Self::SyncFs(header))
        } else if header.opcode == Opcode::Setxattr as u32 {
            let body = message.clone();
            let _: SetxattrIn = message.read_obj().ok()?;
            let flags: u64 = message.read_obj().ok()?;
            // In the older form the name is here, and that has letters.
            (flags <= KILL_SGID.into()).then_some(Self::SetAttribute(header, body))
        } else if header.opcode == Opcode::Init as u32 {
            let offered = message.read_obj::<InitIn>().ok()?.flags;
            let known = FsOptions::from_bits_truncate(offered.into()) & WANTED;
            Some(Self::Init(known.bits() as u32 | offered & SETXATTR_EXT))
        } else {
            None
        }
    }
}

/// Sets an attribute.
pub fn set_attribute(share: &Share, inode: u64, mut body: Reader<'_>) -> io::Result<()> {
    let SetxattrIn { size, flags } = body.read_obj()?;
    let more_flags: u64 = body.read_obj()?;
    let mut rest = vec![0; body.available_bytes()];
    body.read_exact(&mut rest)?;
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    let name = CStr::from_bytes_until_nul(&rest).map_err(|_| invalid())?;
    let value = &rest[name.count_bytes() + 1..];
    if value.len() != size as usize {
        return Err(invalid());
    }
    let kill_sgid = more_flags & u64::from(KILL_SGID) != 0;
    share.set_attribute(inode, name, value, flags, kill_sgid)
}

/// Replaces the flags in the reply to a negotiation that has been written.
pub fn correct_flags(mut reply: VirtioFsWriter<'_>, flags: u32) {
    // A reply that has no room for them is none.
    if let Ok(mut rest) = reply.split_at(INIT_OUT_FLAGS) {
        let _ = rest.write_obj(flags);
    }
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

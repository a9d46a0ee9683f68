//! The packets of a virtio socket device (virtio 1.2, 5.10.6), and their buffers in guest memory.
//!
//! A packet is a 44-byte header and a payload. The guest may spread both over any number of descriptors (Linux does so
//! for zero-copy sends), so a chain is turned into a list of checked slices first, and everything else works on that list. The
//! header is copied once: what was checked is what is used, whatever the guest writes meanwhile.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, GuestMemoryMmap, VolatileSlice};

/// Length of `struct virtio_vsock_hdr`.
pub const HEADER_LEN: usize = 44;

/// The host's context identifier (virtio 1.2, 5.10.4).
pub const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the one socket type offered.
pub const TYPE_STREAM: u16 = 1;

/// Longest payload of one packet, in either direction: Linux's `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// Most slices of one chain. Twice what Linux needs for a packet of [`MAX_PAYLOAD`] in single pages.
const MAX_SLICES: usize = 40;

/// Values of the header's `op` field.
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts a connection.
    pub const RESPONSE: u16 = 2;
    /// Refuses or ends a connection.
    pub const RST: u16 = 3;
    /// Announces that its sender will not receive, or not send, any more.
    pub const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub const RW: u16 = 5;
    /// Tells the peer what its sender has consumed.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for a `CREDIT_UPDATE`.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flag of `SHUTDOWN`: the sender will not receive any more.
pub const SHUTDOWN_RCV: u32 = 1;
/// Flag of `SHUTDOWN`: the sender will not send any more.
pub const SHUTDOWN_SEND: u32 = 2;

/// `struct virtio_vsock_hdr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Context identifier of the sender.
    pub src_cid: u64,
    /// Context identifier of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Length of the payload.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// Operation, one of [`op`].
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Size of the sender's receive buffer.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of its receive buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Decodes a header.
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Encodes a header.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, &self.src_cid.to_le_bytes());
        put(&mut rest, &self.dst_cid.to_le_bytes());
        put(&mut rest, &self.src_port.to_le_bytes());
        put(&mut rest, &self.dst_port.to_le_bytes());
        put(&mut rest, &self.len.to_le_bytes());
        put(&mut rest, &self.kind.to_le_bytes());
        put(&mut rest, &self.op.to_le_bytes());
        put(&mut rest, &self.flags.to_le_bytes());
        put(&mut rest, &self.buf_alloc.to_le_bytes());
        put(&mut rest, &self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The `RST` that refuses this packet. Its socket type is the packet's own, as its sender knows no other.
    pub fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// Cuts `N` bytes off the front. Only called with as many bytes left as the header's layout says.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let mut out = [0; N];
    if let Some((front, back)) = rest.split_at_checked(N) {
        out.copy_from_slice(front);
        *rest = back;
    }
    out
}

/// The reverse of [`take`].
fn put(rest: &mut &mut [u8], bytes: &[u8]) {
    if let Some((front, back)) = std::mem::take(rest).split_at_mut_checked(bytes.len()) {
        front.copy_from_slice(bytes);
        *rest = back;
    }
}

/// A descriptor chain that can't hold a packet: too short, too many pieces, or outside of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadChain;

/// The bytes of one descriptor chain, checked to lie in guest memory.
#[derive(Debug, Default)]
pub struct Buffer<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Buffer<'m> {
    /// The device-readable bytes of a chain.
    pub fn readable<M>(
        mem: &'m GuestMemoryMmap,
        chain: DescriptorChain<M>,
    ) -> Result<Self, BadChain>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        Self::collect(mem, chain.readable())
    }

    /// The device-writable bytes of a chain.
    pub fn writable<M>(
        mem: &'m GuestMemoryMmap,
        chain: DescriptorChain<M>,
    ) -> Result<Self, BadChain>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        Self::collect(mem, chain.writable())
    }

    fn collect(
        mem: &'m GuestMemoryMmap,
        descriptors: impl Iterator<Item = virtio_queue::desc::split::Descriptor>,
    ) -> Result<Self, BadChain> {
        let mut buffer = Self {
            slices: Vec::with_capacity(2),
            len: 0,
        };
        for descriptor in descriptors {
            for slice in mem.get_slices(descriptor.addr(), descriptor.len() as usize) {
                let slice = slice.map_err(|_| BadChain)?;
                if buffer.slices.len() == MAX_SLICES {
                    return Err(BadChain);
                }
                buffer.len += slice.len();
                buffer.slices.push(slice);
            }
        }
        Ok(buffer)
    }

    /// A buffer of one piece.
    #[cfg(test)]
    pub fn from_slice(slice: VolatileSlice<'m>) -> Self {
        let mut buffer = Self::default();
        buffer.push(slice);
        buffer
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Splits the buffer in two at `at`, which must not be beyond its end.
    pub fn split_at(self, at: usize) -> Result<(Self, Self), BadChain> {
        if at > self.len {
            return Err(BadChain);
        }
        let (mut front, mut back) = (Self::default(), Self::default());
        let mut left = at;
        for slice in self.slices {
            let mid = left.min(slice.len());
            left -= mid;
            let (head, tail) = slice.split_at(mid).map_err(|_| BadChain)?;
            front.push(head);
            back.push(tail);
        }
        Ok((front, back))
    }

    /// Cuts off what is beyond `len` bytes.
    pub fn truncate(self, len: usize) -> Result<Self, BadChain> {
        if len >= self.len {
            return Ok(self);
        }
        Ok(self.split_at(len)?.0)
    }

    fn push(&mut self, slice: VolatileSlice<'m>) {
        if !slice.is_empty() {
            self.len += slice.len();
            self.slices.push(slice);
        }
    }

    /// Copies the first bytes out; returns how many.
    pub fn copy_to(&self, mut out: &mut [u8]) -> usize {
        let mut copied = 0;
        for slice in &self.slices {
            let n = slice.copy_to(out);
            copied += n;
            out = &mut out[n..];
        }
        copied
    }

    /// Copies the bytes into two places, one after the other; returns how many.
    pub fn copy_to_pair(&self, mut first: &mut [u8], mut second: &mut [u8]) -> usize {
        let mut copied = 0;
        for slice in &self.slices {
            let n = slice.copy_to(first);
            first = &mut first[n..];
            copied += n;
            if let Ok(rest) = slice.offset(n) {
                let n = rest.copy_to(second);
                second = &mut second[n..];
                copied += n;
            }
        }
        copied
    }

    /// Copies bytes in, as many as there is room for.
    pub fn copy_from(&self, mut bytes: &[u8]) {
        for slice in &self.slices {
            let n = bytes.len().min(slice.len());
            slice.copy_from(&bytes[..n]);
            bytes = &bytes[n..];
        }
    }

    /// Appends the buffer's pieces to a list for `readv` or `sendmsg`. The list must not outlive the buffer's guest memory.
    pub fn append_iovecs(&self, list: &mut Vec<libc::iovec>) {
        list.extend(
            self.slices
                .iter()
                .filter(|slice| !slice.is_empty())
                .map(|slice| libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                }),
        );
    }
}

/// Reads the header of a packet that the guest sends; returns it with the payload that it announces.
pub fn parse<'m, M>(
    mem: &'m GuestMemoryMmap,
    chain: DescriptorChain<M>,
) -> Result<(Header, Result<Buffer<'m>, BadChain>), BadChain>
where
    M: Deref<Target = GuestMemoryMmap>,
{
    let (head, payload) = Buffer::readable(mem, chain)?.split_at(HEADER_LEN)?;
    let mut bytes = [0; HEADER_LEN];
    head.copy_to(&mut bytes);
    let header = Header::from_bytes(&bytes);
    let len = header.len as usize;
    let payload = if len > MAX_PAYLOAD || len > payload.len() {
        Err(BadChain)
    } else {
        payload.truncate(len)
    };
    Ok((header, payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_round_trip_and_has_the_layout_of_the_specification() {
        let header = Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: 0x1122_3344,
            dst_port: 1024,
            len: 5,
            kind: TYPE_STREAM,
            op: op::RW,
            flags: 0x55,
            buf_alloc: 0xdead_beef,
            fwd_cnt: 0x0102_0304,
        };
        let bytes = header.to_bytes();
        assert_eq!(Header::from_bytes(&bytes), header);
        assert_eq!(bytes[0], 3);
        assert_eq!(bytes[8], 2);
        assert_eq!(bytes[16..20], [0x44, 0x33, 0x22, 0x11]);
        assert_eq!(bytes[24], 5);
        assert_eq!(bytes[28], 1);
        assert_eq!(bytes[30], 5);
        assert_eq!(bytes[40..], [4, 3, 2, 1]);
    }
}

//! A byte queue that is bounded, takes no memory while it is empty, and lends its content as two slices.

use super::packet::Buffer;

/// Smallest allocation.
const MIN_CAPACITY: usize = 4096;

/// The byte queue. Its capacity is a power of two once it holds something.
#[derive(Debug, Default)]
pub struct ByteRing {
    storage: Vec<u8>,
    start: usize,
    len: usize,
}

impl ByteRing {
    /// Number of bytes held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Drops the content and gives the memory back.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Appends the content of a guest buffer.
    pub fn push(&mut self, buffer: &Buffer<'_>) {
        self.reserve(buffer.len());
        let capacity = self.storage.len();
        if capacity == 0 {
            return;
        }
        let end = (self.start + self.len) % capacity;
        let room = (capacity - end).min(buffer.len());
        let (front, back) = self.storage.split_at_mut(end);
        // The guest may write to the buffer while it is copied, so one pass over it must fill both pieces.
        let copied = buffer.copy_to_pair(&mut back[..room], front);
        self.len += copied;
    }

    /// The content, in order.
    pub fn as_slices(&self) -> (&[u8], &[u8]) {
        let first = (self.storage.len() - self.start).min(self.len);
        (
            &self.storage[self.start..self.start + first],
            &self.storage[..self.len - first],
        )
    }

    /// Removes `count` bytes from the front.
    pub fn consume(&mut self, count: usize) {
        let count = count.min(self.len);
        self.len -= count;
        if self.len == 0 {
            self.clear();
        } else {
            self.start = (self.start + count) % self.storage.len();
        }
    }

    fn reserve(&mut self, more: usize) {
        let needed = self.len + more;
        if needed <= self.storage.len() {
            return;
        }
        let mut storage = Vec::with_capacity(needed.next_power_of_two().max(MIN_CAPACITY));
        let (first, second) = self.as_slices();
        storage.extend_from_slice(first);
        storage.extend_from_slice(second);
        storage.resize(storage.capacity(), 0);
        self.storage = storage;
        self.start = 0;
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

    use super::*;

    #[test]
    fn bytes_come_out_in_order_across_the_wrap() {
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let pattern: Vec<u8> = (0..0x10000u32).map(|i| (i % 251) as u8).collect();
        mem.write_slice(&pattern, GuestAddress(0)).unwrap();

        let mut ring = ByteRing::default();
        let (mut written, mut read) = (0usize, 0usize);
        for step in 0..200usize {
            let len = (step * 37) % 700;
            let buffer =
                Buffer::from_slice(mem.get_slice(GuestAddress(written as u64), len).unwrap());
            ring.push(&buffer);
            written += len;
            let (first, second) = ring.as_slices();
            let held: Vec<u8> = [first, second].concat();
            assert_eq!(held, &pattern[read..written]);
            let take = (step * 53) % 600;
            let take = take.min(ring.len());
            ring.consume(take);
            read += take;
            if written > 0xf000 {
                break;
            }
        }
        ring.consume(usize::MAX);
        assert!(ring.is_empty());
        assert_eq!(ring.storage.capacity(), 0, "an empty ring holds no memory");
    }
}

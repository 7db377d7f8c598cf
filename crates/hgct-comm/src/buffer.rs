//! Memory of messages: what is sent, where arrivals land, and the pool between.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use crate::sync::locked;

/// Alignment of every buffer: a cache line, and what SIMD loads and frameworks like best.
pub const ALIGNMENT: usize = 64;

/// Smallest buffer the pool hands out; smaller requests share its size class.
const SMALLEST_BYTES: usize = 256;

/// Zeroed memory of its own, aligned to [`ALIGNMENT`].
#[derive(Debug)]
struct Block {
    start: NonNull<u8>,
    capacity: usize,
}

// SAFETY: a block owns its memory alone; nothing in it is tied to a thread.
unsafe impl Send for Block {}
// SAFETY: shared access only reads.
unsafe impl Sync for Block {}

impl Block {
    fn new(capacity: usize) -> Self {
        let layout = Self::layout(capacity);
        // SAFETY: the layout's size is not zero: every class has at least `SMALLEST_BYTES`.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start, capacity }
    }

    fn layout(capacity: usize) -> Layout {
        match Layout::from_size_align(capacity, ALIGNMENT) {
            Ok(layout) => layout,
            Err(error) => panic!("a message buffer of {capacity} bytes has no layout: {error}"),
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: `start` came from `alloc_zeroed` with this very layout and is freed once.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.capacity)) }
    }
}

/// Buffers kept for reuse, by size class, up to a limit of idle bytes.
///
/// Fresh memory costs a page fault every 4 KiB, which is as dear as the copy into it.
#[derive(Debug)]
pub struct Pool {
    idle: Mutex<Idle>,
    limit_bytes: usize,
}

#[derive(Debug, Default)]
struct Idle {
    classes: BTreeMap<usize, Vec<Block>>,
    bytes: usize,
}

impl Pool {
    /// A pool that keeps at most `limit_bytes` of idle buffers.
    pub fn new(limit_bytes: usize) -> Arc<Self> {
        Arc::new(Self { idle: Mutex::default(), limit_bytes })
    }

    /// A buffer of `len` bytes with arbitrary contents; it returns to the pool on drop.
    pub fn take(self: &Arc<Self>, len: usize) -> PooledBuffer {
        let capacity = size_class(len);
        let reused = {
            let mut idle = locked(&self.idle);
            let block = idle.classes.get_mut(&capacity).and_then(Vec::pop);
            if block.is_some() {
                idle.bytes -= capacity;
            }
            block
        };
        let block = reused.unwrap_or_else(|| Block::new(capacity));
        PooledBuffer { block: Some(block), len, pool: Arc::clone(self) }
    }

    fn give_back(&self, block: Block) {
        let mut idle = locked(&self.idle);
        if idle.bytes + block.capacity <= self.limit_bytes {
            idle.bytes += block.capacity;
            idle.classes.entry(block.capacity).or_default().push(block);
        }
    }

    /// Bytes of idle buffers.
    pub fn idle_bytes(&self) -> usize {
        locked(&self.idle).bytes
    }
}

/// Eight classes between a power of two and the next: an eighth too much at most.
fn size_class(len: usize) -> usize {
    let len = len.max(SMALLEST_BYTES);
    let step = (len.next_power_of_two() / 16).max(ALIGNMENT);
    len.next_multiple_of(step)
}

/// A buffer of a [`Pool`], aligned to [`ALIGNMENT`] bytes.
#[derive(Debug)]
pub struct PooledBuffer {
    /// Only `None` while being dropped.
    block: Option<Block>,
    len: usize,
    pool: Arc<Pool>,
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.pool.give_back(block);
        }
    }
}

impl Deref for PooledBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.block {
            // SAFETY: the block has at least `len` initialised bytes (zeroed when made, only
            // written since) and lives as long as `self`.
            Some(block) => unsafe { std::slice::from_raw_parts(block.start.as_ptr(), self.len) },
            None => &[],
        }
    }
}

impl DerefMut for PooledBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.block {
            // SAFETY: as in `deref`, and `self` is borrowed exclusively.
            Some(block) => unsafe { std::slice::from_raw_parts_mut(block.start.as_ptr(), self.len) },
            None => &mut [],
        }
    }
}

/// Memory that leaves: owned, or a lease that others hold too, so that gradients need no copy.
#[derive(Clone)]
#[non_exhaustive]
pub enum SendBuffer {
    /// Bytes of its own.
    Bytes(Arc<Vec<u8>>),
    /// Floats of its own, sent as they lie in memory.
    Floats(Arc<Vec<f32>>),
    /// Memory of another owner, which must not change while the lease is held.
    Lease(Arc<dyn AsRef<[u8]> + Send + Sync>),
}

impl SendBuffer {
    /// A lease on memory of another owner.
    pub fn lease<T: AsRef<[u8]> + Send + Sync + 'static>(owner: Arc<T>) -> Self {
        Self::Lease(owner)
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Floats(floats) => f32_bytes(floats),
            Self::Lease(owner) => (**owner).as_ref(),
        }
    }
}

impl std::fmt::Debug for SendBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SendBuffer({} bytes)", self.as_bytes().len())
    }
}

impl From<Vec<u8>> for SendBuffer {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(Arc::new(bytes))
    }
}

impl From<Vec<f32>> for SendBuffer {
    fn from(floats: Vec<f32>) -> Self {
        Self::Floats(Arc::new(floats))
    }
}

impl From<Arc<Vec<f32>>> for SendBuffer {
    fn from(floats: Arc<Vec<f32>>) -> Self {
        Self::Floats(floats)
    }
}

impl From<Arc<Vec<u8>>> for SendBuffer {
    fn from(bytes: Arc<Vec<u8>>) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<PooledBuffer> for SendBuffer {
    fn from(buffer: PooledBuffer) -> Self {
        Self::Lease(Arc::new(buffer))
    }
}

impl AsRef<[u8]> for PooledBuffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

// Payloads are the memory image of little-endian numbers; a big-endian host would have to swap.
const _: () = assert!(cfg!(target_endian = "little"), "hgct-comm needs a little-endian host");

/// The bytes of floats, as they lie in memory.
pub fn f32_bytes(floats: &[f32]) -> &[u8] {
    // SAFETY: floats have no padding, u8 has alignment 1, and the length is that of the same
    // memory in bytes.
    unsafe { std::slice::from_raw_parts(floats.as_ptr().cast(), size_of_val(floats)) }
}

/// The same, to be written.
pub fn f32_bytes_mut(floats: &mut [f32]) -> &mut [u8] {
    // SAFETY: as in `f32_bytes`; every bit pattern is a float.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), size_of_val(floats)) }
}

/// Bytes as floats: `None` unless they are aligned to 4 and a multiple of 4.
pub fn bytes_f32(bytes: &[u8]) -> Option<&[f32]> {
    // SAFETY: every bit pattern is a float.
    let (before, floats, after) = unsafe { bytes.align_to::<f32>() };
    (before.is_empty() && after.is_empty()).then_some(floats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_come_back() {
        let pool = Pool::new(1 << 20);
        let mut first = pool.take(1000);
        assert_eq!(first.len(), 1000);
        assert_eq!(first.as_ptr() as usize % ALIGNMENT, 0);
        first.fill(7);
        let address = first.as_ptr();
        drop(first);
        assert_eq!(pool.idle_bytes(), 1024);
        let again = pool.take(970);
        assert_eq!(again.as_ptr(), address, "the same class is reused");
        assert_eq!(pool.idle_bytes(), 0);
    }

    #[test]
    fn no_class_is_an_eighth_too_large() {
        for len in (1024..70_000).chain([1 << 24, (1 << 24) + 1]) {
            let class = size_class(len);
            assert!(
                class >= len && class - len <= len / 8 && class.is_multiple_of(ALIGNMENT),
                "{len}: {class}"
            );
            assert_eq!(size_class(class), class);
        }
    }

    #[test]
    fn the_pool_keeps_no_more_than_its_limit() {
        let pool = Pool::new(4096);
        let buffers: Vec<_> = (0..4).map(|_| pool.take(2048)).collect();
        drop(buffers);
        assert_eq!(pool.idle_bytes(), 4096);
        drop(pool.take(0));
        assert_eq!(pool.idle_bytes(), 4096);
    }

    #[test]
    fn floats_and_bytes_are_one_memory() {
        let mut floats = vec![1.5f32, -2.0, f32::NAN];
        let bytes = f32_bytes(&floats).to_vec();
        assert_eq!(bytes.len(), 12);
        f32_bytes_mut(&mut floats).copy_from_slice(&bytes);
        assert_eq!(floats[..2], [1.5, -2.0]);
        let pool = Pool::new(0);
        let mut buffer = pool.take(12);
        buffer.copy_from_slice(&bytes);
        assert_eq!(bytes_f32(&buffer).map(|f| f[1]), Some(-2.0));
        assert!(bytes_f32(&buffer[1..9]).is_none());
        assert!(bytes_f32(&buffer[..7]).is_none());
    }
}

//! Two byte rings in memory that two processes share.
//!
//! ```text
//! 0     cookie, ring size │ 256  control of ring 0 │ 512  control of ring 1 │ 4096  data 0 │ data 1
//!                           control: tail │ reader waits │ head │ writer waits, a cache line each
//! ```
//!
//! One process writes a ring and one reads it. `tail` counts bytes ever written, `head` bytes ever
//! read; the difference is what the ring holds. Who finds nothing to do sets its `waits` word and
//! sleeps on it (a futex); the other clears it and wakes. Nobody spins: a worker's cores have better
//! things to do.
//!
//! - RING-1 `tail` is stored with release after the bytes are written, loaded with acquire before they
//!   are read; `head` the other way round.
//! - RING-2 A side that sleeps stores `waits = 1`, then looks again; a side that moves a count stores
//!   it, then looks at `waits`. All four are sequentially consistent, so one of them sees the other.
//! - RING-3 Counts come from another process: a difference above the ring's size ends the connection.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use rustix::fs::{
    MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
    open, readlink,
};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::thread::futex;

use crate::handshake::Offer;
use crate::time::timespec;

/// Name of the shared memory, by which the other side knows that it opens nothing else.
const NAME: &str = "hgct-ring";
/// Bytes before the data.
const CONTROL_BYTES: usize = 4096;
/// Largest ring that is taken.
const MAX_RING_BYTES: u64 = 1 << 30;
/// Bytes moved before the other side hears of them, so that both sides copy at once.
const CHUNK_BYTES: usize = 128 << 10;
/// A sleep that nobody ends is looked at again after this time.
const SLEEP: Duration = Duration::from_hours(1);

/// The mapped memory of a pair of rings.
pub(crate) struct Rings {
    start: NonNull<u8>,
    ring_bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; it is read and written only through
// atomics and raw copies, ordered as in RING-1.
unsafe impl Send for Rings {}
// SAFETY: as above; each ring has one writer and one reader at a time.
unsafe impl Sync for Rings {}

/// Rings that were offered and not answered yet.
pub(crate) struct Offered {
    pub(crate) rings: Rings,
    pub(crate) offer: Offer,
    /// Held open so that the other side can open it by its number.
    _memory: OwnedFd,
}

impl Rings {
    /// Makes shared memory and says how the other side finds it.
    pub(crate) fn offer(ring_bytes: usize, cookie: [u8; 32]) -> io::Result<Offered> {
        let memory = memfd_create(NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&memory, (CONTROL_BYTES + 2 * ring_bytes) as u64)?;
        // Nobody can take pages away from under the other side.
        fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let rings = Self::map(&memory, ring_bytes)?;
        // SAFETY: the control block is mapped, and nobody else has the memory yet.
        unsafe {
            rings.start.as_ptr().copy_from_nonoverlapping(cookie.as_ptr(), cookie.len());
        }
        let offer = Offer {
            process: std::process::id(),
            descriptor: memory.as_raw_fd() as u32,
            ring_bytes: ring_bytes as u64,
            cookie,
        };
        Ok(Offered { rings, offer, _memory: memory })
    }

    /// Opens what the other side offers. Fails where that is not to be had here: another process
    /// namespace, another user, no such memory.
    pub(crate) fn take(offer: &Offer) -> io::Result<Self> {
        let unfit = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        let ring_bytes = offer.ring_bytes;
        if offer.process == 0 || !ring_bytes.is_power_of_two() || ring_bytes > MAX_RING_BYTES {
            return unfit("no rings were offered");
        }
        let path = format!("/proc/{}/fd/{}", offer.process, offer.descriptor);
        let target = readlink(path.as_str(), Vec::new())?;
        if !target.to_bytes().starts_with(format!("/memfd:{NAME}").as_bytes()) {
            return unfit("the offered file is something else");
        }
        let memory: File = open(path.as_str(), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?.into();
        let expected = CONTROL_BYTES as u64 + 2 * ring_bytes;
        if fstat(&memory)?.st_size as u64 != expected {
            return unfit("the offered memory has another size");
        }
        if !fcntl_get_seals(&memory)?.contains(SealFlags::SHRINK) {
            return unfit("the offered memory could shrink");
        }
        let rings = Self::map(&memory, ring_bytes as usize)?;
        let mut cookie = [0; 32];
        // SAFETY: the control block is mapped; the offering side wrote it before it offered.
        unsafe {
            rings.start.as_ptr().copy_to_nonoverlapping(cookie.as_mut_ptr(), cookie.len());
        }
        if cookie != offer.cookie {
            return unfit("the offered memory belongs to another connection");
        }
        Ok(rings)
    }

    fn map(memory: &impl AsFd, ring_bytes: usize) -> io::Result<Self> {
        let bytes = CONTROL_BYTES + 2 * ring_bytes;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                memory,
                0,
            )?
        };
        match NonNull::new(start.cast()) {
            Some(start) => Ok(Self { start, ring_bytes }),
            None => Err(io::Error::other("shared memory was mapped at address zero")),
        }
    }

    /// One ring; `index` is 0 or 1.
    pub(crate) fn ring(&self, index: usize) -> Ring<'_> {
        Ring { rings: self, index: index & 1 }
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this size and nothing borrows from it any more.
        // It fails for arguments that are no mapping only.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), CONTROL_BYTES + 2 * self.ring_bytes) };
    }
}

/// One direction.
#[derive(Clone, Copy)]
pub(crate) struct Ring<'a> {
    rings: &'a Rings,
    index: usize,
}

/// Which side sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Reader,
    Writer,
}

impl<'a> Ring<'a> {
    /// Copies what fits of `bytes` and says how much that was.
    pub(crate) fn write(self, bytes: &[u8]) -> io::Result<usize> {
        let (held, _, tail) = self.counts()?;
        let count = bytes.len().min(self.size() - held).min(CHUNK_BYTES);
        if count == 0 {
            return Ok(0);
        }
        let at = tail as usize & (self.size() - 1);
        let first = count.min(self.size() - at);
        // SAFETY: both parts lie inside this ring's data, and the reader does not look at bytes that
        // `tail` does not cover yet (RING-1); `bytes` is ours and cannot overlap the mapping.
        unsafe {
            self.data().add(at).copy_from_nonoverlapping(bytes.as_ptr(), first);
            self.data().copy_from_nonoverlapping(bytes.as_ptr().add(first), count - first);
        }
        self.count(0).store(tail + count as u64, Ordering::Release);
        self.wake_if_waiting(Side::Reader);
        Ok(count)
    }

    /// Copies what there is into `bytes` and says how much that was.
    pub(crate) fn read(self, bytes: &mut [u8]) -> io::Result<usize> {
        let (held, head, _) = self.counts()?;
        let count = bytes.len().min(held).min(CHUNK_BYTES);
        if count == 0 {
            return Ok(0);
        }
        let at = head as usize & (self.size() - 1);
        let first = count.min(self.size() - at);
        // SAFETY: both parts lie inside this ring's data and below `tail`, so the writer leaves them
        // alone until `head` has passed them (RING-1). A peer that writes all the same changes only
        // the values of these bytes.
        unsafe {
            bytes.as_mut_ptr().copy_from_nonoverlapping(self.data().add(at), first);
            bytes.as_mut_ptr().add(first).copy_from_nonoverlapping(self.data(), count - first);
        }
        self.count(128).store(head + count as u64, Ordering::Release);
        // A writer is woken for a good part of the ring, not for every piece.
        if self.size() - held + count >= self.size() / 4 {
            self.wake_if_waiting(Side::Writer);
        }
        Ok(count)
    }

    /// Sleeps until the side can go on: the reader when the ring holds something, the writer when a
    /// quarter of it, or `needed` bytes, are free. Returns early when `stop` says so.
    pub(crate) fn sleep(self, side: Side, needed: usize, stop: impl Fn() -> bool) -> io::Result<()> {
        let word = self.waits(side);
        loop {
            word.store(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            let (held, ..) = self.counts()?;
            let ready = match side {
                Side::Reader => held > 0,
                Side::Writer => self.size() - held >= needed.min(self.size() / 4),
            };
            if ready || stop() {
                word.store(0, Ordering::SeqCst);
                return Ok(());
            }
            match futex::wait(word, futex::Flags::empty(), 1, Some(&timespec(SLEEP))) {
                Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Ends the sleep of whoever waits on this ring, here or in the other process.
    pub(crate) fn wake_all(self) {
        for side in [Side::Reader, Side::Writer] {
            self.waits(side).store(0, Ordering::SeqCst);
            // It fails for addresses that are not mapped only.
            let _ = futex::wake(self.waits(side), futex::Flags::empty(), i32::MAX as u32);
        }
    }

    fn wake_if_waiting(self, side: Side) {
        fence(Ordering::SeqCst);
        let word = self.waits(side);
        if word.load(Ordering::SeqCst) == 1 && word.swap(0, Ordering::SeqCst) == 1 {
            // As in `wake_all`.
            let _ = futex::wake(word, futex::Flags::empty(), 1);
        }
    }

    fn size(self) -> usize {
        self.rings.ring_bytes
    }

    /// Bytes held, head and tail.
    fn counts(self) -> io::Result<(usize, u64, u64)> {
        let tail = self.count(0).load(Ordering::Acquire);
        let head = self.count(128).load(Ordering::Acquire);
        // The counts are loaded one after the other: the side that calls moves one of them itself,
        // so the difference can only be too cautious. Beyond the size it is nonsense (RING-3).
        let held = tail.wrapping_sub(head);
        if held > self.size() as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the ring's counts are damaged"));
        }
        Ok((held as usize, head, tail))
    }

    fn data(self) -> *mut u8 {
        // SAFETY: the data of ring `index` lies inside the mapping.
        unsafe { self.rings.start.as_ptr().add(CONTROL_BYTES + self.index * self.size()) }
    }

    fn count(self, at: usize) -> &'a AtomicU64 {
        // SAFETY: as in `waits`, and aligned to 8.
        unsafe { AtomicU64::from_ptr(self.control(at).cast()) }
    }

    fn waits(self, side: Side) -> &'a AtomicU32 {
        let at = match side {
            Side::Reader => 64,
            Side::Writer => 192,
        };
        // SAFETY: the word lies in the control block, aligned to 4, and is only used as an atomic
        // by both processes. The reference lives no longer than the mapping is borrowed.
        unsafe { AtomicU32::from_ptr(self.control(at).cast()) }
    }

    fn control(self, at: usize) -> *mut u8 {
        // SAFETY: 256 + 256 + 192 + 8 is below the size of the control block.
        unsafe { self.rings.start.as_ptr().add(256 * (1 + self.index) + at) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    fn pair(ring_bytes: usize) -> (Rings, Rings) {
        let offered = Rings::offer(ring_bytes, [7; 32]).unwrap();
        let taken = Rings::take(&offered.offer).unwrap();
        (offered.rings, taken)
    }

    #[test]
    fn only_what_was_offered_is_opened() {
        let offered = Rings::offer(4096, [7; 32]).unwrap();
        let fails = |offer: Offer| assert!(Rings::take(&offer).is_err(), "{offer:?} was taken");
        fails(Offer::NONE);
        fails(Offer { cookie: [8; 32], ..offered.offer });
        fails(Offer { ring_bytes: 8192, ..offered.offer });
        fails(Offer { ring_bytes: 5000, ..offered.offer });
        fails(Offer { ring_bytes: 1 << 40, ..offered.offer });
        fails(Offer { descriptor: 0, ..offered.offer });
        fails(Offer { descriptor: 9999, ..offered.offer });
        fails(Offer { process: u32::MAX, ..offered.offer });
        let file = tempfile_like();
        fails(Offer { descriptor: file.as_raw_fd() as u32, ..offered.offer });
    }

    fn tempfile_like() -> OwnedFd {
        memfd_create("other", MemfdFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn damaged_counts_are_an_error() {
        let (one, other) = pair(4096);
        one.ring(0).count(0).store(5000, Ordering::SeqCst);
        assert!(other.ring(0).read(&mut [0; 8]).is_err());
        assert!(one.ring(0).write(&[0; 8]).is_err());
        assert!(other.ring(0).sleep(Side::Reader, 1, || false).is_err());
        assert_eq!(other.ring(1).read(&mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn a_sleeper_is_woken_to_stop() {
        let (one, _other) = pair(4096);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for side in [Side::Reader, Side::Writer] {
                let (one, stop) = (&one, &stop);
                if side == Side::Writer {
                    while one.ring(1).write(&[1; 4096]).unwrap() > 0 {}
                }
                let ring = one.ring(usize::from(side == Side::Writer));
                scope.spawn(move || ring.sleep(side, 4096, || stop.load(Ordering::SeqCst)));
            }
            stop.store(true, Ordering::SeqCst);
            one.ring(0).wake_all();
            one.ring(1).wake_all();
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn bytes_come_out_as_they_went_in(
            sizes in prop::collection::vec(0usize..20_000, 1..30),
            read_sizes in prop::collection::vec(1usize..9_000, 1..30),
        ) {
            let (writer, reader) = pair(8192);
            let total: usize = sizes.iter().sum();
            let sent: Vec<u8> = (0..total).map(|i| (i * 7 + i / 251) as u8).collect();
            let received = thread::scope(|scope| {
                let sent = &sent;
                let sizes = &sizes;
                let writer = &writer;
                scope.spawn(move || {
                    let mut from = 0;
                    for size in sizes {
                        let end = from + size;
                        while from < end {
                            let ring = writer.ring(0);
                            let wrote = ring.write(&sent[from..end]).unwrap();
                            if wrote == 0 {
                                ring.sleep(Side::Writer, end - from, || false).unwrap();
                            }
                            from += wrote;
                        }
                    }
                });
                let mut received = vec![0; total];
                let mut at = 0;
                for size in read_sizes.iter().cycle() {
                    if at == total {
                        break;
                    }
                    let end = total.min(at + size);
                    let read = reader.ring(0).read(&mut received[at..end]).unwrap();
                    if read == 0 {
                        reader.ring(0).sleep(Side::Reader, 1, || false).unwrap();
                    }
                    at += read;
                }
                received
            });
            prop_assert!(received == sent);
        }
    }
}

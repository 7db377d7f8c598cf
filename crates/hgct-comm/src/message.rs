//! A message that has arrived.

use std::fmt;
use std::ops::{Deref, DerefMut};

use hgct_core::ids::Rank;

use crate::buffer::{PooledBuffer, bytes_f32};
use crate::tag::Tag;
use crate::ticket::Times;

/// A received message: its bytes, aligned to 64, which return to the pool on drop.
pub struct Received {
    peer: Rank,
    tag: Tag,
    payload: PooledBuffer,
    times: Times,
}

impl Received {
    pub(crate) fn new(peer: Rank, tag: Tag, payload: PooledBuffer, times: Times) -> Self {
        Self { peer, tag, payload, times }
    }

    /// Who sent it.
    pub fn peer(&self) -> Rank {
        self.peer
    }

    /// What it is about.
    pub fn tag(&self) -> Tag {
        self.tag
    }

    /// When it moved.
    pub fn times(&self) -> Times {
        self.times
    }

    /// Its bytes as floats; `None` where they are no multiple of four.
    pub fn as_f32(&self) -> Option<&[f32]> {
        bytes_f32(&self.payload)
    }
}

impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Received({} from {}, {} bytes)", self.tag, self.peer, self.payload.len())
    }
}

impl Deref for Received {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.payload
    }
}

impl DerefMut for Received {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.payload
    }
}

impl AsRef<[u8]> for Received {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

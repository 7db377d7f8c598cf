//! What moves bytes to one peer, behind one interface.
//!
//! A transport connects two ranks. It takes memory as *registered regions with a memory kind*,
//! never as bare bytes, so that one which must pin memory or can reach a device's memory fits in
//! later. It never makes a sender wait for the wire: a message is queued, and a [`Sink`] hears what
//! became of it. Who drives the wire (two threads for each peer today) is the transport's own matter.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use hgct_core::dtype::MemoryKind;
use hgct_core::ids::Rank;

use crate::buffer::{PooledBuffer, SendBuffer};
use crate::error::Result;
use crate::time::Deadline;
use crate::wire::Header;

/// What a transport can take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Its name: `tcp`, `shared-memory`.
    pub name: &'static str,
    /// The kinds of memory that it sends from.
    pub memory_kinds: Vec<MemoryKind>,
    /// Largest payload of a message.
    pub max_message_bytes: u64,
}

/// Memory that a transport knows and may send from.
#[derive(Debug)]
pub struct Region {
    memory: SendBuffer,
    kind: MemoryKind,
}

impl Region {
    /// Names memory of a kind. Only transports make regions, in [`Transport::register`].
    pub fn new(memory: SendBuffer, kind: MemoryKind) -> Arc<Self> {
        Arc::new(Self { memory, kind })
    }

    /// The kind of its memory.
    pub fn kind(&self) -> &MemoryKind {
        &self.kind
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.memory.as_bytes().len()
    }

    /// All of it.
    pub fn whole(self: &Arc<Self>) -> RegionRange {
        RegionRange { region: Arc::clone(self), range: 0..self.bytes() }
    }

    /// A part of it; `None` where it does not reach so far.
    pub fn part(self: &Arc<Self>, range: Range<usize>) -> Option<RegionRange> {
        (range.start <= range.end && range.end <= self.bytes())
            .then(|| RegionRange { region: Arc::clone(self), range })
    }
}

/// A part of a region, held until it has been sent.
#[derive(Debug, Clone)]
pub struct RegionRange {
    region: Arc<Region>,
    range: Range<usize>,
}

impl RegionRange {
    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Its bytes in host memory.
    pub fn as_bytes(&self) -> &[u8] {
        // An owner that shrinks under its lease gives a short message, which the peer refuses.
        self.region.memory.as_bytes().get(self.range.clone()).unwrap_or_default()
    }
}

/// A message on its way out.
#[derive(Debug)]
pub struct Outgoing {
    /// Its header; the transport numbers it.
    pub header: Header,
    /// Its payload.
    pub payload: RegionRange,
    /// The sender's name for it, given back to [`Sink::sent`].
    pub ticket: crate::ticket::SendTicket,
}

impl Outgoing {
    /// A frame without payload, for which nobody waits.
    pub(crate) fn empty(header: Header) -> Self {
        let payload = Region::new(SendBuffer::from(Vec::<u8>::new()), MemoryKind::Host).whole();
        Self { header, payload, ticket: crate::ticket::SendTicket::new() }
    }
}

/// Why a transport did not take a message.
#[derive(Debug)]
#[non_exhaustive]
pub enum SubmitError {
    /// The queue stayed full until the deadline.
    Full {
        /// Bytes in the queue.
        queued_bytes: u64,
        /// Its limit.
        limit_bytes: u64,
    },
    /// The connection has ended.
    Closed,
}

/// One connection to one peer.
pub trait Transport: Send + Sync {
    /// What it can take.
    fn capabilities(&self) -> Capabilities;

    /// Makes memory known to it. Fails with [`Error::Memory`](crate::Error::Memory) for a kind that
    /// it cannot take.
    fn register(&self, memory: SendBuffer, kind: MemoryKind) -> Result<Arc<Region>>;

    /// Takes a message over. Waits for room in the queue at most until the deadline, never for the
    /// wire; the memory is held until [`Sink::sent`].
    fn submit(&self, message: Outgoing, deadline: Deadline) -> Result<(), SubmitError>;

    /// Drops every message that has not begun to leave and takes no more; its memory is released.
    fn cancel(&self);

    /// Waits until everything queued has left, or until the deadline; says whether it has.
    fn flush(&self, deadline: Deadline) -> bool;

    /// Ends the connection at once in both directions; every wait inside ends. Idempotent.
    fn shut_down(&self);

    /// After [`Transport::shut_down`]: waits for its threads; says whether they ended in time.
    fn join(&self, deadline: Deadline) -> bool;
}

/// Who hears what a transport does. Its methods are called from the transport's threads.
pub trait Sink: Send + Sync {
    /// A header has come: checks it and gives the memory for its payload. An error in words ends the
    /// connection. May wait, which holds the peer back.
    fn begin(&self, peer: Rank, header: &Header) -> Result<PooledBuffer, String>;

    /// A message is complete. `start_ns`: when its header was read.
    fn delivered(&self, peer: Rank, header: &Header, payload: PooledBuffer, start_ns: u64);

    /// A message has left; its memory is free again.
    fn sent(&self, peer: Rank, message: Outgoing, start_ns: u64);

    /// A message was dropped unsent.
    fn dropped(&self, peer: Rank, message: Outgoing);

    /// A send begins or ends to wait for room in its queue. Meanwhile no peer may be held back: it may
    /// be what this send waits for.
    fn send_blocked(&self, blocked: bool);

    /// The connection has ended, or the peer broke the protocol.
    fn lost(&self, peer: Rank, loss: Loss);
}

/// How a connection ended.
#[derive(Debug)]
#[non_exhaustive]
pub enum Loss {
    /// It ended or failed.
    Ended(io::Error),
    /// The peer sent something that is not allowed.
    Protocol(String),
}

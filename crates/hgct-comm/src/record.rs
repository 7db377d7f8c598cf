//! What moved, when: for the timeline, and for communication that compute could not hide.

use hgct_core::ids::Rank;

use crate::tag::Tag;

/// Records kept until they are drained; older ones are dropped and counted.
pub(crate) const MAX_RECORDS: usize = 1 << 18;

/// Which way a message went, seen from this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// From this rank.
    Send,
    /// To this rank.
    Receive,
}

/// One message that has moved. Times are of [`monotonic_ns`](crate::monotonic_ns) on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferRecord {
    /// The other rank.
    pub peer: Rank,
    /// The message.
    pub tag: Tag,
    /// Which way.
    pub direction: Direction,
    /// Bytes of its payload.
    pub bytes: u64,
    /// When it was handed to the sender's communicator; the start, where the sender is on another
    /// host and so has another clock.
    pub queued_ns: u64,
    /// When its first byte moved here.
    pub start_ns: u64,
    /// When it had left for the wire, or could be received.
    pub end_ns: u64,
}

/// Sums over all messages to and from one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PeerStatistics {
    /// Payload bytes sent.
    pub bytes_sent: u64,
    /// Payload bytes received.
    pub bytes_received: u64,
    /// Messages sent.
    pub messages_sent: u64,
    /// Messages received.
    pub messages_received: u64,
    /// Time during which at least one message to this peer was queued or under way.
    pub send_pending_ns: u64,
}

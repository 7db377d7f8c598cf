//! How fast a link is.

use hgct_core::dtype::MemoryKind;
use hgct_core::ids::Rank;

use crate::communicator::Communicator;
use crate::error::{Operation, Result};
use crate::tag::{Tag, TagKind};
use crate::time::{Deadline, monotonic_ns};
use crate::transport::Region;
use crate::wire::FrameKind;

/// Round trips for the latency.
const PINGS: u64 = 31;
/// Messages for the bandwidth, and the size of one.
const BULK: (u64, usize) = (24, 1 << 20);
/// Times the bandwidth is measured.
const ROUNDS: u64 = 3;

/// What [`Communicator::measure_link`] finds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkMeasurement {
    /// Median of half a round trip of an empty message.
    pub latency_ns: u64,
    /// Spread of the same: half the distance between its quartiles.
    pub latency_spread_ns: u64,
    /// Payload rate of large messages, the median of several rounds.
    pub bytes_per_s: u64,
    /// Spread of the rate: half the distance between the slowest and the fastest round.
    pub bytes_per_s_spread: u64,
}

impl Communicator {
    /// Measures the link to a peer, from its transport's queue to the peer's memory and back. The
    /// peer answers without being asked to; both should be otherwise idle.
    pub fn measure_link(&self, peer: Rank, deadline: Deadline) -> Result<LinkMeasurement> {
        let mut round_trips = Vec::with_capacity(PINGS as usize);
        for _ in 0..PINGS {
            round_trips.push(self.ping(peer, deadline)? / 2);
        }
        round_trips.sort_unstable();
        let latency_ns = round_trips[round_trips.len() / 2];
        let quartiles = (round_trips[PINGS as usize / 4], round_trips[PINGS as usize * 3 / 4]);
        let context = self.receive_context(Operation::Measure, peer, None);
        let region = Region::new(vec![0u8; BULK.1].into(), MemoryKind::Host);
        let mut rates = Vec::new();
        // The first round warms buffers and windows up.
        for round in 0..=ROUNDS {
            let begun_ns = monotonic_ns();
            let tag = Tag::new(TagKind::Link, 1, 0, 0);
            for _ in 0..BULK.0 {
                self.submit(peer, FrameKind::Discard, tag, region.whole(), deadline, &context)?;
            }
            self.ping(peer, deadline)?;
            let took_ns = (monotonic_ns() - begun_ns).saturating_sub(latency_ns).max(1);
            if round > 0 {
                let bytes = u128::from(BULK.0) * BULK.1 as u128;
                rates.push((bytes * 1_000_000_000 / u128::from(took_ns)) as u64);
            }
        }
        rates.sort_unstable();
        Ok(LinkMeasurement {
            latency_ns,
            latency_spread_ns: (quartiles.1 - quartiles.0) / 2,
            bytes_per_s: rates[rates.len() / 2],
            bytes_per_s_spread: (rates[rates.len() - 1] - rates[0]) / 2,
        })
    }

    /// One round trip in nanoseconds, behind everything queued.
    fn ping(&self, peer: Rank, deadline: Deadline) -> Result<u64> {
        let begun_ns = monotonic_ns();
        let tag = Tag::new(TagKind::Link, 0, 0, begun_ns);
        let context = self.receive_context(Operation::Measure, peer, Some(tag));
        let nothing = Region::new(Vec::<u8>::new().into(), MemoryKind::Host).whole();
        self.submit(peer, FrameKind::Ping, tag, nothing, deadline, &context)?;
        self.recv_as(&[(peer, tag)], deadline, &context)?;
        Ok(monotonic_ns() - begun_ns)
    }
}

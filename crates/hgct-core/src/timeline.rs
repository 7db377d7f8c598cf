//! Start and end of every action, predicted or measured, in one type.

use serde::{Deserialize, Serialize};

use crate::ids::{DeviceId, Rank};
use crate::schedule::Action;

/// One or more steps of a run, all ranks in the coordinator's time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timeline {
    /// Version of this document's form.
    pub format: u32,
    /// `predicted` or `measured`.
    pub source: TimelineSource,
    /// First step that is in it.
    pub first_step: u64,
    /// A row a rank.
    pub ranks: Vec<RankTimeline>,
}

/// Where a timeline comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TimelineSource {
    /// The simulator.
    Predicted,
    /// A run.
    Measured,
}

/// One rank's part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankTimeline {
    /// The rank.
    pub rank: Rank,
    /// Its device.
    pub device: DeviceId,
    /// What was added to the worker's clock, nanoseconds.
    pub clock_offset_ns: i64,
    /// How far off that may be, nanoseconds.
    pub clock_uncertainty_ns: u64,
    /// What it did, by start.
    pub actions: Vec<ActionSpan>,
    /// What crossed the wire for it, by start.
    pub transfers: Vec<TransferSpan>,
}

/// One action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActionSpan {
    /// Step.
    pub step: u64,
    /// The action.
    pub action: Action,
    /// Start.
    pub start_ns: u64,
    /// End.
    pub end_ns: u64,
}

/// One transfer, as its sender or receiver saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransferSpan {
    /// Step.
    pub step: u64,
    /// The other rank.
    pub peer: Rank,
    /// Whether this rank sent it.
    pub outgoing: bool,
    /// Bytes.
    pub size_bytes: u64,
    /// Queued (sent) or first byte seen (received).
    pub start_ns: u64,
    /// Handed to the wire (sent) or complete (received).
    pub end_ns: u64,
}

impl Timeline {
    /// The current form.
    pub const FORMAT: u32 = 1;

    /// First start and last end over all actions; `None` when empty.
    pub fn span_ns(&self) -> Option<(u64, u64)> {
        let actions = || self.ranks.iter().flat_map(|rank| &rank.actions);
        Some((actions().map(|a| a.start_ns).min()?, actions().map(|a| a.end_ns).max()?))
    }
}

impl RankTimeline {
    /// Nanoseconds in forward and backward actions.
    pub fn compute_ns(&self) -> u64 {
        self.actions.iter().filter(|a| a.action.operation.is_compute()).map(|a| a.end_ns - a.start_ns).sum()
    }

    /// Exposed communication: nanoseconds inside gaps between compute actions during which at
    /// least one transfer of this rank was pending.
    pub fn exposed_communication_ns(&self) -> u64 {
        let mut compute: Vec<(u64, u64)> = self
            .actions
            .iter()
            .filter(|a| a.action.operation.is_compute())
            .map(|a| (a.start_ns, a.end_ns))
            .collect();
        compute.sort_unstable();
        let (Some(first), Some(last)) =
            (self.actions.iter().map(|a| a.start_ns).min(), self.actions.iter().map(|a| a.end_ns).max())
        else {
            return 0;
        };
        let mut pending: Vec<(u64, u64)> =
            self.transfers.iter().map(|t| (t.start_ns.max(first), t.end_ns.min(last))).collect();
        pending.sort_unstable();
        let mut exposed = 0;
        let mut done = 0;
        for (start, end) in pending {
            let start = start.max(done);
            if start >= end {
                continue;
            }
            let busy: u64 = compute.iter().map(|(s, e)| e.min(&end).saturating_sub(*s.max(&start))).sum();
            exposed += (end - start).saturating_sub(busy);
            done = end;
        }
        exposed
    }
}

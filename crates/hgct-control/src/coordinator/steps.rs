//! Which steps are committed: those that all ranks have done and agree on, each once, in order.

use std::collections::{BTreeMap, VecDeque};

use hgct_core::ids::Rank;

use crate::message::StepReport;

/// Reports of steps that are not committed yet.
#[derive(Debug)]
pub(super) struct Steps {
    /// The next step to commit.
    next: u64,
    /// Steps that each rank has reported ahead of it.
    reported: Vec<VecDeque<StepReport>>,
    skipped_in_a_row: u32,
}

/// A committed step.
#[derive(Debug)]
pub(super) struct Committed {
    pub(super) step: u64,
    /// In rank order.
    pub(super) reports: Vec<StepReport>,
    /// Skipped steps in a row, this one included; 0: it was not skipped.
    pub(super) skipped_in_a_row: u32,
}

/// Reports that cannot be.
#[derive(Debug, PartialEq)]
pub(super) enum Fault {
    OutOfOrder { found: u64, expected: u64 },
    Disagreement { step: u64, first: (Rank, String), second: (Rank, String) },
}

impl Steps {
    pub(super) fn new(first: u64, ranks: usize) -> Self {
        Self { next: first, reported: vec![VecDeque::new(); ranks], skipped_in_a_row: 0 }
    }

    /// The next step to commit: that many are trained.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// The step that a rank does next.
    pub(super) fn next_of(&self, rank: Rank) -> u64 {
        self.next + self.reported.get(rank.index()).map_or(0, VecDeque::len) as u64
    }

    /// Takes a report; gives the step that it completes.
    pub(super) fn report(&mut self, rank: Rank, report: StepReport) -> Result<Option<Committed>, Fault> {
        let expected = self.next_of(rank);
        if report.step != expected {
            return Err(Fault::OutOfOrder { found: report.step, expected });
        }
        if let Some(queue) = self.reported.get_mut(rank.index()) {
            queue.push_back(report);
        }
        if self.reported.iter().any(VecDeque::is_empty) {
            return Ok(None);
        }
        let reports: Vec<StepReport> = self.reported.iter_mut().filter_map(VecDeque::pop_front).collect();
        agree(&reports)?;
        let step = self.next;
        self.next += 1;
        let skipped = reports.iter().any(|report| report.skipped);
        self.skipped_in_a_row = if skipped { self.skipped_in_a_row + 1 } else { 0 };
        Ok(Some(Committed { step, reports, skipped_in_a_row: self.skipped_in_a_row }))
    }
}

/// What all ranks must have computed alike, to the bit. No loss that is not a number differs from
/// another.
fn agree(reports: &[StepReport]) -> Result<(), Fault> {
    let Some(first) = reports.first() else { return Ok(()) };
    let bits = |loss: f64| if loss.is_nan() { f64::NAN.to_bits() } else { loss.to_bits() };
    let same = |other: &StepReport| {
        bits(first.loss_sum) == bits(other.loss_sum)
            && first.num_tokens == other.num_tokens
            && first.skipped == other.skipped
    };
    let text = |report: &StepReport| {
        let skipped = if report.skipped { ", skipped" } else { "" };
        format!("a loss sum of {:e} over {} tokens{skipped}", report.loss_sum, report.num_tokens)
    };
    match (0..).map(Rank).zip(reports).find(|(_, report)| !same(report)) {
        None => Ok(()),
        Some((rank, other)) => Err(Fault::Disagreement {
            step: first.step,
            first: (Rank(0), text(first)),
            second: (rank, text(other)),
        }),
    }
}

/// How far a worker's clock is from the coordinator's, from its beats: the beat with the smallest
/// difference of times travelled fastest (the clock filter of NTP, RFC 5905 section 10, one way).
#[derive(Debug, Clone, Default)]
pub(super) struct Clock {
    least: Option<i64>,
    recent: VecDeque<i64>,
}

const RECENT_BEATS: usize = 15;

impl Clock {
    pub(super) fn beat(&mut self, coordinator_ns: u64, worker_ns: u64) {
        let difference = coordinator_ns as i64 - worker_ns as i64;
        self.least = Some(self.least.map_or(difference, |least| least.min(difference)));
        self.recent.push_back(difference);
        if self.recent.len() > RECENT_BEATS {
            self.recent.pop_front();
        }
    }

    pub(super) fn offset(&self) -> super::ClockOffset {
        let mut sorted: Vec<i64> = self.recent.iter().copied().collect();
        sorted.sort_unstable();
        let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0);
        let offset_ns = self.least.unwrap_or(0);
        super::ClockOffset { offset_ns, uncertainty_ns: median.abs_diff(offset_ns) }
    }
}

/// Keeps the latest clock of each device.
pub(super) type Clocks = BTreeMap<hgct_core::ids::DeviceId, Clock>;

#[cfg(test)]
mod tests {
    use super::*;

    fn report(step: u64, loss_sum: f64) -> StepReport {
        StepReport {
            step,
            loss_sum,
            num_tokens: 8,
            grad_norm: 1.0,
            learning_rate: 1e-3,
            skipped: !loss_sum.is_finite(),
            step_ns: 1,
            compute_ns: 1,
            exchange_ns: 0,
            exposed_communication_ns: 0,
            compute_cpu_ns: 1,
            memory_bytes: 1,
        }
    }

    #[test]
    fn a_step_is_committed_when_the_last_rank_has_done_it() {
        let mut steps = Steps::new(3, 2);
        assert!(steps.report(Rank(1), report(3, 1.0)).unwrap().is_none());
        assert!(steps.report(Rank(1), report(4, 2.0)).unwrap().is_none());
        assert_eq!(steps.report(Rank(0), report(3, 1.0)).unwrap().unwrap().step, 3);
        assert_eq!(steps.report(Rank(0), report(4, 2.0)).unwrap().unwrap().step, 4);
        assert_eq!(steps.next(), 5);
    }

    #[test]
    fn steps_come_once_and_in_order() {
        let mut steps = Steps::new(0, 2);
        steps.report(Rank(0), report(0, 1.0)).unwrap();
        for found in [0, 2] {
            let fault = steps.report(Rank(0), report(found, 1.0)).unwrap_err();
            assert_eq!(fault, Fault::OutOfOrder { found, expected: 1 });
        }
    }

    #[test]
    fn one_bit_of_the_loss_is_a_disagreement() {
        let other = f64::from_bits(1f64.to_bits() + 1);
        let mut steps = Steps::new(0, 2);
        steps.report(Rank(0), report(0, 1.0)).unwrap();
        let fault = steps.report(Rank(1), report(0, other)).unwrap_err();
        assert!(matches!(fault, Fault::Disagreement { step: 0, .. }));
    }

    #[test]
    fn skipped_steps_count_in_a_row_and_any_nan_agrees_with_any_other() {
        let mut steps = Steps::new(0, 2);
        let counts: Vec<u32> = [f64::NAN, f64::NAN, 1.0, f64::INFINITY]
            .into_iter()
            .zip(0..)
            .map(|(loss, step)| {
                steps.report(Rank(0), report(step, loss)).unwrap();
                steps.report(Rank(1), report(step, -(-loss))).unwrap().unwrap().skipped_in_a_row
            })
            .collect();
        assert_eq!(counts, [1, 2, 0, 1]);
    }

    #[test]
    fn the_fastest_beat_tells_the_clock() {
        let mut clock = Clock::default();
        for (delay, worker) in [(900u64, 0u64), (20, 1000), (500, 2000)] {
            clock.beat(5000 + worker + delay, worker);
        }
        assert_eq!(clock.offset(), super::super::ClockOffset { offset_ns: 5020, uncertainty_ns: 480 });
    }
}

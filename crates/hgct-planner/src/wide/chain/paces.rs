//! Paces that a pipeline can have: its slowest stage has whole layers.

use std::ops::Range;

use crate::instance::{Schedule, Transfer};

use super::super::table::Table;

/// Seconds that some stage computes, ascending, and longer than any handing on. Empty where handing on
/// adds to a pace.
pub(crate) struct Paces(Vec<f64>);

/// Of what is the same but for rounding.
const ROUNDING: f64 = 1e-9;

impl Paces {
    /// `ways`: seconds of the layers before each layer, of each way to place a stage.
    pub(super) fn new<'w>(
        table: &Table<'_>,
        size: usize,
        schedule: Schedule,
        ways: impl Iterator<Item = &'w [f64]>,
    ) -> Self {
        if table.instance.rules.transfer != Transfer::Overlapped {
            return Self(Vec::new());
        }
        let mut end = 0;
        let run = |run: &crate::instance::Run| {
            let first = end;
            end += run.count as usize;
            first..end
        };
        let runs: Vec<Range<usize>> = table.instance.runs.iter().map(run).collect();
        let handing = 2.0 * table.most_transfer(size) * schedule.transfers();
        let mut paces = Vec::new();
        for compute in ways {
            let mut own = Vec::new();
            let mut take = |first: usize, last: usize| own.push(compute[last + 1] - compute[first]);
            for (at, run) in runs.iter().enumerate() {
                // Inside of a run, length is all that counts.
                run.clone().for_each(|last| take(run.start, last));
                for other in &runs[at + 1..] {
                    run.clone().for_each(|first| other.clone().for_each(|last| take(first, last)));
                }
            }
            own.retain(|pace| *pace > handing);
            // Many where classes of layers alternate, and few that differ.
            paces.extend(distinct(own));
        }
        Self(distinct(paces))
    }

    /// An interval of paces from the least that is possible in it to the largest; `None` if none is.
    pub(crate) fn within(&self, (low, high): (f64, f64)) -> Option<(f64, f64)> {
        if self.0.first().is_none_or(|least| low < *least) {
            // Perhaps handing on is slowest.
            return Some((low, high));
        }
        let from = self.0.partition_point(|pace| *pace < low * (1.0 - ROUNDING));
        let to = self.0.partition_point(|pace| *pace <= high * (1.0 + ROUNDING));
        (from < to).then(|| (self.0[from] * (1.0 - ROUNDING), self.0[to - 1] * (1.0 + ROUNDING)))
    }
}

/// Ascending, each once.
fn distinct(mut paces: Vec<f64>) -> Vec<f64> {
    paces.sort_by(f64::total_cmp);
    paces.dedup_by(|next, pace| *next <= *pace * (1.0 + ROUNDING));
    paces
}

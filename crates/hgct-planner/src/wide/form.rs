//! A pipeline's form: stages with their choices, and how its time grows with micro-batches.

use crate::instance::{Schedule, Stage, Template};

use super::table::{StageTime, Table};

/// A stage of a form: layers up to the next stage's first on a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Placed {
    pub(crate) first: u16,
    pub(crate) choice: u16,
}

/// A pipeline without its number of micro-batches.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Form {
    /// Index into the table's micro-batch sizes.
    pub(crate) size: usize,
    pub(crate) schedule: Schedule,
    /// From the embedding to the head.
    pub(crate) stages: Vec<Placed>,
    /// m micro-batches take `fixed + m · pace`.
    pub(crate) fixed: f64,
    pub(crate) pace: f64,
    /// Devices of each pool.
    pub(crate) used: Vec<u32>,
    /// Gradient bytes of its largest stage.
    pub(crate) largest: f64,
    /// Smallest degree of any stage.
    pub(crate) least_degree: u32,
    /// Micro-batches come in multiples of this.
    pub(crate) grain: u64,
}

impl Form {
    /// Prices stages; `None` if one does not fit into memory or cannot run.
    pub(crate) fn new(
        table: &Table<'_>,
        size: usize,
        schedule: Schedule,
        stages: Vec<Placed>,
    ) -> Option<Self> {
        let num = stages.len();
        let least_layers = schedule.least_layers();
        if least_layers > 1 && num < 2 {
            return None;
        }
        let mut used = vec![0; table.instance.pools.len()];
        let (mut pace, mut fill, mut own) = (0.0f64, 0.0, 0.0);
        let (mut largest, mut least_degree) = (0.0f64, u32::MAX);
        for at in 0..num {
            let (first, end) = range(table, &stages, at);
            let choice = usize::from(stages[at].choice);
            let of = &table.choices[choice];
            if first + least_layers > end
                || !table.runs(choice, size)
                || !table.fits(choice, size, first, end, schedule.in_flight(num, at))
            {
                return None;
            }
            let time = stage_time(table, size, schedule, &stages, at);
            let of_fill = table.fill_s(schedule, choice, time);
            fill += of_fill;
            let of_pace = table.pace(time);
            if of_pace > pace {
                pace = of_pace;
                own = time.forward + time.backward + time.transfer - of_pace - of_fill;
            }
            used[of.pool] += of.devices;
            largest = largest.max(table.gradient[end] - table.gradient[first]);
            least_degree = least_degree.min(of.degree);
        }
        let grain = schedule.grain(num);
        Some(Self { size, schedule, stages, fixed: fill + own, pace, used, largest, least_degree, grain })
    }

    /// Micro-batches that a step of `seconds` allows.
    pub(crate) fn micro_batches(&self, seconds: f64) -> u64 {
        let num = (seconds * (1.0 + 1e-12) - self.fixed) / self.pace;
        // Far more than any batch, and far less than what overflows a sum.
        let num = if num < 1.0 { 0 } else { num.min(1e9).floor() as u64 };
        num - num % self.grain
    }

    /// Samples that a step of `seconds` allows.
    pub(crate) fn samples(&self, table: &Table<'_>, seconds: f64) -> u64 {
        self.micro_batches(seconds) * u64::from(table.micro_batches[self.size])
    }

    /// Seconds of a step with so many micro-batches.
    pub(crate) fn seconds(&self, micro_batches: u64) -> f64 {
        self.fixed + micro_batches as f64 * self.pace
    }

    /// `count` pipelines of this form.
    pub(crate) fn template(&self, table: &Table<'_>, count: u32, num_micro_batches: u32) -> Template {
        let stage = |at: usize| {
            let (first, end) = range(table, &self.stages, at);
            let choice = &table.choices[usize::from(self.stages[at].choice)];
            Stage {
                first_layer: first as u32,
                end_layer: end as u32,
                pool: choice.pool,
                tensor_parallel: choice.tensor_parallel,
                expert_parallel: choice.expert_parallel(),
                replicas: choice.replicas,
                recompute: choice.recompute,
            }
        };
        Template {
            count,
            micro_batch: table.micro_batches[self.size],
            num_micro_batches,
            schedule: if self.stages.len() == 1 && self.schedule == Schedule::ZeroBubble {
                // Nothing to fill: no program needs to know of zero bubbles for it.
                Schedule::OneForwardOneBackward
            } else {
                self.schedule
            },
            stages: (0..self.stages.len()).map(stage).collect(),
        }
    }
}

/// Where to look for the least pace that places all layers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PaceSearch {
    /// Too small a pace.
    pub(crate) low: f64,
    /// The first that is tried; it grows by `GROWTH` while none is enough.
    pub(crate) first: f64,
    /// One that is known to be enough, or infinite.
    pub(crate) high: f64,
    /// Paces that are tried at most.
    pub(crate) tries: u32,
    /// Ends where the two ends differ by less than this part.
    pub(crate) tolerance: f64,
}

impl PaceSearch {
    /// The form of least pace among those that `lay` makes for a pace, by bisection; `None` if it makes
    /// none.
    pub(crate) fn tightest(self, lay: impl Fn(f64) -> Option<Form>) -> Option<Form> {
        /// Of a pace that is too small.
        const GROWTH: f64 = 1.6;
        let Self { mut low, first: mut at, mut high, tries, tolerance } = self;
        let mut best: Option<Form> = None;
        for _ in 0..tries {
            match lay(at) {
                Some(form) => {
                    high = form.pace.min(at);
                    if best.as_ref().is_none_or(|best| form.pace < best.pace) {
                        best = Some(form);
                    }
                }
                None => low = at,
            }
            if high - low < tolerance * low {
                break;
            }
            at = if high.is_finite() { f64::midpoint(low, high) } else { at * GROWTH };
        }
        best
    }
}

/// Layers of a stage.
pub(crate) fn range(table: &Table<'_>, stages: &[Placed], at: usize) -> (usize, usize) {
    let end = stages.get(at + 1).map_or(table.num_layers, |next| usize::from(next.first));
    (usize::from(stages[at].first), end)
}

/// Times of a stage among its neighbours.
pub(crate) fn stage_time(
    table: &Table<'_>,
    size: usize,
    schedule: Schedule,
    stages: &[Placed],
    at: usize,
) -> StageTime {
    let (first, end) = range(table, stages, at);
    let end_of = |stage: &Placed| table.choices[usize::from(stage.choice)].end;
    let choice = usize::from(stages[at].choice);
    let (forward, backward) = table.compute(choice, size, first, end);
    let before = at.checked_sub(1).map(|before| end_of(&stages[before]));
    let after = stages.get(at + 1).map(end_of);
    let transfer = table.stage_transfer(
        size,
        (first, end),
        table.choices[choice].end,
        after,
        before,
        stages.len(),
        schedule,
    );
    StageTime { forward, backward, transfer }
}

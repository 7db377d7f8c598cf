//! What a unit computes next.

use hgct_core::schedule::{Operation, one_forward_one_backward};

use crate::instance::Schedule;

/// A computation of a unit: of a virtual stage and a micro-batch of its pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Op {
    pub(super) kind: OpKind,
    pub(super) chunk: u32,
    pub(super) micro_batch: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum OpKind {
    Forward,
    /// Both halves, or the inputs' half where the schedule divides them.
    Backward,
    Weight,
}

/// How a unit chooses.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Order {
    /// A list that is never left: 1F1B.
    Fixed { ops: Vec<Op>, next: usize },
    /// Backward before forward before weight, with so many forwards ahead at most: interleaved and
    /// zero-bubble schedules.
    Greedy(Greedy),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Greedy {
    forwards: Vec<Op>,
    next_forward: usize,
    /// Backwards whose gradient is there, and weights' halves that are owed; the first goes first.
    backwards: std::collections::BTreeSet<(u32, u32, u32)>,
    weights: std::collections::VecDeque<Op>,
    in_flight: u32,
    limit: u32,
    num_chunks: u32,
    divided: bool,
    done: u32,
    total: u32,
}

impl Order {
    pub(super) fn new(schedule: Schedule, depth: u32, stage: u32, num: u32) -> Self {
        let chunks = schedule.virtual_stages();
        match schedule {
            Schedule::OneForwardOneBackward => Self::Fixed { ops: one_f_one_b(depth, stage, num), next: 0 },
            Schedule::Interleaved(_) => {
                // Megatron-LM's order: as many micro-batches as stages through one virtual stage, then
                // the same through the next.
                let limit = schedule.virtual_in_flight(depth, stage);
                Self::Greedy(Greedy::new(interleaved(depth, chunks, num), limit, chunks, num, false))
            }
            _ => Self::Greedy(Greedy::new(interleaved(1, 1, num), depth - stage, 1, num, true)),
        }
    }

    /// The next computation, if what it needs is there; it counts as begun.
    pub(super) fn take(&mut self, ready: impl Fn(Op) -> bool) -> Option<Op> {
        match self {
            Self::Fixed { ops, next } => {
                let op = *ops.get(*next)?;
                ready(op).then(|| {
                    *next += 1;
                    op
                })
            }
            Self::Greedy(greedy) => greedy.take(ready),
        }
    }

    /// A gradient has come.
    pub(super) fn offer_backward(&mut self, chunk: u32, micro_batch: u32) {
        if let Self::Greedy(greedy) = self {
            greedy.offer_backward(chunk, micro_batch);
        }
    }

    pub(super) fn is_done(&self) -> bool {
        match self {
            Self::Fixed { ops, next } => *next == ops.len(),
            Self::Greedy(greedy) => greedy.done == greedy.total,
        }
    }

    /// Lets one more forward ahead where everybody waits for everybody: odd numbers of micro-batches
    /// do not fill the interleaved order.
    pub(super) fn relax(&mut self) {
        if let Self::Greedy(greedy) = self {
            greedy.limit += 1;
        }
    }
}

impl Greedy {
    fn new(forwards: Vec<Op>, limit: u32, num_chunks: u32, num: u32, divided: bool) -> Self {
        let per_micro_batch = if divided { 3 } else { 2 };
        Self {
            forwards,
            next_forward: 0,
            backwards: std::collections::BTreeSet::new(),
            weights: std::collections::VecDeque::new(),
            in_flight: 0,
            limit,
            num_chunks,
            divided,
            done: 0,
            total: num * num_chunks * per_micro_batch,
        }
    }

    fn take(&mut self, ready: impl Fn(Op) -> bool) -> Option<Op> {
        let op = if let Some((_, chunk, micro_batch)) = self.backwards.pop_first() {
            let op = Op { kind: OpKind::Backward, chunk, micro_batch };
            if self.divided {
                self.weights.push_back(Op { kind: OpKind::Weight, ..op });
            } else {
                self.in_flight -= 1;
            }
            op
        } else if self.in_flight < self.limit
            && let Some(op) = self.forwards.get(self.next_forward).copied()
            && ready(op)
        {
            self.next_forward += 1;
            self.in_flight += 1;
            op
        } else {
            let op = self.weights.pop_front()?;
            self.in_flight -= 1;
            op
        };
        self.done += 1;
        Some(op)
    }

    fn offer_backward(&mut self, chunk: u32, micro_batch: u32) {
        // Micro-batch by micro-batch, the last virtual stage's first.
        let place = micro_batch * self.num_chunks + (self.num_chunks - 1 - chunk);
        self.backwards.insert((place, chunk, micro_batch));
    }
}

fn one_f_one_b(depth: u32, stage: u32, num: u32) -> Vec<Op> {
    let op = |(operation, micro_batch)| {
        let kind = if operation == Operation::Forward { OpKind::Forward } else { OpKind::Backward };
        Op { kind, chunk: 0, micro_batch }
    };
    one_forward_one_backward(0..num, (depth - 1 - stage) as usize).into_iter().map(op).collect()
}

fn interleaved(depth: u32, chunks: u32, num: u32) -> Vec<Op> {
    let mut ops = Vec::with_capacity((num * chunks) as usize);
    for first in (0..num).step_by(depth as usize) {
        for chunk in 0..chunks {
            for micro_batch in first..(first + depth).min(num) {
                ops.push(Op { kind: OpKind::Forward, chunk, micro_batch });
            }
        }
    }
    ops
}

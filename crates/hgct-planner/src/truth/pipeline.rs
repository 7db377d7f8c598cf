//! One pipeline's step as pipeline engines run it: 1F1B, with neighbours handing over in turn.
//!
//! A stage that is about to compute first takes what it needs and gives what it has: before a
//! backward it receives a gradient and sends the activation of its last forward, before a forward it
//! sends the gradient of its last backward and receives an activation. Both ends do the two transfers
//! in the same order, one after the other over the same link. Large messages are a meeting: they move
//! when both are there, and both wait. Small ones leave without the receiver.

use hgct_core::schedule::{Operation, one_forward_one_backward};

/// One pipeline.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Chain {
    /// Forward of a micro-batch, by stage.
    pub(crate) forward_s: Vec<f64>,
    /// Backward of a micro-batch, by stage.
    pub(crate) backward_s: Vec<f64>,
    /// Boundaries between stages, one fewer than stages.
    pub(crate) hops: Vec<Hop>,
    /// Micro-batches a step.
    pub(crate) num_micro_batches: u32,
}

/// A boundary between two stages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Hop {
    /// Seconds of an activation, and of a gradient.
    pub(crate) seconds: f64,
    /// Whether a message fits into the transport's buffer.
    pub(crate) eager: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Op {
    Compute(f64),
    /// Over a hop, for a micro-batch; `forward` is an activation, else a gradient.
    Send {
        hop: usize,
        micro_batch: usize,
        forward: bool,
    },
    Receive {
        hop: usize,
        micro_batch: usize,
        forward: bool,
    },
}

/// A message: when its sender was there, and when it had arrived.
#[derive(Debug, Clone, Copy, Default)]
struct Message {
    offered_s: Option<f64>,
    arrived_s: Option<f64>,
}

impl Chain {
    /// Seconds from the first forward to the last backward.
    pub(crate) fn seconds(&self) -> f64 {
        let stages = self.forward_s.len();
        let ops: Vec<Vec<Op>> = (0..stages).map(|stage| self.ops(stage)).collect();
        let num = self.num_micro_batches as usize;
        let mut messages = vec![Message::default(); 2 * self.hops.len() * num];
        let mut link_free_s = vec![0.0f64; self.hops.len()];
        let (mut next, mut now) = (vec![0; stages], vec![0.0f64; stages]);
        loop {
            let mut moved = false;
            for stage in 0..stages {
                while let Some(op) = ops[stage].get(next[stage]) {
                    let (hop, message) = match *op {
                        Op::Compute(seconds) => {
                            now[stage] += seconds;
                            next[stage] += 1;
                            moved = true;
                            continue;
                        }
                        Op::Send { hop, micro_batch, forward }
                        | Op::Receive { hop, micro_batch, forward } => {
                            (hop, &mut messages[(2 * hop + usize::from(forward)) * num + micro_batch])
                        }
                    };
                    let Hop { seconds, eager } = self.hops[hop];
                    let send = matches!(op, Op::Send { .. });
                    if send && message.offered_s.is_none() {
                        message.offered_s = Some(now[stage]);
                        moved = true;
                        if eager {
                            let arrived = now[stage].max(link_free_s[hop]) + seconds;
                            link_free_s[hop] = arrived;
                            message.arrived_s = Some(arrived);
                        }
                    }
                    if !send
                        && !eager
                        && message.arrived_s.is_none()
                        && let Some(offered) = message.offered_s
                    {
                        let arrived = now[stage].max(offered).max(link_free_s[hop]) + seconds;
                        link_free_s[hop] = arrived;
                        message.arrived_s = Some(arrived);
                    }
                    if !(send && eager) {
                        let Some(arrived) = message.arrived_s else { break };
                        now[stage] = now[stage].max(arrived);
                    }
                    next[stage] += 1;
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        // The order below never blocks; were it to, no finite time would be the honest answer.
        if next.iter().zip(&ops).any(|(next, ops)| *next < ops.len()) {
            return f64::INFINITY;
        }
        now.into_iter().fold(0.0, f64::max)
    }

    fn ops(&self, stage: usize) -> Vec<Op> {
        let last = self.forward_s.len() - 1;
        let mut ops = Vec::with_capacity(6 * self.num_micro_batches as usize);
        let mut owed: Option<Op> = None;
        let forward = |ops: &mut Vec<Op>, owed: &mut Option<Op>, micro_batch: usize| {
            ops.extend(owed.take());
            if stage > 0 {
                ops.push(Op::Receive { hop: stage - 1, micro_batch, forward: true });
            }
            ops.push(Op::Compute(self.forward_s[stage]));
            *owed = (stage < last).then_some(Op::Send { hop: stage, micro_batch, forward: true });
        };
        let backward = |ops: &mut Vec<Op>, owed: &mut Option<Op>, micro_batch: usize| {
            let pairs = |op: &Op| matches!(op, Op::Send { micro_batch: sent, .. } if *sent == micro_batch + last - stage);
            // An activation that nobody meets on its way to this gradient goes first.
            if !owed.as_ref().is_some_and(pairs) {
                ops.extend(owed.take());
            }
            if stage < last {
                ops.push(Op::Receive { hop: stage, micro_batch, forward: false });
            }
            ops.extend(owed.take());
            ops.push(Op::Compute(self.backward_s[stage]));
            *owed = (stage > 0).then(|| Op::Send { hop: stage - 1, micro_batch, forward: false });
        };
        for (operation, micro_batch) in one_forward_one_backward(0..self.num_micro_batches, last - stage) {
            match operation {
                Operation::Forward => forward(&mut ops, &mut owed, micro_batch as usize),
                _ => backward(&mut ops, &mut owed, micro_batch as usize),
            }
        }
        ops.extend(owed);
        ops
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chain(costs: &[(f64, f64)], seconds: f64, eager: bool, num: u32) -> Chain {
        Chain {
            forward_s: costs.iter().map(|c| c.0).collect(),
            backward_s: costs.iter().map(|c| c.1).collect(),
            hops: vec![Hop { seconds, eager }; costs.len() - 1],
            num_micro_batches: num,
        }
    }

    #[test]
    fn alike_stages_and_free_links_take_what_1f1b_takes() {
        let chain = chain(&[(1.0, 2.0); 4], 0.0, true, 8);
        assert!((chain.seconds() - f64::from(8 + 3) * 3.0).abs() < 1e-9);
    }

    #[test]
    fn large_messages_are_paid_by_both_and_small_ones_hide() {
        // The slow stage meets the fast one for a gradient and an activation a micro-batch.
        let a_micro_batch = |costs: &[(f64, f64)], eager| chain(costs, 1.0, eager, 64).seconds() / 64.0;
        let (slow_first, slow_last) = ([(2.0, 4.0), (0.5, 0.5)], [(0.5, 0.5), (2.0, 4.0)]);
        for costs in [&slow_first, &slow_last] {
            let met = a_micro_batch(costs, false);
            assert!((met - 8.0).abs() < 0.1, "{met}");
        }
        // Behind the first stage's work they hide; the last one gets its next activation in turn for
        // its gradient.
        let hidden = a_micro_batch(&slow_first, true);
        assert!((hidden - 6.0).abs() < 0.1, "{hidden}");
        let in_turn = a_micro_batch(&slow_last, true);
        assert!((in_turn - 8.0).abs() < 0.1, "{in_turn}");
    }

    proptest! {
        #[test]
        fn between_the_slowest_stage_and_all_in_series(
            costs in prop::collection::vec((0.1f64..3.0, 0.1f64..3.0), 1..6),
            seconds in 0.0f64..2.0,
            eager: bool,
            num in 1u32..12,
        ) {
            let taken = chain(&costs, seconds, eager, num).seconds();
            let work: f64 = costs.iter().map(|(f, b)| f + b).sum();
            let slowest = costs.iter().map(|(f, b)| f + b).fold(0.0, f64::max);
            let hops = 2.0 * seconds * (costs.len() - 1) as f64;
            prop_assert!(taken >= f64::from(num) * slowest - 1e-9);
            prop_assert!(taken <= f64::from(num) * (work + hops) + 1e-9);
        }
    }
}

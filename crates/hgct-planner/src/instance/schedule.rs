//! What a schedule means for fill and memory.

use super::Schedule;

/// What one stage adds to its pipeline's fill, and how it is divided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Work {
    /// Seconds of a micro-batch: forward.
    pub(crate) forward_s: f64,
    /// Seconds of a micro-batch: backward, recompute included.
    pub(crate) backward_s: f64,
    /// Seconds of a micro-batch: handing on.
    pub(crate) transfer_s: f64,
}

impl Schedule {
    /// Seconds by which a stage that is not the slowest lengthens its pipeline.
    ///
    /// * 1F1B: a whole micro-batch waits for every other stage once.
    /// * interleaved (v virtual stages a device): a v-th of it; transfers stay, as each virtual
    ///   stage has its own.
    /// * zero-bubble (ZB-H1 of Qi et al., 2023: `(p − 1)(F + I − W)`, with the backward's halves
    ///   taken as equal): the forward.
    pub(crate) fn fill_s(self, work: Work) -> f64 {
        let compute = match self {
            Self::OneForwardOneBackward => work.forward_s + work.backward_s,
            Self::Interleaved(v) => (work.forward_s + work.backward_s) / f64::from(v.max(1)),
            Self::ZeroBubble => work.forward_s,
        };
        compute + work.transfer_s
    }

    /// How often a micro-batch is handed on by each stage.
    pub(crate) fn transfers(self) -> f64 {
        match self {
            Self::Interleaved(v) => f64::from(v.max(1)),
            Self::OneForwardOneBackward | Self::ZeroBubble => 1.0,
        }
    }

    /// Micro-batches whose activations a stage holds at most; a fraction where a virtual stage is
    /// one. The schedule is the same for any number of micro-batches, so few of them save nothing.
    ///
    /// Interleaved: Megatron-LM's warm-up of `2(p − 1 − i) + (v − 1)p` virtual micro-batches and the
    /// one in work, each a v-th.
    pub(crate) fn in_flight(self, num_stages: usize, index: usize) -> f64 {
        let after = num_stages - index;
        match self {
            Self::OneForwardOneBackward | Self::ZeroBubble => after as f64,
            Self::Interleaved(v) => {
                let v = v.max(1) as usize;
                (2 * (after - 1) + (v - 1) * num_stages + 1) as f64 / v as f64
            }
        }
    }
}

//! What a schedule means for fill and memory.

use std::fmt;
use std::str::FromStr;

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
    /// Whether the backward computes the forward again first.
    pub(crate) recompute: bool,
}

impl Work {
    /// Seconds of the weights' half of a divided backward: half of what recompute does not add.
    pub(crate) fn weights_s(self) -> f64 {
        let again_s = if self.recompute { self.forward_s } else { 0.0 };
        (self.backward_s - again_s).max(0.0) / 2.0
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OneForwardOneBackward => f.write_str("1f1b"),
            Self::Interleaved(v) => write!(f, "interleaved-{v}"),
            Self::ZeroBubble => f.write_str("zero-bubble"),
        }
    }
}

impl FromStr for Schedule {
    type Err = String;

    /// `1f1b`, `zero-bubble`, or `interleaved-V` with V virtual stages a device.
    fn from_str(text: &str) -> Result<Self, String> {
        let virtual_stages = |v: &str| v.parse().ok().filter(|v| (2..=64).contains(v));
        match text {
            "1f1b" => Ok(Self::OneForwardOneBackward),
            "zero-bubble" => Ok(Self::ZeroBubble),
            _ => text
                .strip_prefix("interleaved-")
                .and_then(virtual_stages)
                .map(Self::Interleaved)
                .ok_or_else(|| "write 1f1b, zero-bubble, or interleaved-V with V from 2 to 64".into()),
        }
    }
}

impl Schedule {
    /// Seconds by which a stage that is not the slowest lengthens its pipeline.
    ///
    /// * 1F1B: a whole micro-batch waits for every other stage once.
    /// * interleaved (v virtual stages a device): a v-th of it; transfers stay, as each virtual
    ///   stage has its own.
    /// * zero-bubble: all but the weights' half of the backward. ZB-H1 of Qi et al. (2023) has
    ///   `(p − 1)(F + I − W)`, but holds p micro-batches on every stage for it; in the memory of 1F1B,
    ///   `p − i`, the last stage does forward and both halves in turn, and every stage before it
    ///   waits for `F + I`.
    pub(crate) fn fill_s(self, work: Work) -> f64 {
        let compute = match self {
            Self::OneForwardOneBackward => work.forward_s + work.backward_s,
            Self::Interleaved(_) => (work.forward_s + work.backward_s) / f64::from(self.virtual_stages()),
            Self::ZeroBubble => work.forward_s + work.backward_s - work.weights_s(),
        };
        compute + work.transfer_s
    }

    /// Layers of a stage at least: one for each of its virtual stages.
    pub(crate) fn least_layers(self) -> usize {
        match self {
            Self::Interleaved(v) => v.max(1) as usize,
            Self::OneForwardOneBackward | Self::ZeroBubble => 1,
        }
    }

    /// Micro-batches come in multiples of this: interleaving takes as many as stages through one
    /// virtual stage, then the same through the next.
    pub(crate) fn grain(self, num_stages: usize) -> u64 {
        match self {
            Self::Interleaved(_) => num_stages as u64,
            Self::OneForwardOneBackward | Self::ZeroBubble => 1,
        }
    }

    /// How often a micro-batch is handed on by each stage.
    pub(crate) fn transfers(self) -> f64 {
        f64::from(self.virtual_stages())
    }

    /// Virtual stages of a device.
    pub(crate) fn virtual_stages(self) -> u32 {
        match self {
            Self::Interleaved(v) => v.max(1),
            Self::OneForwardOneBackward | Self::ZeroBubble => 1,
        }
    }

    /// Virtual micro-batches that a stage holds at most: `num_stages − index` of 1F1B; interleaved,
    /// Megatron-LM's warm-up of `2(p − 1 − i) + (v − 1)p` and the one in work.
    pub(crate) fn virtual_in_flight(self, num_stages: u32, index: u32) -> u32 {
        let after = num_stages - index;
        match self {
            Self::OneForwardOneBackward | Self::ZeroBubble => after,
            Self::Interleaved(_) => 2 * (after - 1) + (self.virtual_stages() - 1) * num_stages + 1,
        }
    }

    /// Micro-batches whose activations a stage holds at most; a fraction where a virtual stage is
    /// one. However many the schedule allows, there are no more than a batch has
    /// ([`Instance::most_in_flight`](super::Instance::most_in_flight)).
    pub(crate) fn in_flight(self, num_stages: usize, index: usize) -> f64 {
        let num = self.virtual_in_flight(num_stages as u32, index as u32);
        f64::from(num) / f64::from(self.virtual_stages())
    }
}

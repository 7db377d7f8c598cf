//! Routed experts: what of a layer belongs to them, and what a device holds where they are divided.
//!
//! A group of `e` devices of one node that divides the experts of a layer has `e / t` tensor-parallel
//! groups of t devices. Each of these takes its part of the micro-batch through attention and whatever
//! else is dense, so the group holds `e / t` copies of the dense weights, and one of the experts. Every
//! token goes to the devices of its experts and back: two all-to-alls a layer, forward and backward
//! (Lepikhin et al. 2020, arXiv 2006.16668, section 3.2), which are part of the layer's seconds.

use serde::{Deserialize, Serialize};

use super::{Instance, LayerMemory};

/// What of a layer belongs to its routed experts, all together, tensor parallel degree 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertClass {
    /// Part of the layer's gradient bytes.
    pub gradient_bytes: f64,
    /// Part of its parameter bytes.
    pub parameter_bytes: f64,
    /// Part of what replicas hold.
    pub state_bytes: f64,
    /// Part of the optimizer state.
    pub optimizer_bytes: f64,
}

/// What each device of a group holds of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Held {
    /// Weights and gradients.
    pub(crate) state_bytes: f64,
    /// Optimizer state of what is dense, divided among its copies if it is sharded.
    pub(crate) dense_optimizer_bytes: f64,
    /// The same of the experts.
    pub(crate) expert_optimizer_bytes: f64,
}

impl Held {
    /// Of a class, at one position among the degrees, in a group of `parts` tensor-parallel groups.
    pub(crate) fn new(instance: &Instance, class: usize, degree: usize, parts: u32) -> Self {
        let of = &instance.classes[class];
        let memory = &of.memory[degree];
        let (state_bytes, optimizer_bytes) = (memory.state_bytes, memory.optimizer_bytes);
        let Some(experts) = &of.experts else {
            return Self { state_bytes, dense_optimizer_bytes: optimizer_bytes, expert_optimizer_bytes: 0.0 };
        };
        let (t, parts) = (f64::from(instance.degrees[degree]), f64::from(parts));
        let expert_optimizer_bytes = (experts.optimizer_bytes / t).min(optimizer_bytes);
        Self {
            state_bytes: (state_bytes - experts.state_bytes / t * (1.0 - 1.0 / parts)).max(0.0),
            dense_optimizer_bytes: optimizer_bytes - expert_optimizer_bytes,
            expert_optimizer_bytes: expert_optimizer_bytes / parts,
        }
    }

    /// A device's part of a layer's update, which takes `seconds` for all that a tensor-parallel rank
    /// has: as much as it has of the optimizer state.
    pub(crate) fn update_s(&self, seconds: f64, whole: &LayerMemory, copies: f64, expert_copies: f64) -> f64 {
        if self.expert_optimizer_bytes <= 0.0 {
            return seconds / copies;
        }
        let own = self.dense_optimizer_bytes / copies + self.expert_optimizer_bytes / expert_copies;
        seconds * own / whole.optimizer_bytes
    }

    /// All of it, with optimizer state divided among so many copies of what is dense, and of experts.
    pub(crate) fn bytes(&self, copies: f64, expert_copies: f64) -> f64 {
        self.state_bytes
            + self.dense_optimizer_bytes / copies
            + if self.expert_optimizer_bytes > 0.0 {
                self.expert_optimizer_bytes / expert_copies
            } else {
                0.0
            }
    }
}

impl Instance {
    /// What framework and libraries take on a device of a group: those of the largest degree that is no
    /// larger than the group.
    pub(crate) fn overhead_bytes(&self, pool: usize, group_devices: u32) -> f64 {
        let at = self.degrees.iter().rposition(|degree| *degree <= group_devices).unwrap_or(0);
        self.pools[pool].overhead_bytes[at]
    }
}

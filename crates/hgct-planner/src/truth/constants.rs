//! The constants of our price of a real step. One set for all plans; none is fitted to a row. Each
//! says what it is physically and where its figure comes from.

use serde::{Deserialize, Serialize};

/// What tables and peak figures do not say.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constants {
    /// Relative spread (one standard deviation) of how long alike replicas take. The slowest of n
    /// replicas is about `σ·√(2 ln n)` behind the mean (the largest of n normal variates). Runs on
    /// healthy accelerators vary by about one per cent from step to step.
    pub replica_spread: f64,
    /// Fixed time of handing one micro-batch over a stage boundary: shape messages, the wait of the
    /// host for them, and some ten kernel launches.
    pub hop_s: f64,
    /// A piece of a message up to this size leaves without the receiver: it fits into the
    /// transport's buffer (4 MiB, NCCL's documented default of `NCCL_BUFFSIZE`). Larger ones move
    /// when both sides are there.
    pub eager_bytes: f64,
    /// What an allocator takes for each byte of activations: its blocks are rounded up and fragmented.
    pub activation_slack: f64,
    /// Device memory before the first tensor: context, library workspaces, communication buffers of
    /// pipeline, data and tensor parallel groups.
    pub overhead_bytes: f64,
    /// Bytes a parameter of single-precision training: weights, gradients and two moments of Adam
    /// (16), and gradients and weights once more as contiguous buffers for the exchange (8).
    pub state_bytes_per_parameter: f64,
    /// Part of the peak that the best matrix multiplication kernels reach on large matrices.
    pub matrix_efficiency: f64,
    /// The same with tiles of 128 × 128 and of 128 × 64 instead of 256 × 128: each byte that a tile
    /// loads is used less often.
    pub small_tile_efficiency: [f64; 2],
    /// Part of the memory's nominal rate that streaming kernels reach (1,328 of 1,555 GB/s measured
    /// on A100 40 GB).
    pub memory_efficiency: f64,
    /// Part of a network card's line rate that is left for payload.
    pub network_efficiency: f64,
    /// From one small kernel to the next.
    pub launch_s: f64,
    /// A step of a ring between devices of a node.
    pub ring_step_s: f64,
    /// Bytes that the optimizer moves a parameter: master weight and two moments read and written in
    /// single precision (24), the gradient read twice for norm and update (8), scaled and cast (6),
    /// the two-byte weight written and copied (4).
    pub update_bytes_per_parameter: f64,
    /// Bytes a parameter in the exchange of mixed-precision training: gradients are added up in
    /// single precision.
    pub gradient_bytes_per_parameter: f64,
}

impl Default for Constants {
    fn default() -> Self {
        Self {
            replica_spread: 0.01,
            hop_s: 0.5e-3,
            eager_bytes: 4.0 * 1024.0 * 1024.0,
            activation_slack: 1.14,
            overhead_bytes: 3.5e9,
            state_bytes_per_parameter: 24.0,
            matrix_efficiency: 0.80,
            small_tile_efficiency: [0.93, 0.80],
            memory_efficiency: 0.85,
            network_efficiency: 0.85,
            launch_s: 5e-6,
            ring_step_s: 8e-6,
            update_bytes_per_parameter: 42.0,
            gradient_bytes_per_parameter: 4.0,
        }
    }
}

impl Constants {
    /// How far the slowest of `replicas` is behind the mean, as a factor.
    pub fn slowest_of(&self, replicas: u32) -> f64 {
        1.0 + self.replica_spread * (2.0 * f64::from(replicas.max(1)).ln()).sqrt()
    }
}

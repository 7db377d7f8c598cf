//! Seconds of a layer from peaks: each product takes the longer of its arithmetic and its bytes, what
//! stands between products its bytes alone, and tensor parallelism its collectives.

use hgct_core::accelerator::Figure;
use hgct_core::architecture::LayerClass;
use hgct_core::dtype::DType;
use hgct_core::model::LayerKind;
use hgct_core::topology::ResolvedGroup;

use super::{Case, Precision, Workload, no_rate};
use crate::Result;

/// A card with what a program reaches of its peaks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Device {
    /// Matrix products of large sizes.
    pub flops_per_s: f64,
    /// Its memory.
    pub memory_bytes_per_s: f64,
    /// To another card of its node, one way.
    pub link_bytes_per_s: f64,
    /// Of a message inside the node.
    pub link_latency_s: f64,
}

/// Of the largest rate that anybody found over all shapes, what the shapes of a model reach.
/// (SemiAnalysis 2024 measured 720 Tflop/s at a model's shapes on an H100, of 792 found at best.)
const SHAPES: [f64; 3] = [0.80, 0.91, 1.0];
/// Of a peak of which nobody published what is reached: the cards of the catalogue of which it is
/// known reach 0.60 to 0.86 at best.
const UNKNOWN: [f64; 3] = [0.45, 0.65, 0.85];
/// Of the bandwidth of memory; a copy reaches 0.85 to 0.92 on cards where it was published.
const MEMORY: [f64; 3] = [0.70, 0.85, 0.92];
/// Of a link's rate.
const LINK: [f64; 3] = [0.60, 0.80, 0.95];
/// Rate of fused attention against that of large products (Dao 2023, arXiv 2307.08691: 0.50 to 0.73
/// of an A100's peak, where products reach 0.86).
const ATTENTION: f64 = 0.7;
/// Products whose narrowest side has this many elements reach half of what large ones do.
const HALF_WIDTH: f64 = 96.0;
/// Starting the kernels of a layer that nothing hides.
const LAUNCH_S: f64 = 10e-6;

fn at(case: Case, of: [f64; 3]) -> f64 {
    match case {
        Case::Slow => of[0],
        Case::Expected => of[1],
        Case::Fast => of[2],
    }
}

/// Of a link's rate, what messages reach.
pub(super) fn link_factor(case: Case) -> f64 {
    at(case, LINK)
}

/// What a program reaches of a figure: its published part times `known`, else `unknown` of the
/// figure itself, at the end of its range that the case wants.
fn reached(figure: &Figure, case: Case, known: [f64; 3], unknown: [f64; 3]) -> f64 {
    let (low, high) = figure.range();
    let disputed = at(case, [low, figure.value, high]) / figure.value;
    match figure.reached {
        Some(reached) => reached * disputed * at(case, known),
        None => figure.value * disputed * at(case, unknown),
    }
}

impl Device {
    /// What a card of the group reaches in `dtype`.
    pub fn new(group: &ResolvedGroup<'_>, dtype: DType, case: Case) -> Result<Self> {
        let card = group.accelerator;
        let peak = card.peak_flops_per_s.get(&dtype).ok_or_else(|| no_rate(group, dtype))?;
        Ok(Self {
            flops_per_s: reached(peak, case, SHAPES, UNKNOWN),
            memory_bytes_per_s: reached(&card.memory_bytes_per_s, case, [0.9, 1.0, 1.0], MEMORY),
            link_bytes_per_s: group.inside.bytes_per_s * link_factor(case),
            link_latency_s: group.inside.latency_ns as f64 * 1e-9,
        })
    }

    /// Forward and backward of one layer, one micro-batch, on `tensor_parallel` such cards; experts are
    /// divided among these, or among `expert_parallel` if that is more: several groups, each with a
    /// micro-batch of that size.
    pub fn layer(
        &self,
        class: &LayerClass,
        workload: &Workload<'_>,
        tensor_parallel: u32,
        expert_parallel: u32,
        micro_batch: u32,
    ) -> (f64, f64) {
        let t = f64::from(tensor_parallel);
        let holders = f64::from(tensor_parallel.max(expert_parallel));
        let element = workload.precision.compute.size_bytes() as f64;
        let hidden = f64::from(workload.architecture.hidden_size);
        let tokens = f64::from(workload.seq_len) * f64::from(micro_batch);
        let dense = self.product(tokens, class.multiplied_weights as f64 / t, hidden / t, element);
        let experts = class.experts.map_or(0.0, |experts| {
            // Each expert of a rank meets its part of the tokens of all groups that share the experts.
            let routed = tokens * holders / t * f64::from(experts.per_token) / f64::from(experts.count);
            let each = self.product(routed, experts.parameters_each as f64, hidden, element);
            each * (f64::from(experts.count) / holders).max(1.0)
        });
        let attention = f64::from(micro_batch) * class.attention_flops(workload.seq_len)
            / t
            / (self.flops_per_s * ATTENTION);
        // What backward keeps was written once and read once; what is read between products is that.
        let kept = class.saved_whole as f64 * element
            + (class.saved_divided as f64 * element + class.saved_f32 as f64 * 4.0) / t;
        let looked_up = if class.kind == LayerKind::Embedding { 2.0 * hidden * element } else { 0.0 };
        let between = tokens * (2.0 * kept + looked_up) / self.memory_bytes_per_s;
        let collectives = self.collectives(class, tokens * hidden * element, (tensor_parallel, holders));
        let forward = dense + experts + attention + between + collectives + LAUNCH_S;
        // Two products for each of forward's; fused attention computes its scores once more.
        let backward =
            2.0 * (dense + experts) + 2.5 * attention + 2.0 * between + collectives + 2.0 * LAUNCH_S;
        (forward, backward)
    }

    /// Seconds to update that many parameters: every state is read and written once, the gradient
    /// read, the weight written.
    pub fn update(&self, parameters: f64, precision: Precision) -> f64 {
        let each = 2 * precision.optimizer_bytes + precision.gradient_bytes + precision.weight_bytes;
        parameters * f64::from(each) / self.memory_bytes_per_s + LAUNCH_S
    }

    /// A product of `tokens` rows with `weights` elements whose narrow side is `width`.
    fn product(&self, tokens: f64, weights: f64, width: f64, element: f64) -> f64 {
        if weights == 0.0 || tokens == 0.0 {
            return 0.0;
        }
        let shape = |size: f64| size / (size + HALF_WIDTH);
        let arithmetic = 2.0 * tokens * weights / (self.flops_per_s * shape(tokens) * shape(width));
        arithmetic.max(weights * element / self.memory_bytes_per_s)
    }

    /// All-reduces behind attention and MLP, or, before and behind experts, all-to-alls of a rank's
    /// part of the tokens among the `holders` of the experts, a copy of a token for each expert that it
    /// goes to (Lepikhin et al. 2020, arXiv 2006.16668, section 3.2); one all-reduce in embedding and
    /// head.
    fn collectives(&self, class: &LayerClass, bytes: f64, (tensor_parallel, holders): (u32, f64)) -> f64 {
        let t = f64::from(tensor_parallel);
        let ring =
            2.0 * (t - 1.0) / t * bytes / self.link_bytes_per_s + 2.0 * (t - 1.0) * self.link_latency_s;
        let routed = class.experts.filter(|_| holders > 1.0).map(|experts| {
            let sent = bytes / t * f64::from(experts.per_token) * (holders - 1.0) / holders;
            2.0 * (sent / self.link_bytes_per_s + self.link_latency_s)
        });
        match class.kind {
            LayerKind::Block => ring + routed.unwrap_or(ring),
            LayerKind::Embedding | LayerKind::Head => ring,
        }
    }
}

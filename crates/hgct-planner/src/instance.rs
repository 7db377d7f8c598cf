//! Large planning problems as plain numbers, and the plans that answer them.
//!
//! An [`Instance`] knows nothing of vendors, architectures or files: whoever has a catalogue, a
//! measured profile or a table of layer times fills one. Times are seconds, sizes bytes, both `f64`;
//! every sum is made in a fixed order, so equal inputs give equal bits.
//!
//! ```text
//! catalogue + config.json ─┐
//! measured profile ────────┼─► Instance ──► search ──► Layout ──► price ──► Priced
//! tables from elsewhere ───┘                  └─ bounds: what no layout can beat
//! ```
//!
//! A [`Layout`] is a list of pipeline templates with how many of each there are: thousands of devices
//! are a handful of rows. [`price()`] is a pure function of both and the reference for what a layout
//! costs; [`check`] says why a layout is none.

use serde::{Deserialize, Serialize};

mod assign;
mod check;
mod curve;
mod experts;
mod names;
mod price;
mod schedule;
#[cfg(test)]
mod tests;

pub use assign::{Group, assign};
pub use check::{Fault, check, check_groups, check_instance};
pub use curve::{Curve, Link, LinkRow};
pub use experts::ExpertClass;
pub(crate) use experts::Held;
pub(crate) use names::bad;
pub use names::{Named, lost_nodes};
pub(crate) use price::Buckets;
pub use price::{Priced, PricedStage, PricedTemplate, price};
pub(crate) use schedule::Work;

/// One planning problem.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Instance {
    /// Degrees of tensor parallelism that may be used, ascending, the first being 1. All vectors "by
    /// degree" are indexed like this one.
    pub degrees: Vec<u32>,
    /// Kinds of layers.
    pub classes: Vec<LayerClass>,
    /// The model from the embedding to the head, as runs of alike layers.
    pub runs: Vec<Run>,
    /// Devices, a pool a kind.
    pub pools: Vec<Pool>,
    /// Links between nodes: `inter[p][q]` from a node of pool `p` to another node of pool `q`. For a
    /// pool of one node `inter[p][p]` is never used by transfers between nodes, but stands for
    /// whatever links two of its devices.
    pub inter: Vec<Vec<Link>>,
    /// Samples a step.
    pub global_batch: u32,
    /// Tokens a sample; only carried along.
    pub seq_len: u32,
    /// How time and memory are added up.
    pub rules: Rules,
}

/// Layers that cost the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerClass {
    /// For tables that people read: `embedding`, `block`, `head`.
    pub name: String,
    /// Gradient of the whole layer on the wire, tensor parallel degree 1.
    pub gradient_bytes: f64,
    /// Updated parameters of the whole layer on the wire (the second half of an exchange with
    /// sharded optimizer state); equal to `gradient_bytes` where both have one dtype.
    pub parameter_bytes: f64,
    /// What one sample hands to the next layer, at any degree.
    pub output_bytes: f64,
    /// What a device holds, by degree.
    pub memory: Vec<LayerMemory>,
    /// What of all this belongs to routed experts; absent where there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<ExpertClass>,
}

/// What each device of a group holds of one layer at one degree.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerMemory {
    /// Weights, gradients, and whatever else every replica needs.
    pub state_bytes: f64,
    /// Optimizer state: held whole, or divided by the number of the layer's replicas if the layout
    /// shards it (ZeRO-1).
    pub optimizer_bytes: f64,
    /// Kept from forward to backward, a sample.
    pub activation_bytes: f64,
    /// Kept from forward to backward with recompute, a sample (the layer's input).
    pub recompute_bytes: f64,
}

/// Consecutive layers of one class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Index into [`Instance::classes`].
    pub class: usize,
    /// How many.
    pub count: u32,
}

/// Alike nodes with alike devices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// The devices' kind.
    pub kind: String,
    /// Nodes.
    pub nodes: u32,
    /// Devices a node.
    pub devices_per_node: u32,
    /// Memory of a device.
    pub memory_bytes: f64,
    /// What framework and libraries take of it, by degree.
    pub overhead_bytes: Vec<f64>,
    /// Link between devices of a node.
    pub intra: Link,
    /// Known costs; a degree, expert parallel degree and micro-batch without a row cannot be used.
    pub costs: Vec<CostRow>,
}

/// Seconds of each layer class on a group of one degree with one micro-batch size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CostRow {
    /// Tensor parallel degree.
    pub tensor_parallel: u32,
    /// Devices among which routed experts are divided, where these are more than the tensor-parallel
    /// group; else 1.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub expert_parallel: u32,
    /// Samples that each tensor-parallel group takes of a micro-batch.
    pub micro_batch: u32,
    /// Forward of a layer, by class.
    pub forward_s: Vec<f64>,
    /// Backward of a layer without recompute, by class.
    pub backward_s: Vec<f64>,
    /// Optimizer update of a whole layer (its part at this degree), by class.
    pub update_s: Vec<f64>,
}

/// How time and memory are added up. A figure is only comparable with its rules beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    /// What stages pay for handing micro-batches on.
    pub transfer: Transfer,
    /// How gradients are exchanged.
    pub exchange: Exchange,
    /// What of the exchange may hide behind the last micro-batch's backward of the same stage, or behind
    /// its weights' half: 0 none, 1 as much as is there. `price/overlap.rs` has the rule.
    pub exchange_overlap: f64,
    /// What of the optimizer's update counts.
    pub update: Update,
    /// Whether a stage may recompute.
    pub recompute: bool,
    /// Whether a layout may shard optimizer state.
    pub shard_optimizer: bool,
    /// Data-parallel replicas that a stage may have inside of one pipeline, at most.
    pub max_replicas: u32,
    /// Schedules that may be used; 1F1B always may.
    pub schedules: Vec<Schedule>,
}

/// What a stage pays for handing a micro-batch on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transfer {
    /// As the published tables are priced: in series with compute; the first stage pays its
    /// activation (twice with more than three stages), the last twice its gradient.
    Published,
    /// In series with compute; each stage pays its activation out and its gradient back.
    Serial,
    /// Beside compute: a stage's pace is the slower of both, the fill pays the transfer in series.
    Overlapped,
}

/// How gradients are exchanged after the last backward.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exchange {
    /// One ring over all holders of a layer, at the slowest neighbouring link of one device to one,
    /// in buckets: `2(n − 1) · t(bytes / n)` each.
    FlatRing {
        /// Bytes of a bucket.
        bucket_bytes: f64,
    },
    /// Inside each node first, then rings between nodes (all ranks of a node share its link), then
    /// inside again: `2(g − 1)/g` of the bytes inside and `2(n − 1)/n` between, at the slowest link
    /// that the group must use.
    Hierarchical,
}

/// What of the optimizer's update counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Update {
    /// As the published tables are priced: the largest of any stage's first layer, once.
    FirstLayer,
    /// All layers of a stage, divided by the replicas where optimizer state is sharded; the slowest
    /// stage counts.
    AllLayers,
}

/// How a pipeline orders its micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Schedule {
    /// One forward, one backward in turn.
    #[default]
    #[serde(rename = "1f1b")]
    OneForwardOneBackward,
    /// 1F1B over that many virtual stages a device; fill and drain shrink, transfers multiply.
    Interleaved(u32),
    /// Backward split in two, weights' part in the gaps: of the fill only the forwards and the
    /// inputs' part of the backwards remain.
    ZeroBubble,
}

const fn one() -> u32 {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde hands out a reference")]
const fn is_one(value: &u32) -> bool {
    *value == 1
}

/// An answer: pipelines and how many of each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// Templates, in an order that means nothing; devices are handed out in it.
    pub templates: Vec<Template>,
    /// Whether optimizer state is divided among the replicas of a layer (ZeRO-1).
    pub shard_optimizer: bool,
}

/// `count` pipelines that are alike.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// Pipelines.
    pub count: u32,
    /// Samples a micro-batch.
    pub micro_batch: u32,
    /// Micro-batches a step, in each of them.
    pub num_micro_batches: u32,
    /// Their order.
    pub schedule: Schedule,
    /// Stages from the embedding to the head.
    pub stages: Vec<Stage>,
}

/// A contiguous range of layers on `replicas` groups of devices of one pool; a group lies in one node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// First layer.
    pub first_layer: u32,
    /// Layer past the last.
    pub end_layer: u32,
    /// Index into [`Instance::pools`].
    pub pool: usize,
    /// Devices of a tensor-parallel group.
    pub tensor_parallel: u32,
    /// Devices of one node among which the routed experts of each layer are divided: several
    /// tensor-parallel groups, which divide each micro-batch among them and exchange tokens. 1: experts
    /// stay in the tensor-parallel group, each whole on one of its ranks.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub expert_parallel: u32,
    /// Groups that divide each micro-batch among them; it must be divisible.
    pub replicas: u32,
    /// Whether backward computes activations again.
    pub recompute: bool,
}

impl Instance {
    /// Layers of the model.
    pub fn num_layers(&self) -> u32 {
        self.runs.iter().map(|run| run.count).sum()
    }

    /// The class of every layer.
    pub fn layer_classes(&self) -> Vec<usize> {
        self.runs.iter().flat_map(|run| std::iter::repeat_n(run.class, run.count as usize)).collect()
    }

    /// Position of a degree in the vectors by degree.
    pub fn degree_index(&self, tensor_parallel: u32) -> Option<usize> {
        self.degrees.iter().position(|degree| *degree == tensor_parallel)
    }

    /// Micro-batches of so many samples that any stage holds at most: those of a whole batch. What a
    /// pipeline has of them is not known where memory is counted.
    pub fn most_in_flight(&self, micro_batch: u32) -> f64 {
        f64::from((self.global_batch / micro_batch.max(1)).max(1))
    }

    /// Devices of all pools.
    pub fn num_devices(&self) -> u64 {
        self.pools.iter().map(Pool::num_devices).sum()
    }
}

impl Pool {
    /// Its devices.
    pub fn num_devices(&self) -> u64 {
        u64::from(self.nodes) * u64::from(self.devices_per_node)
    }

    /// The cost of a group of that degree with micro-batches of that size, experts inside of it.
    pub fn cost(&self, tensor_parallel: u32, micro_batch: u32) -> Option<&CostRow> {
        self.cost_with_experts(tensor_parallel, 1, micro_batch)
    }

    /// The same with experts divided among `expert_parallel` devices.
    pub fn cost_with_experts(
        &self,
        tensor_parallel: u32,
        expert_parallel: u32,
        micro_batch: u32,
    ) -> Option<&CostRow> {
        self.costs.iter().find(|row| {
            row.tensor_parallel == tensor_parallel
                && row.expert_parallel == expert_parallel
                && row.micro_batch == micro_batch
        })
    }
}

impl CostRow {
    /// Tensor parallel degree, and the devices of a group, over which experts may be divided.
    pub(crate) fn shape(&self) -> (u32, u32) {
        (self.tensor_parallel, self.tensor_parallel.max(self.expert_parallel))
    }

    /// Samples of a micro-batch of the whole group.
    pub(crate) fn samples(&self) -> u32 {
        let (tensor_parallel, group) = self.shape();
        self.micro_batch.saturating_mul(group / tensor_parallel.max(1))
    }
}

impl Rules {
    /// The rules by which the published tables are priced: everything in series, a flat ring in
    /// buckets of 5e8 bytes, nothing that their peers lack.
    pub fn published() -> Self {
        Self {
            transfer: Transfer::Published,
            exchange: Exchange::FlatRing { bucket_bytes: 5e8 },
            exchange_overlap: 0.0,
            update: Update::FirstLayer,
            recompute: false,
            shard_optimizer: false,
            max_replicas: 1,
            schedules: vec![Schedule::OneForwardOneBackward],
        }
    }

    /// What a run on today's frameworks does: transfers beside compute, exchange inside nodes first
    /// and behind the last backward, sharded optimizer state, recompute; 1F1B and zero bubble.
    pub fn hierarchical() -> Self {
        Self {
            transfer: Transfer::Overlapped,
            exchange: Exchange::Hierarchical,
            exchange_overlap: 1.0,
            update: Update::AllLayers,
            recompute: true,
            shard_optimizer: true,
            max_replicas: 1,
            schedules: vec![Schedule::OneForwardOneBackward, Schedule::ZeroBubble],
        }
    }

    /// What `hgct train` runs: [`Rules::hierarchical`], whose update owners divide optimizer state.
    pub fn executable() -> Self {
        Self { schedules: Vec::new(), ..Self::hierarchical() }
    }
}

impl Layout {
    /// Samples a step.
    pub fn num_samples(&self) -> u64 {
        self.templates.iter().map(|t| u64::from(t.count) * t.num_samples()).sum()
    }

    /// Pipelines.
    pub fn num_pipelines(&self) -> u64 {
        self.templates.iter().map(|t| u64::from(t.count)).sum()
    }

    /// Forwards and backwards of a step, of virtual stages where there are such.
    pub(crate) fn computations(&self) -> u64 {
        let of = |t: &Template| {
            let stages = t.stages.len() as u64 * u64::from(t.schedule.virtual_stages());
            2 * u64::from(t.num_micro_batches) * stages
        };
        self.templates.iter().map(|t| u64::from(t.count) * of(t)).sum()
    }

    /// Devices used of each pool.
    pub fn devices_used(&self, num_pools: usize) -> Vec<u64> {
        let mut used = vec![0; num_pools];
        for template in &self.templates {
            for stage in &template.stages {
                if let Some(used) = used.get_mut(stage.pool) {
                    *used += u64::from(template.count) * stage.num_devices();
                }
            }
        }
        used
    }
}

impl Template {
    /// Samples a step of one of its pipelines.
    pub fn num_samples(&self) -> u64 {
        u64::from(self.micro_batch) * u64::from(self.num_micro_batches)
    }
}

impl Stage {
    /// Devices of one instance of the stage.
    pub fn num_devices(&self) -> u64 {
        u64::from(self.group_devices()) * u64::from(self.replicas)
    }

    /// Devices of a group that lies in one node: a tensor-parallel group, or all among which experts are
    /// divided.
    pub fn group_devices(&self) -> u32 {
        self.tensor_parallel.max(self.expert_parallel)
    }

    /// Tensor-parallel groups of such a group.
    pub fn parts(&self) -> u32 {
        self.group_devices() / self.tensor_parallel.max(1)
    }

    /// Its layers.
    pub fn num_layers(&self) -> u32 {
        self.end_layer - self.first_layer
    }
}

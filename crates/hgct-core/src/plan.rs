//! The plan: a complete answer, with no choice left to the worker that executes it.
//!
//! A plan is a set of *stage instances* and *pipelines* through them. From these it derives who
//! holds every slice and who owns its update; gradients are reduced to the owner, it updates, the
//! new parameters are gathered from it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::canonical::Hash;
use crate::cluster::{Grant, Isolation};
use crate::dtype::DType;
use crate::ids::{DeviceId, Kind, NodeId, Rank};
use crate::model::ModelSpec;
use crate::slice::{self, Slice};

mod builder;
#[cfg(test)]
mod tests;
mod validate;

pub use builder::PlanBuilder;

/// Index of a stage instance in its plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StageId(pub u32);

impl fmt::Display for StageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stage {}", self.0)
    }
}

impl StageId {
    /// The id as an index into `Plan::stages`.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// `plan.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Version of this document's form.
    pub format: u32,
    /// The plan that this one replaces.
    pub parent: Option<Hash>,
    /// Hash of the job.
    pub job: Hash,
    /// Hash of the cluster, grants included; absent in a plan written by hand.
    pub cluster: Option<Hash>,
    /// Hash of the profile; absent in a plan written by hand.
    pub profile: Option<Hash>,
    /// How grants are held.
    pub isolation: Isolation,
    /// The model's shape.
    pub model: ModelSpec,
    /// Tokens a sample.
    pub seq_len: u32,
    /// Samples a step.
    pub global_batch: u32,
    /// Workers in rank order.
    pub ranks: Vec<PlanRank>,
    /// Stage instances; a `StageId` is an index here.
    pub stages: Vec<StageInstance>,
    /// Pipelines in the order in which their contributions are added.
    pub pipelines: Vec<Pipeline>,
    /// Update owners of all slices, in order of first layer.
    pub owners: Vec<OwnedGroup>,
    /// Dtype of activations and gradients on the wire.
    pub wire_dtype: DType,
    /// Dtype of the optimizer's parameters and moments.
    pub master_dtype: DType,
    /// Hash of the schedule's text, so that two executors can only do the same thing.
    pub schedule: Hash,
    /// What the planner expects; written before the first step and never touched again.
    pub prediction: Option<Prediction>,
}

/// One worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanRank {
    /// Its device.
    pub device: DeviceId,
    /// The device's kind.
    pub kind: Kind,
    /// The device's node.
    pub node: NodeId,
    /// The grant that it was measured under.
    pub grant: Grant,
}

/// A contiguous range of layers on a group of devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageInstance {
    /// First layer.
    pub first_layer: u32,
    /// Layer past the last.
    pub end_layer: u32,
    /// The group; one rank today (tensor parallelism will put more here).
    pub ranks: Vec<Rank>,
    /// Whether backward computes activations again.
    pub recompute: bool,
    /// Dtype of its arithmetic.
    pub compute_dtype: DType,
}

/// A path over stage instances with its own micro-batches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pipeline {
    /// Stage instances from the embedding to the head.
    pub stages: Vec<StageId>,
    /// Samples a micro-batch.
    pub micro_batch: u32,
    /// Micro-batches a step.
    pub num_micro_batches: u32,
    /// How they are ordered.
    pub schedule: ScheduleKind,
    /// Under 1F1B: forwards for each later stage that a stage is ahead of the fewest, so that none
    /// waits for a way between them that takes longer than a micro-batch. Activations of as many
    /// more micro-batches are kept.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub run_ahead: u32,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde hands out a reference")]
fn is_zero(value: &u32) -> bool {
    *value == 0
}

/// How a pipeline orders its micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ScheduleKind {
    /// One forward, one backward in turn.
    #[serde(rename = "1f1b")]
    OneForwardOneBackward,
    /// All forwards, then all backwards.
    #[serde(rename = "gpipe")]
    GPipe,
    /// 1F1B over virtual stages.
    #[serde(rename = "interleaved-1f1b")]
    Interleaved,
    /// Split backward to fill the bubble.
    ZeroBubble,
}

/// Where a slice is updated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateSite {
    /// In host memory, by our optimizer.
    Host,
    /// In the device's memory, by the engine.
    Device,
}

/// Slices that share holders and an update owner, and travel as one message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnedGroup {
    /// Who updates them.
    pub owner: Rank,
    /// Where.
    pub site: UpdateSite,
    /// The stage instances that hold them, in the order in which contributions are added, each
    /// with the layer whose backward makes its gradient final.
    pub holders: Vec<Holder>,
    /// The slices, in order.
    pub slices: Vec<Slice>,
}

/// A stage instance that holds a group of slices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holder {
    /// The stage instance.
    pub stage: StageId,
    /// The lowest of its layers that uses the slices.
    pub layer: u32,
}

/// What the planner expects of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prediction {
    /// One step.
    pub step_ns: u64,
    /// No plan of these devices can be faster.
    pub bound_ns: u64,
    /// What limits the step: `compute`, `bubble`, `rounding`, `exchange`, `memory`.
    pub limited_by: String,
    /// A row a rank.
    pub ranks: Vec<RankPrediction>,
}

/// What the planner expects of one rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankPrediction {
    /// Time in forward and backward actions.
    pub compute_ns: u64,
    /// Time in reduce, update and gather.
    pub exchange_ns: u64,
    /// Peak memory.
    pub memory_bytes: u64,
    /// Thousandths by which the plan is faster with this device than the best one without it;
    /// absent where that was not searched.
    pub gain_permille: Option<i64>,
}

impl OwnedGroup {
    /// Elements of all its slices.
    pub fn num_elements(&self) -> u64 {
        self.slices.iter().map(Slice::num_elements).sum()
    }
}

impl StageInstance {
    /// Its layers.
    pub fn layers(&self) -> Range<u32> {
        self.first_layer..self.end_layer
    }

    /// The one rank of its group.
    pub fn rank(&self) -> Rank {
        self.ranks[0]
    }
}

impl Pipeline {
    /// Forwards of the stage at `position` before its first backward under 1F1B, where there are as
    /// many micro-batches.
    pub fn warm_up(&self, position: usize) -> usize {
        self.stages.len().saturating_sub(position + 1).saturating_mul(self.run_ahead as usize + 1)
    }

    /// Samples a step.
    pub fn num_samples(&self) -> u64 {
        u64::from(self.micro_batch) * u64::from(self.num_micro_batches)
    }
}

/// A micro-batch of a plan: which pipeline, and which samples of the global batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MicroBatchPlace {
    /// Index into `Plan::pipelines`.
    pub pipeline: usize,
    /// Positions in the global batch.
    pub samples: Range<u64>,
}

impl Plan {
    /// The current form.
    pub const FORMAT: u32 = 1;

    /// Hash of the whole plan.
    pub fn hash(&self) -> Hash {
        Hash::of(self)
    }

    /// Parses a `plan.json` and checks its invariants; `file` is only named in errors.
    pub fn from_json(file: &str, text: &str) -> Result<Self> {
        let plan: Self = crate::canonical::decode(file, text)?;
        plan.validate()?;
        Ok(plan)
    }

    /// A stage instance.
    pub fn stage(&self, id: StageId) -> &StageInstance {
        &self.stages[id.index()]
    }

    /// The stage instances on a rank, in order of id.
    pub fn stages_of(&self, rank: Rank) -> impl Iterator<Item = (StageId, &StageInstance)> {
        (0..).map(StageId).zip(&self.stages).filter(move |(_, stage)| stage.ranks.contains(&rank))
    }

    /// Where each micro-batch of a step lies; a micro-batch's id is its index here. Pipelines take
    /// the samples of the global batch in order, so the plan's shape never changes which samples a
    /// step sees.
    pub fn micro_batches(&self) -> Vec<MicroBatchPlace> {
        let mut next = 0u64;
        let mut places = Vec::new();
        for (pipeline, p) in self.pipelines.iter().enumerate() {
            for _ in 0..p.num_micro_batches {
                let end = next + u64::from(p.micro_batch);
                places.push(MicroBatchPlace { pipeline, samples: next..end });
                next = end;
            }
        }
        places
    }

    /// Ids of the micro-batches of a pipeline.
    pub fn micro_batches_of(&self, pipeline: usize) -> Range<u32> {
        let first: u32 = self.pipelines[..pipeline].iter().map(|p| p.num_micro_batches).sum();
        first..first + self.pipelines[pipeline].num_micro_batches
    }
}

/// Most elements of a group: one message carries a group, and 256 MiB of single precision stay far
/// below what a message may have.
pub const MAX_GROUP_ELEMENTS: u64 = 1 << 26;

/// Derives who holds every slice and who owns its update.
///
/// Slices with the same holders form a pool; each pool is cut along update blocks among its
/// holders' ranks in proportion to `weights` (one a rank; how much update work each should do), and a
/// rank's part into groups of at most [`MAX_GROUP_ELEMENTS`].
pub fn derive_owners(model: &ModelSpec, stages: &[StageInstance], weights: &[f64]) -> Vec<OwnedGroup> {
    let num_parameters = model.num_parameters();
    let mut holders = holders_of_tensors(model, stages);
    // Pools in the order of the model's tensors, so that groups are in layer order.
    let mut pools: Vec<(Vec<Holder>, Vec<crate::model::TensorSpec>)> = Vec::new();
    for tensor in model.tensors() {
        let Some(of_tensor) = holders.remove(&tensor.name) else { continue };
        match pools.iter_mut().find(|(known, _)| *known == of_tensor) {
            Some((_, tensors)) => tensors.push(tensor),
            None => pools.push((of_tensor, vec![tensor])),
        }
    }
    let mut groups = Vec::new();
    for (of_pool, tensors) in pools {
        let mut ranks: Vec<Rank> = of_pool.iter().map(|holder| stages[holder.stage.index()].rank()).collect();
        ranks.sort_unstable();
        ranks.dedup();
        let weight = |rank: &Rank| weights.get(rank.index()).copied().unwrap_or(1.0).max(0.0);
        let sum: f64 = ranks.iter().map(weight).sum();
        let total: u64 = tensors.iter().map(crate::model::TensorSpec::num_elements).sum();
        let mut cut = Vec::new();
        let mut share = 0.0;
        for rank in &ranks {
            share += if sum > 0.0 { weight(rank) / sum } else { 1.0 / ranks.len() as f64 };
            cut.push((share * total as f64).round() as u64);
        }
        let mut passed = 0u64;
        // Elements of each group. Blocks go to the ranks in their order, so only the newest grows.
        let mut of_ranks: Vec<(u64, OwnedGroup)> = Vec::new();
        for tensor in &tensors {
            for rows in slice::blocks(tensor, num_parameters) {
                let elements = (rows.end - rows.start) * tensor.row_elements();
                let middle = passed + elements / 2;
                let owner = ranks[cut.iter().position(|end| middle < *end).unwrap_or(ranks.len() - 1)];
                passed += elements;
                match of_ranks.last_mut() {
                    Some((held, OwnedGroup { owner: of, slices, .. }))
                        if *of == owner && *held + elements <= MAX_GROUP_ELEMENTS =>
                    {
                        *held += elements;
                        match slices.last_mut() {
                            Some(last) if last.tensor == tensor.name && last.end[0] == rows.start => {
                                last.end[0] = rows.end;
                            }
                            _ => slices.push(Slice::rows_of(tensor, rows)),
                        }
                    }
                    _ => {
                        let (holders, slices) = (of_pool.clone(), vec![Slice::rows_of(tensor, rows)]);
                        let group = OwnedGroup { owner, site: UpdateSite::Host, holders, slices };
                        of_ranks.push((elements, group));
                    }
                }
            }
        }
        groups.extend(of_ranks.into_iter().map(|(_, group)| group));
    }
    groups
}

/// The stage instances that hold each tensor, in order of id; contributions are added in this order.
fn holders_of_tensors(model: &ModelSpec, stages: &[StageInstance]) -> BTreeMap<String, Vec<Holder>> {
    let mut holders: BTreeMap<String, Vec<Holder>> = BTreeMap::new();
    for (id, stage) in (0..).map(StageId).zip(stages) {
        for (layer, tensor) in model.stage_tensors(stage.layers()) {
            holders.entry(tensor.name).or_default().push(Holder { stage: id, layer });
        }
    }
    holders
}

//! The answer to a large planning problem as a document, and why it is the answer.
//!
//! An [`Answer`] holds the problem too, so that it can be priced again, compared, replanned, simulated
//! and exported without the files that it came from. It has no seconds of a search and no date: equal
//! problems give equal bytes.

use hgct_core::accelerator::Confidence;
use hgct_core::architecture::Architecture;
use hgct_core::canonical::Hash;
use hgct_core::plan::Plan;
use serde::{Deserialize, Serialize};

use crate::instance::{Group, Instance, Layout, Priced, check, check_groups, check_instance, price};
use crate::{Error, Result};

mod alike;
mod batch;
mod below;
mod compare;
mod shortage;
#[cfg(test)]
mod tests;
mod text;
mod why;

pub use batch::check_batch;
pub use below::{BelowSum, Part};
pub use compare::{Compared, Comparison, UsedDevices, compare};
pub use shortage::{Shortage, shortage};
pub use why::{Idle, Rejected, Search, Shadow, TimeOver, Why, why};

/// Where the costs of a problem come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Basis {
    /// Public figures: an interval stands beside every prediction.
    Estimate,
    /// A measured profile.
    Profile,
    /// Tables from elsewhere.
    Tables,
}

/// `plan.json` of a layout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    /// Version of this document's form.
    pub format: u32,
    /// The answer that this one replaces.
    pub parent: Option<Hash>,
    /// Where the costs come from.
    pub basis: Basis,
    /// The model, in figures.
    pub model: ModelFacts,
    /// Peak of one device of each pool in the dtype of arithmetic, flops a second; empty where it is
    /// not known.
    pub peaks: Vec<f64>,
    /// How far the figures of each pool can be trusted; empty for measured ones.
    pub confidence: Vec<Confidence>,
    /// The problem.
    pub instance: Instance,
    /// The same with every figure at the slow, and at the fast end of its range; absent for measured
    /// costs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends: Option<Box<[Instance; 2]>>,
    /// The layout.
    pub layout: Layout,
    /// Its devices, where they are not those that [`crate::instance::assign`] hands out: pipelines that
    /// outlived a loss keep theirs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<Vec<Group>>,
    /// What is expected of it.
    pub prediction: Expected,
    /// The same as `hgct train` executes it, with its own prediction; absent where devices were not
    /// measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Box<Plan>>,
}

/// A model, in figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelFacts {
    /// Its family.
    pub family: String,
    /// Parameters.
    pub parameters: u64,
    /// Parameters that one token meets.
    pub active_parameters: u64,
    /// Model flops of one sample, forward and backward; 0 where they are not known.
    pub train_flops: f64,
    /// Whether embedding and head are one tensor; absent where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tied_embeddings: Option<bool>,
}

/// What is expected of a layout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expected {
    /// One step.
    pub iteration_s: f64,
    /// One step if every figure is at the slow end of its range; absent for measured costs.
    pub slow_s: Option<f64>,
    /// One step if every figure is at the fast end of its range.
    pub fast_s: Option<f64>,
    /// No layout of these devices takes less; absent where it was not computed.
    pub bound_s: Option<f64>,
    /// By how much of itself the bound rises with one more device of each pool; empty where it was not
    /// computed.
    pub prices: Vec<f64>,
    /// What limits the step: [`limited_by`].
    pub limited_by: String,
    /// Whether the search came to its end.
    pub finished: bool,
}

/// What most of a step that is not compute goes to, if it is more than a tenth of it: `transfer`,
/// `bubble`, `update`, `exchange`; else `compute`.
pub fn limited_by(priced: &Priced) -> &'static str {
    let slowest = priced.templates.iter().max_by(|a, b| a.total_s.total_cmp(&b.total_s));
    let (transfer_s, bubble_s) = slowest.map_or((0.0, 0.0), |t| (t.transfer_s, t.bubble_s));
    let parts = [
        ("bubble", bubble_s),
        ("exchange", priced.exchange_s),
        ("transfer", transfer_s),
        ("update", priced.update_s),
    ];
    let most = parts
        .iter()
        .fold(("compute", 0.1 * priced.iteration_s), |most, part| if part.1 > most.1 { *part } else { most });
    most.0
}

/// One stage of one template, for tables.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageRow {
    /// Index of its template.
    pub template: usize,
    /// Pipelines of that template.
    pub pipelines: u32,
    /// Index in its pipeline.
    pub stage: usize,
    /// The pool's kind.
    pub kind: String,
    /// First layer, and the layer past the last.
    pub layers: [u32; 2],
    /// Devices of all its instances.
    pub devices: u64,
    /// Devices of a tensor-parallel group.
    pub tensor_parallel: u32,
    /// Devices that routed experts are divided among, each whole; 1 where the model has none.
    pub expert_parallel: u32,
    /// Groups of an instance.
    pub replicas: u32,
    /// Samples a micro-batch.
    pub micro_batch: u32,
    /// Micro-batches a step in each pipeline.
    pub micro_batches: u32,
    /// Their order: `1f1b`, `zero-bubble`, `interleaved-V`.
    pub schedule: String,
    /// Whether backward computes activations again.
    pub recompute: bool,
    /// Peak of each device.
    pub memory_bytes: u64,
    /// What each device has.
    pub memory_limit_bytes: u64,
    /// Part of the step in which its devices compute.
    pub busy: f64,
}

impl ModelFacts {
    /// Reads an architecture at a sequence length.
    pub fn new(architecture: &Architecture, seq_len: u32) -> Self {
        Self {
            family: architecture.family.clone(),
            parameters: architecture.num_parameters(),
            active_parameters: architecture.num_active_parameters(),
            train_flops: architecture.train_flops(seq_len),
            tied_embeddings: Some(architecture.tied_parameters > 0),
        }
    }
}

impl Expected {
    /// By how much a better layout could be faster at most: bound ÷ plan is 1 less this.
    pub fn gap(&self) -> Option<f64> {
        self.bound_s.map(|bound| (1.0 - bound / self.iteration_s).max(0.0))
    }
}

impl Answer {
    /// The current form.
    pub const FORMAT: u32 = 1;

    /// Parses a `plan.json` of a layout and checks it; `file` is only named in errors.
    pub fn from_json(file: &str, text: &str) -> Result<Self> {
        let answer: Self = hgct_core::canonical::decode(file, text)?;
        let bad = |key: &str, found: String, allowed: &str| {
            Err(Error::Core(hgct_core::Error::Value {
                file: file.into(),
                key: key.into(),
                found,
                allowed: allowed.into(),
            }))
        };
        if answer.format != Self::FORMAT {
            return bad("format", answer.format.to_string(), "1");
        }
        if let Some(fault) = check_instance(&answer.instance).first() {
            return bad("instance", fault.to_string(), "a sound problem");
        }
        if let Some(fault) = check(&answer.instance, &answer.layout).first() {
            return bad("layout", fault.to_string(), "a sound layout");
        }
        let fault = |end: &Instance| {
            check_instance(end).into_iter().next().or_else(|| check(end, &answer.layout).into_iter().next())
        };
        if let Some(fault) = answer.ends.as_deref().and_then(|ends| ends.iter().find_map(fault)) {
            return bad("ends", fault.to_string(), "the problem with other speeds");
        }
        let groups = answer.groups.as_deref();
        if let Some(fault) = groups.and_then(|of| check_groups(&answer.instance, &answer.layout, of)) {
            return bad("groups", fault.to_string(), "a device for every rank of every stage");
        }
        if let Some(plan) = &answer.plan {
            plan.validate()?;
        }
        Ok(answer)
    }

    /// What the layout costs.
    pub fn price(&self) -> Priced {
        price(&self.instance, &self.layout)
    }

    /// Steps a second.
    pub fn iterations_per_s(&self) -> f64 {
        1.0 / self.prediction.iteration_s
    }

    /// Tokens a second.
    pub fn tokens_per_s(&self) -> f64 {
        f64::from(self.instance.global_batch) * f64::from(self.instance.seq_len) / self.prediction.iteration_s
    }

    /// Model flops ÷ (time × peaks of all devices used); absent where peaks or flops are not known.
    pub fn mfu(&self) -> Option<f64> {
        let used = self.layout.devices_used(self.instance.pools.len());
        let peak: f64 = used.iter().zip(&self.peaks).map(|(used, peak)| *used as f64 * peak).sum();
        let flops = self.model.train_flops * f64::from(self.instance.global_batch);
        (self.peaks.len() == used.len() && peak > 0.0 && flops > 0.0)
            .then(|| flops / self.prediction.iteration_s / peak)
    }

    /// A row a stage.
    pub fn rows(&self) -> Vec<StageRow> {
        let priced = self.price();
        let routed = self.instance.classes.iter().any(|class| class.experts.is_some());
        let mut rows = Vec::new();
        for (template, (of, costs)) in self.layout.templates.iter().zip(&priced.templates).enumerate() {
            for (index, (stage, cost)) in of.stages.iter().zip(&costs.stages).enumerate() {
                let pool = &self.instance.pools[stage.pool];
                rows.push(StageRow {
                    template,
                    pipelines: of.count,
                    stage: index,
                    kind: pool.kind.clone(),
                    layers: [stage.first_layer, stage.end_layer],
                    devices: u64::from(of.count) * stage.num_devices(),
                    tensor_parallel: stage.tensor_parallel,
                    expert_parallel: if routed { stage.group_devices() } else { 1 },
                    replicas: stage.replicas,
                    micro_batch: of.micro_batch,
                    micro_batches: of.num_micro_batches,
                    schedule: of.schedule.to_string(),
                    recompute: stage.recompute,
                    memory_bytes: cost.memory_bytes as u64,
                    memory_limit_bytes: pool.memory_bytes as u64,
                    busy: cost.busy,
                });
            }
        }
        rows
    }
}

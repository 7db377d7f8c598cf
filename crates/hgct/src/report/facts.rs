//! The figures of a report, from its documents.

use hgct_core::canonical::Hash;
use hgct_core::cluster::{Grant, Isolation};
use hgct_core::ids::{DeviceId, Kind, Rank, RunId};
use hgct_core::plan::{Plan, PlanRank};
use hgct_core::profile::DeviceProfile;
use hgct_core::timeline::RankTimeline;
use serde::Serialize;

use super::shares::Shares;
use super::{Inputs, steady_step};
use crate::metrics::StepRow;

/// Last steps whose mean is the training loss at the end.
const LAST_STEPS: usize = 10;

/// All figures; prints as the answer of `hgct report --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Report {
    /// The run.
    pub(crate) run: RunId,
    /// How grants were held.
    pub(crate) isolation: Isolation,
    /// Losses.
    pub(crate) losses: Losses,
    /// Time of a step.
    pub(crate) steps: Steps,
    /// The step that `shares` are of.
    pub(crate) shares_step: Option<u64>,
    /// A row a rank.
    #[serde(rename = "rows")]
    pub(crate) devices: Vec<Device>,
}

/// Nats a token.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Losses {
    /// Mean of the last steps.
    pub(crate) train: Option<f64>,
    /// Last evaluation of the held-out split.
    pub(crate) held_out: Option<f64>,
    /// Steps trained at that evaluation.
    pub(crate) held_out_step: Option<u64>,
    /// Bigram model on the held-out tokens.
    pub(crate) bigram: Option<f64>,
    /// Unigram model on the held-out tokens.
    pub(crate) unigram: Option<f64>,
    /// Whether the held-out loss ended below the bigram model's.
    pub(crate) below_bigram: Option<bool>,
}

/// Time of a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Steps {
    /// Steps that count, each as it was done last.
    pub(crate) trained: u64,
    /// Steps that all ranks skipped.
    pub(crate) skipped: u64,
    /// Steps that the measured figures are of: all under this plan but the first and skipped ones.
    pub(crate) steady: u64,
    /// Their median.
    pub(crate) measured_seconds: Option<f64>,
    /// A tenth of them take less.
    pub(crate) measured_low_seconds: Option<f64>,
    /// A tenth of them take more.
    pub(crate) measured_high_seconds: Option<f64>,
    /// As the plan says.
    pub(crate) predicted_seconds: Option<f64>,
    /// (predicted − measured) ÷ measured.
    pub(crate) prediction_error: Option<f64>,
    /// No plan of these devices takes less, as the plan says.
    pub(crate) bound_seconds: Option<f64>,
    /// As the plan says.
    pub(crate) limited_by: Option<String>,
    /// Tokens of a step ÷ measured time.
    pub(crate) tokens_per_second: Option<f64>,
    /// Model flops ÷ (time × sum of the devices' peaks), where the catalogue knows all of them.
    pub(crate) mfu: Option<f64>,
    /// Sum of what the devices reach alone.
    pub(crate) alone_tokens_per_second: Option<f64>,
    /// Together ÷ that sum.
    pub(crate) efficiency: Option<f64>,
}

/// One rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Device {
    /// Its device.
    pub(crate) device: DeviceId,
    /// The device's kind.
    pub(crate) kind: Kind,
    /// Framework and version.
    pub(crate) framework: String,
    /// Its grant.
    pub(crate) grant: Grant,
    /// Its layers, in words.
    pub(crate) layers: String,
    /// Its micro-batches a step, in words.
    pub(crate) micro_batches: String,
    /// Share of the step's model flops that it computes.
    pub(crate) flops_share: f64,
    /// Mean share of its step in forward and backward.
    pub(crate) busy_share: Option<f64>,
    /// Tokens a second alone.
    pub(crate) tokens_per_second_alone: Option<f64>,
    /// Tokens of the step × its share of model flops ÷ step time.
    pub(crate) tokens_per_second_together: Option<f64>,
    /// Thousandths by which the plan is faster with it, as the plan says.
    pub(crate) gain_permille: Option<i64>,
    /// Where the time of `shares_step` went.
    pub(crate) shares: Option<Shares>,
    /// Largest resident memory of its worker.
    pub(crate) memory_bytes: Option<u64>,
    /// Peak memory, as the plan says.
    pub(crate) predicted_memory_bytes: Option<u64>,
    /// A plain loop of the same framework, where one was measured.
    pub(crate) plain_loop_bytes: Option<u64>,
}

impl Report {
    pub(super) fn of(inputs: &Inputs) -> Self {
        // A resumed run may have had other plans, whose times say nothing of this one.
        let under_plan = inputs.metrics.steps_under(&Hash::of(&inputs.plan));
        let steady = steady_steps(&under_plan);
        let steps = Steps::of(inputs, &steady);
        let window = inputs.measured.as_ref().and_then(steady_step);
        let devices: Vec<Device> = (0..inputs.plan.ranks.len())
            .map(|rank| {
                Device::of(inputs, Rank(rank as u32), &under_plan, &steady, steps.measured_seconds, window)
            })
            .collect();
        let alone = devices.iter().map(|device| device.tokens_per_second_alone).sum::<Option<f64>>();
        let efficiency = steps.tokens_per_second.zip(alone.filter(|alone| *alone > 0.0)).map(|(t, a)| t / a);
        Self {
            run: inputs.summary.run.clone(),
            isolation: inputs.summary.isolation,
            losses: Losses::of(inputs),
            steps: Steps { alone_tokens_per_second: alone, efficiency, ..steps },
            shares_step: window.map(|(step, ..)| step),
            devices,
        }
    }
}

impl Losses {
    fn of(inputs: &Inputs) -> Self {
        let finite = |loss: &f64| loss.is_finite();
        let kept = inputs.metrics.steps.iter().filter(|row| !row.skipped).map(|row| row.loss).filter(finite);
        let last: Vec<f64> = kept.rev().take(LAST_STEPS).collect();
        let evaluation = inputs.metrics.evaluations.last();
        let held_out = evaluation.map(|row| row.loss);
        let data = &inputs.summary.data;
        Self {
            train: (!last.is_empty()).then(|| last.iter().sum::<f64>() / last.len() as f64),
            held_out,
            held_out_step: evaluation.map(|row| row.step),
            bigram: data.bigram_nats,
            unigram: data.unigram_nats,
            below_bigram: held_out.zip(data.bigram_nats).map(|(loss, bigram)| loss < bigram),
        }
    }
}

impl Steps {
    fn of(inputs: &Inputs, steady: &[&StepRow]) -> Self {
        let mut seconds: Vec<f64> = steady.iter().map(|row| row.step_seconds).collect();
        seconds.sort_by(f64::total_cmp);
        // The middle of an even number is the mean of two.
        let middle = |at: f64| {
            let position = at * (seconds.len().checked_sub(1)? as f64);
            let (low, high) = (seconds[position.floor() as usize], seconds[position.ceil() as usize]);
            Some(low + (high - low) * position.fract())
        };
        let measured = middle(0.5);
        let prediction = inputs.plan.prediction.as_ref();
        let predicted = prediction.map(|p| p.step_ns as f64 / 1e9);
        let tokens = f64::from(inputs.plan.global_batch) * f64::from(inputs.plan.seq_len);
        Self {
            trained: inputs.metrics.steps.len() as u64,
            skipped: inputs.metrics.steps.iter().filter(|row| row.skipped).count() as u64,
            steady: steady.len() as u64,
            measured_seconds: measured,
            measured_low_seconds: middle(0.1),
            measured_high_seconds: middle(0.9),
            predicted_seconds: predicted,
            prediction_error: predicted.zip(measured).map(|(p, m)| (p - m) / m),
            bound_seconds: prediction.map(|p| p.bound_ns as f64 / 1e9),
            limited_by: prediction.map(|p| p.limited_by.clone()),
            tokens_per_second: measured.map(|m| tokens / m),
            mfu: measured.zip(sum_of_peaks(&inputs.plan)).map(|(seconds, peak)| {
                let plan = &inputs.plan;
                let flops = plan.model.train_flops(0..plan.model.num_placeable_layers(), plan.seq_len);
                flops * f64::from(plan.global_batch) / seconds / peak
            }),
            alone_tokens_per_second: None,
            efficiency: None,
        }
    }
}

impl Device {
    fn of(
        inputs: &Inputs,
        rank: Rank,
        under_plan: &[&StepRow],
        steady: &[&StepRow],
        step_seconds: Option<f64>,
        window: Option<(u64, u64, u64)>,
    ) -> Self {
        let Inputs { plan, summary, .. } = inputs;
        let of_plan = &plan.ranks[rank.index()];
        let device = &of_plan.device;
        let of_summary = summary.devices.iter().find(|row| row.device == *device);
        let of_profile = inputs.profile.as_ref().and_then(|profile| profile.device(device));
        let prediction = plan.prediction.as_ref().and_then(|p| p.ranks.get(rank.index()));
        let rows = |row: &StepRow| row.devices.iter().find(|row| row.device == *device).cloned();
        let busy: Vec<f64> = steady.iter().filter_map(|row| Some(rows(row)?.busy_share)).collect();
        let seen = under_plan.iter().filter_map(|row| Some(rows(row)?.memory_bytes)).max();
        let share = flops_share(plan, rank);
        let tokens = f64::from(plan.global_batch) * f64::from(plan.seq_len);
        let (layers, micro_batches) = work_in_words(plan, rank);
        Self {
            device: device.clone(),
            kind: of_plan.kind.clone(),
            framework: of_summary
                .map(|row| row.framework.clone())
                .filter(|framework| !framework.is_empty())
                .or_else(|| of_profile.map(|row| row.framework.clone()))
                .unwrap_or_default(),
            grant: of_plan.grant.clone(),
            layers,
            micro_batches,
            flops_share: share,
            busy_share: (!busy.is_empty()).then(|| busy.iter().sum::<f64>() / busy.len() as f64),
            tokens_per_second_alone: of_profile.and_then(|row| alone_tokens_per_second(plan, row)),
            tokens_per_second_together: step_seconds.map(|seconds| tokens * share / seconds),
            gain_permille: prediction.and_then(|p| p.gain_permille),
            shares: window.and_then(|(step, begin, end)| {
                let timeline = inputs.measured.as_ref()?;
                let of_rank = timeline.ranks.iter().find(|row| row.rank == rank)?;
                Some(Shares::of(&only_step(of_rank, step), begin, end))
            }),
            memory_bytes: seen,
            predicted_memory_bytes: prediction.map(|p| p.memory_bytes),
            plain_loop_bytes: summary.memory.plain_loops.get(device).copied(),
        }
    }
}

/// A rank's spans of one step.
pub(super) fn only_step(rank: &RankTimeline, step: u64) -> RankTimeline {
    RankTimeline {
        actions: rank.actions.iter().filter(|span| span.step == step).copied().collect(),
        transfers: rank.transfers.iter().filter(|span| span.step == step).copied().collect(),
        ..rank.clone()
    }
}

/// Sum of the devices' peaks in the dtype of arithmetic, if it is one and the catalogue knows all of
/// them.
fn sum_of_peaks(plan: &Plan) -> Option<f64> {
    let dtype = plan.stages.first()?.compute_dtype;
    if plan.stages.iter().any(|stage| stage.compute_dtype != dtype) {
        return None;
    }
    let catalogue = crate::catalogue::load(None).ok()?;
    let peak = |rank: &PlanRank| {
        let accelerator = catalogue.of_kind(rank.kind.as_str())?;
        Some(accelerator.peak_flops_per_s.get(&dtype)?.value)
    };
    plan.ranks.iter().map(peak).sum()
}

/// Share of a step's model flops that a rank computes; recompute does not count.
pub(crate) fn flops_share(plan: &Plan, rank: Rank) -> f64 {
    let flops = |layers| plan.model.train_flops(layers, plan.seq_len);
    let mut done = 0.0;
    for pipeline in &plan.pipelines {
        for stage in pipeline.stages.iter().map(|id| plan.stage(*id)).filter(|stage| stage.rank() == rank) {
            done += pipeline.num_samples() as f64 * flops(stage.layers());
        }
    }
    done / (f64::from(plan.global_batch) * flops(0..plan.model.num_placeable_layers()))
}

/// Tokens a second of a device that trains the whole model alone with its best micro-batch size,
/// update included, from its measured layers; `None` where layers are missing.
pub(crate) fn alone_tokens_per_second(plan: &Plan, profile: &DeviceProfile) -> Option<f64> {
    let samples = f64::from(plan.global_batch);
    let of_size = |micro_batch: u32| {
        let mut step_ns = 2.0 * profile.action_overhead_ns as f64;
        for layer in 0..plan.model.num_placeable_layers() {
            let row = profile.layer(plan.model.layer_kind(layer), micro_batch)?;
            step_ns += (row.forward.median_ns + row.backward.median_ns) as f64;
        }
        Some(step_ns / f64::from(micro_batch))
    };
    let sample_ns = profile.micro_batches().into_iter().filter_map(of_size).min_by(f64::total_cmp)?;
    let update_ns = plan.model.num_parameters() as f64 * profile.update_ps_per_element as f64 / 1e3;
    Some(samples * f64::from(plan.seq_len) * 1e9 / (samples * sample_ns + update_ns))
}

/// A rank's layers and its micro-batches, for people.
fn work_in_words(plan: &Plan, rank: Rank) -> (String, String) {
    let (mut layers, mut micro_batches) = (Vec::new(), Vec::new());
    for pipeline in &plan.pipelines {
        for stage in pipeline.stages.iter().map(|id| plan.stage(*id)).filter(|stage| stage.rank() == rank) {
            layers.push(layers_in_words(plan, stage.first_layer, stage.end_layer));
            micro_batches.push(format!("{} × {}", pipeline.num_micro_batches, pipeline.micro_batch));
        }
    }
    (layers.join("; "), micro_batches.join("; "))
}

fn layers_in_words(plan: &Plan, first: u32, end: u32) -> String {
    let (blocks, head) = (plan.model.num_layers, plan.model.head_layer());
    if first == 0 && end == head + 1 {
        return "all".into();
    }
    let mut parts = Vec::new();
    if first == 0 {
        parts.push("embedding".to_owned());
    }
    let (low, high) = (first.max(1), (end.saturating_sub(1)).min(blocks));
    match low.cmp(&high) {
        std::cmp::Ordering::Less => parts.push(format!("blocks {low}–{high}")),
        std::cmp::Ordering::Equal => parts.push(format!("block {low}")),
        std::cmp::Ordering::Greater => {}
    }
    if end == head + 1 {
        parts.push("head".to_owned());
    }
    parts.join(", ")
}

/// Steps whose time counts: not skipped, and without the first tenth (at least two, at most ten),
/// in which caches fill.
fn steady_steps<'a>(steps: &[&'a StepRow]) -> Vec<&'a StepRow> {
    let kept: Vec<&StepRow> = steps.iter().copied().filter(|row| !row.skipped).collect();
    let first = if kept.len() < 6 { 0 } else { (kept.len() / 10).clamp(2, 10) };
    kept[first..].to_vec()
}

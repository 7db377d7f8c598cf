//! A plan in the words of other programs: what they can execute, and why not where they cannot.
//!
//! | Target | Its words |
//! | --- | --- |
//! | Megatron-LM | `--pipeline-model-parallel-layout` and the sizes beside it |
//! | FlagScale | `hetero_process_meshes`, `hetero_pipeline_layer_split`, `hetero_device_types` |
//! | SynerFuse | `--hetero-pipeline-stages`, `--micro-batch-size-per-dp`, `--num-micro-batches-per-dp` |
//! | torchtitan | module names a stage, and a schedule as CSV |
//! | DeepSpeed | `PipelineModule`'s cuts and checkpoints, and a configuration |
//!
//! A target gets exactly the plan or nothing: what it has no word for is [`Error::Export`].

use std::ops::Range;

use hgct_core::plan::{Plan, ScheduleKind};

use crate::instance::{Instance, Layout, Schedule};
use crate::{Error, Result};

mod arguments;
mod deepspeed;
mod flagscale;
mod megatron;
mod synerfuse;
#[cfg(test)]
mod tests;
mod torchtitan;

/// Who shall execute the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Target {
    /// Megatron-LM (Megatron core).
    Megatron,
    /// FlagScale.
    FlagScale,
    /// SynerFuse.
    SynerFuse,
    /// torchtitan.
    Torchtitan,
    /// DeepSpeed.
    DeepSpeed,
}

impl Target {
    /// All of them with their names.
    pub const ALL: [(&'static str, Self); 5] = [
        ("megatron", Self::Megatron),
        ("flagscale", Self::FlagScale),
        ("synerfuse", Self::SynerFuse),
        ("torchtitan", Self::Torchtitan),
        ("deepspeed", Self::DeepSpeed),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, target)| *target == self).map_or("?", |(name, _)| name)
    }
}

/// A file for the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Its name.
    pub name: &'static str,
    /// What is in it.
    pub text: String,
}

/// What targets need to know of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// Decoder blocks; layer 0 is the embedding, the layer past the blocks the head.
    pub blocks: u32,
    /// Whether embedding and head are one tensor, where that is known.
    pub tied_embeddings: Option<bool>,
    /// Samples a step.
    pub global_batch: u32,
    /// Tokens a sample.
    pub seq_len: u32,
    /// Whether optimizer state is sharded.
    pub shard_optimizer: bool,
    /// Pipelines that are alike, with how many of each.
    pub pipelines: Vec<ExportedPipeline>,
}

/// Pipelines that are alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportedPipeline {
    /// How many.
    pub count: u32,
    /// Samples a micro-batch.
    pub micro_batch: u32,
    /// Micro-batches a step.
    pub num_micro_batches: u32,
    /// Their order.
    pub schedule: Schedule,
    /// [`hgct_core::plan::Pipeline::run_ahead`].
    pub run_ahead: u32,
    /// Stages.
    pub stages: Vec<ExportedStage>,
}

/// A stage of a pipeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportedStage {
    /// Its layers.
    pub layers: Range<u32>,
    /// Kind of its devices.
    pub kind: String,
    /// Devices that divide a layer.
    pub tensor_parallel: u32,
    /// Devices that routed experts are divided among, each expert whole; 1 where there are none.
    pub expert_parallel: u32,
    /// Groups that divide a micro-batch.
    pub replicas: u32,
    /// Whether backward computes activations again.
    pub recompute: bool,
}

/// The plan's files for a target.
pub fn export(plan: &Exported, target: Target) -> Result<Vec<File>> {
    if plan.pipelines.is_empty() || plan.pipelines.iter().any(|pipeline| pipeline.stages.is_empty()) {
        return Err(refuse(target, "the plan has no pipeline, or one without stages".into()));
    }
    // Only a list of every computation can say it.
    let ahead = plan.pipelines.iter().map(|pipeline| pipeline.run_ahead).max().unwrap_or(0);
    if ahead > 0 && target != Target::Torchtitan {
        return Err(refuse(
            target,
            format!(
                "its 1F1B has one forward ahead for each later stage, and the plan's stages run {ahead} further ahead"
            ),
        ));
    }
    match target {
        Target::Megatron => megatron::export(plan),
        Target::FlagScale => flagscale::export(plan),
        Target::SynerFuse => synerfuse::export(plan),
        Target::Torchtitan => torchtitan::export(plan),
        Target::DeepSpeed => deepspeed::export(plan),
    }
}

impl Exported {
    /// From a layout over a problem's pools, and whether the model's embedding and head are one tensor.
    pub fn of_layout(instance: &Instance, layout: &Layout, tied_embeddings: Option<bool>) -> Self {
        let routed = instance.classes.iter().any(|class| class.experts.is_some());
        let pipelines = layout.templates.iter().map(|template| ExportedPipeline {
            count: template.count,
            micro_batch: template.micro_batch,
            num_micro_batches: template.num_micro_batches,
            schedule: template.schedule,
            run_ahead: 0,
            stages: template
                .stages
                .iter()
                .map(|stage| ExportedStage {
                    layers: stage.first_layer..stage.end_layer,
                    kind: instance.pools.get(stage.pool).map_or_else(String::new, |pool| pool.kind.clone()),
                    tensor_parallel: stage.tensor_parallel,
                    expert_parallel: if routed { stage.group_devices() } else { 1 },
                    replicas: stage.replicas * stage.parts(),
                    recompute: stage.recompute,
                })
                .collect(),
        });
        Self {
            blocks: instance.num_layers().saturating_sub(2),
            tied_embeddings,
            global_batch: instance.global_batch,
            seq_len: instance.seq_len,
            shard_optimizer: layout.shard_optimizer,
            pipelines: merged(pipelines),
        }
    }

    /// From a plan that `hgct train` executes.
    pub fn of_plan(plan: &Plan) -> Result<Self> {
        let mut pipelines = Vec::new();
        for pipeline in &plan.pipelines {
            let schedule = match pipeline.schedule {
                ScheduleKind::OneForwardOneBackward => Schedule::OneForwardOneBackward,
                ScheduleKind::Interleaved => Schedule::Interleaved(2),
                ScheduleKind::ZeroBubble => Schedule::ZeroBubble,
                other => {
                    return Err(Error::Export {
                        target: "any",
                        reason: format!("the plan's schedule {other:?} is no 1F1B"),
                    });
                }
            };
            let stages = pipeline.stages.iter().map(|id| {
                let stage = plan.stage(*id);
                ExportedStage {
                    layers: stage.layers(),
                    kind: plan.ranks[stage.rank().index()].kind.to_string(),
                    tensor_parallel: stage.ranks.len() as u32,
                    expert_parallel: 1,
                    replicas: 1,
                    recompute: stage.recompute,
                }
            });
            pipelines.push(ExportedPipeline {
                count: 1,
                micro_batch: pipeline.micro_batch,
                num_micro_batches: pipeline.num_micro_batches,
                schedule,
                run_ahead: pipeline.run_ahead,
                stages: stages.collect(),
            });
        }
        Ok(Self {
            blocks: plan.model.num_layers,
            tied_embeddings: Some(plan.model.tie_embeddings),
            global_batch: plan.global_batch,
            seq_len: plan.seq_len,
            shard_optimizer: true,
            pipelines: merged(pipelines.into_iter()),
        })
    }

    /// The one shape of all pipelines, kinds aside; what differs is the reason that there is none.
    fn one_shape(&self, target: Target) -> Result<&ExportedPipeline> {
        let first = &self.pipelines[0];
        for other in &self.pipelines[1..] {
            if (other.micro_batch, other.num_micro_batches) != (first.micro_batch, first.num_micro_batches) {
                return Err(refuse(
                    target,
                    format!(
                        "it has one number of micro-batches and one size for all pipelines, and the plan has {} × {} and {} × {}",
                        first.num_micro_batches,
                        first.micro_batch,
                        other.num_micro_batches,
                        other.micro_batch
                    ),
                ));
            }
            if (other.schedule, other.run_ahead) != (first.schedule, first.run_ahead) {
                return Err(refuse(target, "it has one schedule for all pipelines".into()));
            }
        }
        self.one_cut(target)?;
        Ok(first)
    }

    /// That all pipelines are cut alike, with the same degrees, replicas and recompute.
    fn one_cut(&self, target: Target) -> Result<()> {
        let shape = |pipeline: &ExportedPipeline| -> Vec<ExportedStage> {
            let of = |s: &ExportedStage| ExportedStage { kind: String::new(), ..s.clone() };
            pipeline.stages.iter().map(of).collect()
        };
        let first = shape(&self.pipelines[0]);
        match self.pipelines[1..].iter().find(|other| shape(other) != first) {
            Some(other) => Err(refuse(
                target,
                format!(
                    "it cuts all pipelines alike, and the plan has {} and {}",
                    cuts(&self.pipelines[0]),
                    cuts(other)
                ),
            )),
            None => Ok(()),
        }
    }

    /// Pipelines of all shapes.
    fn num_pipelines(&self) -> u32 {
        self.pipelines.iter().map(|pipeline| pipeline.count).sum()
    }

    /// Decoder blocks of some layers, and whether embedding and head are among them.
    fn parts(&self, layers: &Range<u32>) -> Parts {
        let blocks = layers.start.max(1)..layers.end.min(self.blocks + 1);
        Parts {
            embedding: layers.start == 0,
            head: layers.end == self.blocks + 2,
            // Named from 0, as the targets do.
            blocks: blocks.start - 1..blocks.end.max(blocks.start) - 1,
        }
    }
}

/// What of the model a stage has.
struct Parts {
    embedding: bool,
    head: bool,
    blocks: Range<u32>,
}

impl Parts {
    fn num_blocks(&self) -> u32 {
        self.blocks.end - self.blocks.start
    }
}

/// Neighbours that differ in their count only are one.
fn merged(pipelines: impl Iterator<Item = ExportedPipeline>) -> Vec<ExportedPipeline> {
    let mut all: Vec<ExportedPipeline> = Vec::new();
    for pipeline in pipelines {
        match all.last_mut() {
            Some(last) if (ExportedPipeline { count: last.count, ..pipeline.clone() }) == *last => {
                last.count += pipeline.count;
            }
            _ => all.push(pipeline),
        }
    }
    all
}

/// `0–12 tp 4, 13–25 tp 4 × 2`.
fn cuts(pipeline: &ExportedPipeline) -> String {
    let stages: Vec<String> = pipeline
        .stages
        .iter()
        .map(|stage| {
            let replicas = if stage.replicas > 1 { format!(" × {}", stage.replicas) } else { String::new() };
            let experts = match stage.expert_parallel {
                1 => String::new(),
                experts => format!(" ep {experts}"),
            };
            let recompute = if stage.recompute { " recompute" } else { "" };
            format!(
                "{}–{} tp {}{experts}{replicas}{recompute}",
                stage.layers.start,
                stage.layers.end.saturating_sub(1),
                stage.tensor_parallel
            )
        })
        .collect();
    stages.join(", ")
}

fn refuse(target: Target, reason: String) -> Error {
    Error::Export { target: target.name(), reason }
}

/// The one value of all stages, or why there is none.
fn one<T: PartialEq + Copy + std::fmt::Display>(
    target: Target,
    what: &str,
    pipeline: &ExportedPipeline,
    of: impl Fn(&ExportedStage) -> T,
) -> Result<T> {
    let first = of(&pipeline.stages[0]);
    match pipeline.stages.iter().map(of).find(|other| *other != first) {
        Some(other) => Err(refuse(
            target,
            format!("it has one {what} for all stages, and the plan has {first} and {other}"),
        )),
        None => Ok(first),
    }
}

/// What all stages of a pipeline have in common where a target has one word for it.
struct Uniform {
    degree: u32,
    replicas: u32,
    recompute: bool,
}

/// That no stage divides experts, for a target that has no word for it which says the same.
fn no_experts(target: Target, plan: &Exported) -> Result<()> {
    let mut stages = plan.pipelines.iter().flat_map(|pipeline| &pipeline.stages);
    match stages.find(|stage| stage.expert_parallel > 1) {
        Some(stage) => Err(refuse(
            target,
            format!(
                "it has no word for routed experts that are divided, each whole, among {} devices",
                stage.expert_parallel
            ),
        )),
        None => Ok(()),
    }
}

/// The one degree, number of replicas and answer to recompute of all stages.
fn uniform(target: Target, pipeline: &ExportedPipeline) -> Result<Uniform> {
    let degree = one(target, "tensor parallel degree", pipeline, |stage| stage.tensor_parallel)?;
    let (replicas, recompute) = uniform_beside_degree(target, pipeline)?;
    Ok(Uniform { degree, replicas, recompute })
}

/// The same for targets whose stages may have a degree each.
fn uniform_beside_degree(target: Target, pipeline: &ExportedPipeline) -> Result<(u32, bool)> {
    let replicas = one(target, "number of replicas", pipeline, |stage| stage.replicas)?;
    let recompute = one(target, "answer to recompute", pipeline, |stage| stage.recompute)?;
    Ok((replicas, recompute))
}

/// Layers of every virtual stage in the order of a forward: with v a device, the first v-th of all
/// stages' layers, then the next.
fn virtual_stages(target: Target, pipeline: &ExportedPipeline) -> Result<Vec<Range<u32>>> {
    let num = match pipeline.schedule {
        Schedule::OneForwardOneBackward => {
            return Ok(pipeline.stages.iter().map(|stage| stage.layers.clone()).collect());
        }
        Schedule::Interleaved(num) => num.max(1),
        other => return Err(refuse(target, format!("it has no schedule {other:?}"))),
    };
    let layers = one(target, "number of layers with virtual stages", pipeline, |stage| {
        stage.layers.end - stage.layers.start
    })?;
    if !layers.is_multiple_of(num) {
        return Err(refuse(
            target,
            format!(
                "{layers} layers a stage, embedding and head among them, do not make {num} virtual stages"
            ),
        ));
    }
    let (width, all) = (layers / num, num * pipeline.stages.len() as u32);
    Ok((0..all).map(|at| at * width..(at + 1) * width).collect())
}

/// Samples of a micro-batch that each of a stage's groups takes.
fn share(target: Target, pipeline: &ExportedPipeline, replicas: u32) -> Result<u32> {
    if replicas == 0 || !pipeline.micro_batch.is_multiple_of(replicas) {
        return Err(refuse(
            target,
            format!("a micro-batch of {} cannot be divided among {replicas} groups", pipeline.micro_batch),
        ));
    }
    Ok(pipeline.micro_batch / replicas)
}

/// Which devices stand where, as comment lines for a person who orders hosts.
fn places(plan: &Exported, comment: &str) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let mut first = 0;
    for pipeline in &plan.pipelines {
        let _ = writeln!(text, "{comment} pipelines {first} to {}:", first + pipeline.count - 1);
        first += pipeline.count;
        for (at, stage) in pipeline.stages.iter().enumerate() {
            let _ = writeln!(
                text,
                "{comment}   stage {at}: layers {} to {} on {} × {} {}",
                stage.layers.start,
                stage.layers.end - 1,
                stage.replicas,
                stage.tensor_parallel,
                stage.kind
            );
        }
    }
    text
}

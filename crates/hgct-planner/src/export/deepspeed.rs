//! DeepSpeed: what `PipelineModule` is made with. Its methods of partition weigh layers and cut where
//! it likes, so the plan's cuts are stated as what a method of one's own sets: `parts`, the first of
//! each stage's layers and the end (embedding, decoder blocks and head are a layer each). Only so are
//! tied embeddings two layers of one key, and a checkpoint a block: `activation_checkpoint_interval`
//! counts layers.

use serde_json::{Value, json};

use super::{Exported, File, Target, no_experts, one, refuse, share};
use crate::Result;
use crate::instance::Schedule;

const TARGET: Target = Target::DeepSpeed;

pub(super) fn export(plan: &Exported) -> Result<Vec<File>> {
    no_experts(TARGET, plan)?;
    let pipeline = plan.one_shape(TARGET)?;
    let degree = one(TARGET, "tensor parallel degree", pipeline, |stage| stage.tensor_parallel)?;
    let replicas = one(TARGET, "number of replicas", pipeline, |stage| stage.replicas)?;
    if pipeline.schedule != Schedule::OneForwardOneBackward {
        return Err(refuse(TARGET, format!("its pipeline is 1F1B, not {:?}", pipeline.schedule)));
    }
    let stages: Vec<Value> = pipeline
        .stages
        .iter()
        .enumerate()
        .map(|(at, stage)| {
            let parts = plan.parts(&stage.layers);
            json!({
                "stage": at,
                "embedding": parts.embedding,
                "first_block": parts.blocks.start,
                "num_blocks": parts.num_blocks(),
                "head": parts.head,
                "kind": stage.kind,
                "activation_checkpoint_interval": u32::from(stage.recompute),
            })
        })
        .collect();
    let ends = pipeline.stages.iter().map(|stage| stage.layers.end);
    let mut partition = json!({
        "num_stages": pipeline.stages.len(),
        "model_parallel_size": degree,
        "data_parallel_size": plan.num_pipelines() * replicas,
        "parts": std::iter::once(0).chain(ends).collect::<Vec<u32>>(),
        "stages": stages,
    });
    if let Some(tied) = plan.tied_embeddings {
        partition["tied_embeddings"] = tied.into();
    }
    let config = json!({
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": share(TARGET, pipeline, replicas)?,
        "gradient_accumulation_steps": pipeline.num_micro_batches,
        "zero_optimization": {"stage": u32::from(plan.shard_optimizer)},
    });
    Ok(vec![
        File { name: "deepspeed.json", text: hgct_core::canonical::encode(&config) },
        File { name: "partition.json", text: hgct_core::canonical::encode(&partition) },
    ])
}

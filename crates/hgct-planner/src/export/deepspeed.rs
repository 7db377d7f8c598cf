//! DeepSpeed: `PipelineModule` chooses the cuts itself and can only be told how to weigh layers. With
//! as many modules as stages its `uniform` method gives each stage exactly one: so the plan's cuts are
//! stated as which layers to put into which module.

use serde_json::{Value, json};

use super::{Exported, File, Target, Uniform, no_experts, refuse, share, uniform};
use crate::Result;
use crate::instance::Schedule;

const TARGET: Target = Target::DeepSpeed;

pub(super) fn export(plan: &Exported) -> Result<Vec<File>> {
    no_experts(TARGET, plan)?;
    let pipeline = plan.one_shape(TARGET)?;
    let Uniform { degree, replicas, recompute } = uniform(TARGET, pipeline)?;
    if pipeline.schedule != Schedule::OneForwardOneBackward {
        return Err(refuse(TARGET, format!("its pipeline is 1F1B, not {:?}", pipeline.schedule)));
    }
    let modules: Vec<Value> = pipeline
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
            })
        })
        .collect();
    let partition = json!({
        "num_stages": pipeline.stages.len(),
        "model_parallel_size": degree,
        "data_parallel_size": plan.num_pipelines() * replicas,
        "partition_method": "uniform",
        "activation_checkpoint_interval": u32::from(recompute),
        "modules": modules,
    });
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

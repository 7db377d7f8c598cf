//! FlagScale: the heterogeneous part of a training configuration. A mesh is `[tp, cp, ep, dp, pp]`,
//! its stages follow each other; each mesh has a device type; the layer split has one entry a stage.

use std::fmt::Write as _;

use super::{Exported, File, Target, places, refuse, share, uniform_beside_degree};
use crate::Result;
use crate::instance::Schedule;

const TARGET: Target = Target::FlagScale;

pub(super) fn export(plan: &Exported) -> Result<Vec<File>> {
    let pipeline = plan.one_shape(TARGET)?;
    for (at, stage) in pipeline.stages.iter().enumerate() {
        if let Some(other) = plan.pipelines.iter().find(|other| other.stages[at].kind != stage.kind) {
            return Err(refuse(
                TARGET,
                format!(
                    "a mesh has one device type, and stage {at} is on {} and on {}",
                    stage.kind, other.stages[at].kind
                ),
            ));
        }
    }
    // A mesh with fewer replicas would need larger micro-batches, for which there is no word.
    let (replicas, recompute) = uniform_beside_degree(TARGET, pipeline)?;
    if pipeline.schedule != Schedule::OneForwardOneBackward {
        return Err(refuse(TARGET, "unlike meshes are 1F1B only".into()));
    }
    let (first, last) = (&pipeline.stages[0], &pipeline.stages[pipeline.stages.len() - 1]);
    if plan.tied_embeddings != Some(false) && first.tensor_parallel != last.tensor_parallel {
        return Err(refuse(
            TARGET,
            format!(
                "first and last stage must have one tensor parallel degree unless the embeddings are known to be untied, and have {} and {}",
                first.tensor_parallel, last.tensor_parallel
            ),
        ));
    }
    if let Some(stage) = pipeline.stages.iter().find(|s| s.expert_parallel > 1 && s.tensor_parallel > 1) {
        return Err(refuse(
            TARGET,
            format!(
                "its meshes divide experts among data-parallel ranks alone, and the plan among {} ranks of tensor \
                 parallel groups of {}",
                stage.expert_parallel, stage.tensor_parallel
            ),
        ));
    }
    let replicas_of_all = plan.num_pipelines() * replicas;
    let mut meshes: Vec<([u32; 5], &str)> = Vec::new();
    let mut split = Vec::new();
    for (at, stage) in pipeline.stages.iter().enumerate() {
        let blocks = plan.parts(&stage.layers).num_blocks();
        if blocks == 0 {
            return Err(refuse(TARGET, format!("stage {at} has no decoder block")));
        }
        split.push(blocks.to_string());
        match meshes.last_mut() {
            Some((mesh, kind))
                if *kind == stage.kind
                    && (mesh[0], mesh[2]) == (stage.tensor_parallel, stage.expert_parallel) =>
            {
                mesh[4] += 1;
            }
            _ => {
                let mesh = [stage.tensor_parallel, 1, stage.expert_parallel, replicas_of_all, 1];
                meshes.push((mesh, &stage.kind));
            }
        }
    }
    let numbers: Vec<String> =
        meshes.iter().flat_map(|(mesh, _)| mesh.iter().map(ToString::to_string)).collect();
    let kinds: Vec<String> = meshes.iter().map(|(_, kind)| format!("{kind:?}")).collect();
    let mut text = places(plan, "#");
    let _ = write!(
        text,
        "train:\n  system:\n    tensor_model_parallel_size: {}\n    pipeline_model_parallel_size: {}\n    use_distributed_optimizer: {}\n",
        first.tensor_parallel,
        pipeline.stages.len(),
        plan.shard_optimizer,
    );
    if meshes.iter().any(|(mesh, _)| mesh[0] != first.tensor_parallel) {
        // Activations are handed over between unlike degrees only where sequences are divided.
        text.push_str("    sequence_parallel: true\n");
    }
    if recompute {
        text.push_str(
            "    recompute_granularity: full\n    recompute_method: uniform\n    recompute_num_layers: 1\n",
        );
    }
    let _ = write!(
        text,
        "    hetero:\n      enable_hetero: true\n      hetero_process_meshes: [{}]\n      hetero_pipeline_layer_split: [{}]\n      hetero_device_types: [{}]\n",
        numbers.join(", "),
        split.join(", "),
        kinds.join(", "),
    );
    let _ = write!(
        text,
        "  model:\n    num_layers: {}\n    seq_length: {}\n    micro_batch_size: {}\n    global_batch_size: {}\n",
        plan.blocks,
        plan.seq_len,
        share(TARGET, pipeline, replicas)?,
        plan.global_batch,
    );
    if let Some(tied) = plan.tied_embeddings {
        let _ = writeln!(text, "    untie_embeddings_and_output_weights: {}", !tied);
    }
    Ok(vec![File { name: "flagscale.yaml", text }])
}

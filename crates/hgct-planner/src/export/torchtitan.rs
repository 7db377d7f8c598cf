//! torchtitan: a configuration with the module names of every stage, and the schedule as a CSV of
//! compute actions, a line a pipeline rank (`0F3`, `0B3`: stage, forward or full backward,
//! micro-batch), as `torch.distributed.pipelining` reads it.

use std::fmt::Write as _;

use hgct_core::schedule::{Operation, one_forward_one_backward};

use super::{
    Exported, ExportedPipeline, File, Target, Uniform, no_experts, places, share, uniform, virtual_stages,
};
use crate::Result;
use crate::instance::Schedule;

const TARGET: Target = Target::Torchtitan;

pub(super) fn export(plan: &Exported) -> Result<Vec<File>> {
    no_experts(TARGET, plan)?;
    let pipeline = plan.one_shape(TARGET)?;
    let Uniform { degree, replicas, recompute } = uniform(TARGET, pipeline)?;
    let stages = virtual_stages(TARGET, pipeline)?;
    let size = share(TARGET, pipeline, replicas)?;
    let depth = pipeline.stages.len();
    let mut text = places(plan, "#");
    let _ = write!(
        text,
        "[training]\nseq_len = {}\nlocal_batch_size = {}\nglobal_batch_size = {}\n\n[parallelism]\n",
        plan.seq_len,
        size * pipeline.num_micro_batches,
        plan.global_batch
    );
    let (sharded, plain) = if plan.shard_optimizer {
        (plan.num_pipelines() * replicas, 1)
    } else {
        (1, plan.num_pipelines() * replicas)
    };
    let _ = write!(
        text,
        "data_parallel_replicate_degree = {plain}\ndata_parallel_shard_degree = {sharded}\ntensor_parallel_degree = {degree}\npipeline_parallel_degree = {depth}\n"
    );
    let mut files = Vec::new();
    if depth > 1 {
        let _ = write!(
            text,
            "pipeline_parallel_microbatch_size = {size}\n{}module_fqns_per_model_part = [\n",
            if pipeline.schedule == Schedule::OneForwardOneBackward {
                files.push(File { name: "schedule.csv", text: schedule(pipeline) });
                "pipeline_parallel_schedule = \"_PipelineScheduleRuntime\"\npipeline_parallel_schedule_csv = \"schedule.csv\"\n"
            } else {
                "pipeline_parallel_schedule = \"Interleaved1F1B\"\n"
            }
        );
        for layers in &stages {
            let parts = plan.parts(layers);
            let mut names = Vec::new();
            if parts.embedding {
                names.push("tok_embeddings".to_owned());
            }
            names.extend(parts.blocks.clone().map(|block| format!("layers.{block}")));
            if parts.head {
                names.extend(["norm".to_owned(), "output".to_owned()]);
            }
            let names: Vec<String> = names.into_iter().map(|name| format!("\"{name}\"")).collect();
            let _ = writeln!(text, "    [{}],", names.join(", "));
        }
        text.push_str("]\n");
    }
    if recompute {
        text.push_str("\n[activation_checkpoint]\nmode = \"full\"\n");
    }
    files.insert(0, File { name: "torchtitan.toml", text });
    Ok(files)
}

/// 1F1B, a line a rank.
fn schedule(pipeline: &ExportedPipeline) -> String {
    let mut text = String::new();
    for (stage, later) in (0..pipeline.stages.len()).rev().enumerate() {
        let warm_up = later * (pipeline.run_ahead as usize + 1);
        let actions = one_forward_one_backward(0..pipeline.num_micro_batches, warm_up);
        let actions = actions.into_iter().map(|(operation, micro_batch)| {
            let letter = if operation == Operation::Forward { 'F' } else { 'B' };
            format!("{stage}{letter}{micro_batch}")
        });
        text.push_str(&actions.collect::<Vec<_>>().join(","));
        text.push('\n');
    }
    text
}

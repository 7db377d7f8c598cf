//! SynerFuse: arguments. `--hetero-pipeline-stages` has for each kind in turn the number of its
//! stages and their layers, the same for all replicas; sizes and numbers of micro-batches are given
//! for runs of replicas, `n₀ size₀ n₁ size₁ …`, and sum to the global batch.

use super::arguments::Arguments;
use super::{Exported, ExportedPipeline, File, Target, Uniform, no_experts, places, refuse, share, uniform};
use crate::Result;
use crate::instance::Schedule;

const TARGET: Target = Target::SynerFuse;

pub(super) fn export(plan: &Exported) -> Result<Vec<File>> {
    no_experts(TARGET, plan)?;
    plan.one_cut(TARGET)?;
    let pipeline = &plan.pipelines[0];
    if plan.pipelines.iter().any(|pipeline| pipeline.schedule != Schedule::OneForwardOneBackward) {
        return Err(refuse(TARGET, "uneven stages are 1F1B only".into()));
    }
    let Uniform { degree, replicas, recompute } = uniform(TARGET, pipeline)?;
    let mut arguments = Arguments::after(places(plan, "#"));
    arguments.add("tensor-model-parallel-size", &degree.to_string());
    arguments.add("pipeline-model-parallel-size", &pipeline.stages.len().to_string());
    arguments.add("num-layers", &plan.blocks.to_string());
    arguments.add("seq-length", &plan.seq_len.to_string());
    arguments.add("global-batch-size", &plan.global_batch.to_string());
    if pipeline.stages.len() > 1 {
        arguments.add("hetero-pipeline-stages", &stages(plan)?);
    }
    let same = |of: fn(&ExportedPipeline) -> u32| plan.pipelines.iter().all(|p| of(p) == of(pipeline));
    if same(|p| p.micro_batch) && same(|p| p.num_micro_batches) {
        arguments.add("micro-batch-size", &share(TARGET, pipeline, replicas)?.to_string());
    } else {
        let (mut sizes, mut numbers) = (Vec::new(), Vec::new());
        for pipeline in &plan.pipelines {
            let num = pipeline.count * replicas;
            sizes.push(format!("{num} {}", share(TARGET, pipeline, replicas)?));
            numbers.push(format!("{num} {}", pipeline.num_micro_batches));
        }
        arguments.add("use-tp-pp-dp-mapping", "");
        arguments.add("micro-batch-size-per-dp", &sizes.join(" "));
        arguments.add("num-micro-batches-per-dp", &numbers.join(" "));
    }
    Ok(vec![File { name: "synerfuse.args", text: arguments.finish(plan, recompute) }])
}

/// `n₀ layers … n₁ layers …`: a group ends where any pipeline's kind changes.
fn stages(plan: &Exported) -> Result<String> {
    let first = &plan.pipelines[0];
    let mut groups: Vec<Vec<u32>> = Vec::new();
    for (at, stage) in first.stages.iter().enumerate() {
        let blocks = plan.parts(&stage.layers).num_blocks();
        if blocks == 0 {
            return Err(refuse(TARGET, format!("stage {at} has no decoder block")));
        }
        let as_before = at > 0 && plan.pipelines.iter().all(|p| p.stages[at].kind == p.stages[at - 1].kind);
        match groups.last_mut() {
            Some(group) if as_before => group.push(blocks),
            _ => groups.push(vec![blocks]),
        }
    }
    let words =
        groups.iter().flat_map(|group| std::iter::once(group.len() as u32).chain(group.iter().copied()));
    Ok(words.map(|word| word.to_string()).collect::<Vec<String>>().join(" "))
}

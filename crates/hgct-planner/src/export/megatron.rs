//! Megatron-LM: arguments. A layout names every stage's layers in the order of a forward: `E`
//! embedding, `t` decoder block, `L` loss, stages split by `|`, `x*N` for repetition (Megatron core,
//! "Custom Pipeline Model Parallel Layout"). With v virtual stages a device the first v-th of all
//! stages comes first.

use std::fmt::Write as _;

use super::arguments::Arguments;
use super::{Exported, ExportedPipeline, File, Target, Uniform, one, places, share, uniform, virtual_stages};
use crate::Result;

const TARGET: Target = Target::Megatron;

pub(super) fn export(plan: &Exported) -> Result<Vec<File>> {
    let pipeline = plan.one_shape(TARGET)?;
    let Uniform { degree, replicas, recompute } = uniform(TARGET, pipeline)?;
    let experts = one(TARGET, "expert parallel degree", pipeline, |stage| stage.expert_parallel)?;
    let mut text = String::from(
        "# Ranks are handed out tensor parallel group by group, then replica by replica, then stage by stage.\n",
    );
    text.push_str(&places(plan, "#"));
    let mut arguments = Arguments::after(text);
    arguments.add("tensor-model-parallel-size", &degree.to_string());
    arguments.add("pipeline-model-parallel-size", &pipeline.stages.len().to_string());
    if pipeline.stages.len() > 1 {
        arguments.add("pipeline-model-parallel-layout", &format!("\"{}\"", layout(plan, pipeline)?));
    }
    if experts > 1 {
        // Each expert whole on one rank; by itself Megatron divides each as it divides the rest.
        arguments.add("expert-model-parallel-size", &experts.to_string());
        arguments.add("expert-tensor-parallel-size", "1");
        if degree > 1 {
            arguments.add("sequence-parallel", "");
        }
    }
    arguments.add("num-layers", &plan.blocks.to_string());
    arguments.add("seq-length", &plan.seq_len.to_string());
    arguments.add("micro-batch-size", &share(TARGET, pipeline, replicas)?.to_string());
    arguments.add("global-batch-size", &plan.global_batch.to_string());
    Ok(vec![File { name: "megatron.args", text: arguments.finish(plan, recompute) }])
}

fn layout(plan: &Exported, pipeline: &ExportedPipeline) -> Result<String> {
    let stages = virtual_stages(TARGET, pipeline)?;
    let words = stages.iter().map(|layers| {
        let parts = plan.parts(layers);
        let mut text = String::from(if parts.embedding { "E" } else { "" });
        match parts.num_blocks() {
            0 => {}
            1 => text.push('t'),
            num => {
                let _ = write!(text, "t*{num}");
            }
        }
        if parts.head {
            text.push_str(if text.is_empty() { "L" } else { ",L" });
        }
        text
    });
    Ok(words.collect::<Vec<String>>().join("|"))
}

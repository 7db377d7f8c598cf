//! How well a plan's price agrees with runs: measured plans, what we predict for them, and what the
//! published formula predicts.
//!
//! | Price | Is |
//! | --- | --- |
//! | `hgct` | this module: the layers' times as tables or a roofline give them, put together as a run puts them together, with [`Constants`] |
//! | `published` | the formula of the Sailor paper (SOSP'25) by which the published tables are priced ([`crate::instance::price()`]) |
//!
//! What ours adds to the published formula: neighbouring stages that meet for large messages and not
//! for small ones, a ring over the cards that the devices of a node share, the slowest of many
//! replicas, an update in proportion to parameters, and the allocator's share of memory.

use crate::Result;
use crate::instance::{Layout, Link, Schedule, Stage, Template, price};
use crate::tables::{DeviceCount, MeasuredLayers, MeasuredReplica, MeasuredTransformer, ModelTable, Tables};

mod constants;
mod pipeline;
mod roofline;
mod score;
#[cfg(test)]
mod tests;

pub use constants::Constants;
use pipeline::{Chain, Hop};
pub use roofline::Accelerator;
use roofline::{Transformer, VOCAB};
pub use score::{CrossValidation, Measured, Row, Summary, cross_validate, summaries};

/// What a step of a plan is expected to take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Predicted {
    /// One step: the three below.
    pub iteration_s: f64,
    /// The slowest pipeline.
    pub pipeline_s: f64,
    /// Exchange of gradients between pipelines.
    pub exchange_s: f64,
    /// The optimizer.
    pub update_s: f64,
    /// Peak of the fullest device, where the tables tell.
    pub peak_bytes: Option<f64>,
    /// What the tables alone put on the fullest device at once: weights, gradients and two moments in
    /// single precision, activations of the micro-batches in flight, nothing for allocator and
    /// framework. A run that records less contradicts its tables.
    pub least_peak_bytes: Option<f64>,
}

/// Our price of a plan over tabled layers.
pub fn predict_layers(tables: &Tables, constants: &Constants, row: &MeasuredLayers) -> Result<Predicted> {
    let table = tables.model(&row.model)?;
    let mut pipeline_s = 0.0f64;
    for pipeline in 0..row.num_pipelines() as usize {
        pipeline_s = pipeline_s.max(chain_of_layers(tables, table, constants, row, pipeline)?.seconds());
    }
    pipeline_s *= constants.slowest_of(row.num_pipelines());
    let (mut exchange_s, mut update_s) = (0.0f64, 0.0f64);
    let (mut peak_bytes, mut least_peak_bytes) = (0.0f64, 0.0f64);
    for (at, stage) in row.stages.iter().enumerate() {
        let layers = stage.first_layer as usize..stage.end_layer as usize;
        exchange_s = exchange_s.max(ring_s(tables, table, &stage.replicas, layers.clone())?);
        for replica in &stage.replicas {
            let floats = table.floats(replica.tensor_parallel)?;
            let seconds = table.layers(&replica.kind, replica.tensor_parallel, row.micro_batch)?;
            let largest = floats.iter().map(|layer| layer.parameters).fold(1.0, f64::max);
            let parameters: f64 = floats[layers.clone()].iter().map(|layer| layer.parameters).sum();
            let kept: f64 = floats[layers.clone()].iter().map(|layer| layer.kept).sum();
            // The tables have one update time for all layers: that of the largest.
            update_s = update_s.max(seconds[layers.start].update_s * parameters / largest);
            let in_flight = ((row.stages.len() - at) as u32).min(row.num_micro_batches());
            let activations = 4.0 * kept * f64::from(row.micro_batch) * f64::from(in_flight);
            let state = parameters * constants.state_bytes_per_parameter;
            peak_bytes =
                peak_bytes.max(state + activations * constants.activation_slack + constants.overhead_bytes);
            // Before the first backward there may be no gradients yet.
            let gradients = if row.num_micro_batches() > in_flight { 4.0 } else { 0.0 };
            least_peak_bytes = least_peak_bytes.max(parameters * (12.0 + gradients) + activations);
        }
    }
    Ok(Predicted {
        iteration_s: pipeline_s + exchange_s + update_s,
        pipeline_s,
        exchange_s,
        update_s,
        peak_bytes: Some(peak_bytes),
        least_peak_bytes: Some(least_peak_bytes),
    })
}

fn chain_of_layers(
    tables: &Tables,
    table: &ModelTable,
    constants: &Constants,
    row: &MeasuredLayers,
    pipeline: usize,
) -> Result<Chain> {
    let mut chain = Chain {
        forward_s: Vec::new(),
        backward_s: Vec::new(),
        hops: Vec::new(),
        num_micro_batches: row.num_micro_batches(),
    };
    for (at, stage) in row.stages.iter().enumerate() {
        let replica = &stage.replicas[pipeline];
        let layers = stage.first_layer as usize..stage.end_layer as usize;
        let seconds = &table.layers(&replica.kind, replica.tensor_parallel, row.micro_batch)?[layers.clone()];
        chain.forward_s.push(seconds.iter().map(|layer| layer.forward_s).sum());
        chain.backward_s.push(seconds.iter().map(|layer| layer.backward_s).sum());
        let Some(next) = row.stages.get(at + 1).map(|next| &next.replicas[pipeline]) else { continue };
        let output = table.floats(replica.tensor_parallel)?[layers.end - 1].output;
        let bytes = 4.0 * output * f64::from(row.micro_batch);
        // Every rank sends its part; the receiving node's ranks put the parts together.
        let degree = f64::from(replica.tensor_parallel);
        let intra = tables.node(&next.kind)?.intra.as_ref().map_or(0.0, |link| {
            let part = bytes * (degree - 1.0) / degree;
            part / rate(link, next.tensor_parallel, next.tensor_parallel, bytes)
        });
        let seconds = bytes / between(tables, replica, next, bytes)? + intra + constants.hop_s;
        chain.hops.push(Hop { seconds, eager: bytes / degree <= constants.eager_bytes });
    }
    Ok(chain)
}

/// One ring over all holders of some layers: all ranks of a group send at once, over the cards that
/// they share, what is `2(n − 1)/n` of all its bytes; the slowest neighbours set the pace.
fn ring_s(
    tables: &Tables,
    table: &ModelTable,
    replicas: &[MeasuredReplica],
    layers: std::ops::Range<usize>,
) -> Result<f64> {
    let num = replicas.len();
    if num < 2 {
        return Ok(0.0);
    }
    let mut slowest = 0.0f64;
    for (at, replica) in replicas.iter().enumerate() {
        let parameters: f64 =
            table.floats(replica.tensor_parallel)?[layers.clone()].iter().map(|layer| layer.parameters).sum();
        let bytes = 4.0 * parameters * f64::from(replica.tensor_parallel);
        let next = &replicas[(at + 1) % num];
        let moved = 2.0 * (num - 1) as f64 / num as f64 * bytes;
        slowest = slowest.max(moved / between(tables, replica, next, bytes / num as f64)?);
    }
    Ok(slowest)
}

/// Bytes a second that two groups in different nodes move together.
fn between(tables: &Tables, from: &MeasuredReplica, to: &MeasuredReplica, bytes: f64) -> Result<f64> {
    let devices = |replica: &MeasuredReplica| -> Result<u32> {
        Ok(replica.tensor_parallel.min(tables.node(&replica.kind)?.devices_per_node))
    };
    Ok(rate(tables.link(&from.kind, &to.kind)?, devices(from)?, devices(to)?, bytes))
}

fn rate(link: &Link, from: u32, to: u32, bytes: f64) -> f64 {
    link.curve(from, to).map_or(f64::INFINITY, |curve| curve.bytes_per_s(bytes))
}

/// Our price of a GPT on alike accelerators of which only public figures are known.
pub fn predict_transformer(
    accelerator: &Accelerator,
    constants: &Constants,
    row: &MeasuredTransformer,
) -> Predicted {
    let layers = Transformer { accelerator, constants, row };
    let (stages, degree) = (row.pipeline_parallel as usize, f64::from(row.tensor_parallel));
    let (forward_s, backward_s) = layers.block_s();
    let blocks = f64::from(row.blocks / row.pipeline_parallel);
    let hop = Hop { seconds: layers.hop_s(), eager: layers.output_bytes() / degree <= constants.eager_bytes };
    let mut chain = Chain {
        forward_s: vec![blocks * forward_s; stages],
        // Every block is computed once more before its backward.
        backward_s: vec![blocks * (forward_s + backward_s); stages],
        hops: vec![hop; stages - 1],
        num_micro_batches: row.global_batch / (row.micro_batch * row.data_parallel),
    };
    let head = layers.head_s();
    chain.forward_s[stages - 1] += head.0;
    chain.backward_s[stages - 1] += head.1;
    let pipeline_s = chain.seconds() * constants.slowest_of(row.data_parallel);
    // A block has 12 h² parameters; the embedding is the first stage's (and, tied, the last one's).
    let hidden = f64::from(row.hidden);
    let parameters = (12.0 * blocks * hidden * hidden + VOCAB * hidden) / degree;
    let replicas = f64::from(row.data_parallel);
    let ring = 2.0 * (replicas - 1.0) / replicas * parameters * constants.gradient_bytes_per_parameter;
    // Replicas of a node share its cards: a ring that passes through it can use all of theirs.
    let in_node = (accelerator.devices_per_node / row.tensor_parallel).clamp(1, row.data_parallel);
    let exchange_s = if row.data_parallel == in_node {
        ring / accelerator.ring_bytes_per_s
    } else {
        ring / (layers.network_bytes_per_s() * f64::from(in_node))
    };
    let update_s = parameters * constants.update_bytes_per_parameter / layers.memory_bytes_per_s();
    Predicted {
        iteration_s: pipeline_s + exchange_s + update_s,
        pipeline_s,
        exchange_s,
        update_s,
        peak_bytes: None,
        least_peak_bytes: None,
    }
}

/// The published price of a plan over tabled layers: seconds a step, and the peak of the fullest
/// device.
pub fn published_layers(tables: &Tables, row: &MeasuredLayers) -> Result<(f64, f64)> {
    // Whole nodes, as many as the plan's groups need at the most.
    let mut devices: Vec<DeviceCount> = Vec::new();
    for replica in row.stages.iter().flat_map(|stage| &stage.replicas) {
        let per_node = tables.node(&replica.kind)?.devices_per_node;
        match devices.iter_mut().find(|of| of.kind == replica.kind) {
            Some(of) => of.count += per_node,
            None => devices.push(DeviceCount { kind: replica.kind.clone(), count: per_node }),
        }
    }
    // Two nodes of a kind at the least, so that its groups are linked as nodes are.
    for of in &mut devices {
        let per_node = tables.node(&of.kind)?.devices_per_node;
        of.count = of.count.max(2 * per_node);
    }
    let instance = tables.instance(&row.model, &devices, row.global_batch)?;
    let pool = |kind: &str| devices.iter().position(|of| of.kind == kind).unwrap_or(0);
    let template = |pipeline: usize| Template {
        count: 1,
        micro_batch: row.micro_batch,
        num_micro_batches: row.num_micro_batches(),
        schedule: Schedule::OneForwardOneBackward,
        stages: row
            .stages
            .iter()
            .map(|stage| Stage {
                first_layer: stage.first_layer,
                end_layer: stage.end_layer,
                pool: pool(&stage.replicas[pipeline].kind),
                tensor_parallel: stage.replicas[pipeline].tensor_parallel,
                expert_parallel: 1,
                replicas: 1,
                recompute: false,
            })
            .collect(),
    };
    let templates = (0..row.num_pipelines() as usize).map(template).collect();
    let priced = price(&instance, &Layout { templates, shard_optimizer: false });
    let stages = priced.templates.iter().flat_map(|template| &template.stages);
    Ok((priced.iteration_s, stages.map(|stage| stage.memory_bytes).fold(0.0, f64::max)))
}

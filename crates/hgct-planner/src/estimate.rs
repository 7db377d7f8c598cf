//! An [`Instance`] from public figures: a roofline a card, and how far it can be trusted.
//!
//! What a catalogue knows of a card is its peak; what a program reaches is less, and how much less
//! differs from card to card and from source to source. So an estimate is made three times, as
//! [`Case::Expected`], [`Case::Slow`] and [`Case::Fast`]; a layout found for the first is priced by
//! all three, and the span is printed beside it. Measured profiles need none of this.

use hgct_core::architecture::{Architecture, Kept, LayerClass as ModelLayer};
use hgct_core::dtype::DType;
use hgct_core::topology::{ResolvedGroup, Topology};
use serde::{Deserialize, Serialize};

use crate::instance::{
    CostRow, Curve, Exchange, ExpertClass, Instance, LayerClass, LayerMemory, Link, LinkRow, Pool, Rules, Run,
};
use crate::{Error, Result};

mod measured;
mod mixed;
mod roofline;
#[cfg(test)]
mod tests;

pub use measured::{devices_of_pools, measured};
pub use mixed::mixed;
pub use roofline::Device;

/// Micro-batch sizes that are offered to the search, where the global batch allows.
const MICRO_BATCHES: [u32; 5] = [1, 2, 4, 8, 16];
/// Samples of a micro-batch that several groups divide, at most.
const MOST_SAMPLES: u32 = 32;
/// What a framework takes of a card before it has a model, bytes: context, libraries, workspaces.
const BASE_BYTES: f64 = 2.0 * GIB;
/// The same for the buffers of collectives.
const COLLECTIVE_BYTES: f64 = GIB;
/// Part of a card's memory that an allocator loses to fragments.
const FRAGMENTS: f64 = 0.04;
const GIB: f64 = 1_073_741_824.0;

/// Which figure of each span is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Case {
    /// Every card and link as slow as its sources allow.
    Slow,
    /// What is most likely.
    Expected,
    /// Every card and link as fast as its sources allow.
    Fast,
}

/// Bytes a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Precision {
    /// Dtype of arithmetic, weights and activations.
    pub compute: DType,
    /// Bytes of a weight as it is computed with.
    pub weight_bytes: u32,
    /// Bytes of a gradient, held and sent.
    pub gradient_bytes: u32,
    /// Bytes of master, m and v; ZeRO-1 divides them among replicas.
    pub optimizer_bytes: u32,
}

/// What is trained, how much of it a step.
#[derive(Debug, Clone)]
pub struct Workload<'a> {
    /// The model.
    pub architecture: &'a Architecture,
    /// Tokens a sample.
    pub seq_len: u32,
    /// Samples a step.
    pub global_batch: u32,
    /// Bytes a parameter.
    pub precision: Precision,
}

impl Case {
    /// All three, from slow to fast.
    pub const ALL: [Self; 3] = [Self::Slow, Self::Expected, Self::Fast];
}

impl Precision {
    /// Adam in single precision: 4 + 4 + 8 bytes a parameter; in half precision with single-precision
    /// masters: 2 + 2 + 12 (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1).
    pub fn of(compute: DType) -> Self {
        let half = compute.size_bytes() < 4;
        Self {
            compute,
            weight_bytes: if half { 2 } else { 4 },
            gradient_bytes: if half { 2 } else { 4 },
            optimizer_bytes: if half { 12 } else { 8 },
        }
    }
}

/// Estimates what a workload costs on the groups of a topology; a pool a group.
///
/// Tensor parallelism stays inside a node. The routed experts of a layer are divided, each whole, among
/// the ranks of its tensor-parallel group, or among several such groups of one node that divide the
/// micro-batch (expert parallelism beyond the group), where their number allows it.
pub fn estimate(
    topology: &Topology,
    groups: &[ResolvedGroup<'_>],
    workload: &Workload<'_>,
    rules: Rules,
    case: Case,
) -> Result<Instance> {
    let architecture = workload.architecture;
    let most = groups.iter().map(|group| group.group.devices).max().unwrap_or(1);
    let degrees: Vec<u32> = (0..=most.ilog2())
        .map(|power| 1 << power)
        .filter(|degree| architecture.allows_tensor_parallel(*degree))
        .collect();
    // Several copies of what is dense are exchanged inside of a node first, and their optimizer state is
    // divided: what has no word for either knows no such groups.
    let divides = matches!(rules.exchange, Exchange::Hierarchical) && rules.shard_optimizer;
    let shapes = shapes(architecture, &degrees, if divides { most } else { 1 });
    let pools = groups.iter().map(|group| pool(group, workload, &degrees, &shapes, case));
    let pools: Vec<Pool> = pools.collect::<Result<_>>()?;
    let inter = (0..groups.len())
        .map(|a| (0..groups.len()).map(|b| between(topology, groups, a, b, case)).collect())
        .collect();
    Ok(Instance {
        classes: architecture.classes.iter().map(|class| layer(class, workload, &degrees)).collect(),
        runs: architecture.runs.iter().map(|&(class, count)| Run { class, count }).collect(),
        degrees,
        pools,
        inter,
        global_batch: workload.global_batch,
        seq_len: workload.seq_len,
        rules,
    })
}

/// Bytes of one layer: on the wire, and held by each rank at each degree.
fn layer(class: &ModelLayer, workload: &Workload<'_>, degrees: &[u32]) -> LayerClass {
    let Workload { architecture, seq_len, precision, .. } = workload;
    let dtype = precision.compute;
    let bytes = |each: u32| held_parameters(class, architecture, 1) * f64::from(each);
    let memory = |degree: &u32| {
        let parameters = held_parameters(class, architecture, *degree);
        let kept =
            |kept| class.activation_bytes(*seq_len, dtype, *degree, architecture.hidden_size, kept) as f64;
        LayerMemory {
            state_bytes: parameters * f64::from(precision.weight_bytes + precision.gradient_bytes),
            optimizer_bytes: parameters * f64::from(precision.optimizer_bytes),
            activation_bytes: kept(Kept::All),
            recompute_bytes: kept(Kept::Input),
        }
    };
    LayerClass {
        name: class.name.clone(),
        gradient_bytes: bytes(precision.gradient_bytes),
        parameter_bytes: bytes(precision.weight_bytes),
        output_bytes: architecture.edge_bytes(*seq_len, dtype) as f64,
        memory: degrees.iter().map(memory).collect(),
        experts: class.experts.map(|_| {
            let bytes = |each: u32| class.num_expert_parameters() as f64 * f64::from(each);
            ExpertClass {
                gradient_bytes: bytes(precision.gradient_bytes),
                parameter_bytes: bytes(precision.weight_bytes),
                state_bytes: bytes(precision.weight_bytes + precision.gradient_bytes),
                optimizer_bytes: bytes(precision.optimizer_bytes),
            }
        }),
    }
}

/// Tensor parallel degrees, each with the devices among which experts may be divided: 1 for those of the
/// group, and whatever more of a node of `most` devices divides every layer's experts evenly.
fn shapes(architecture: &Architecture, degrees: &[u32], most: u32) -> Vec<(u32, u32)> {
    let experts: Vec<u32> = architecture.classes.iter().filter_map(|c| Some(c.experts?.count)).collect();
    let wider = |degree: u32| {
        let powers = (1..=most.max(1).ilog2()).map(|power| 1u32 << power);
        powers.filter(move |e| *e > degree)
    };
    let even = |e: &u32| !experts.is_empty() && experts.iter().all(|count| count.is_multiple_of(*e));
    let of = |degree: &u32| {
        let degree = *degree;
        std::iter::once(1).chain(wider(degree).filter(even)).map(move |e| (degree, e))
    };
    degrees.iter().flat_map(of).collect()
}

/// Parameters that a rank holds of a layer at a degree. A tied head holds the embedding's matrix too.
fn held_parameters(class: &ModelLayer, architecture: &Architecture, degree: u32) -> f64 {
    let is_head = class.kind == hgct_core::model::LayerKind::Head;
    let tied = if is_head { architecture.tied_parameters } else { 0 };
    (class.parameters_a_rank(degree, 1) + tied.div_ceil(u64::from(degree))) as f64
}

fn pool(
    group: &ResolvedGroup<'_>,
    workload: &Workload<'_>,
    degrees: &[u32],
    shapes: &[(u32, u32)],
    case: Case,
) -> Result<Pool> {
    let device = Device::new(group, workload.precision.compute, case)?;
    let memory_bytes = group.memory_bytes as f64;
    let costs = shapes
        .iter()
        .filter(|(degree, experts)| degree.max(experts) <= &group.group.devices)
        .flat_map(|shape| MICRO_BATCHES.map(|size| (*shape, size)))
        .filter(|((degree, experts), size)| {
            let samples = size * (experts / degree).max(1);
            samples <= workload.global_batch && (*experts == 1 || samples <= MOST_SAMPLES)
        })
        .map(|(shape, size)| cost(&device, workload, shape, size));
    let overhead = |degree: &u32| {
        BASE_BYTES + FRAGMENTS * memory_bytes + if *degree > 1 { COLLECTIVE_BYTES } else { 0.0 }
    };
    Ok(Pool {
        kind: group.group.name.clone(),
        nodes: group.group.nodes,
        devices_per_node: group.group.devices,
        memory_bytes,
        overhead_bytes: degrees.iter().map(overhead).collect(),
        intra: Link::uniform(Curve::AlphaBeta {
            latency_s: group.inside.latency_ns as f64 * 1e-9,
            bytes_per_s: device.link_bytes_per_s,
        }),
        costs: costs.collect(),
    })
}

fn cost(
    device: &Device,
    workload: &Workload<'_>,
    (tensor_parallel, expert_parallel): (u32, u32),
    micro_batch: u32,
) -> CostRow {
    let architecture = workload.architecture;
    let (mut forward_s, mut backward_s, mut update_s) = (Vec::new(), Vec::new(), Vec::new());
    for class in &architecture.classes {
        let seconds = device.layer(class, workload, tensor_parallel, expert_parallel, micro_batch);
        forward_s.push(seconds.0);
        backward_s.push(seconds.1);
        let parameters = held_parameters(class, architecture, tensor_parallel);
        update_s.push(device.update(parameters, workload.precision));
    }
    CostRow { tensor_parallel, expert_parallel, micro_batch, forward_s, backward_s, update_s }
}

/// The link from a node of group `a` to one of group `b`, by how many devices use it: each device has
/// its part of the ports, all together no more than the link's rate.
fn between(topology: &Topology, groups: &[ResolvedGroup<'_>], a: usize, b: usize, case: Case) -> Link {
    // Validation leaves a missing link only inside of a single node, whose devices use the node's own.
    let inside = groups[a].inside;
    let rate = topology.link(a, b).unwrap_or(inside);
    let latency_s = rate.latency_ns as f64 * 1e-9;
    let alone = |group: usize| {
        let group = groups[group].group;
        let share = f64::from(group.nics) / f64::from(group.devices);
        if group.nics == 0 { f64::INFINITY } else { group.nic_bytes_per_s * share.max(1.0) }
    };
    let row = |devices: u32| {
        let ports = (f64::from(devices) * alone(a)).min(f64::from(devices) * alone(b));
        LinkRow {
            from: devices,
            to: devices,
            curve: Curve::AlphaBeta {
                latency_s,
                bytes_per_s: rate.bytes_per_s.min(ports) * roofline::link_factor(case),
            },
        }
    };
    let most = groups[a].group.devices.min(groups[b].group.devices);
    let mut devices: Vec<u32> = (0..=most.ilog2()).map(|power| 1 << power).collect();
    if !most.is_power_of_two() {
        devices.push(most);
    }
    Link { rows: devices.into_iter().map(row).collect() }
}

fn no_rate(group: &ResolvedGroup<'_>, dtype: DType) -> Error {
    let known: Vec<&str> = group.accelerator.peak_flops_per_s.keys().map(|dtype| dtype.name()).collect();
    Error::NoRate {
        kind: group.accelerator.name.clone(),
        group: group.group.name.clone(),
        dtype: dtype.name(),
        known: known.join(", "),
    }
}

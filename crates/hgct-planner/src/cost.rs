//! What things cost: time and memory of stages, from the profile alone.
//!
//! A stage's forward is the sum of its layers' medians and one action's overhead; its backward the
//! same, and with recompute another forward. Memory of a stage instance is
//!
//! - the engine's: parameters 4 B, gradients 4 B, activations by micro-batches in flight, and what the
//!   layer that needs most of it takes while it is computed;
//! - the owner's: master, m and v, 12 B for each parameter that it updates, and 4 B for the sum of
//!   gradients where several are added;
//! - messages: contributions to what it owns, gradients and new parameters of the rest, activations, and
//!   shared memory with every peer;
//! - what a worker with its framework needs beside all this.

use std::ops::Range;

use hgct_core::cluster::DeviceSpec;
use hgct_core::model::{LayerKind, ModelSpec, TensorSpec};
use hgct_core::profile::{DeviceProfile, Profile};
use hgct_core::slice;

use crate::{Error, Result};

/// Bytes of one f32 element: the dtype of compute and wire today.
pub(crate) const ELEMENT_BYTES: u64 = 4;

/// Shared memory of a worker with one peer, of the same host or not: 2 MiB in each direction.
const PEER_BYTES: u64 = 4 << 20;

/// What the cost model needs of a model, as numbers.
#[derive(Debug, Clone)]
pub struct ModelShape {
    /// Layers that are placed: embedding, blocks, head.
    pub num_layers: u32,
    /// Elements of the update blocks of embedding, block and head, in the order of their tensors; a
    /// tied embedding stands in the first alone.
    blocks: [Vec<u64>; 3],
    /// Parameters of embedding, block and head; a tied embedding stands in the first alone.
    parameters: [u64; 3],
    /// Parameters of the embedding if the head uses it too, else 0.
    tied_parameters: u64,
    /// Bytes of one sample's activation between layers.
    pub edge_bytes_per_sample: u64,
    /// Model flops of one sample, forward and backward, of embedding, block and head.
    flops: [f64; 3],
}

fn kind_index(kind: LayerKind) -> usize {
    match kind {
        LayerKind::Embedding => 0,
        LayerKind::Block => 1,
        LayerKind::Head => 2,
    }
}

impl ModelShape {
    /// Reads a model; `seq_len` tokens a sample.
    pub fn new(model: &ModelSpec, seq_len: u32) -> Self {
        let total = model.num_parameters();
        let layers = [0, 1, model.head_layer()];
        let tensors = |layer: u32| -> Vec<TensorSpec> {
            let tied_away = |t: &TensorSpec| layer > 0 && t.name == hgct_core::model::EMBEDDING;
            model.layer_tensors(layer).into_iter().filter(|t| !tied_away(t)).collect()
        };
        let blocks = layers.map(|layer| {
            let blocks = |t: &TensorSpec| -> Vec<u64> {
                slice::blocks(t, total).into_iter().map(|r| (r.end - r.start) * t.row_elements()).collect()
            };
            tensors(layer).iter().flat_map(blocks).collect()
        });
        let parameters = layers.map(|layer| tensors(layer).iter().map(TensorSpec::num_elements).sum());
        Self {
            num_layers: model.num_placeable_layers(),
            tied_parameters: if model.tie_embeddings { parameters[0] } else { 0 },
            blocks,
            parameters,
            edge_bytes_per_sample: u64::from(seq_len) * u64::from(model.hidden_size) * ELEMENT_BYTES,
            flops: layers.map(|layer| 3.0 * model.layer_forward_flops(layer, seq_len)),
        }
    }

    /// What layer `layer` is, as an index: embedding 0, block 1, head 2.
    pub(crate) fn kind(&self, layer: u32) -> usize {
        match layer {
            0 => 0,
            layer if layer + 1 == self.num_layers => 2,
            _ => 1,
        }
    }

    /// How many layers of each kind a range has.
    pub(crate) fn counts(&self, layers: &Range<u32>) -> [u64; 3] {
        let embedding = u64::from(layers.start == 0 && layers.end > 0);
        let head = u64::from(layers.end == self.num_layers && layers.start < layers.end);
        let all = u64::from(layers.end.saturating_sub(layers.start));
        [embedding, all.saturating_sub(embedding + head), head]
    }

    /// Parameters that a stage of these layers holds.
    pub fn stage_parameters(&self, layers: &Range<u32>) -> u64 {
        let counts = self.counts(layers);
        let plain: u64 = (0..3).map(|k| counts[k] * self.parameters[k]).sum();
        // A head without the embedding's layer holds the tied tensor too.
        if counts[2] == 1 && counts[0] == 0 { plain + self.tied_parameters } else { plain }
    }

    /// Parameters of the model.
    pub fn num_parameters(&self) -> u64 {
        self.stage_parameters(&(0..self.num_layers))
    }

    /// Parameters of the embedding if the head uses them too, else 0.
    pub(crate) fn tied_parameters(&self) -> u64 {
        self.tied_parameters
    }

    /// Update blocks of a layer's own tensors.
    pub(crate) fn layer_blocks(&self, layer: u32) -> &[u64] {
        &self.blocks[self.kind(layer)]
    }

    /// Model flops of one sample over a range of layers.
    pub fn stage_flops(&self, layers: &Range<u32>) -> f64 {
        let counts = self.counts(layers);
        (0..3).map(|k| counts[k] as f64 * self.flops[k]).sum()
    }
}

/// Times and bytes at one micro-batch size: embedding, block, head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SizeCost {
    /// Samples a micro-batch.
    pub micro_batch: u32,
    /// Forward.
    pub forward_ns: [u64; 3],
    /// Backward without recompute.
    pub backward_ns: [u64; 3],
    /// What one micro-batch in flight keeps alive without recompute.
    pub activation_bytes: [u64; 3],
    /// What one layer takes beside that while it is computed.
    pub workspace_bytes: [u64; 3],
}

/// What one device costs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceCost {
    /// By micro-batch size, ascending; only sizes at which all three kinds of layer were measured.
    pub sizes: Vec<SizeCost>,
    /// Beside the layers of an action.
    pub action_overhead_ns: u64,
    /// Adding a contribution, picoseconds an element.
    pub reduce_ps_per_element: u64,
    /// Update, picoseconds an element.
    pub update_ps_per_element: u64,
    /// Import, picoseconds a byte.
    pub import_ps_per_byte: u64,
    /// Sending or receiving, picoseconds of its CPU a byte.
    pub send_ps_per_byte: u64,
    /// A worker before it has a model.
    pub base_memory_bytes: u64,
}

/// Memory that one rank of a plan needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// In the host's memory.
    pub host_bytes: u64,
    /// In the device's own.
    pub device_bytes: u64,
}

impl Memory {
    /// All of it.
    pub fn total_bytes(self) -> u64 {
        self.host_bytes.saturating_add(self.device_bytes)
    }
}

/// Memory that one device may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemoryLimit {
    /// Of the host's: its grant.
    pub host_bytes: u64,
    /// Of its own; 0 where it computes in the host's.
    pub device_bytes: u64,
}

impl MemoryLimit {
    /// The limit of a device of the cluster.
    pub fn of(device: &DeviceSpec) -> Self {
        Self { host_bytes: device.grant.memory_bytes, device_bytes: device.memory_bytes }
    }

    /// Bytes missing, the worse of the two; 0 where it fits.
    pub fn missing(self, memory: Memory) -> u64 {
        let host = memory.host_bytes.saturating_sub(self.host_bytes);
        host.max(memory.device_bytes.saturating_sub(self.device_bytes))
    }
}

/// A stage instance as the cost model sees it.
#[derive(Debug, Clone, Copy)]
pub struct StageLoad<'a> {
    /// Its layers.
    pub layers: &'a Range<u32>,
    /// Samples a micro-batch.
    pub micro_batch: u32,
    /// Micro-batches in flight at most.
    pub in_flight: u32,
    /// Whether backward computes activations again.
    pub recompute: bool,
    /// Parameters that its rank updates.
    pub owned: u64,
    /// Stage instances that hold each of those.
    pub num_holders: u64,
}

impl DeviceCost {
    /// Reads a row of the profile.
    pub fn new(row: &DeviceProfile) -> Self {
        let kinds = [LayerKind::Embedding, LayerKind::Block, LayerKind::Head];
        let size = |micro_batch: u32| {
            let mut cost = SizeCost {
                micro_batch,
                forward_ns: [0; 3],
                backward_ns: [0; 3],
                activation_bytes: [0; 3],
                workspace_bytes: [0; 3],
            };
            for kind in kinds {
                let layer = row.layer(kind, micro_batch)?;
                let k = kind_index(kind);
                cost.forward_ns[k] = layer.forward.median_ns;
                cost.backward_ns[k] = layer.backward.median_ns;
                cost.activation_bytes[k] = layer.activation_bytes;
                cost.workspace_bytes[k] = layer.workspace_bytes;
            }
            Some(cost)
        };
        Self {
            sizes: row.micro_batches().into_iter().filter(|b| *b > 0).filter_map(size).collect(),
            action_overhead_ns: row.action_overhead_ns,
            reduce_ps_per_element: row.reduce_ps_per_element,
            update_ps_per_element: row.update_ps_per_element,
            import_ps_per_byte: row.import_ps_per_byte,
            send_ps_per_byte: row.send_ps_per_byte,
            base_memory_bytes: row.base_memory_bytes,
        }
    }

    /// Costs at a micro-batch size, if it was measured.
    pub fn size(&self, micro_batch: u32) -> Option<&SizeCost> {
        self.sizes.iter().find(|size| size.micro_batch == micro_batch)
    }

    /// Adding contributions to `elements`, each held by `num_holders`.
    pub fn reduce_ns(&self, elements: u64, num_holders: u64) -> u64 {
        picos(self.reduce_ps_per_element, elements.saturating_mul(num_holders))
    }

    /// Updating `elements`.
    pub fn update_ns(&self, elements: u64) -> u64 {
        picos(self.update_ps_per_element, elements)
    }

    /// Importing `elements`.
    pub fn import_ns(&self, elements: u64) -> u64 {
        picos(self.import_ps_per_byte, elements * ELEMENT_BYTES)
    }

    /// This worker's CPU time to send or receive `bytes`.
    pub fn send_ns(&self, bytes: u64) -> u64 {
        picos(self.send_ps_per_byte, bytes)
    }

    /// Memory of a worker with one stage instance, or `None` at a size that was not measured.
    /// `own_memory`: the device computes in memory of its own.
    pub fn memory(&self, shape: &ModelShape, load: StageLoad<'_>, own_memory: bool) -> Option<Memory> {
        let size = self.size(load.micro_batch)?;
        let counts = shape.counts(load.layers);
        let parameters = shape.stage_parameters(load.layers);
        let edge = shape.edge_bytes_per_sample * u64::from(load.micro_batch);
        let full: u64 = (0..3).map(|k| counts[k] * size.activation_bytes[k]).sum();
        let in_flight = u64::from(load.in_flight);
        // Recompute keeps a stage's input for each micro-batch, and one micro-batch in full.
        let activations = if load.recompute { in_flight * edge + full } else { in_flight * full };
        let workspace = (0..3).filter(|k| counts[*k] > 0).map(|k| size.workspace_bytes[k]).max().unwrap_or(0);
        let engine = 2 * ELEMENT_BYTES * parameters + activations + workspace;
        let others = load.num_holders.saturating_sub(1);
        let sum = u64::from(others > 0);
        let state = ELEMENT_BYTES * (3 + sum) * load.owned;
        // A gradient on its way out and its parameter's new value on its way in.
        let messages = ELEMENT_BYTES * (load.owned * others + 2 * parameters.saturating_sub(load.owned));
        // Holders of the same parameters, and the stages before and after.
        let neighbours = u64::from(load.layers.start > 0) + u64::from(load.layers.end < shape.num_layers);
        let peers = PEER_BYTES * (others + neighbours);
        let host = self.base_memory_bytes + state + messages + 2 * edge + peers;
        Some(if own_memory {
            // Gradients come out into host memory on their way to the owner.
            Memory { host_bytes: host + ELEMENT_BYTES * parameters, device_bytes: engine }
        } else {
            Memory { host_bytes: host + engine, device_bytes: 0 }
        })
    }
}

impl SizeCost {
    /// Forward of layers counted by kind, without the action's overhead.
    pub(crate) fn forward(&self, counts: [u64; 3]) -> u64 {
        (0..3).map(|k| counts[k] * self.forward_ns[k]).sum()
    }

    /// Backward of layers counted by kind, without the action's overhead and without recompute.
    pub(crate) fn backward(&self, counts: [u64; 3]) -> u64 {
        (0..3).map(|k| counts[k] * self.backward_ns[k]).sum()
    }
}

/// Picoseconds a unit times units, in nanoseconds, rounded up.
fn picos(per_unit: u64, units: u64) -> u64 {
    u64::try_from((u128::from(per_unit) * u128::from(units)).div_ceil(1000)).unwrap_or(u64::MAX)
}

/// Latency and bandwidth of a directed link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkCost {
    /// One-way latency.
    pub latency_ns: u64,
    /// Bytes a second.
    pub bytes_per_s: u64,
}

impl LinkCost {
    /// A link that costs nothing.
    pub const FREE: Self = Self { latency_ns: 0, bytes_per_s: u64::MAX };

    /// Time that `bytes` occupy the link.
    pub fn occupied_ns(self, bytes: u64) -> u64 {
        if self.bytes_per_s == u64::MAX {
            return 0;
        }
        let ns = (u128::from(bytes) * 1_000_000_000).div_ceil(u128::from(self.bytes_per_s.max(1)));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }
}

/// Costs of some devices and of the links between them, in the given order.
#[derive(Debug, Clone)]
pub struct Costs {
    /// A row a device.
    pub devices: Vec<DeviceCost>,
    /// `links[from][to]`; the diagonal is free.
    pub links: Vec<Vec<LinkCost>>,
}

impl Costs {
    /// Reads the rows of `devices` from a profile.
    pub fn new<'a>(
        profile: &Profile,
        devices: impl IntoIterator<Item = &'a hgct_core::ids::DeviceId>,
    ) -> Result<Self> {
        let ids: Vec<_> = devices.into_iter().collect();
        let row = |id: &&hgct_core::ids::DeviceId| {
            profile
                .device(id)
                .map(DeviceCost::new)
                .ok_or_else(|| Error::NotMeasured { device: (*id).clone(), detail: String::new() })
        };
        let link = |from: usize, to: usize| {
            if from == to {
                return Ok(LinkCost::FREE);
            }
            let link = profile
                .link(ids[from], ids[to])
                .ok_or_else(|| Error::NoLink { from: ids[from].clone(), to: ids[to].clone() })?;
            Ok(LinkCost { latency_ns: link.latency_ns, bytes_per_s: link.bytes_per_s })
        };
        Ok(Self {
            devices: ids.iter().map(row).collect::<Result<_>>()?,
            links: (0..ids.len())
                .map(|from| (0..ids.len()).map(|to| link(from, to)).collect::<Result<_>>())
                .collect::<Result<_>>()?,
        })
    }

    /// The same for some of the devices, by index.
    pub(crate) fn select(&self, devices: &[usize]) -> Self {
        Self {
            devices: devices.iter().map(|d| self.devices[*d].clone()).collect(),
            links: devices.iter().map(|a| devices.iter().map(|b| self.links[*a][*b]).collect()).collect(),
        }
    }
}

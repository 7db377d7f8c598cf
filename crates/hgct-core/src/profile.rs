//! What was measured: the planner's only knowledge of speed.

use serde::{Deserialize, Serialize};

use crate::canonical::Hash;
use crate::cluster::{Grant, Isolation};
use crate::ids::{DeviceId, Kind};
use crate::model::LayerKind;

/// Measurements of all devices of a cluster for one model shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Version of this document's form.
    pub format: u32,
    /// Date of the measurement, `YYYY-MM-DDThh:mm:ssZ`.
    pub measured_at: String,
    /// Hash of the model's shape.
    pub model: Hash,
    /// Sequence length that was measured.
    pub seq_len: u32,
    /// How grants were held while measuring.
    pub isolation: Isolation,
    /// A row a device.
    pub devices: Vec<DeviceProfile>,
    /// A row a directed pair of devices.
    pub links: Vec<LinkProfile>,
}

/// One device under one grant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceProfile {
    /// The device.
    pub device: DeviceId,
    /// Its kind.
    pub kind: Kind,
    /// Hash of the environment that drove it.
    pub environment_hash: Hash,
    /// Framework and version, for people.
    pub framework: String,
    /// The grant it was measured under; another grant is another row.
    pub grant: Grant,
    /// Seconds and bytes of each kind of layer at each micro-batch size.
    pub layers: Vec<LayerProfile>,
    /// Picoseconds an element for the owner to add one contribution to a gradient.
    pub reduce_ps_per_element: u64,
    /// Picoseconds an element for the owner's AdamW update, norm included.
    pub update_ps_per_element: u64,
    /// Picoseconds a byte for the engine to import parameters.
    pub import_ps_per_byte: u64,
    /// Picoseconds a byte of this worker's CPU to send (receive costs the same).
    pub send_ps_per_byte: u64,
    /// Nanoseconds that an action costs beside its layers (call, bookkeeping).
    pub action_overhead_ns: u64,
    /// Resident bytes of a worker whose framework has computed all kinds of layer, without a model.
    pub base_memory_bytes: u64,
}

/// One kind of layer at one micro-batch size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerProfile {
    /// Which layer.
    pub layer: LayerKind,
    /// Samples a micro-batch.
    pub micro_batch: u32,
    /// Forward of one micro-batch.
    pub forward: Spread,
    /// Backward of one micro-batch, without recompute.
    pub backward: Spread,
    /// Bytes that one micro-batch in flight keeps alive, without recompute.
    pub activation_bytes: u64,
    /// Bytes beside that while the layer is computed: gradients of activations and of one layer's
    /// parameters, and what the framework's operators take.
    #[serde(default)]
    pub workspace_bytes: u64,
}

/// Median and spread of repeated measurements, nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spread {
    /// Median.
    pub median_ns: u64,
    /// Smallest.
    pub min_ns: u64,
    /// Largest.
    pub max_ns: u64,
    /// How many.
    pub num_samples: u32,
}

/// One directed link between two workers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkProfile {
    /// Sending device.
    pub from: DeviceId,
    /// Receiving device.
    pub to: DeviceId,
    /// `tcp` or `shared-memory`.
    pub transport: String,
    /// Alpha: one-way latency of a small message.
    pub latency_ns: u64,
    /// Bytes a second of large messages.
    pub bytes_per_s: u64,
}

impl Spread {
    /// Median and spread of samples; `None` without samples.
    pub fn of(mut samples: Vec<u64>) -> Option<Self> {
        samples.sort_unstable();
        let (min_ns, max_ns) = (*samples.first()?, *samples.last()?);
        let middle = samples.len() / 2;
        let median_ns = if samples.len().is_multiple_of(2) {
            samples[middle - 1].midpoint(samples[middle])
        } else {
            samples[middle]
        };
        Some(Self { median_ns, min_ns, max_ns, num_samples: samples.len() as u32 })
    }
}

impl Profile {
    /// The current form.
    pub const FORMAT: u32 = 1;

    /// The row of a device.
    pub fn device(&self, id: &DeviceId) -> Option<&DeviceProfile> {
        self.devices.iter().find(|row| row.device == *id)
    }

    /// The link between two devices.
    pub fn link(&self, from: &DeviceId, to: &DeviceId) -> Option<&LinkProfile> {
        self.links.iter().find(|row| row.from == *from && row.to == *to)
    }
}

impl DeviceProfile {
    /// The row of a kind of layer at a micro-batch size.
    pub fn layer(&self, layer: LayerKind, micro_batch: u32) -> Option<&LayerProfile> {
        self.layers.iter().find(|row| row.layer == layer && row.micro_batch == micro_batch)
    }

    /// The micro-batch sizes that were measured, ascending.
    pub fn micro_batches(&self) -> Vec<u32> {
        let mut sizes: Vec<u32> = self.layers.iter().map(|row| row.micro_batch).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }
}

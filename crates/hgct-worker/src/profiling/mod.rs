//! Measures one device under its grant: the planner's only knowledge of its speed.
//!
//! The layers are timed through the engine interface, on a model of the same shape with at most
//! two blocks, so that loading is quick. A device may be held to a share of a processor by a quota
//! that gives it bursts: one action can then run at full speed and the next one stand still.
//! Therefore a sample is never one action but the mean over a *window* of many periods of such a
//! quota, and medians are taken over windows.

mod host;
mod layers;

use std::time::{Duration, Instant};

use hgct_core::canonical::Hash;
use hgct_core::cluster::Grant;
use hgct_core::ids::{DeviceId, Kind};
use hgct_core::model::ModelSpec;
use hgct_core::profile::DeviceProfile;

use crate::Result;
use crate::engine::Engine;
use crate::memory::{give_back, resident_bytes};

/// What to measure, and what stands in the row beside it.
#[derive(Debug, Clone)]
pub struct Request {
    /// The device.
    pub device: DeviceId,
    /// Its kind.
    pub kind: Kind,
    /// Hash of the environment that drives it.
    pub environment_hash: Hash,
    /// The grant that it runs under now.
    pub grant: Grant,
    /// The model's shape.
    pub model: ModelSpec,
    /// Tokens a sample.
    pub seq_len: u32,
    /// Samples a micro-batch, three sizes at most.
    pub micro_batches: Vec<u32>,
    /// How long it may take; compilation counts.
    pub budget: Duration,
}

/// Sizes that are measured when the request names none.
const MICRO_BATCHES: [u32; 3] = [1, 2, 4];

/// Measures everything. Sizes whose micro-batches the device cannot hold or that the budget does
/// not reach are left out; it is an error when none is left.
///
/// `action_overhead_ns` is what an embedding's forward of the smallest micro-batch takes at least:
/// a call with next to no arithmetic. It is taken off every layer's time, so that overhead and
/// layers add up to what an action took. `activation_bytes` of a block is the growth with
/// micro-batches in flight of what the engine says that tensors take, or else on a `cpu` of resident
/// memory; of other layers, on other devices, and where that growth is implausible, it is the count of
/// what the mathematics of backward needs.
/// `workspace_bytes` on a `cpu` is the peak of a forward and its backward above that.
/// `base_memory_bytes` is what is resident in the end, when all is unloaded: the framework after it
/// has computed, and the programs that it compiled for one size.
pub fn run(engine: &mut dyn Engine, request: &Request) -> Result<DeviceProfile> {
    let start = Instant::now();
    engine.load(&[])?;
    // Host arithmetic is short; what is left of the budget belongs to the layers.
    let window = (request.budget / 100).clamp(Duration::from_millis(5), Duration::from_millis(200));
    let host = host::measure(window);
    let description = engine.describe().clone();
    let measured = layers::measure(engine, request, start + request.budget, window)?;
    let base_memory_bytes = base_memory_bytes(engine, &measured)?;
    Ok(DeviceProfile {
        device: request.device.clone(),
        kind: request.kind.clone(),
        environment_hash: request.environment_hash.clone(),
        framework: format!("{} {}", description.engine, description.framework_version),
        grant: request.grant.clone(),
        layers: measured.layers,
        reduce_ps_per_element: host.reduce_ps_per_element,
        update_ps_per_element: host.update_ps_per_element,
        import_ps_per_byte: measured.import_ps_per_byte,
        send_ps_per_byte: host.send_ps_per_byte,
        action_overhead_ns: measured.action_overhead_ns,
        base_memory_bytes,
    })
}

/// What stays resident when nothing is loaded, and what the programs of one micro-batch size take.
fn base_memory_bytes(engine: &mut dyn Engine, measured: &layers::Measured) -> Result<u64> {
    give_back();
    let loaded = resident_bytes();
    engine.load(&[])?;
    give_back();
    let base = resident_bytes();
    let sizes = measured.layers.len() as u64 / layers::NUM_KINDS;
    Ok(base + loaded.saturating_sub(base + measured.parameter_bytes) / sizes.max(1))
}

/// Runs `work` until `window` is over, at least once; answers with the nanoseconds of one run.
fn mean_ns(window: Duration, mut work: impl FnMut()) -> u64 {
    let start = Instant::now();
    let mut count = 0u64;
    loop {
        work();
        count += 1;
        let elapsed = start.elapsed();
        if elapsed >= window {
            return elapsed.as_nanos() as u64 / count;
        }
    }
}

/// The middle one of some figures.
fn median(mut figures: Vec<u64>) -> u64 {
    figures.sort_unstable();
    figures.get(figures.len() / 2).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests;

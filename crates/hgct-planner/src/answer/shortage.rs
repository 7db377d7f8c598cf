//! By how much a model fits nowhere, and what would make it fit.

use std::fmt;

use super::text::gib;
use crate::instance::{CostRow, Held, Instance};

/// What is missing.
#[derive(Debug, Clone, PartialEq)]
pub struct Shortage {
    /// Bytes that all devices together must hold at least: weights, gradients and optimizer state
    /// once, one micro-batch of one sample in flight.
    pub needed_bytes: f64,
    /// Bytes that they have beside what frameworks take.
    pub available_bytes: f64,
    /// The layer that is too large for any device, with the bytes that a device needs for it at least
    /// and those that the best has.
    pub layer: Option<(String, f64, f64)>,
    /// Device of which the fewest more would do: kind, how many more.
    pub more: Option<(String, u64)>,
    /// Factor by which the memory of every device would have to grow.
    pub factor: f64,
}

/// Why no layout of an instance fits, as far as sums of memory say; `None` where they would fit, and
/// only their division does not.
pub fn shortage(instance: &Instance) -> Option<Shortage> {
    let classes = instance.layer_classes();
    let sharded = instance.rules.shard_optimizer;
    // Sharded state counts once however many replicas there are; so does the rest with one replica.
    let least = |class: usize, at: usize| {
        let memory = &instance.classes[class].memory[at];
        let kept = if instance.rules.recompute { memory.recompute_bytes } else { memory.activation_bytes };
        memory.state_bytes + memory.optimizer_bytes + kept
    };
    let whole = |class: usize| {
        let at_degree = |(at, degree): (usize, &u32)| least(class, at) * f64::from(*degree);
        instance.degrees.iter().enumerate().map(at_degree).fold(f64::INFINITY, f64::min)
    };
    let needed_bytes: f64 = classes.iter().map(|class| whole(*class)).sum();
    let room = |pool: usize, at: usize| {
        let pool = &instance.pools[pool];
        (pool.memory_bytes - pool.overhead_bytes[at]).max(0.0)
    };
    let pools = 0..instance.pools.len();
    let available_bytes: f64 =
        pools.clone().map(|pool| room(pool, 0) * instance.pools[pool].num_devices() as f64).sum();
    let missing = needed_bytes - available_bytes;
    let layer = too_large(instance, &classes, |class, at| {
        // With enough replicas nothing of sharded optimizer state is left on a device.
        let optimizer = if sharded { instance.classes[class].memory[at].optimizer_bytes } else { 0.0 };
        least(class, at) - optimizer
    });
    if missing <= 0.0 && layer.is_none() {
        return None;
    }
    let more = pools
        .filter(|pool| room(*pool, 0) > 0.0 && missing > 0.0)
        .map(|pool| ((missing / room(pool, 0)).ceil() as u64, pool))
        .min()
        .map(|(count, pool)| (instance.pools[pool].kind.clone(), count));
    let by_layer = layer.as_ref().map_or(0.0, |(_, needs, has)| needs / has.max(1.0));
    let factor = (needed_bytes / available_bytes.max(1.0)).max(by_layer);
    Some(Shortage { needed_bytes, available_bytes, layer, more, factor })
}

/// The layer that no device of any pool holds at any degree, if there is one: the largest.
fn too_large(
    instance: &Instance,
    classes: &[usize],
    least: impl Fn(usize, usize) -> f64,
) -> Option<(String, f64, f64)> {
    let mut worst: Option<(String, f64, f64)> = None;
    let mut seen = classes.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for class in seen {
        // The place where the least is missing.
        let mut best: Option<(f64, f64)> = None;
        for pool in &instance.pools {
            let own =
                pool.costs.iter().map(CostRow::shape).filter(|(_, group)| *group <= pool.devices_per_node);
            for (degree, group) in own {
                if let Some(at) = instance.degree_index(degree) {
                    let parts = group / degree.max(1);
                    // Of divided experts a device holds less.
                    let held = Held::new(instance, class, at, parts);
                    let less = instance.classes[class].memory[at].state_bytes - held.state_bytes;
                    let (needs, has) = (least(class, at) - less, pool.memory_bytes - pool.overhead_bytes[at]);
                    if best.is_none_or(|(n, h)| needs - has < n - h) {
                        best = Some((needs, has));
                    }
                }
            }
        }
        if let Some((needs, has)) = best
            && needs > has
            && worst.as_ref().is_none_or(|(_, n, h)| needs - has > n - h)
        {
            worst = Some((instance.classes[class].name.clone(), needs, has));
        }
    }
    worst
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let missing = self.needed_bytes - self.available_bytes;
        if let Some((name, needs, has)) = &self.layer {
            write!(
                f,
                "one {name} alone needs {} GiB of a device, whatever the tensor parallelism, and {} GiB are \
                 free where the least is missing; ",
                gib(*needs),
                gib(*has)
            )?;
        }
        if missing > 0.0 {
            write!(
                f,
                "at least {} GiB are needed, and all devices together have {} GiB beside what frameworks \
                 take: {} GiB are missing; ",
                gib(self.needed_bytes),
                gib(self.available_bytes),
                gib(missing)
            )?;
        }
        write!(f, "needed are ")?;
        if let (Some((kind, count)), None) = (&self.more, &self.layer) {
            write!(f, "{count} more devices of {kind} at least, or ")?;
        }
        write!(f, "{:.1} times the memory on each device at least", self.factor)
    }
}

//! An [`Instance`] from a measured profile: nothing is estimated, and nothing has an interval.

use std::collections::BTreeMap;

use hgct_core::architecture::Architecture;
use hgct_core::cluster::{ClusterSpec, DeviceSpec};
use hgct_core::ids::{DeviceId, Kind, NodeId};
use hgct_core::model::{LayerKind, ModelSpec};
use hgct_core::profile::{DeviceProfile, Profile};

use super::{Precision, Workload, layer};
use crate::cost::MemoryLimit;
use crate::instance::{CostRow, Curve, Instance, Link, Pool, Rules, Run};
use crate::{Error, Result};

/// Rate of a link that nothing crosses, bytes a second.
const UNLIMITED: f64 = 1e15;

/// Alike measured devices of one kind on nodes that have as many of them each.
struct Measured<'a> {
    kind: Kind,
    per_node: u32,
    /// A row a node.
    devices: Vec<Vec<Device<'a>>>,
}

type Device<'a> = (&'a DeviceSpec, &'a DeviceProfile);

/// Takes costs, memory and links from what was measured; a pool for each kind, number of devices a node
/// and speed. The slowest device of a pool stands for all of it, and devices that are not nearly as fast
/// have a pool of their own. There is no tensor parallelism yet where there is only a profile.
pub fn measured(
    cluster: &ClusterSpec,
    profile: &Profile,
    model: &ModelSpec,
    global_batch: u32,
    rules: Rules,
) -> Result<Instance> {
    let architecture = Architecture::from(model);
    let expected = hgct_core::canonical::Hash::of(model);
    if profile.model != expected {
        return Err(Error::OtherProfile {
            what: "model",
            found: profile.model.to_string(),
            expected: expected.to_string(),
        });
    }
    let groups = grouped(cluster, profile)?;
    let workload = Workload {
        architecture: &architecture,
        seq_len: profile.seq_len,
        global_batch,
        precision: Precision::of(hgct_core::dtype::DType::F32),
    };
    let mut classes: Vec<_> =
        architecture.classes.iter().map(|class| layer(class, &workload, &[1])).collect();
    for (class, cost) in architecture.classes.iter().zip(&mut classes) {
        // What a layer keeps for backward was measured: the most that any engine does.
        let bytes = groups.iter().flat_map(Measured::rows).flat_map(|row| {
            row.layers
                .iter()
                .filter(|of| of.layer == class.kind && of.micro_batch > 0)
                .map(|of| of.activation_bytes as f64 / f64::from(of.micro_batch))
        });
        cost.memory[0].activation_bytes = bytes.fold(0.0, f64::max);
        // An owner has master and both moments beside the engine's own copy.
        cost.memory[0].optimizer_bytes = class.num_parameters() as f64 * 12.0;
    }
    let pools = groups.iter().map(|group| group.pool(&architecture)).collect();
    let inter = groups.iter().map(|a| groups.iter().map(|b| link(profile, a, b)).collect()).collect();
    Ok(Instance {
        degrees: vec![1],
        classes,
        runs: architecture.runs.iter().map(|&(class, count)| Run { class, count }).collect(),
        pools,
        inter,
        global_batch,
        seq_len: profile.seq_len,
        rules,
    })
}

/// The devices of each pool of [`measured`], by node: what a layout's groups mean.
pub fn devices_of_pools(cluster: &ClusterSpec, profile: &Profile) -> Result<Vec<Vec<Vec<DeviceId>>>> {
    let ids = |node: &Vec<Device<'_>>| node.iter().map(|(of, _)| of.id.clone()).collect();
    let of_group = |group: Measured<'_>| group.devices.iter().map(ids).collect();
    Ok(grouped(cluster, profile)?.into_iter().map(of_group).collect())
}

fn grouped<'a>(cluster: &'a ClusterSpec, profile: &'a Profile) -> Result<Vec<Measured<'a>>> {
    let mut nodes: BTreeMap<(&Kind, &NodeId), Vec<Vec<Device<'a>>>> = BTreeMap::new();
    for (node, device) in cluster.devices() {
        let row = profile
            .device(&device.id)
            .ok_or_else(|| Error::NotMeasured { device: device.id.clone(), detail: String::new() })?;
        let of_node = nodes.entry((&device.kind, &node.name)).or_default();
        match of_node.iter_mut().find(|others| others.iter().all(|other| alike(*other, (device, row)))) {
            Some(others) => others.push((device, row)),
            None => of_node.push(vec![(device, row)]),
        }
    }
    let mut groups: Vec<Measured<'a>> = Vec::new();
    for ((kind, _), of_node) in nodes {
        for devices in of_node {
            let per_node = devices.len() as u32;
            let same = |group: &&mut Measured<'a>| {
                group.kind == *kind
                    && group.per_node == per_node
                    && group.all().all(|other| alike(*other, devices[0]))
            };
            match groups.iter_mut().find(same) {
                Some(group) => group.devices.push(devices),
                None => groups.push(Measured { kind: kind.clone(), per_node, devices: vec![devices] }),
            }
        }
    }
    if groups.is_empty() {
        return Err(Error::NoDevices { reason: "the cluster lists none".into() });
    }
    Ok(groups)
}

/// Whether one of two devices may stand for the other: as much memory, the same sizes of micro-batches,
/// and blocks that take about as long.
fn alike(a: Device<'_>, b: Device<'_>) -> bool {
    let sizes = a.1.micro_batches();
    let near = |size: &u32| {
        let block = |row: &DeviceProfile| {
            row.layer(LayerKind::Block, *size).map(|of| (of.forward.median_ns + of.backward.median_ns) as f64)
        };
        match (block(a.1), block(b.1)) {
            (Some(a), Some(b)) => a.max(b) <= a.min(b) * ALIKE,
            (a, b) => a.is_none() && b.is_none(),
        }
    };
    MemoryLimit::of(a.0) == MemoryLimit::of(b.0) && sizes == b.1.micro_batches() && sizes.iter().all(near)
}

/// Ratio of the times of two devices that are taken for alike; more than measuring varies.
const ALIKE: f64 = 1.1;

impl<'a> Measured<'a> {
    fn all(&self) -> impl Iterator<Item = &Device<'a>> {
        self.devices.iter().flatten()
    }

    fn rows(&self) -> impl Iterator<Item = &'a DeviceProfile> {
        self.all().map(|(_, row)| *row)
    }

    fn pool(&self, architecture: &Architecture) -> Pool {
        let limit = |device: &DeviceSpec| {
            let limit = MemoryLimit::of(device);
            if limit.device_bytes > 0 { limit.device_bytes } else { limit.host_bytes }
        };
        let memory_bytes = self.all().map(|(device, _)| limit(device)).min().unwrap_or(0) as f64;
        let base = self.rows().map(|row| row.base_memory_bytes).max().unwrap_or(0) as f64;
        let mut sizes: Vec<u32> = self.rows().flat_map(DeviceProfile::micro_batches).collect();
        sizes.sort_unstable();
        sizes.dedup();
        Pool {
            kind: self.kind.to_string(),
            nodes: self.devices.len() as u32,
            devices_per_node: self.per_node,
            memory_bytes,
            overhead_bytes: vec![base],
            intra: Link::uniform(Curve::AlphaBeta { latency_s: 0.0, bytes_per_s: UNLIMITED }),
            costs: sizes.into_iter().filter_map(|size| self.cost(architecture, size)).collect(),
        }
    }

    /// The slowest of the group, if all of them have all layers at that size.
    fn cost(&self, architecture: &Architecture, micro_batch: u32) -> Option<CostRow> {
        let slowest = |of: &dyn Fn(&DeviceProfile) -> Option<f64>| {
            self.rows().map(of).try_fold(0.0f64, |most, seconds| Some(most.max(seconds?)))
        };
        let seconds = |kind: LayerKind, backward: bool| {
            slowest(&|row: &DeviceProfile| {
                let layer = row.layer(kind, micro_batch)?;
                let spread = if backward { layer.backward } else { layer.forward };
                Some(spread.median_ns as f64 * 1e-9)
            })
        };
        let classes = &architecture.classes;
        let update = |parameters: u64| {
            slowest(&|row: &DeviceProfile| {
                let each = row.reduce_ps_per_element + row.update_ps_per_element + 4 * row.import_ps_per_byte;
                Some(parameters as f64 * each as f64 * 1e-12)
            })
        };
        Some(CostRow {
            tensor_parallel: 1,
            expert_parallel: 1,
            micro_batch,
            forward_s: classes.iter().map(|class| seconds(class.kind, false)).collect::<Option<_>>()?,
            backward_s: classes.iter().map(|class| seconds(class.kind, true)).collect::<Option<_>>()?,
            update_s: classes.iter().map(|class| update(class.num_parameters())).collect::<Option<_>>()?,
        })
    }
}

/// The slowest measured link between any two devices of two groups; within one group of one device,
/// whatever is measured at it.
fn link(profile: &Profile, a: &Measured<'_>, b: &Measured<'_>) -> Link {
    let mut slowest: Option<(f64, f64)> = None;
    for (from, _) in a.all() {
        for (to, _) in b.all() {
            if let Some(row) = profile.link(&from.id, &to.id) {
                let (latency, rate) = (row.latency_ns as f64 * 1e-9, row.bytes_per_s.max(1) as f64);
                let known = slowest.get_or_insert((latency, rate));
                *known = (known.0.max(latency), known.1.min(rate));
            }
        }
    }
    let (latency_s, bytes_per_s) = slowest.unwrap_or((0.0, UNLIMITED));
    Link::uniform(Curve::AlphaBeta { latency_s, bytes_per_s })
}

//! From tables to a planning problem.

use std::collections::BTreeMap;

use super::{LayerFloats, LayerSeconds, ModelTable, Tables};
use crate::instance::{CostRow, Curve, Instance, LayerClass, LayerMemory, Link, LinkRow, Pool, Rules, Run};
use crate::{Error, Result};

/// So many devices of a kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceCount {
    /// The kind.
    pub kind: String,
    /// How many.
    pub count: u32,
}

/// Parses `A100-40=32,V100-16=96`.
pub fn parse_device_counts(text: &str) -> Result<Vec<DeviceCount>> {
    let bad = |found: &str| {
        Error::Core(hgct_core::Error::Value {
            file: "command line".into(),
            key: "--devices".into(),
            found: format!("{found:?}"),
            allowed: "KIND=COUNT,KIND=COUNT with counts from 1, every kind once".into(),
        })
    };
    let mut counts: Vec<DeviceCount> = Vec::new();
    for part in text.split(',') {
        let (kind, count) = part.trim().rsplit_once('=').ok_or_else(|| bad(part))?;
        let count = count.parse::<u32>().ok().filter(|count| (1..=1 << 20).contains(count));
        let count = count.ok_or_else(|| bad(part))?;
        if kind.is_empty() || counts.iter().any(|known| known.kind == kind) {
            return Err(bad(part));
        }
        counts.push(DeviceCount { kind: kind.into(), count });
    }
    Ok(counts)
}

/// Bytes of an element: the tables are of single precision throughout.
const ELEMENT: f64 = 4.0;
/// Weights, gradients and a copy of both for the exchange, a parameter.
const STATE: f64 = 16.0;
/// Adam's moments, a parameter.
const OPTIMIZER: f64 = 8.0;
/// What framework and libraries take without and with tensor parallelism, as the published tables
/// are priced.
const OVERHEAD: [f64; 2] = [2.0e9, 3.0e9];

impl Tables {
    /// The problem of planning a model on these devices, priced as the tables are published.
    pub fn instance(&self, model: &str, devices: &[DeviceCount], global_batch: u32) -> Result<Instance> {
        let table = self.model(model)?;
        for DeviceCount { kind, count } in devices {
            let node = self.node(kind)?;
            if !count.is_multiple_of(node.devices_per_node) {
                return Err(Error::Core(hgct_core::Error::Value {
                    file: "command line".into(),
                    key: format!("--devices {kind}"),
                    found: count.to_string(),
                    allowed: format!("a multiple of {}, its devices a node", node.devices_per_node),
                }));
            }
            if table.seconds.get(kind).is_none_or(BTreeMap::is_empty) {
                return Err(super::unknown(
                    "layer times of kind",
                    kind,
                    table.seconds.iter().filter(|(_, rows)| !rows.is_empty()).map(|(kind, _)| kind),
                ));
            }
        }
        // No group is larger than a node, so larger degrees are left out.
        let largest =
            devices.iter().filter_map(|of| self.nodes.get(&of.kind)).map(|node| node.devices_per_node).max();
        let degrees: Vec<u32> =
            table.floats.keys().copied().filter(|degree| Some(*degree) <= largest).collect();
        if degrees.first() != Some(&1) {
            return Err(super::unknown("tensor parallel degree", "1", std::iter::empty()));
        }
        let (classes, runs) = classes(table, devices, &degrees);
        let first: Vec<usize> = first_layers(&runs, classes.len());
        let pools =
            devices.iter().map(|of| self.pool(table, of, &degrees, &first)).collect::<Result<Vec<Pool>>>()?;
        let inter = devices
            .iter()
            .map(|from| devices.iter().map(|to| self.between(from, to)).collect::<Result<Vec<Link>>>())
            .collect::<Result<Vec<Vec<Link>>>>()?;
        Ok(Instance {
            degrees,
            classes,
            runs,
            pools,
            inter,
            global_batch,
            seq_len: table.seq_len,
            rules: Rules::published(),
        })
    }

    fn pool(
        &self,
        table: &ModelTable,
        of: &DeviceCount,
        degrees: &[u32],
        first_layers: &[usize],
    ) -> Result<Pool> {
        let node = self.node(&of.kind)?;
        let usable = |(degree, _): &(u32, u32)| degrees.contains(degree) && *degree <= node.devices_per_node;
        let of_class = |rows: &[LayerSeconds], get: fn(&LayerSeconds) -> f64| {
            first_layers.iter().map(|layer| get(&rows[*layer])).collect()
        };
        let costs = table.seconds[&of.kind].iter().filter(|(key, _)| usable(key));
        Ok(Pool {
            kind: of.kind.clone(),
            nodes: of.count / node.devices_per_node,
            devices_per_node: node.devices_per_node,
            memory_bytes: node.memory_bytes,
            overhead_bytes: degrees.iter().map(|degree| OVERHEAD[usize::from(*degree > 1)]).collect(),
            // Tensor parallelism is in the layers' times already; only a node of two or more needs it.
            intra: node.intra.as_ref().map_or_else(|| Link::uniform(FREE), published),
            costs: costs
                .map(|((tensor_parallel, micro_batch), rows)| CostRow {
                    tensor_parallel: *tensor_parallel,
                    expert_parallel: 1,
                    micro_batch: *micro_batch,
                    forward_s: of_class(rows, |row| row.forward_s),
                    backward_s: of_class(rows, |row| row.backward_s),
                    update_s: of_class(rows, |row| row.update_s),
                })
                .collect(),
        })
    }

    fn between(&self, from: &DeviceCount, to: &DeviceCount) -> Result<Link> {
        let node = self.node(&from.kind)?;
        if from.kind == to.kind && from.count == node.devices_per_node {
            return Ok(node.intra.as_ref().map_or_else(|| Link::uniform(FREE), published));
        }
        // Some pairs were measured in one direction only.
        self.link(&from.kind, &to.kind).map(published).or_else(|error| {
            self.link(&to.kind, &from.kind).map(|link| published(&turned(link))).map_err(|_| error)
        })
    }
}

/// Where a link was not measured and is not used.
const FREE: Curve = Curve::AlphaBeta { latency_s: 0.0, bytes_per_s: 1e15 };

/// The link as the published figures use it: without the cap on its rate.
fn published(link: &Link) -> Link {
    let mut link = link.clone();
    for row in &mut link.rows {
        if let Curve::Polynomial { cap_bytes_per_s, .. } = &mut row.curve {
            *cap_bytes_per_s = f64::INFINITY;
        }
    }
    link
}

pub(crate) fn turned(link: &Link) -> Link {
    let turn = |row: &LinkRow| LinkRow { from: row.to, to: row.from, curve: row.curve };
    let mut rows: Vec<LinkRow> = link.rows.iter().map(turn).collect();
    rows.sort_by_key(|row| (row.from, row.to));
    Link { rows }
}

/// Layers that are alike in everything that these devices have measured of them, and the model as
/// runs of these.
fn classes(table: &ModelTable, devices: &[DeviceCount], degrees: &[u32]) -> (Vec<LayerClass>, Vec<Run>) {
    let alike = |a: usize, b: usize| {
        table.floats.values().all(|rows| rows[a] == rows[b])
            && devices.iter().all(|of| table.seconds[&of.kind].values().all(|rows| rows[a] == rows[b]))
    };
    let mut classes: Vec<LayerClass> = Vec::new();
    let mut examples: Vec<usize> = Vec::new();
    let mut runs: Vec<Run> = Vec::new();
    for layer in 0..table.num_layers as usize {
        let class = examples.iter().position(|example| alike(*example, layer)).unwrap_or_else(|| {
            examples.push(layer);
            classes.push(class(table, degrees, layer));
            classes.len() - 1
        });
        match runs.last_mut() {
            Some(run) if run.class == class => run.count += 1,
            _ => runs.push(Run { class, count: 1 }),
        }
    }
    (classes, runs)
}

fn class(table: &ModelTable, degrees: &[u32], layer: usize) -> LayerClass {
    let name = match layer {
        0 => "embedding".into(),
        _ if layer + 1 == table.num_layers as usize => "head".into(),
        _ => format!("block {layer}"),
    };
    let at = |degree: &u32| table.floats[degree][layer];
    let LayerFloats { parameters, output, .. } = at(&degrees[0]);
    let memory = |degree: &u32| {
        let floats = at(degree);
        LayerMemory {
            state_bytes: STATE * floats.parameters,
            optimizer_bytes: OPTIMIZER * floats.parameters,
            activation_bytes: ELEMENT * floats.kept,
            recompute_bytes: ELEMENT * floats.input.min(floats.output).min(floats.kept),
        }
    };
    LayerClass {
        name,
        gradient_bytes: ELEMENT * parameters,
        parameter_bytes: ELEMENT * parameters,
        output_bytes: ELEMENT * output,
        experts: None,
        memory: degrees.iter().map(memory).collect(),
    }
}

/// A layer of every class.
fn first_layers(runs: &[Run], num_classes: usize) -> Vec<usize> {
    let mut first = vec![usize::MAX; num_classes];
    let mut layer = 0;
    for run in runs {
        first[run.class] = first[run.class].min(layer);
        layer += run.count as usize;
    }
    first
}

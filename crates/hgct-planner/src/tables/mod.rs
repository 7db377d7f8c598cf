//! Tables that others have published: what layers take and need, what links move, and plans that
//! were really run.
//!
//! The form is that of the Sailor artifact (SOSP'25): `profiles.json` with a model's layers by kind,
//! micro-batch and tensor parallel degree, `network.json` with fitted link curves,
//! `measured_mixed.jsonl` and `measured_a100.csv` with measured plans. Nothing here reads a file: the
//! caller hands texts in, and names files for the errors.

use std::collections::{BTreeMap, BTreeSet};

use crate::Result;
use crate::instance::{Curve, Link, LinkRow};

mod cursor;
mod measured;
mod problem;
#[cfg(test)]
pub(crate) mod tests;

use cursor::Cursor;
pub use measured::{MeasuredLayers, MeasuredReplica, MeasuredStage, MeasuredTransformer};
pub use measured::{parse_measured_layers, parse_measured_transformers};
pub use problem::{DeviceCount, parse_device_counts};

/// More than this of anything in one file is not a table of layers.
const MOST: usize = 4096;

/// `profiles.json` and `network.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Tables {
    /// By name.
    pub models: BTreeMap<String, ModelTable>,
    /// Nodes, by kind.
    pub nodes: BTreeMap<String, NodeTable>,
    /// `inter[a][b]`: from a node of kind `a` to another node of kind `b`.
    pub inter: BTreeMap<String, BTreeMap<String, Link>>,
}

/// What is known of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelTable {
    /// Layers, embedding and head among them.
    pub num_layers: u32,
    /// Tokens a sample.
    pub seq_len: u32,
    /// Width between layers.
    pub hidden: u32,
    /// Entries of the vocabulary.
    pub vocab: u32,
    /// Seconds of every layer, by kind and then by (tensor parallel, micro-batch).
    pub seconds: BTreeMap<String, BTreeMap<(u32, u32), Vec<LayerSeconds>>>,
    /// Elements of every layer, by tensor parallel degree.
    pub floats: BTreeMap<u32, Vec<LayerFloats>>,
}

/// Seconds of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LayerSeconds {
    /// Forward of a micro-batch.
    pub forward_s: f64,
    /// Backward of a micro-batch.
    pub backward_s: f64,
    /// The optimizer's update. The published tables give one figure for all layers of a model, large
    /// and small.
    pub update_s: f64,
}

/// Elements of one layer on each device of a group, activations a sample.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LayerFloats {
    /// Parameters.
    pub parameters: f64,
    /// What it hands on.
    pub output: f64,
    /// What it is handed.
    pub input: f64,
    /// What it keeps for its backward.
    pub kept: f64,
}

/// Nodes of a kind.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeTable {
    /// Devices a node.
    pub devices_per_node: u32,
    /// Memory of a device.
    pub memory_bytes: f64,
    /// Links between devices of a node; `None` where not measured.
    pub intra: Option<Link>,
}

impl Tables {
    /// Parses both files; the names are only for errors.
    pub fn parse(profiles_file: &str, profiles: &str, network_file: &str, network: &str) -> Result<Self> {
        let (profiles, network) =
            (cursor::parse(profiles_file, profiles)?, cursor::parse(network_file, network)?);
        let models = Cursor::root(profiles_file, &profiles)
            .entries(MOST)?
            .into_iter()
            .map(|(name, at)| Ok((name.to_owned(), model(&at)?)))
            .collect::<Result<_>>()?;
        let network = Cursor::root(network_file, &network);
        Ok(Self { models, nodes: nodes(&network)?, inter: inter(&network)? })
    }

    /// A model by name.
    pub fn model(&self, name: &str) -> Result<&ModelTable> {
        self.models.get(name).ok_or_else(|| unknown("model", name, self.models.keys()))
    }

    /// Nodes of a kind.
    pub fn node(&self, kind: &str) -> Result<&NodeTable> {
        self.nodes.get(kind).ok_or_else(|| unknown("kind", kind, self.nodes.keys()))
    }

    /// The link from one node to another.
    pub fn link(&self, from: &str, to: &str) -> Result<&Link> {
        self.inter.get(from).and_then(|row| row.get(to)).ok_or_else(|| {
            crate::Error::Core(hgct_core::Error::Value {
                file: "network.json".into(),
                key: format!("inter_node.{from}.*.{to}"),
                found: "missing".into(),
                allowed: format!("there to use {from} and {to} in different nodes"),
            })
        })
    }
}

impl ModelTable {
    /// Seconds of every layer of a kind at a degree and a micro-batch.
    pub fn layers(&self, kind: &str, tensor_parallel: u32, micro_batch: u32) -> Result<&[LayerSeconds]> {
        let of_kind = self.seconds.get(kind).ok_or_else(|| unknown("kind", kind, self.seconds.keys()))?;
        of_kind.get(&(tensor_parallel, micro_batch)).map(Vec::as_slice).ok_or_else(|| {
            let known: BTreeSet<String> =
                of_kind.keys().map(|(t, b)| format!("tp {t} micro-batch {b}")).collect();
            unknown("row", &format!("{kind} tp {tensor_parallel} micro-batch {micro_batch}"), known.iter())
        })
    }

    /// Elements of every layer at a degree.
    pub fn floats(&self, tensor_parallel: u32) -> Result<&[LayerFloats]> {
        self.floats.get(&tensor_parallel).map(Vec::as_slice).ok_or_else(|| {
            let known: BTreeSet<String> = self.floats.keys().map(ToString::to_string).collect();
            unknown("tensor parallel degree", &tensor_parallel.to_string(), known.iter())
        })
    }
}

/// Something that the tables do not have.
fn unknown<'a>(what: &'static str, found: &str, known: impl Iterator<Item = &'a String>) -> crate::Error {
    let known: Vec<&str> = known.map(String::as_str).collect();
    let nearest = hgct_core::suggest::nearest(found, known.iter().copied())
        .map_or_else(String::new, |near| format!("; nearest: {near}"));
    crate::Error::Tables { what, found: found.into(), known: format!("{}{nearest}", known.join(", ")) }
}

fn model(at: &Cursor<'_>) -> Result<ModelTable> {
    let config = at.get("config")?;
    let optional = |key: &str| config.find(key).map_or(Ok(0), |row| row.count(0));
    let floats = at
        .get("layer_floats")?
        .numbered(1, 16)?
        .into_iter()
        .map(|(degree, row)| Ok((degree, layer_floats(&row)?)))
        .collect::<Result<BTreeMap<u32, Vec<LayerFloats>>>>()?;
    let Some(num_layers) = floats.values().next().map(Vec::len) else {
        return Err(at.get("layer_floats")?.error("no degree", "at least one"));
    };
    if floats.values().any(|rows| rows.len() != num_layers) {
        return Err(at.get("layer_floats")?.error("different numbers of layers", "one number of layers"));
    }
    let mut seconds = BTreeMap::new();
    for (kind, of_kind) in at.get("layer_seconds")?.entries(MOST)? {
        let mut rows = BTreeMap::new();
        for (micro_batch, of_batch) in of_kind.numbered(1, MOST)? {
            for (degree, of_degree) in of_batch.numbered(1, 64)? {
                let layers = layer_seconds(&of_degree)?;
                if layers.len() != num_layers {
                    return Err(
                        of_degree.error(format!("{} layers", layers.len()), format!("{num_layers} layers"))
                    );
                }
                // A block of zeros was not measured.
                if layers.iter().any(|row| row.forward_s > 0.0) {
                    rows.insert((degree, micro_batch), layers);
                }
            }
        }
        seconds.insert(kind.to_owned(), rows);
    }
    Ok(ModelTable {
        num_layers: num_layers as u32,
        seq_len: config.get("sequence_length")?.count(1)?,
        hidden: optional("hidden_size")?,
        vocab: optional("vocab_size")?,
        seconds,
        floats,
    })
}

/// Layers 0, 1, …, none missing.
fn layers<'a>(at: &Cursor<'a>) -> Result<Vec<Cursor<'a>>> {
    let rows = at.numbered(0, MOST)?;
    match rows.iter().zip(0..).find(|((layer, _), expected)| layer != expected) {
        Some(((layer, _), expected)) => {
            Err(at.error(format!("layer {layer} after {expected} layers"), "every layer from 0"))
        }
        None if rows.is_empty() => Err(at.error("no layer", "at least one")),
        None => Ok(rows.into_iter().map(|(_, row)| row).collect()),
    }
}

fn layer_seconds(at: &Cursor<'_>) -> Result<Vec<LayerSeconds>> {
    let row = |row: &Cursor<'_>| {
        let [forward_s, backward_s, update_s] = row.numbers::<3>()?;
        if forward_s.min(backward_s).min(update_s) < 0.0 {
            return Err(row.error("a negative time", "seconds"));
        }
        Ok(LayerSeconds { forward_s, backward_s, update_s })
    };
    layers(at)?.iter().map(row).collect()
}

fn layer_floats(at: &Cursor<'_>) -> Result<Vec<LayerFloats>> {
    let row = |row: &Cursor<'_>| {
        Ok(LayerFloats {
            parameters: row.get("params_floats")?.amount()?,
            output: row.get("act_output_floats")?.amount()?,
            input: row.get("act_input_floats")?.amount()?,
            kept: row.get("act_mem_floats")?.amount()?,
        })
    };
    layers(at)?.iter().map(row).collect()
}

fn nodes(network: &Cursor<'_>) -> Result<BTreeMap<String, NodeTable>> {
    let mut nodes = BTreeMap::new();
    for (kind, row) in network.get("nodes")?.entries(MOST)? {
        // The file also names the zone in which it was measured, as a text.
        if row.text().is_ok() {
            continue;
        }
        let intra = network.get("intra_node")?.find(kind).map(|row| intra(&row)).transpose()?;
        let memory_bytes = row.get("mem_per_gpu")?.amount()?;
        let devices_per_node = row.get("gpus_per_node")?.count(1)?;
        nodes.insert(kind.to_owned(), NodeTable { devices_per_node, memory_bytes, intra });
    }
    Ok(nodes)
}

fn intra(at: &Cursor<'_>) -> Result<Link> {
    let rows = at
        .numbered(1, 64)?
        .into_iter()
        .map(|(devices, row)| Ok(LinkRow { from: devices, to: devices, curve: curve(&row)? }))
        .collect::<Result<Vec<LinkRow>>>()?;
    if rows.is_empty() {
        return Err(at.error("no row", "at least one"));
    }
    Ok(Link { rows })
}

fn inter(network: &Cursor<'_>) -> Result<BTreeMap<String, BTreeMap<String, Link>>> {
    let mut links: BTreeMap<String, BTreeMap<String, Link>> = BTreeMap::new();
    for (from_kind, of_kind) in network.get("inter_node")?.entries(MOST)? {
        for (from, of_devices) in of_kind.numbered(1, 64)? {
            for (to_kind, of_peer) in of_devices.entries(MOST)? {
                for (to, row) in of_peer.numbered(1, 64)? {
                    let link = links.entry(from_kind.to_owned()).or_default().entry(to_kind.to_owned());
                    let row = LinkRow { from, to, curve: curve(&row)? };
                    link.or_insert_with(|| Link { rows: Vec::new() }).rows.push(row);
                }
            }
        }
    }
    Ok(links)
}

/// `[[a, b, c], cap]`.
fn curve(at: &Cursor<'_>) -> Result<Curve> {
    let items = at.items(2)?;
    let [coefficients, cap] = items.as_slice() else {
        return Err(at.error(format!("a list of {}", items.len()), "[[a, b, c], bytes a second]"));
    };
    let [a, b, c] = coefficients.numbers::<3>()?;
    let cap_bytes_per_s = cap.amount()?;
    if c <= 0.0 || cap_bytes_per_s <= 0.0 {
        return Err(at.error(format!("c = {c}, cap = {cap_bytes_per_s}"), "a positive rate at 1e6 bytes"));
    }
    Ok(Curve::Polynomial { a, b, c, smallest_bytes: smallest_bytes(a, b, c), cap_bytes_per_s })
}

/// Down to which size a fitted bandwidth means something: as long as it is positive and falls with
/// the size. The files do not say which sizes were measured.
fn smallest_bytes(a: f64, b: f64, c: f64) -> f64 {
    let rate = |bytes: f64| {
        let x = (bytes / 1e6).log2();
        a * x * x + b * x + c
    };
    let mut bytes = 1e6;
    // A twentieth of the rate at 1e6 bytes: a quadratic soon falls to nothing below that.
    while bytes > 1e3 && rate(bytes / 2.0) > c / 20.0 && rate(bytes / 2.0) <= rate(bytes) {
        bytes /= 2.0;
    }
    bytes
}

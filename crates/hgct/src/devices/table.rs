//! `hgct devices`: the answer for people and for programs.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use hgct_core::cluster::ClusterSpec;
use hgct_core::ids::NodeId;
use serde::Serialize;

use super::{Discovery, Options, discover};
use crate::output::print;
use crate::session::MOST_SECONDS;
use crate::workspace::write_atomically;
use crate::{grants, vendors};

/// Options of `hgct devices`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:\n  hgct devices\n  hgct devices --json | python3 -m json.tool\n  \
    hgct devices --output cluster.toml\n\nExit codes: 0 when there is a \
    device, 1 when there is none, 2 for a bad call, vendor file or table of environments.")]
pub(crate) struct Args {
    /// Print one JSON object: devices as `rows`, and `unusable`
    #[arg(long)]
    json: bool,
    /// Write a cluster document of these devices and their grants, for --cluster, to this file too
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// A folder of vendor files over the built-in ones
    #[arg(long, value_name = "DIR")]
    vendors: Option<PathBuf>,
    /// This node's name in device ids
    #[arg(long, default_value = "local")]
    name: NodeId,
    /// Ask every framework again, whatever is cached
    #[arg(long)]
    fresh: bool,
    /// Seconds that one framework may take to answer
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=MOST_SECONDS))]
    deadline: u64,
}

/// Runs `hgct devices` on the environments of `folder` (`.hgct`); the exit code.
pub(crate) fn run(folder: &Path, args: &Args) -> anyhow::Result<u8> {
    let mut options = Options::new(args.name.clone(), folder);
    options.vendors.clone_from(&args.vendors);
    options.deadline = Duration::from_secs(args.deadline);
    if args.fresh
        && let Some(cache) = &options.cache
    {
        match std::fs::remove_dir_all(cache) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("{} cannot be cleared", cache.display()));
            }
            _ => {}
        }
    }
    let mut discovery = discover(&options)?;
    let policy = grants::Policy::new(&vendors::load(args.vendors.as_deref())?);
    grants::assign(&mut discovery.node, &policy);
    let text = if args.json { json(&discovery) } else { text(&discovery) };
    if let Some(path) = &args.output {
        let nodes = vec![discovery.node.clone()];
        let cluster = ClusterSpec { format: ClusterSpec::FORMAT, nodes };
        cluster.validate("the discovered cluster")?;
        write_atomically(path, cluster.to_toml().as_bytes(), 0o644)?;
    }
    print(&text)?;
    Ok(u8::from(discovery.node.devices.is_empty()))
}

#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    device: &'a hgct_core::cluster::DeviceSpec,
    python: &'a str,
    verified: &'a str,
}

#[derive(Serialize)]
struct Document<'a> {
    node: &'a NodeId,
    cores: u32,
    memory_bytes: u64,
    rows: Vec<Row<'a>>,
    unusable: &'a [hgct_control::message::UnusableDevice],
}

pub(super) fn json(discovery: &Discovery) -> String {
    let rows = discovery.node.devices.iter().filter_map(|device| {
        let detail = discovery.details.get(&device.id)?;
        let (python, verified) = (detail.python.as_str(), detail.verified.as_str());
        Some(Row { device, python, verified })
    });
    hgct_core::canonical::encode(&Document {
        node: &discovery.node.name,
        cores: discovery.node.cores,
        memory_bytes: discovery.node.memory_bytes,
        rows: rows.collect(),
        unusable: &discovery.unusable,
    })
}

pub(super) fn text(discovery: &Discovery) -> String {
    let mut rows = vec![
        [
            "DEVICE",
            "KIND",
            "IDENTITY",
            "MEMORY",
            "DRIVER",
            "FRAMEWORK",
            "ENVIRONMENT",
            "HOST RESOURCE",
            "GRANT",
        ]
        .map(str::to_owned),
    ];
    for device in &discovery.node.devices {
        let detail = discovery.details.get(&device.id);
        let python = detail.map_or("", |detail| detail.python.as_str());
        let memory = if device.memory_bytes == 0 { "host's".to_owned() } else { gib(device.memory_bytes) };
        let grant = &device.grant;
        rows.push([
            device.id.to_string(),
            device.kind.to_string(),
            device.identity.clone(),
            memory,
            device.driver.clone().unwrap_or_else(|| "-".into()),
            format!("{} {}", device.engine, device.framework_version),
            if python.is_empty() {
                device.environment.to_string()
            } else {
                format!("{} (Python {python})", device.environment)
            },
            device.host_resource.clone(),
            format!("{:.3} cores, {}", f64::from(grant.cpu_millicores) / 1e3, gib(grant.memory_bytes)),
        ]);
    }
    let mut out = String::new();
    let widths: Vec<usize> = (0..rows[0].len())
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    for row in &rows {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let _ = writeln!(out, "{}", cells.join("  ").trim_end());
    }
    if discovery.node.devices.is_empty() {
        out.clear();
        out.push_str("no device can be used\n");
    }
    if !discovery.unusable.is_empty() {
        out.push_str("\nnot usable:\n");
    }
    for device in &discovery.unusable {
        let _ = writeln!(out, "  {} ({}): {}", device.name, device.kind, device.reason);
    }
    out
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
}

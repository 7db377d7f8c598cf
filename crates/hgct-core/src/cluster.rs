//! The cluster: nodes, devices and the grants that policy gives them.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::canonical::Hash;
use crate::ids::{DeviceId, EnvironmentId, Kind, NodeId};
use crate::{Error, Result};

/// `cluster.toml`: all nodes that may take part in a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterSpec {
    /// Version of this document's form.
    pub format: u32,
    /// The machines.
    #[serde(rename = "node")]
    pub nodes: Vec<NodeSpec>,
}

/// One machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSpec {
    /// Its name.
    pub name: NodeId,
    /// Logical cores that devices may share.
    pub cores: u32,
    /// Host memory that devices may share, bytes.
    pub memory_bytes: u64,
    /// How grants are held on this node.
    pub isolation: Isolation,
    /// Its devices.
    #[serde(rename = "device", default)]
    pub devices: Vec<DeviceSpec>,
}

/// How a node keeps devices to their grants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Isolation {
    /// By cgroups and affinity.
    Cgroup,
    /// By affinity and thread counts alone.
    Affinity,
    /// Not at all: kinds share the cores unrestrained.
    Unisolated,
}

/// One device: an accelerator, or a software stack on the CPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSpec {
    /// Stable id, `NODE/ENVIRONMENT:INDEX`.
    pub id: DeviceId,
    /// What makes it interchangeable with others.
    pub kind: Kind,
    /// The vendor file that recognised it.
    pub vendor: String,
    /// PCI address, UUID or processor model: what the device *is*, whatever drives it.
    pub identity: String,
    /// Engine that drives it: `torch`, `jax`, `paddle`, `mlx`, `burn`.
    pub engine: String,
    /// The framework's own device string.
    pub device_string: String,
    /// Environment in the agent's table.
    pub environment: EnvironmentId,
    /// Hash of that environment's record.
    pub environment_hash: Hash,
    /// Version of the framework.
    pub framework_version: String,
    /// Name or version of the driver beneath it, where something tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// Memory that is the device's own, bytes; 0 where it uses the host's.
    pub memory_bytes: u64,
    /// The host resource it lives on, such as `cpu`; devices of one node with the same resource
    /// share cores and memory.
    pub host_resource: String,
    /// Its part of the host.
    pub grant: Grant,
}

/// The part of a host that a device's worker may use. Written before profiling; a plan never
/// changes it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// CPU time, thousandths of a core.
    pub cpu_millicores: u32,
    /// Cores its threads may run on; empty: any.
    #[serde(default)]
    pub cores: Vec<u32>,
    /// Compute threads.
    pub threads: u32,
    /// Host memory, bytes.
    pub memory_bytes: u64,
}

impl ClusterSpec {
    /// The current form.
    pub const FORMAT: u32 = 1;

    /// Parses and validates a `cluster.toml`; `file` is only named in errors.
    pub fn from_toml(file: &str, text: &str) -> Result<Self> {
        let spec: Self = crate::suggest::parse_toml(file, text)?;
        spec.validate(file)?;
        Ok(spec)
    }

    /// Writes it as TOML.
    pub fn to_toml(&self) -> String {
        match toml::to_string_pretty(self) {
            Ok(text) => text,
            Err(error) => panic!("a cluster does not encode as TOML: {error}"),
        }
    }

    /// All devices with their nodes, in document order.
    pub fn devices(&self) -> impl Iterator<Item = (&NodeSpec, &DeviceSpec)> {
        self.nodes.iter().flat_map(|node| node.devices.iter().map(move |device| (node, device)))
    }

    /// Looks a device up.
    pub fn device(&self, id: &DeviceId) -> Option<(&NodeSpec, &DeviceSpec)> {
        self.devices().find(|(_, device)| device.id == *id)
    }

    /// Checks what types alone cannot: unique names, grants inside the host.
    pub fn validate(&self, file: &str) -> Result<()> {
        let bad = |key: String, found: String, allowed: String| {
            Err(Error::Value { file: file.into(), key, found, allowed })
        };
        if self.format != Self::FORMAT {
            return bad("format".into(), self.format.to_string(), Self::FORMAT.to_string());
        }
        let mut nodes = BTreeSet::new();
        let mut devices = BTreeSet::new();
        for node in &self.nodes {
            if !nodes.insert(&node.name) {
                return bad("node.name".into(), node.name.to_string(), "unique".into());
            }
            for device in &node.devices {
                let key = |field: &str| format!("node.device.{field} of {}", device.id);
                if !devices.insert(&device.id) {
                    return bad("node.device.id".into(), device.id.to_string(), "unique".into());
                }
                let grant = &device.grant;
                if grant.threads == 0 {
                    return bad(key("grant.threads"), "0".into(), "at least 1".into());
                }
                if grant.cpu_millicores == 0 || grant.cpu_millicores > node.cores * 1000 {
                    let allowed =
                        format!("from 1 to {} (the node has {} cores)", node.cores * 1000, node.cores);
                    return bad(key("grant.cpu_millicores"), grant.cpu_millicores.to_string(), allowed);
                }
                if let Some(core) = grant.cores.iter().find(|core| **core >= node.cores) {
                    return bad(key("grant.cores"), core.to_string(), format!("below {}", node.cores));
                }
            }
            let granted: u64 = node.devices.iter().map(|device| device.grant.memory_bytes).sum();
            if granted > node.memory_bytes {
                let allowed = format!("at most the node's memory_bytes = {}", node.memory_bytes);
                return bad(
                    format!("sum of grant.memory_bytes on {}", node.name),
                    granted.to_string(),
                    allowed,
                );
            }
        }
        Ok(())
    }
}

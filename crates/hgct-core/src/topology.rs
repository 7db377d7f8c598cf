//! A large cluster as the planner sees it: groups of like nodes, and the links between them.
//!
//! The other form of `cluster.toml`: [`crate::cluster::ClusterSpec`] lists every device that was
//! found and what it is granted; a topology says how many nodes of which accelerator there are, also
//! where none of them is at hand.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::accelerator::{Accelerator, Catalogue, Confidence};
use crate::suggest::nearest;
use crate::{Error, Result};

/// Latency of a small message, where the document gives none: between cards of a node, between nodes,
/// and between nodes through both hosts' memory.
const LATENCY_NS: [u64; 3] = [10_000, 20_000, 60_000];
/// Most devices of a cluster, so that a slip of the pen cannot ask for endless tables.
const MAX_DEVICES: u64 = 1 << 20;
/// Stands for every group that has no row of its own.
const ANY: &str = "*";

/// `cluster.toml` with groups of nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// Version of this document's form.
    pub format: u32,
    /// Like nodes.
    #[serde(rename = "group")]
    pub groups: Vec<NodeGroup>,
    /// What connects them.
    #[serde(rename = "link", default)]
    pub links: Vec<GroupLink>,
}

/// Like nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeGroup {
    /// Its name; its nodes are NAME-0, NAME-1 and so on.
    pub name: String,
    /// The accelerator, by its name in the catalogue.
    pub kind: String,
    /// How many nodes.
    pub nodes: u32,
    /// Accelerators a node.
    pub devices: u32,
    /// Memory of each accelerator, bytes; else the catalogue's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Rate between two accelerators of a node, one way, bytes a second; else the catalogue's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inside_bytes_per_s: Option<f64>,
    /// Latency between two accelerators of a node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inside_latency_ns: Option<u64>,
    /// Network ports a node.
    pub nics: u32,
    /// Rate of each, one way, bytes a second.
    pub nic_bytes_per_s: f64,
}

/// What connects the nodes of two groups, or of one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupLink {
    /// The two groups, in either order; `*` stands for every pair of unlike groups without a row.
    pub between: [String; 2],
    /// What one node sends at most over it, bytes a second; else all of its ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<f64>,
    /// Latency of a small message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_ns: Option<u64>,
    /// Which way the bytes go.
    #[serde(default)]
    pub path: LinkPath,
}

/// Which way bytes go between two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkPath {
    /// From accelerator to accelerator.
    #[default]
    Direct,
    /// Through the memory of both hosts, as between vendors whose libraries do not know each other.
    HostStaged,
}

/// A link with nothing left open: the rate of one node, and its latency.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Bytes a second, one way.
    pub bytes_per_s: f64,
    /// Latency of a small message.
    pub latency_ns: u64,
    /// Which way.
    pub path: LinkPath,
}

/// A group with its accelerator looked up.
#[derive(Debug, Clone, PartialEq)]
pub struct ResolvedGroup<'a> {
    /// As the document has it.
    pub group: &'a NodeGroup,
    /// Its accelerator.
    pub accelerator: &'a Accelerator,
    /// Memory of each accelerator.
    pub memory_bytes: u64,
    /// Between accelerators of a node.
    pub inside: Rate,
    /// The least confidence of the figures that stand for this group.
    pub confidence: Confidence,
}

impl NodeGroup {
    /// Accelerators in all.
    pub fn num_devices(&self) -> u64 {
        u64::from(self.nodes) * u64::from(self.devices)
    }

    /// What a node's ports carry together, one way.
    pub fn ports_bytes_per_s(&self) -> f64 {
        f64::from(self.nics) * self.nic_bytes_per_s
    }
}

impl Topology {
    /// The current form.
    pub const FORMAT: u32 = 1;

    /// Parses and validates a `cluster.toml` with groups; `file` is only named in errors.
    pub fn from_toml(file: &str, text: &str) -> Result<Self> {
        let topology: Self = crate::suggest::parse_toml(file, text)?;
        topology.validate(file)?;
        Ok(topology)
    }

    /// Writes it as TOML.
    pub fn to_toml(&self) -> String {
        match toml::to_string_pretty(self) {
            Ok(text) => text,
            Err(error) => panic!("a topology does not encode as TOML: {error}"),
        }
    }

    /// Accelerators in all.
    pub fn num_devices(&self) -> u64 {
        self.groups.iter().map(NodeGroup::num_devices).sum()
    }

    /// Looks the accelerators of all groups up.
    pub fn resolve<'a>(&'a self, file: &str, catalogue: &'a Catalogue) -> Result<Vec<ResolvedGroup<'a>>> {
        self.groups
            .iter()
            .map(|group| {
                let key = format!("group.kind of {}", group.name);
                let accelerator = catalogue.find(file, &key, &group.kind)?;
                let link = &accelerator.link_bytes_per_s;
                let inside = Rate {
                    bytes_per_s: group.inside_bytes_per_s.unwrap_or(link.reached.unwrap_or(link.value)),
                    latency_ns: group.inside_latency_ns.unwrap_or(LATENCY_NS[0]),
                    path: LinkPath::Direct,
                };
                let mut figures = vec![&accelerator.memory_bytes_per_s];
                figures.extend(accelerator.peak_flops_per_s.values());
                let confidence = figures.iter().map(|f| f.confidence).min().unwrap_or(Confidence::Estimate);
                Ok(ResolvedGroup {
                    group,
                    accelerator,
                    memory_bytes: group.memory_bytes.unwrap_or(accelerator.memory_bytes.whole()),
                    inside,
                    confidence,
                })
            })
            .collect()
    }

    /// What connects a node of group `a` and one of group `b`, by index; they may be the same group.
    /// Both nodes' ports bound it. `None` where nothing does: validation leaves that only inside a
    /// group of one node.
    pub fn link(&self, a: usize, b: usize) -> Option<Rate> {
        let (ga, gb) = (&self.groups[a], &self.groups[b]);
        let ports = ga.ports_bytes_per_s().min(gb.ports_bytes_per_s());
        match self.link_row(a, b) {
            Some(row) => Some(Rate {
                bytes_per_s: row.bytes_per_s.unwrap_or(ports).min(ports),
                latency_ns: row.latency_ns.unwrap_or(match row.path {
                    LinkPath::Direct => LATENCY_NS[1],
                    LinkPath::HostStaged => LATENCY_NS[2],
                }),
                path: row.path,
            }),
            None if a == b => {
                Some(Rate { bytes_per_s: ports, latency_ns: LATENCY_NS[1], path: LinkPath::Direct })
            }
            None => None,
        }
        .filter(|rate| rate.bytes_per_s > 0.0)
    }

    fn link_row(&self, a: usize, b: usize) -> Option<&GroupLink> {
        let (na, nb) = (&self.groups[a].name, &self.groups[b].name);
        let named = |row: &&GroupLink| {
            let [x, y] = &row.between;
            (x == na && y == nb) || (x == nb && y == na)
        };
        let any = |row: &&GroupLink| a != b && row.between == [ANY, ANY];
        self.links.iter().find(named).or_else(|| self.links.iter().find(any))
    }

    /// Checks what types alone cannot: counts, names, that every pair of groups is connected once and
    /// at a rate that its ports carry.
    pub fn validate(&self, file: &str) -> Result<()> {
        let bad = |key: String, found: String, allowed: String| {
            Err(Error::Value { file: file.into(), key, found, allowed })
        };
        if self.format != Self::FORMAT {
            return bad("format".into(), self.format.to_string(), Self::FORMAT.to_string());
        }
        if self.groups.is_empty() {
            return bad("group".into(), "empty".into(), "at least one [[group]]".into());
        }
        let mut names = BTreeSet::new();
        for group in &self.groups {
            if !names.insert(group.name.as_str()) {
                return bad("group.name".into(), format!("{:?} twice", group.name), "unique".into());
            }
            group.validate(file)?;
        }
        if self.num_devices() > MAX_DEVICES {
            let found = format!("{} in all", self.num_devices());
            return bad("group.nodes × group.devices".into(), found, format!("at most {MAX_DEVICES}"));
        }
        self.validate_links(file, &names)?;
        for a in 0..self.groups.len() {
            for b in a..self.groups.len() {
                let several = a != b || self.groups[a].nodes > 1;
                if several && self.link(a, b).is_none() {
                    let (na, nb) = (&self.groups[a].name, &self.groups[b].name);
                    return bad(
                        "link".into(),
                        format!("missing between {na} and {nb}"),
                        format!(
                            "there: add [[link]] between = [\"{na}\", \"{nb}\"] with its bytes_per_s, or one between = [\"*\", \"*\"] for all unlike groups"
                        ),
                    );
                }
            }
        }
        Ok(())
    }

    fn validate_links(&self, file: &str, names: &BTreeSet<&str>) -> Result<()> {
        let bad = |key: String, found: String, allowed: String| {
            Err(Error::Value { file: file.into(), key, found, allowed })
        };
        let mut seen: BTreeMap<[&str; 2], &GroupLink> = BTreeMap::new();
        for row in &self.links {
            let [x, y] = &row.between;
            let key = |field: &str| format!("link.{field} between {x} and {y}");
            let wild = row.between == [ANY, ANY];
            if let Some(unknown) = row.between.iter().find(|name| !wild && !names.contains(name.as_str())) {
                let near = nearest(unknown, names.iter().copied());
                let hint = near.map_or_else(String::new, |near| format!(" (did you mean `{near}`?)"));
                let known: Vec<&str> = names.iter().copied().collect();
                let allowed = format!("groups of this file: {}{hint}; or both \"*\"", known.join(", "));
                return bad("link.between".into(), format!("{unknown:?}"), allowed);
            }
            let mut pair = [x.as_str(), y.as_str()];
            pair.sort_unstable();
            if let Some(other) = seen.insert(pair, row) {
                let rate = |row: &GroupLink| {
                    row.bytes_per_s.map_or_else(|| "all ports".to_owned(), |rate| format!("{rate} bytes/s"))
                };
                let found = format!("there twice, with {} and {}", rate(other), rate(row));
                return bad(format!("link between {x} and {y}"), found, "there once".into());
            }
            if row.bytes_per_s.is_some_and(|rate| !(rate.is_finite() && rate > 0.0)) {
                let found = row.bytes_per_s.unwrap_or_default().to_string();
                return bad(key("bytes_per_s"), found, "a positive number".into());
            }
            let ports = |name: &str| {
                self.groups.iter().find(|group| group.name == name).map(NodeGroup::ports_bytes_per_s)
            };
            for name in [x, y] {
                if let (Some(rate), Some(ports)) = (row.bytes_per_s, ports(name))
                    && rate > ports * 1.001
                {
                    let allowed =
                        format!("at most {ports}: what the nics of a node of {name} carry together");
                    return bad(key("bytes_per_s"), rate.to_string(), allowed);
                }
            }
        }
        Ok(())
    }
}

impl NodeGroup {
    fn validate(&self, file: &str) -> Result<()> {
        let bad = |field: &str, found: String, allowed: &str| {
            Err(Error::Value {
                file: file.into(),
                key: format!("group.{field} of {}", self.name),
                found,
                allowed: allowed.into(),
            })
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if self.name.is_empty() || self.name.len() > 100 || !self.name.chars().all(plain) {
            return bad("name", format!("{:?}", self.name), "letters, digits, '-', '_' and '.'");
        }
        for (field, count) in [("nodes", self.nodes), ("devices", self.devices)] {
            if count == 0 {
                return bad(field, "0".into(), "at least 1; leave the group out if there is none");
            }
        }
        if self.memory_bytes.is_some_and(|bytes| bytes < 1 << 30) {
            let found = self.memory_bytes.unwrap_or_default().to_string();
            return bad("memory_bytes", found, "at least 1073741824 (bytes of one device)");
        }
        let rates = [
            ("inside_bytes_per_s", self.inside_bytes_per_s),
            ("nic_bytes_per_s", Some(self.nic_bytes_per_s)),
        ];
        for (field, rate) in rates {
            if let Some(rate) = rate.filter(|rate| !(rate.is_finite() && *rate > 0.0)) {
                return bad(field, rate.to_string(), "a positive number (bytes a second, one way)");
            }
        }
        if self.nics == 0 && self.nodes > 1 {
            return bad("nics", "0".into(), "at least 1 where there is more than one node");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

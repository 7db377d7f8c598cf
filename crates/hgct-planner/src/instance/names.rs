//! Names of an instance's devices: a kind, a node (`KIND-3`), a device (`KIND-3/0`).

use std::collections::BTreeSet;

use super::{Group, Instance, Pool};
use crate::{Error, Result};

/// What a name means: a whole pool, a node of it, or a device of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Named {
    /// Index into [`Instance::pools`].
    pub pool: usize,
    /// Node of the pool.
    pub node: Option<u32>,
    /// Device of the node.
    pub device: Option<u32>,
}

impl Named {
    /// Reads the name of what there is; `option` is only named in the error. A kind may end like a
    /// node: the name of a kind means the kind.
    pub fn read(instance: &Instance, option: &str, name: &str) -> Result<Self> {
        let pools = || instance.pools.iter().enumerate();
        let kind = pools().find(|(_, pool)| pool.kind == name);
        let whole = kind.map(|(pool, _)| Self { pool, node: None, device: None });
        whole
            .or_else(|| pools().find_map(|(pool, of)| Self::of_pool(pool, of, name)))
            .ok_or_else(|| unknown(instance, option, name))
    }

    fn of_pool(pool: usize, of: &Pool, name: &str) -> Option<Self> {
        let rest = name.strip_prefix(of.kind.as_str())?.strip_prefix('-')?;
        let (node, device) = match rest.split_once('/') {
            Some((node, device)) => (node, Some(number(device, of.devices_per_node)?)),
            None => (rest, None),
        };
        Some(Self { pool, node: Some(number(node, of.nodes)?), device })
    }

    /// Whether any of a group's devices is meant.
    pub fn meets(&self, group: &Group) -> bool {
        let devices = group.first_device..group.first_device + group.devices;
        self.pool == group.pool
            && self.node.is_none_or(|node| node == group.node)
            && self.device.is_none_or(|device| devices.contains(&device))
    }
}

/// The nodes of `--lose`, as pool and node.
pub fn lost_nodes(instance: &Instance, names: &[String]) -> Result<BTreeSet<(usize, u32)>> {
    let node = |name: &String| match Named::read(instance, "--lose", name)? {
        Named { pool, node: Some(node), device: None } => Ok((pool, node)),
        _ => Err(unknown(instance, "--lose", name)),
    };
    names.iter().map(node).collect()
}

fn unknown(instance: &Instance, option: &str, name: &str) -> Error {
    let range = |pool: &Pool| format!("{0}-0 to {0}-{1}", pool.kind, pool.nodes - 1);
    let known: Vec<String> = instance.pools.iter().filter(|pool| pool.nodes > 0).map(range).collect();
    bad(option, name, &format!("one of the nodes that there are: {}", known.join(", ")))
}

/// A name of the command line that means nothing here.
pub(crate) fn bad(option: &str, name: &str, allowed: &str) -> Error {
    Error::Core(hgct_core::Error::Value {
        file: "command line".into(),
        key: option.into(),
        found: name.into(),
        allowed: allowed.into(),
    })
}

fn number(text: &str, end: u32) -> Option<u32> {
    text.parse().ok().filter(|number| *number < end)
}

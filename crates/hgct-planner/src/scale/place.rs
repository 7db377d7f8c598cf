//! Which devices hold which stage, and what what-ifs change in that.

use std::collections::BTreeSet;

use super::WhatIf;
use crate::instance::{Instance, Layout};
use crate::{Error, Result};

/// A group of devices in one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Group {
    pub(super) pool: usize,
    pub(super) node: u32,
    /// First device in the node.
    pub(super) device: u32,
    pub(super) devices: u32,
}

/// One stage of one pipeline.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Unit {
    pub(super) template: usize,
    pub(super) stage: usize,
    /// Index into [`Places::pipelines`].
    pub(super) pipeline: usize,
    /// A group a replica.
    pub(super) groups: Vec<Group>,
    /// By what its slowest device takes longer.
    pub(super) factor: f64,
}

/// One pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PipelinePlace {
    /// Its template.
    pub(super) template: usize,
    /// Its first unit; the others follow.
    pub(super) first_unit: usize,
    /// Micro-batches that it takes.
    pub(super) num_micro_batches: u32,
    /// Plan-wide id of its first one.
    pub(super) first_micro_batch: u32,
}

/// All of them.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Places {
    pub(super) units: Vec<Unit>,
    pub(super) pipelines: Vec<PipelinePlace>,
}

impl Places {
    /// Hands out devices in the order of templates, pipelines, stages and replicas; a group is never
    /// divided between nodes.
    pub(super) fn new(instance: &Instance, layout: &Layout, what_if: &WhatIf) -> Result<Self> {
        let lost = lost_nodes(instance, &what_if.lose)?;
        for (name, factor) in &what_if.slow {
            if !(factor.is_finite() && *factor > 0.0 && *factor <= 1e6) {
                return Err(what_if_error("--slow", &format!("{name}={factor}"), "a factor above 0"));
            }
            if !devices_exist(instance, name) {
                return Err(unknown(instance, "--slow", name));
            }
        }
        let mut free = Free::new(instance);
        let mut places = Self { units: Vec::new(), pipelines: Vec::new() };
        for (index, template) in layout.templates.iter().enumerate() {
            for _ in 0..template.count {
                let pipeline = places.pipelines.len();
                let first_unit = places.units.len();
                for (stage, of) in template.stages.iter().enumerate() {
                    let mut groups = Vec::new();
                    for _ in 0..of.replicas {
                        groups.push(free.take(of.pool, of.tensor_parallel).ok_or_else(|| Error::Layout {
                            fault: format!(
                                "no node of {} has {} devices left for stage {stage} of template {index}",
                                instance.pools[of.pool].kind, of.tensor_parallel
                            ),
                        })?);
                    }
                    let factor =
                        groups.iter().map(|group| slowed(instance, *group, what_if)).fold(0.0, f64::max);
                    places.units.push(Unit { template: index, stage, pipeline, groups, factor });
                }
                places.pipelines.push(PipelinePlace {
                    template: index,
                    first_unit,
                    num_micro_batches: template.num_micro_batches,
                    first_micro_batch: 0,
                });
            }
        }
        if !lost.is_empty() {
            places.drop_pipelines_on(layout, &lost, what_if)?;
        }
        let mut next = 0;
        for pipeline in &mut places.pipelines {
            pipeline.first_micro_batch = next;
            next += pipeline.num_micro_batches;
        }
        Ok(places)
    }

    /// Drops the pipelines that a lost node has a part in; the rest take their samples, each next
    /// micro-batch to whoever has the fewest.
    fn drop_pipelines_on(
        &mut self,
        layout: &Layout,
        lost: &BTreeSet<(usize, u32)>,
        what_if: &WhatIf,
    ) -> Result<()> {
        let (units, pipelines) = (std::mem::take(&mut self.units), std::mem::take(&mut self.pipelines));
        let ends = pipelines.iter().skip(1).map(|p| p.first_unit).chain([units.len()]);
        let mut missing = 0u64;
        for (pipeline, end) in pipelines.iter().zip(ends) {
            let own = &units[pipeline.first_unit..end];
            let hit = own
                .iter()
                .flat_map(|unit| &unit.groups)
                .any(|group| lost.contains(&(group.pool, group.node)));
            let template = &layout.templates[pipeline.template];
            if hit {
                missing += template.num_samples();
                continue;
            }
            let at = self.pipelines.len();
            self.pipelines.push(PipelinePlace { first_unit: self.units.len(), ..*pipeline });
            self.units.extend(own.iter().map(|unit| Unit { pipeline: at, ..unit.clone() }));
        }
        if self.pipelines.is_empty() {
            return Err(what_if_error(
                "--lose",
                &what_if.lose.join(","),
                "nodes without which a pipeline is left: every one has a part there, so the plan has to be made anew",
            ));
        }
        while missing > 0 {
            let relative = |pipeline: &PipelinePlace| {
                let planned = layout.templates[pipeline.template].num_micro_batches;
                // Of alike pipelines the first; of unlike ones whoever has grown the least.
                u64::from(pipeline.num_micro_batches) * 1_000_000 / u64::from(planned.max(1))
            };
            let Some(least) = (0..self.pipelines.len()).min_by_key(|at| relative(&self.pipelines[*at]))
            else {
                break;
            };
            let pipeline = &mut self.pipelines[least];
            pipeline.num_micro_batches += 1;
            missing = missing.saturating_sub(u64::from(layout.templates[pipeline.template].micro_batch));
        }
        Ok(())
    }
}

/// Devices that nobody has yet.
struct Free {
    /// Per pool and node: devices taken.
    taken: Vec<Vec<u32>>,
    per_node: Vec<u32>,
    /// The first node that may have room, by pool and size of group.
    hint: Vec<std::collections::BTreeMap<u32, usize>>,
}

impl Free {
    fn new(instance: &Instance) -> Self {
        Self {
            taken: instance.pools.iter().map(|pool| vec![0; pool.nodes as usize]).collect(),
            per_node: instance.pools.iter().map(|pool| pool.devices_per_node).collect(),
            hint: vec![std::collections::BTreeMap::new(); instance.pools.len()],
        }
    }

    fn take(&mut self, pool: usize, devices: u32) -> Option<Group> {
        let hint = self.hint[pool].entry(devices).or_default();
        let nodes = &mut self.taken[pool];
        let node = (*hint..nodes.len()).find(|node| nodes[*node] + devices <= self.per_node[pool])?;
        *hint = node;
        let device = nodes[node];
        nodes[node] += devices;
        Some(Group { pool, node: node as u32, device, devices })
    }
}

/// By what a group's slowest device takes longer.
fn slowed(instance: &Instance, group: Group, what_if: &WhatIf) -> f64 {
    let kind = instance.pools[group.pool].kind.as_str();
    let mut factor = 1.0f64;
    for (name, by) in &what_if.slow {
        let Some(rest) = name.strip_prefix(kind) else { continue };
        let hit = match rest.strip_prefix('-').map(|rest| rest.split_once('/').unwrap_or((rest, ""))) {
            None => rest.is_empty(),
            Some((node, device)) => {
                node.parse() == Ok(group.node)
                    && (device.is_empty()
                        || device.parse::<u32>().is_ok_and(|device| {
                            (group.device..group.device + group.devices).contains(&device)
                        }))
            }
        };
        if hit {
            factor = factor.max(*by);
        }
    }
    factor
}

fn devices_exist(instance: &Instance, name: &str) -> bool {
    instance.pools.iter().any(|pool| {
        let Some(rest) = name.strip_prefix(pool.kind.as_str()) else { return false };
        match rest.strip_prefix('-').map(|rest| rest.split_once('/').unwrap_or((rest, "0"))) {
            None => rest.is_empty(),
            Some((node, device)) => {
                node.parse::<u32>().is_ok_and(|node| node < pool.nodes)
                    && device.parse::<u32>().is_ok_and(|device| device < pool.devices_per_node)
            }
        }
    })
}

fn lost_nodes(instance: &Instance, names: &[String]) -> Result<BTreeSet<(usize, u32)>> {
    let mut lost = BTreeSet::new();
    for name in names {
        let found = instance.pools.iter().enumerate().find_map(|(at, pool)| {
            let node = name.strip_prefix(pool.kind.as_str())?.strip_prefix('-')?.parse::<u32>().ok()?;
            (node < pool.nodes).then_some((at, node))
        });
        lost.insert(found.ok_or_else(|| unknown(instance, "--lose", name))?);
    }
    Ok(lost)
}

fn unknown(instance: &Instance, key: &str, name: &str) -> Error {
    let nodes: Vec<String> = instance
        .pools
        .iter()
        .map(|pool| format!("{0}-0 to {0}-{1}", pool.kind, pool.nodes.saturating_sub(1)))
        .collect();
    what_if_error(key, name, &format!("a name there is; nodes: {}", nodes.join(", ")))
}

fn what_if_error(key: &str, found: &str, allowed: &str) -> Error {
    Error::Core(hgct_core::Error::Value {
        file: "command line".into(),
        key: key.into(),
        found: found.into(),
        allowed: allowed.into(),
    })
}

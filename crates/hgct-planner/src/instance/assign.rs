//! Which devices each stage of a layout gets.

use serde::{Deserialize, Serialize};

use super::{Instance, Layout};

/// A group of devices of one node: a tensor-parallel group, or several that divide experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Index into [`Layout::templates`].
    pub template: usize,
    /// Which of the template's pipelines.
    pub pipeline: u32,
    /// Stage of the template.
    pub stage: usize,
    /// Replica of the stage inside of the pipeline.
    pub replica: u32,
    /// Index into [`Instance::pools`].
    pub pool: usize,
    /// Node of the pool.
    pub node: u32,
    /// First device of the node; the others follow.
    pub first_device: u32,
    /// Devices.
    pub devices: u32,
}

/// Hands devices out: of each pool the largest groups first, replicas of one stage beside each other
/// (as the hierarchical exchange is priced). `None` if they do not fit. Sorted by template, pipeline,
/// stage and replica.
pub fn assign(instance: &Instance, layout: &Layout) -> Option<Vec<Group>> {
    let mut all = Vec::new();
    for (pool, of) in instance.pools.iter().enumerate() {
        let mut groups = Vec::new();
        for (t, template) in layout.templates.iter().enumerate() {
            for (s, stage) in template.stages.iter().enumerate().filter(|(_, s)| s.pool == pool) {
                for pipeline in 0..template.count {
                    groups.extend((0..stage.replicas).map(|replica| Group {
                        template: t,
                        pipeline,
                        stage: s,
                        replica,
                        pool,
                        node: 0,
                        first_device: 0,
                        devices: stage.group_devices(),
                    }));
                }
            }
        }
        groups.sort_by_key(|g| (std::cmp::Reverse(g.devices), g.template, g.stage, g.pipeline, g.replica));
        let mut taken = vec![0u32; of.nodes as usize];
        let (mut node, mut devices) = (0, 0);
        for group in &mut groups {
            if group.devices != devices {
                (node, devices) = (0, group.devices);
            }
            while *taken.get(node)? + devices > of.devices_per_node {
                node += 1;
            }
            group.node = node as u32;
            group.first_device = taken[node];
            taken[node] += devices;
        }
        all.extend(groups);
    }
    all.sort_by_key(|g| (g.template, g.pipeline, g.stage, g.replica));
    Some(all)
}

//! Where a layout's groups go when devices hold something already, and what they must receive.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::instance::{Group, Held as HeldLayer, Instance, Layout, Stage, assign};

/// Devices of a group: pool, node, first device, how many.
type Spot = (usize, u32, u32, u32);

/// What devices that are left hold: of every group that has lost none of its devices.
pub(super) struct Held {
    groups: BTreeMap<Spot, Range<u32>>,
    /// Pipelines without a lost device: their stages, and where they stand.
    whole: Vec<(Vec<Stage>, Vec<Spot>)>,
    /// Part of a layer's optimizer state that a holder has, by layer.
    share: Vec<f64>,
}

/// Where a layout goes, and what that takes.
pub(super) struct Moves {
    pub(super) groups: Vec<Group>,
    /// Pipelines whose devices and layers stay as they are.
    pub(super) kept_pipelines: u64,
    /// State that devices must receive.
    pub(super) bytes: f64,
    /// Seconds that this takes, all nodes at once, each over its link.
    pub(super) seconds: f64,
}

fn spot(group: &Group) -> Spot {
    (group.pool, group.node, group.first_device, group.devices)
}

fn stage<'l>(layout: &'l Layout, group: &Group) -> &'l Stage {
    &layout.templates[group.template].stages[group.stage]
}

fn layers(stage: &Stage) -> Range<u32> {
    stage.first_layer..stage.end_layer
}

/// Groups of one pipeline, sorted as [`assign`] sorts.
fn pipelines(groups: &[Group]) -> impl Iterator<Item = &[Group]> {
    groups.chunk_by(|a, b| (a.template, a.pipeline) == (b.template, b.pipeline))
}

/// Part of each layer's optimizer state that one holder has.
fn shares(layout: &Layout, groups: &[Group], num_layers: u32) -> Vec<f64> {
    let mut holders = vec![0.0; num_layers as usize];
    for group in groups {
        layers(stage(layout, group)).for_each(|layer| holders[layer as usize] += 1.0);
    }
    holders.iter().map(|num| if layout.shard_optimizer { 1.0 / num } else { 1.0 }).collect()
}

impl Held {
    /// What is left of a layout on these groups without `lost` nodes; the nodes that are left are
    /// numbered from 0 again.
    pub(super) fn new(
        instance: &Instance,
        layout: &Layout,
        groups: &[Group],
        lost: &BTreeSet<(usize, u32)>,
    ) -> Self {
        let left = |group: &Group| !lost.contains(&(group.pool, group.node));
        let renumbered = |group: &Group| {
            let before = lost.range((group.pool, 0)..(group.pool, group.node)).count() as u32;
            spot(&Group { node: group.node - before, ..*group })
        };
        let held = groups.iter().filter(|group| left(group));
        let whole = pipelines(groups).filter(|of| of.iter().all(left)).map(|of| {
            let stages = layout.templates[of[0].template].stages.clone();
            (stages, of.iter().map(renumbered).collect())
        });
        Self {
            groups: held.map(|group| (renumbered(group), layers(stage(layout, group)))).collect(),
            whole: whole.collect(),
            share: shares(layout, groups, instance.num_layers()),
        }
    }

    /// Places a layout so that as much as can be stays where it is; `None` if its groups do not fit.
    pub(super) fn place(&self, left: &Instance, layout: &Layout) -> Option<Moves> {
        let plain = assign(left, layout)?;
        // What is held may lie so that the rest does not fit between.
        let groups = self.around(left, layout, &plain).unwrap_or(plain);
        let (bytes, seconds) = self.received(left, layout, &groups);
        Some(Moves { kept_pipelines: self.kept(layout, &groups), bytes, seconds, groups })
    }

    /// Whole pipelines where they are; then groups where the same layers are; then the rest, the largest
    /// first, into the first node with room.
    fn around(&self, left: &Instance, layout: &Layout, plain: &[Group]) -> Option<Vec<Group>> {
        let mut taken: Vec<Vec<Vec<bool>>> = left
            .pools
            .iter()
            .map(|pool| vec![vec![false; pool.devices_per_node as usize]; pool.nodes as usize])
            .collect();
        let mut groups = plain.to_vec();
        let mut placed = vec![false; groups.len()];
        let mut whole: Vec<&(Vec<Stage>, Vec<Spot>)> = self.whole.iter().collect();
        let mut at = 0;
        for of in pipelines(plain) {
            let stages = &layout.templates[of[0].template].stages;
            if let Some(same) = whole.iter().position(|(known, _)| known == stages) {
                for (index, spot) in whole.remove(same).1.iter().enumerate() {
                    put(&mut groups[at + index], *spot, &mut taken);
                    placed[at + index] = true;
                }
            }
            at += of.len();
        }
        let mut spots: BTreeMap<(usize, u32, u32, u32), Vec<Spot>> = BTreeMap::new();
        for (spot, of) in self.groups.iter().rev().filter(|(spot, _)| is_free(spot, &taken)) {
            spots.entry((spot.0, spot.3, of.start, of.end)).or_default().push(*spot);
        }
        let mut rest: Vec<usize> = (0..groups.len()).filter(|at| !placed[*at]).collect();
        rest.retain(|at| {
            let group = &mut groups[*at];
            let of = layers(stage(layout, group));
            let found = spots.get_mut(&(group.pool, group.devices, of.start, of.end)).and_then(Vec::pop);
            found.inspect(|spot| put(group, *spot, &mut taken)).is_none()
        });
        rest.sort_by_key(|at| (std::cmp::Reverse(groups[*at].devices), *at));
        for at in rest {
            let group = &mut groups[at];
            let pool = &left.pools[group.pool];
            let starts = (0..pool.devices_per_node).step_by(group.devices as usize);
            let mut all = (0..pool.nodes).flat_map(|node| starts.clone().map(move |first| (node, first)));
            let of = |(node, first)| (group.pool, node, first, group.devices);
            let free = all.find(|at| is_free(&of(*at), &taken)).map(of)?;
            put(group, free, &mut taken);
        }
        Some(groups)
    }

    /// Pipelines of `groups` that stand where one with the same stages stood.
    fn kept(&self, layout: &Layout, groups: &[Group]) -> u64 {
        let known: BTreeSet<(&[Stage], &[Spot])> =
            self.whole.iter().map(|(stages, spots)| (&stages[..], &spots[..])).collect();
        let same = |of: &&[Group]| {
            let spots: Vec<Spot> = of.iter().map(spot).collect();
            known.contains(&(&layout.templates[of[0].template].stages[..], &spots[..]))
        };
        pipelines(groups).filter(same).count() as u64
    }

    /// Bytes that all devices receive, and the seconds of the slowest node. A device keeps a layer that
    /// it held in the same part of a group of as many devices, and its part of the optimizer state; parts
    /// are cut anew so that nobody gives one away who needs it.
    fn received(&self, left: &Instance, layout: &Layout, groups: &[Group]) -> (f64, f64) {
        let classes = left.layer_classes();
        let shares = shares(layout, groups, left.num_layers());
        let mut nodes: BTreeMap<(usize, u32), f64> = BTreeMap::new();
        for group in groups {
            let stage = stage(layout, group);
            let Some(degree) = left.degree_index(stage.tensor_parallel) else { continue };
            let held = self.groups.get(&spot(group));
            let each: f64 = layers(stage)
                .map(|layer| {
                    let of = HeldLayer::new(left, classes[layer as usize], degree, stage.parts());
                    let optimizer_bytes = of.dense_optimizer_bytes + of.expert_optimizer_bytes;
                    let (share, before) = (shares[layer as usize], self.share[layer as usize]);
                    if held.is_some_and(|held| held.contains(&layer)) {
                        optimizer_bytes * (share - before).max(0.0)
                    } else {
                        of.state_bytes + optimizer_bytes * share
                    }
                })
                .sum();
            *nodes.entry((group.pool, group.node)).or_default() += each * f64::from(group.devices);
        }
        let seconds = nodes.iter().map(|((pool, _), bytes)| {
            let devices = left.pools[*pool].devices_per_node;
            left.inter[*pool][*pool].seconds(devices, devices, *bytes)
        });
        (nodes.values().sum(), seconds.fold(0.0, f64::max))
    }
}

fn is_free((pool, node, first, devices): &Spot, taken: &[Vec<Vec<bool>>]) -> bool {
    let of_node = &taken[*pool][*node as usize];
    let devices = of_node.get(*first as usize..(*first + *devices) as usize);
    devices.is_some_and(|devices| devices.iter().all(|taken| !taken))
}

fn put(group: &mut Group, spot: Spot, taken: &mut [Vec<Vec<bool>>]) {
    let (pool, node, first, devices) = spot;
    taken[pool][node as usize][first as usize..(first + devices) as usize].fill(true);
    (group.node, group.first_device) = (node, first);
}

//! Going on after a loss.

use std::collections::{BTreeMap, BTreeSet};

use hgct_planner::instance::{Exchange, Group, Instance, Layout, Rules, assign, check, check_groups};
use hgct_planner::wide::{Effort, Found, find, replan};

use crate::cases::{Size, instance};

const EFFORT: Effort<'_> = Effort { nodes: 2_000_000, stop: None };

/// Two pools of several nodes each, with memory for everything.
fn large(seed: u64) -> Option<Instance> {
    let size = Size { pools: 2, devices: 4, layers: 4, batch: 8, tensor_parallel: true };
    let mut instance = instance(seed, size);
    instance.rules = Rules { exchange: Exchange::Hierarchical, ..Rules::published() };
    instance.global_batch = 24;
    for pool in &mut instance.pools {
        pool.nodes += 1;
        pool.memory_bytes = 1e5;
    }
    (instance.pools.len() == 2).then_some(instance)
}

#[test]
fn a_pool_that_lost_its_last_node_is_not_used() {
    let mut tried = 0;
    for seed in 0..40 {
        let Some(mut instance) = large(seed) else { continue };
        instance.pools[0].nodes = 1;
        let found = find(&instance, None, &EFFORT).unwrap();
        let (parent, _) = found.best.unwrap();
        let replanned = replan(&instance, &parent, None, &[(0, 0)], 100, &EFFORT).unwrap();
        assert_eq!(replanned.instance.pools[0].nodes, 0);
        assert!(!replanned.ways.is_empty(), "seed {seed}");
        for way in &replanned.ways {
            assert_eq!(way.layout.devices_used(2)[0], 0, "seed {seed}: {way:?}");
            assert_eq!(check(&replanned.instance, &way.layout), vec![]);
        }
        // What the other pool can do alone, no more and no less.
        let mut alone = instance.clone();
        alone.pools.remove(0);
        alone.inter = vec![vec![alone.inter[1][1].clone()]];
        let alone = find(&alone, None, &EFFORT).unwrap();
        let left = find(&replanned.instance, None, &EFFORT).unwrap();
        let ratio = alone.bound.compute_s / left.bound.compute_s;
        assert!((ratio - 1.0).abs() < 1e-6, "seed {seed}: {:?}", left.bound);
        let seconds = |found: &Found| found.best.as_ref().unwrap().1.iteration_s;
        if alone.gap.unwrap() < 1e-9 && left.gap.unwrap() < 1e-9 {
            assert!((seconds(&alone) / seconds(&left) - 1.0).abs() < 1e-9, "seed {seed}");
            tried += 1;
        }
    }
    assert!(tried > 10);
}

#[test]
fn without_a_loss_the_parent_stays_as_it_is() {
    for seed in 0..20 {
        let Some(instance) = large(seed) else { continue };
        let (parent, priced) = find(&instance, None, &EFFORT).unwrap().best.unwrap();
        let replanned = replan(&instance, &parent, None, &[], 100, &EFFORT).unwrap();
        let [way] = &replanned.ways[..] else { panic!("seed {seed}: {:?}", replanned.ways) };
        assert_eq!((&way.layout, &way.priced, &replanned.instance), (&parent, &priced, &instance));
        assert_eq!(way.groups, assign(&instance, &parent).unwrap());
        assert_eq!((way.moved_bytes, way.moved_s), (0.0, 0.0));
        assert_eq!(way.kept_pipelines, parent.num_pipelines());
    }
}

#[test]
fn a_plan_moves_as_it_is_where_devices_are_spare() {
    let mut moved = 0;
    for seed in 0..40 {
        let Some(instance) = large(seed) else { continue };
        let mut smaller = instance.clone();
        smaller.pools[0].nodes -= 1;
        let (parent, priced) = find(&smaller, None, &EFFORT).unwrap().best.unwrap();
        let groups = assign(&smaller, &parent).unwrap();
        let on_lost = |group: &&Group| (group.pool, group.node) == (0, 0);
        let hit: BTreeSet<_> = groups.iter().filter(on_lost).map(|g| (g.template, g.pipeline)).collect();
        let replanned = replan(&instance, &parent, Some(&groups), &[(0, 0)], 100, &EFFORT).unwrap();
        let name = if hit.is_empty() { "keep" } else { "move" };
        let way = replanned.ways.iter().find(|way| way.name == name).unwrap();
        assert_eq!((&way.layout, &way.priced), (&parent, &priced), "seed {seed}");
        assert_eq!(way.kept_pipelines, parent.num_pipelines() - hit.len() as u64, "seed {seed}");
        assert_eq!(way.moved_bytes > 0.0, !hit.is_empty(), "seed {seed}");
        let bound_s = replanned.anew.unwrap().proven_s;
        assert!(replanned.ways.iter().all(|way| bound_s <= way.priced.iteration_s * (1.0 + 1e-9)));
        moved += u32::from(!hit.is_empty());
    }
    assert!(moved > 10, "{moved}");
}

/// What every device holds: layer → (degree, which part of the layer).
type Holdings = BTreeMap<(usize, u32, u32), BTreeMap<u32, (u32, u32)>>;

fn holdings(layout: &Layout, groups: &[Group]) -> Holdings {
    let mut all = Holdings::new();
    for group in groups {
        let stage = &layout.templates[group.template].stages[group.stage];
        for part in 0..group.devices {
            let device = all.entry((group.pool, group.node, group.first_device + part)).or_default();
            for layer in stage.first_layer..stage.end_layer {
                assert!(device.insert(layer, (group.devices, part)).is_none(), "a device twice");
            }
        }
    }
    all
}

/// Device by device and layer by layer, what was not there before.
fn bytes_by_hand(instance: &Instance, before: &Holdings, after: &Holdings, shard: bool) -> f64 {
    let classes = instance.layer_classes();
    let holders = |of: &Holdings, layer: u32| {
        let parts =
            of.values().filter_map(|layers| layers.get(&layer)).map(|(degree, _)| 1.0 / f64::from(*degree));
        if shard { parts.sum() } else { 1.0 }
    };
    let mut bytes = 0.0;
    for (device, layers) in after {
        for (layer, (degree, part)) in layers {
            let memory =
                &instance.classes[classes[*layer as usize]].memory[instance.degree_index(*degree).unwrap()];
            let mut optimizer = memory.optimizer_bytes / holders(after, *layer);
            let held = before.get(device).and_then(|layers| layers.get(layer)) == Some(&(*degree, *part));
            if held {
                optimizer -= memory.optimizer_bytes / holders(before, *layer);
            } else {
                bytes += memory.state_bytes;
            }
            bytes += optimizer.max(0.0);
        }
    }
    bytes
}

#[test]
fn what_is_moved_is_counted_as_by_hand_and_what_stays_stays() {
    let (mut ways, mut moving) = (0, 0);
    for seed in 0..80 {
        let Some(mut instance) = large(seed) else { continue };
        instance.rules.shard_optimizer = seed % 2 == 0;
        let (parent, _) = find(&instance, None, &EFFORT).unwrap().best.unwrap();
        let groups = assign(&instance, &parent).unwrap();
        let lost = (0, seed as u32 % instance.pools[0].nodes);
        let replanned = replan(&instance, &parent, None, &[lost], 10, &EFFORT).unwrap();
        // Before the loss all holders divide optimizer state; after it the lost node's parts are gone.
        let whole = holdings(&parent, &groups);
        let renumber = |(pool, node, device): (usize, u32, u32)| {
            (pool, node - u32::from(pool == lost.0 && node > lost.1), device)
        };
        for way in &replanned.ways {
            assert_eq!(check_groups(&replanned.instance, &way.layout, &way.groups), None, "seed {seed}");
            let after = holdings(&way.layout, &way.groups);
            // Devices that are gone hold their parts somewhere where nobody is.
            let before: Holdings = whole
                .iter()
                .map(|((pool, node, device), layers)| {
                    let gone = (*pool, *node) == lost;
                    (
                        if gone { (9, *node, *device) } else { renumber((*pool, *node, *device)) },
                        layers.clone(),
                    )
                })
                .collect();
            let by_hand = bytes_by_hand(&instance, &before, &after, instance.rules.shard_optimizer);
            assert!(
                (way.moved_bytes - by_hand).abs() <= 1e-9 * by_hand.max(1.0),
                "seed {seed}, {}: {} and by hand {by_hand}",
                way.name,
                way.moved_bytes
            );
            assert!((way.moved_s > 0.0) == (way.moved_bytes > 0.0), "seed {seed}");
            if way.name == "keep" {
                assert_eq!(way.kept_pipelines, way.layout.num_pipelines(), "seed {seed}");
                assert!(instance.rules.shard_optimizer || way.moved_bytes == 0.0, "seed {seed}");
            }
            ways += 1;
            moving += u32::from(way.moved_bytes > 0.0);
        }
        let best = replanned.ways.iter().map(|way| way.total_s).fold(f64::INFINITY, f64::min);
        assert!(replanned.ways.first().is_none_or(|way| way.total_s <= best));
    }
    assert!(ways > 60 && moving > 30, "{ways} {moving}");
}

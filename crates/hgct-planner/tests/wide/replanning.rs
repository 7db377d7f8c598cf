//! Going on after a loss.

use hgct_planner::instance::{Exchange, Instance, Rules, check};
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
        let replanned = replan(&instance, &parent, &[(0, 0)], 100, &EFFORT).unwrap();
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

//! What one more of something brings, against the problem that has it.

use hgct_planner::answer::{Answer, Basis, Expected, ModelFacts, why};
use hgct_planner::instance::Instance;
use hgct_planner::wide::{Bound, Effort, Found, find};

use crate::cases::{Size, instance};

const SMALL: Size = Size { pools: 2, devices: 3, layers: 4, batch: 6, tensor_parallel: true };
const EFFORT: Effort<'_> = Effort { nodes: 3_000_000, stop: None };

fn searched(instance: &Instance) -> Found {
    find(instance, None, &EFFORT).unwrap()
}

/// The bound, with hardly a search.
fn bound(instance: &Instance) -> Bound {
    find(instance, None, &Effort { nodes: 1000, stop: None }).unwrap().bound
}

fn rate(instance: &Instance) -> Option<f64> {
    searched(instance).best.map(|(_, priced)| 1.0 / priced.iteration_s)
}

/// The compute bound's rate is concave in devices, and the prices are its slope: so the gain of a node
/// lies between the price after it and the price before it.
#[test]
fn the_price_of_a_device_is_what_it_does_to_the_compute_bound() {
    let mut compared = 0;
    for seed in 0..200 {
        let before = instance(seed, Size { devices: 6, ..SMALL });
        let before_it = bound(&before);
        if !before_it.compute_s.is_finite() {
            continue;
        }
        for pool in 0..before.pools.len() {
            let mut after = before.clone();
            after.pools[pool].nodes += 1;
            let more = bound(&after);
            let devices = f64::from(before.pools[pool].devices_per_node);
            let gain = before_it.compute_s / more.compute_s;
            assert!(
                gain <= 1.0 + before_it.prices[pool] * devices + 1e-6,
                "seed {seed}: {gain} {before_it:?}"
            );
            assert!(gain * (1.0 - more.prices[pool] * devices) >= 1.0 - 1e-6, "seed {seed}: {gain} {more:?}");
            compared += 1;
        }
    }
    assert!(compared > 200, "{compared}");
}

#[test]
fn what_a_node_memory_or_bandwidth_brings_is_what_a_search_with_it_finds() {
    let (mut compared, mut gains) = (0, 0);
    for seed in 500..540 {
        let instance = instance(seed, SMALL);
        let found = searched(&instance);
        let Some((layout, priced)) = found.best else { continue };
        let own = 1.0 / priced.iteration_s;
        let answer = Answer {
            format: Answer::FORMAT,
            parent: None,
            basis: Basis::Tables,
            model: ModelFacts {
                family: "x".into(),
                parameters: 1,
                active_parameters: 1,
                train_flops: 0.0,
                tied_embeddings: None,
            },
            peaks: vec![],
            confidence: vec![],
            instance: instance.clone(),
            ends: None,
            layout,
            groups: None,
            prediction: Expected {
                iteration_s: priced.iteration_s,
                slow_s: None,
                fast_s: None,
                bound_s: Some(found.proven_s),
                prices: found.bound.prices,
                limited_by: found.limited_by,
                finished: found.finished,
            },
            plan: None,
        };
        let shadows = why(&answer, &[], Some(&mut |changed: &Instance| Ok(rate(changed)))).shadow_prices;
        assert_eq!(shadows.len(), instance.pools.len() + 2);
        for (pool, shadow) in shadows.iter().take(instance.pools.len()).enumerate() {
            let mut more = instance.clone();
            more.pools[pool].nodes += 1;
            let devices = f64::from(more.pools[pool].devices_per_node);
            let gain = rate(&more).map_or(0.0, |rate| (rate - own).max(0.0) / devices);
            assert!((shadow.gain - gain).abs() <= 1e-9 * own, "seed {seed}: {shadow:?}, {gain} by hand");
            assert!((shadow.gain_part * own - shadow.gain).abs() <= 1e-9 * own);
            gains += u32::from(gain > 0.0);
        }
        let mut roomy = instance.clone();
        roomy.pools.iter_mut().for_each(|pool| pool.memory_bytes *= 1.1);
        let memory = &shadows[instance.pools.len()];
        let gain = rate(&roomy).map_or(0.0, |rate| (rate - own).max(0.0));
        assert!((memory.gain - gain).abs() <= 1e-9 * own, "seed {seed}: {memory:?}, {gain} by hand");
        compared += 1;
    }
    assert!(compared > 15 && gains > 10, "{compared} {gains}");
}

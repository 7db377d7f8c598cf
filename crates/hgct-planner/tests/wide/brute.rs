//! Every layout of a small instance, priced by a second pricer that shares nothing with the first but
//! the types.

use hgct_planner::instance::{Curve, Exchange, Instance, Layout, Link, Stage, Transfer, check, price};
use hgct_planner::wide::{Effort, find};

use crate::cases::{Size, instance};

fn seconds(link: &Link, from: u32, to: u32, bytes: f64) -> f64 {
    let mut best: Option<(u32, u32, Curve)> = None;
    for row in &link.rows {
        let inside = row.from <= from && row.to <= to;
        if inside && best.is_none_or(|(a, b, _)| (row.from, row.to) > (a, b)) {
            best = Some((row.from, row.to, row.curve));
        }
    }
    let curve = best.map_or(link.rows[0].curve, |(_, _, curve)| curve);
    match curve {
        Curve::AlphaBeta { latency_s, bytes_per_s } if bytes > 0.0 => latency_s + bytes / bytes_per_s,
        Curve::AlphaBeta { .. } => 0.0,
        Curve::Polynomial { .. } => panic!("not in these cases"),
    }
}

/// A pipeline as (micro-batch, stages).
type Pipe = (u32, Vec<Stage>);

/// Compute and transfer of each stage, for one micro-batch, and memory.
fn stages(instance: &Instance, (micro_batch, stages): &Pipe) -> Vec<(f64, f64, bool)> {
    let classes: Vec<usize> =
        instance.runs.iter().flat_map(|run| vec![run.class; run.count as usize]).collect();
    let k = stages.len();
    let b = f64::from(*micro_batch);
    let per_node = |s: &Stage| s.tensor_parallel.min(instance.pools[s.pool].devices_per_node);
    (0..k)
        .map(|i| {
            let s = &stages[i];
            let pool = &instance.pools[s.pool];
            let row = pool
                .costs
                .iter()
                .find(|r| r.tensor_parallel == s.tensor_parallel && r.micro_batch == *micro_batch)
                .unwrap();
            let degree = instance.degrees.iter().position(|d| *d == s.tensor_parallel).unwrap();
            let (mut compute, mut bytes, mut working) = (0.0, pool.overhead_bytes[degree], 0.0f64);
            for layer in s.first_layer..s.end_layer {
                let class = classes[layer as usize];
                let memory = instance.classes[class].memory[degree];
                compute += row.backward_s[class] + row.forward_s[class] * if s.recompute { 2.0 } else { 1.0 };
                let kept = if s.recompute { memory.recompute_bytes } else { memory.activation_bytes };
                bytes += memory.state_bytes + memory.optimizer_bytes + (k - i) as f64 * b * kept;
                if s.recompute {
                    working = working.max(b * memory.activation_bytes);
                }
            }
            let mut transfer = 0.0;
            if i + 1 < k {
                let out = instance.classes[classes[s.end_layer as usize - 1]].output_bytes * b;
                let t = &stages[i + 1];
                let once = seconds(&instance.inter[s.pool][t.pool], per_node(s), per_node(t), out);
                let twice = instance.rules.transfer == Transfer::Published && i == 0 && k > 3;
                transfer += if twice { 2.0 * once } else { once };
            }
            if i > 0 {
                let back = instance.classes[classes[s.first_layer as usize - 1]].output_bytes * b;
                let t = &stages[i - 1];
                let once = seconds(&instance.inter[s.pool][t.pool], per_node(s), per_node(t), back);
                let twice = instance.rules.transfer == Transfer::Published && i + 1 == k;
                transfer += if twice { 2.0 * once } else { once };
            }
            (compute, transfer, bytes + working <= pool.memory_bytes)
        })
        .collect()
}

fn pipeline_s(instance: &Instance, pipe: &Pipe, micro_batches: u32) -> f64 {
    let rows = stages(instance, pipe);
    let sum: f64 = rows.iter().map(|(c, t, _)| c + t).sum();
    let pace = rows.iter().map(|(c, t, _)| match instance.rules.transfer {
        Transfer::Overlapped => c.max(*t),
        _ => c + t,
    });
    sum + f64::from(micro_batches - 1) * pace.fold(0.0, f64::max)
}

/// The largest exchange of any device, by walking over layers.
fn exchange_s(instance: &Instance, pipes: &[Pipe]) -> f64 {
    let Exchange::FlatRing { bucket_bytes } = instance.rules.exchange else { panic!("not in these cases") };
    let classes: Vec<usize> =
        instance.runs.iter().flat_map(|run| vec![run.class; run.count as usize]).collect();
    let holder = |pipe: &Pipe, layer: u32| pipe.1.iter().position(|s| s.end_layer > layer).unwrap();
    let n = pipes.len() as f64;
    if pipes.len() < 2 {
        return 0.0;
    }
    let mut paid: Vec<Vec<f64>> = pipes.iter().map(|p| vec![0.0; p.1.len()]).collect();
    let mut layer = 0u32;
    while (layer as usize) < classes.len() {
        let group: Vec<usize> = pipes.iter().map(|p| holder(p, layer)).collect();
        let mut bytes = 0.0;
        while (layer as usize) < classes.len()
            && pipes.iter().zip(&group).all(|(p, at)| holder(p, layer) == *at)
        {
            bytes += instance.classes[classes[layer as usize]].gradient_bytes;
            layer += 1;
        }
        let owners: Vec<&Stage> = pipes.iter().zip(&group).map(|(p, at)| &p.1[*at]).collect();
        bytes /= f64::from(owners.iter().map(|s| s.tensor_parallel).min().unwrap());
        let mut order: Vec<usize> = owners.iter().map(|s| s.pool).collect();
        order.sort_unstable();
        let mut time = 0.0;
        let mut left = bytes;
        while left > 0.0 {
            let bucket = left.min(bucket_bytes);
            let slowest = (0..order.len())
                .map(|i| {
                    let (p, q) = (order[i], order[(i + 1) % order.len()]);
                    seconds(&instance.inter[p][q], 1, 1, bucket / n)
                })
                .fold(0.0, f64::max);
            time += 2.0 * (n - 1.0) * slowest;
            left -= bucket;
        }
        for (pipe, at) in paid.iter_mut().zip(&group) {
            pipe[*at] += time;
        }
    }
    paid.iter().flatten().copied().fold(0.0, f64::max)
}

fn update_s(instance: &Instance, pipes: &[Pipe]) -> f64 {
    let classes: Vec<usize> =
        instance.runs.iter().flat_map(|run| vec![run.class; run.count as usize]).collect();
    let of = |(b, stages): &Pipe| {
        let b = *b;
        let of = |s: &Stage| {
            let rows = &instance.pools[s.pool].costs;
            let row = rows.iter().find(|r| r.tensor_parallel == s.tensor_parallel && r.micro_batch == b);
            row.unwrap().update_s[classes[s.first_layer as usize]]
        };
        stages.iter().map(of).fold(0.0, f64::max)
    };
    pipes.iter().map(of).fold(0.0, f64::max)
}

/// Every pipeline on no more than the devices that are left.
fn pipes(instance: &Instance) -> Vec<Pipe> {
    let mut all = Vec::new();
    let mut sizes: Vec<u32> =
        instance.pools.iter().flat_map(|p| p.costs.iter().map(|r| r.micro_batch)).collect();
    sizes.sort_unstable();
    sizes.dedup();
    for b in sizes {
        grow(instance, b, 0, &mut Vec::new(), &mut all);
    }
    all.retain(|pipe| stages(instance, pipe).iter().all(|(_, _, fits)| *fits));
    all
}

fn grow(instance: &Instance, b: u32, first: u32, so_far: &mut Vec<Stage>, all: &mut Vec<Pipe>) {
    let num: u32 = instance.runs.iter().map(|r| r.count).sum();
    if first == num {
        return all.push((b, so_far.clone()));
    }
    for (at, pool) in instance.pools.iter().enumerate() {
        for row in pool.costs.iter().filter(|r| r.micro_batch == b) {
            let used: u32 = so_far.iter().filter(|s| s.pool == at).map(|s| s.tensor_parallel).sum();
            if used + row.tensor_parallel > pool.nodes * pool.devices_per_node {
                continue;
            }
            for end in first + 1..=num {
                for recompute in [false, true] {
                    if recompute && !instance.rules.recompute {
                        continue;
                    }
                    so_far.push(Stage {
                        first_layer: first,
                        end_layer: end,
                        pool: at,
                        tensor_parallel: row.tensor_parallel,
                        replicas: 1,
                        recompute,
                    });
                    grow(instance, b, end, so_far, all);
                    so_far.pop();
                }
            }
        }
    }
}

/// Degrees are 1 and 2: groups fit if all of two have a node with two free.
fn fits(instance: &Instance, chosen: &[&Pipe]) -> bool {
    instance.pools.iter().enumerate().all(|(at, pool)| {
        let of = || chosen.iter().flat_map(|p| &p.1).filter(move |s| s.pool == at);
        let pairs = of().filter(|s| s.tensor_parallel == 2).count() as u32;
        let ones = of().filter(|s| s.tensor_parallel == 1).count() as u32;
        pairs <= pool.nodes * (pool.devices_per_node / 2)
            && 2 * pairs + ones <= pool.nodes * pool.devices_per_node
    })
}

/// The least slowest pipeline over all ways to give the batch to them, at least one micro-batch each.
fn divide(instance: &Instance, chosen: &[&Pipe], left: u32, slowest: f64, best: &mut f64) {
    if slowest >= *best {
        return;
    }
    let Some((pipe, rest)) = chosen.split_first() else {
        if left == 0 {
            *best = slowest;
        }
        return;
    };
    for m in 1..=left / pipe.0 {
        let time = pipeline_s(instance, pipe, m);
        divide(instance, rest, left - m * pipe.0, slowest.max(time), best);
    }
}

fn choose<'p>(instance: &Instance, all: &'p [Pipe], from: usize, chosen: &mut Vec<&'p Pipe>, best: &mut f64) {
    for at in from..all.len() {
        chosen.push(&all[at]);
        if fits(instance, chosen) {
            let owned: Vec<Pipe> = chosen.iter().map(|p| (*p).clone()).collect();
            let fixed = exchange_s(instance, &owned) + update_s(instance, &owned);
            let mut slowest = *best - fixed;
            divide(instance, chosen, instance.global_batch, 0.0, &mut slowest);
            *best = best.min(slowest + fixed);
            choose(instance, all, at, chosen, best);
        }
        chosen.pop();
    }
}

pub(crate) fn optimum(instance: &Instance) -> Option<f64> {
    let all = pipes(instance);
    let mut best = f64::INFINITY;
    choose(instance, &all, 0, &mut Vec::new(), &mut best);
    best.is_finite().then_some(best)
}

/// The second pricer on a whole layout.
pub(crate) fn second_price(instance: &Instance, layout: &Layout) -> f64 {
    let mut all = Vec::new();
    let mut slowest = 0.0f64;
    for t in &layout.templates {
        let pipe = (t.micro_batch, t.stages.clone());
        slowest = slowest.max(pipeline_s(instance, &pipe, t.num_micro_batches));
        all.extend((0..t.count).map(|_| pipe.clone()));
    }
    slowest + exchange_s(instance, &all) + update_s(instance, &all)
}

fn agrees(seed: u64, size: Size) -> bool {
    let instance = instance(seed, size);
    let found = find(&instance, None, &Effort::default()).unwrap();
    let brute = optimum(&instance);
    match (&found.best, brute) {
        (None, None) => false,
        (Some((layout, priced)), Some(brute)) => {
            assert_eq!(check(&instance, layout), vec![], "seed {seed}");
            assert_eq!(price(&instance, layout), *priced);
            let second = second_price(&instance, layout);
            assert!((second - priced.iteration_s).abs() <= 1e-6 * second, "seed {seed}: {second} {priced:?}");
            assert!(
                (priced.iteration_s - brute).abs() <= 1e-6 * brute,
                "seed {seed}: found {} s, brute force {brute} s: {layout:?}",
                priced.iteration_s
            );
            assert!(
                found.bound.seconds <= brute * (1.0 + 1e-9),
                "seed {seed}: {:?} beaten by {brute}",
                found.bound
            );
            assert!(found.gap.unwrap() < 1e-9, "seed {seed}");
            true
        }
        (found, brute) => panic!("seed {seed}: {found:?} where brute force says {brute:?}"),
    }
}

fn all_agree(seeds: std::ops::Range<u64>, size: Size) {
    let num = seeds.end - seeds.start;
    let planned = seeds.filter(|seed| agrees(*seed, size)).count() as u64;
    assert!(planned * 2 > num, "only {planned} of {num} cases have a plan: they test too little");
}

#[test]
fn thousands_of_tiny_instances_have_the_optimum_of_brute_force() {
    all_agree(0..1500, Size { pools: 2, devices: 3, layers: 4, batch: 6, tensor_parallel: true });
}

#[test]
fn three_kinds_have_the_optimum_of_brute_force() {
    all_agree(10_000..10_400, Size { pools: 3, devices: 4, layers: 4, batch: 6, tensor_parallel: true });
}

#[test]
fn deep_models_have_the_optimum_of_brute_force() {
    all_agree(20_000..20_150, Size { pools: 3, devices: 3, layers: 8, batch: 8, tensor_parallel: false });
}

#[test]
fn eight_devices_have_the_optimum_of_brute_force() {
    all_agree(30_000..30_040, Size { pools: 3, devices: 6, layers: 3, batch: 6, tensor_parallel: false });
}

//! Every layout of a small instance, priced by a second pricer that shares nothing with the first but
//! the types.

use hgct_planner::instance::{Curve, Exchange, Instance, Layout, Link, Stage, Transfer, check, price};
use hgct_planner::wide::{Bound, Effort, find};

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

/// What ends a branch of the enumeration, and why no faster layout is lost. A device of pool p is worth
/// `worth[p]`, all devices together 1; a sample costs at least `sample` worth-seconds, since each of
/// its layers runs somewhere. So in `seconds` devices that are worth w do at most
/// `w · seconds / sample` samples.
struct Limit {
    seconds: f64,
    worth: Vec<f64>,
    sample: f64,
    batch: f64,
}

impl Limit {
    fn new(instance: &Instance, seconds: f64) -> Self {
        let runs = |of: &dyn Fn(usize) -> f64| -> f64 {
            instance.runs.iter().map(|run| of(run.class) * f64::from(run.count)).sum()
        };
        let costs: Vec<Vec<f64>> = instance
            .pools
            .iter()
            .map(|pool| {
                let each = |class: usize| {
                    let of = |row: &hgct_planner::instance::CostRow| {
                        (row.forward_s[class] + row.backward_s[class]) * f64::from(row.tensor_parallel)
                            / f64::from(row.micro_batch)
                    };
                    pool.costs.iter().map(of).fold(f64::INFINITY, f64::min)
                };
                (0..instance.classes.len()).map(each).collect()
            })
            .collect();
        // Any worth would do; that of a whole sample on the pool alone prunes well.
        let mut worth: Vec<f64> = costs.iter().map(|cost| 1.0 / runs(&|class| cost[class])).collect();
        let all: f64 =
            worth.iter().zip(&instance.pools).map(|(w, p)| w * f64::from(p.nodes * p.devices_per_node)).sum();
        for w in &mut worth {
            *w /= all;
        }
        let least = |class: usize| {
            worth.iter().zip(&costs).map(|(w, cost)| w * cost[class]).fold(f64::INFINITY, f64::min)
        };
        let sample = runs(&least);
        Self { seconds, worth, sample, batch: f64::from(instance.global_batch) }
    }

    fn worth(&self, stages: &[Stage]) -> f64 {
        stages.iter().map(|s| self.worth[s.pool] * f64::from(s.tensor_parallel)).sum()
    }

    /// Whether devices worth `worth` that do so many samples leave the rest enough to do the others.
    fn reaches(&self, samples: f64, worth: f64) -> bool {
        samples + (1.0 - worth).max(0.0) * self.seconds / self.sample + 1e-6 >= self.batch
    }

    /// Samples of a pipeline whose stages compute that long a micro-batch.
    fn samples(&self, micro_batch: u32, computes: impl Iterator<Item = f64> + Clone) -> f64 {
        let (sum, most) = (computes.clone().sum::<f64>(), computes.fold(0.0, f64::max));
        let num = ((self.seconds - sum) / most + 1.0 + 1e-9).floor().max(0.0);
        f64::from(micro_batch) * num
    }
}

/// Every pipeline that can be part of a layout within the limit.
fn pipes(instance: &Instance, limit: &Limit) -> Vec<Pipe> {
    let mut all = Vec::new();
    let mut sizes: Vec<u32> =
        instance.pools.iter().flat_map(|p| p.costs.iter().map(|r| r.micro_batch)).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let classes: Vec<usize> =
        instance.runs.iter().flat_map(|run| vec![run.class; run.count as usize]).collect();
    for b in sizes {
        let mut grown = Grown { instance, limit, classes: &classes, micro_batch: b, all: &mut all };
        grown.grow(0, &mut Vec::new(), &mut Vec::new());
    }
    all.retain(|pipe| stages(instance, pipe).iter().all(|(_, _, fits)| *fits));
    all
}

struct Grown<'g> {
    instance: &'g Instance,
    limit: &'g Limit,
    classes: &'g [usize],
    micro_batch: u32,
    all: &'g mut Vec<Pipe>,
}

impl Grown<'_> {
    fn grow(&mut self, first: u32, so_far: &mut Vec<Stage>, computes: &mut Vec<f64>) {
        let b = self.micro_batch;
        let num = self.classes.len() as u32;
        if first == num {
            return self.all.push((b, so_far.clone()));
        }
        for (at, pool) in self.instance.pools.iter().enumerate() {
            for row in pool.costs.iter().filter(|r| r.micro_batch == b) {
                let used: u32 = so_far.iter().filter(|s| s.pool == at).map(|s| s.tensor_parallel).sum();
                if used + row.tensor_parallel > pool.nodes * pool.devices_per_node {
                    continue;
                }
                for (end, recompute) in (first + 1..=num).flat_map(|end| [(end, false), (end, true)]) {
                    if recompute && !self.instance.rules.recompute {
                        continue;
                    }
                    let of = |layer: u32| {
                        let class = self.classes[layer as usize];
                        row.backward_s[class] + row.forward_s[class] * if recompute { 2.0 } else { 1.0 }
                    };
                    computes.push((first..end).map(of).sum());
                    so_far.push(Stage {
                        first_layer: first,
                        end_layer: end,
                        pool: at,
                        tensor_parallel: row.tensor_parallel,
                        replicas: 1,
                        recompute,
                    });
                    let samples = self.limit.samples(b, computes.iter().copied());
                    if samples > 0.0 && self.limit.reaches(samples, self.limit.worth(so_far)) {
                        self.grow(end, so_far, computes);
                    }
                    so_far.pop();
                    computes.pop();
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

/// A pipeline with the samples that it can do at most, and what its devices are worth.
struct Candidate {
    pipe: Pipe,
    samples: f64,
    worth: f64,
}

fn choose<'p>(
    instance: &Instance,
    limit: &Limit,
    all: &'p [Candidate],
    from: usize,
    (samples, worth): (f64, f64),
    chosen: &mut Vec<&'p Pipe>,
    best: &mut f64,
) {
    for at in from..all.len() {
        let (samples, worth) = (samples + all[at].samples, worth + all[at].worth);
        if worth > 1.0 + 1e-9 || !limit.reaches(samples, worth) {
            continue;
        }
        chosen.push(&all[at].pipe);
        if fits(instance, chosen) {
            if samples + 1e-6 >= limit.batch {
                let owned: Vec<Pipe> = chosen.iter().map(|p| (*p).clone()).collect();
                let fixed = exchange_s(instance, &owned) + update_s(instance, &owned);
                let mut slowest = *best - fixed;
                divide(instance, chosen, instance.global_batch, 0.0, &mut slowest);
                *best = best.min(slowest + fixed);
            }
            choose(instance, limit, all, at, (samples, worth), chosen, best);
        }
        chosen.pop();
    }
}

/// The shortest step of all layouts, if any takes less than `below`.
pub(crate) fn optimum(instance: &Instance, below: f64) -> Option<f64> {
    let limit = Limit::new(instance, below);
    let candidates: Vec<Candidate> = pipes(instance, &limit)
        .into_iter()
        .map(|pipe| {
            let rows = stages(instance, &pipe);
            Candidate {
                samples: limit.samples(pipe.0, rows.iter().map(|(c, _, _)| *c)),
                worth: limit.worth(&pipe.1),
                pipe,
            }
        })
        .collect();
    let mut best = below;
    choose(instance, &limit, &candidates, 0, (0.0, 0.0), &mut Vec::new(), &mut best);
    (best < below).then_some(best)
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
    // Where there is a layout, the enumeration needs to look no further than a little above it; where
    // there is none, a limit that any layout keeps: everything in series on the slowest devices.
    let step = found.best.as_ref().map(|(_, priced)| priced.iteration_s);
    let brute = optimum(&instance, step.map_or(1e6, |step| step * (1.0 + 1e-4)));
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
            // Far above the optimum nothing but the reasoning itself keeps it below.
            let bound = Bound::up_to(&instance, 3.0 * brute);
            assert!(bound.seconds <= brute * (1.0 + 1e-9), "seed {seed}: {bound:?} beaten by {brute}");
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

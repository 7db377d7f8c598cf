//! Every layout of a small instance, priced by a second pricer.

use hgct_planner::instance::{Curve, Exchange, Instance, Stage, Transfer, check, price};
use hgct_planner::wide::{Bound, Effort, find};

use crate::cases::{Size, instance};
use crate::pricer::{Pipe, exchange_s, second_price, stages, update_s};

/// What ends a branch of the enumeration, and why no faster layout is lost.
///
/// * *Worth.* A device of pool p is worth `worth[p]`, all devices together 1; a sample costs at least
///   `layers` worth-seconds, since each of its layers runs somewhere. So in `seconds` devices that are
///   worth w do at most `w · seconds / sample` samples; and who does s samples in a pipeline that lacks
///   layers yet takes their cost from the rest.
/// * *Beside.* A layout takes its update and its exchange beside its pipelines. With n pipelines, two
///   or more, the holder of a stage's bytes pays `2 (n − 1)` messages of an n-th of them, at the best
///   rate and latency of any link, and the least degree of a layer's holders is not above the stage's.
/// * *Slack* ([`Sets`]).
struct Limit {
    seconds: f64,
    worth: Vec<f64>,
    /// Worth-seconds of a sample in the layers before each layer.
    layers: Vec<f64>,
    batch: f64,
    latency_s: f64,
    bytes_per_s: f64,
    bucket_bytes: f64,
}

/// What a pipeline makes any layout with it pay beside its pipelines.
#[derive(Clone, Copy, Default)]
struct Beside {
    bytes: f64,
    update_s: f64,
}

impl Limit {
    fn new(instance: &Instance, seconds: f64) -> Self {
        let classes: Vec<usize> =
            instance.runs.iter().flat_map(|run| vec![run.class; run.count as usize]).collect();
        let costs: Vec<Vec<f64>> = instance
            .pools
            .iter()
            .map(|pool| {
                let each = |class: &usize| {
                    let of = |row: &hgct_planner::instance::CostRow| {
                        (row.forward_s[*class] + row.backward_s[*class]) * f64::from(row.tensor_parallel)
                            / f64::from(row.micro_batch)
                    };
                    pool.costs.iter().map(of).fold(f64::INFINITY, f64::min)
                };
                classes.iter().map(each).collect()
            })
            .collect();
        // Any worth would do; that of a whole sample on the pool alone prunes well.
        let mut worth: Vec<f64> = costs.iter().map(|cost| 1.0 / cost.iter().sum::<f64>()).collect();
        let all: f64 =
            worth.iter().zip(&instance.pools).map(|(w, p)| w * f64::from(p.nodes * p.devices_per_node)).sum();
        for w in &mut worth {
            *w /= all;
        }
        let mut layers = vec![0.0];
        for layer in 0..classes.len() {
            let least =
                worth.iter().zip(&costs).map(|(w, cost)| w * cost[layer]).fold(f64::INFINITY, f64::min);
            layers.push(layers[layer] + least);
        }
        let Exchange::FlatRing { bucket_bytes } = instance.rules.exchange else {
            panic!("not in these cases")
        };
        let curves = instance.inter.iter().flatten().map(|link| match link.rows[0].curve {
            Curve::AlphaBeta { latency_s, bytes_per_s } => (latency_s, bytes_per_s),
            Curve::Polynomial { .. } => panic!("not in these cases"),
        });
        let (latency_s, bytes_per_s) =
            curves.fold((f64::INFINITY, 0.0f64), |a, b| (a.0.min(b.0), a.1.max(b.1)));
        Self {
            seconds,
            worth,
            layers,
            batch: f64::from(instance.global_batch),
            latency_s,
            bytes_per_s,
            bucket_bytes,
        }
    }

    fn worth(&self, stages: &[Stage]) -> f64 {
        stages.iter().map(|s| self.worth[s.pool] * f64::from(s.tensor_parallel)).sum()
    }

    /// Seconds that are left for the pipelines of a layout of n.
    fn left(&self, beside: Beside, n: usize) -> f64 {
        let n = n as f64;
        let buckets = (beside.bytes / self.bucket_bytes).ceil();
        let message = buckets * self.latency_s + beside.bytes / n / self.bytes_per_s;
        self.seconds - beside.update_s - 2.0 * (n - 1.0) * message
    }

    /// Whether a pipeline of which the stages from layer `first` on are there may be part of a layout.
    fn allows(&self, micro_batch: u32, stages: &[Stage], first: u32, pace: &Pace, beside: Beside) -> bool {
        let samples = |seconds: f64| f64::from(micro_batch) * pace.micro_batches(seconds);
        if samples(self.left(beside, 1)) >= self.batch {
            return true;
        }
        let seconds = self.left(beside, 2);
        let own = samples(seconds);
        let sample = self.layers[self.layers.len() - 1];
        let rest = (1.0 - self.worth(stages)).max(0.0) * seconds / sample;
        own > 0.0 && own * (1.0 - self.layers[first as usize] / sample) + rest + 1e-6 >= self.batch
    }
}

/// Times of some stages of a pipeline.
struct Pace {
    sum: f64,
    slowest: f64,
}

impl Pace {
    /// Compute and transfer of each stage.
    fn new(instance: &Instance, rows: impl Iterator<Item = (f64, f64)>) -> Self {
        let mut pace = Self { sum: 0.0, slowest: 0.0 };
        for (c, t) in rows {
            let own = if instance.rules.transfer == Transfer::Overlapped { c.max(t) } else { c + t };
            pace.slowest = pace.slowest.max(own);
            pace.sum += c + t;
        }
        pace
    }

    fn seconds(&self, micro_batches: u32) -> f64 {
        self.sum + f64::from(micro_batches - 1) * self.slowest
    }

    /// Micro-batches at most, whatever stages are still to come: they may be the slowest.
    fn micro_batches(&self, seconds: f64) -> f64 {
        ((seconds - self.sum) / self.slowest + 1.0 + 1e-9).floor().max(0.0)
    }
}

/// Every pipeline that can be part of a layout within the limit.
fn pipes(instance: &Instance, limit: &Limit) -> Vec<Candidate> {
    let mut all = Vec::new();
    let mut sizes: Vec<u32> =
        instance.pools.iter().flat_map(|p| p.costs.iter().map(|r| r.micro_batch)).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let classes: Vec<usize> =
        instance.runs.iter().flat_map(|run| vec![run.class; run.count as usize]).collect();
    for b in sizes {
        let mut grown = Grown { instance, limit, classes: &classes, micro_batch: b, all: &mut all };
        grown.grow(classes.len() as u32, &mut Vec::new(), Beside::default());
    }
    all
}

struct Grown<'g> {
    instance: &'g Instance,
    limit: &'g Limit,
    classes: &'g [usize],
    micro_batch: u32,
    all: &'g mut Vec<Candidate>,
}

impl Grown<'_> {
    /// Puts stages before those that are there, which begin at layer `end`.
    fn grow(&mut self, end: u32, behind: &mut Vec<Stage>, beside: Beside) {
        let b = self.micro_batch;
        for (at, pool) in self.instance.pools.iter().enumerate() {
            for row in pool.costs.iter().filter(|r| r.micro_batch == b) {
                let used: u32 = behind.iter().filter(|s| s.pool == at).map(|s| s.tensor_parallel).sum();
                if used + row.tensor_parallel > pool.nodes * pool.devices_per_node {
                    continue;
                }
                for (first, recompute) in (0..end).flat_map(|first| [(first, false), (first, true)]) {
                    if recompute && !self.instance.rules.recompute {
                        continue;
                    }
                    let stage = Stage {
                        first_layer: first,
                        end_layer: end,
                        pool: at,
                        tensor_parallel: row.tensor_parallel,
                        expert_parallel: 1,
                        replicas: 1,
                        recompute,
                    };
                    behind.insert(0, stage);
                    let bytes: f64 = (first..end)
                        .map(|layer| self.instance.classes[self.classes[layer as usize]].gradient_bytes)
                        .sum();
                    let beside = Beside {
                        bytes: beside.bytes.max(bytes / f64::from(row.tensor_parallel)),
                        update_s: beside.update_s.max(row.update_s[self.classes[first as usize]]),
                    };
                    self.with(first, behind, beside);
                    behind.remove(0);
                }
            }
        }
    }

    fn with(&mut self, first: u32, behind: &mut Vec<Stage>, beside: Beside) {
        let pipe = (self.micro_batch, behind.clone());
        // Stages that are the last of a shorter pipeline hold no more, and hand on no more, than here.
        let rows = stages(self.instance, &pipe);
        if rows.iter().any(|(_, _, fits)| !fits) {
            return;
        }
        let short = first > 0 && self.instance.rules.transfer == Transfer::Published;
        // Without a stage before it the first one may be taken to hand on twice.
        let handed = |at: usize, t: f64| if short && at == 0 { t / 2.0 } else { t };
        let own = rows.iter().enumerate().map(|(at, (c, t, _))| (*c, handed(at, *t)));
        let pace = Pace::new(self.instance, own);
        if !self.limit.allows(self.micro_batch, behind, first, &pace, beside) {
            return;
        }
        if first > 0 {
            return self.grow(first, behind, beside);
        }
        let used: Vec<u32> = (0..self.instance.pools.len())
            .map(|at| behind.iter().filter(|s| s.pool == at).map(|s| s.tensor_parallel).sum())
            .collect();
        self.all.push(Candidate { pipe, pace, beside, used });
    }
}

/// Degrees are 1 and 2: groups fit if all of two have a node with two free.
fn fits(instance: &Instance, chosen: &[&Candidate]) -> bool {
    instance.pools.iter().enumerate().all(|(at, pool)| {
        let of = || chosen.iter().flat_map(|c| &c.pipe.1).filter(move |s| s.pool == at);
        let pairs = of().filter(|s| s.tensor_parallel == 2).count() as u32;
        let ones = of().filter(|s| s.tensor_parallel == 1).count() as u32;
        pairs <= pool.nodes * (pool.devices_per_node / 2)
            && 2 * pairs + ones <= pool.nodes * pool.devices_per_node
    })
}

/// The least slowest pipeline over all ways to give the batch to them, at least one micro-batch each.
fn divide(chosen: &[&Candidate], left: u32, slowest: f64, best: &mut f64) {
    if slowest >= *best {
        return;
    }
    let Some((first, rest)) = chosen.split_first() else {
        if left == 0 {
            *best = slowest;
        }
        return;
    };
    for m in 1..=left / first.pipe.0 {
        divide(rest, left - m * first.pipe.0, slowest.max(first.pace.seconds(m)), best);
    }
}

/// A pipeline with how long it takes.
struct Candidate {
    pipe: Pipe,
    pace: Pace,
    beside: Beside,
    /// Devices of each pool.
    used: Vec<u32>,
}

impl Candidate {
    fn samples(&self, seconds: f64) -> f64 {
        f64::from(self.pipe.0) * self.pace.micro_batches(seconds)
    }
}

/// All sets of pipelines, each as often as its devices are there. `worth` of a device is such that no
/// pipeline does more samples than its devices are worth, in the time that two pipelines have or more;
/// what it does less is its *slack*. Devices that no pipeline uses are slack too. So all slack of a set
/// that does the batch is at most what all devices are worth less the batch.
struct Sets<'s> {
    instance: &'s Instance,
    limit: &'s Limit,
    /// Slack, and the pipeline; ascending.
    order: Vec<(f64, &'s Candidate)>,
    worth: Vec<f64>,
    best: f64,
}

impl<'s> Sets<'s> {
    fn new(instance: &'s Instance, limit: &'s Limit, all: &'s [Candidate]) -> Self {
        let devices: Vec<f64> =
            instance.pools.iter().map(|p| f64::from(p.nodes * p.devices_per_node)).collect();
        let samples: Vec<f64> = all.iter().map(|c| c.samples(limit.left(c.beside, 2))).collect();
        let value = |worth: &[f64], used: &[u32]| -> f64 {
            worth.iter().zip(used).map(|(w, n)| w * f64::from(*n)).sum()
        };
        let scaled = |mut worth: Vec<f64>| -> (f64, Vec<f64>) {
            let short = all.iter().zip(&samples).map(|(c, s)| s / value(&worth, &c.used)).fold(0.0, f64::max);
            for w in &mut worth {
                *w *= short;
            }
            (worth.iter().zip(&devices).map(|(w, n)| w * n).sum(), worth)
        };
        // Small steps as long as they make all devices together worth less: any worth would do.
        let mut best = scaled(vec![1.0; devices.len()]);
        for step in [4.0, 2.0, 1.4, 1.15, 1.05, 1.02, 1.005] {
            for _ in 0..12 {
                let before = best.0;
                for pool in 0..devices.len() {
                    for by in [step, 1.0 / step] {
                        let mut worth = best.1.clone();
                        worth[pool] = (worth[pool] * by).max(1e-9);
                        let found = scaled(worth);
                        if found.0 < best.0 {
                            best = found;
                        }
                    }
                }
                if best.0 >= before {
                    break;
                }
            }
        }
        let worth = best.1;
        let own = |(c, samples): (&'s Candidate, &f64)| (value(&worth, &c.used) - samples, c);
        let mut order: Vec<(f64, &Candidate)> =
            all.iter().zip(&samples).filter(|(_, samples)| **samples > 0.0).map(own).collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0));
        Self { instance, limit, order, worth, best: limit.seconds }
    }

    fn slack(&self) -> f64 {
        let devices = self.instance.pools.iter().map(|p| f64::from(p.nodes * p.devices_per_node));
        self.worth.iter().zip(devices).map(|(w, n)| w * n).sum::<f64>() * (1.0 + 1e-9) - self.limit.batch
            + 1e-6
    }

    fn choose(&mut self, from: usize, slack: f64, chosen: &mut Vec<&'s Candidate>) {
        for at in from..self.order.len() {
            let (own, candidate) = self.order[at];
            if own > slack {
                break;
            }
            chosen.push(candidate);
            if fits(self.instance, chosen) {
                let most = |all: Beside, c: &&Candidate| Beside {
                    bytes: all.bytes.max(c.beside.bytes),
                    update_s: all.update_s.max(c.beside.update_s),
                };
                let beside = chosen.iter().fold(Beside::default(), most);
                let seconds = self.limit.left(beside, chosen.len().max(2));
                let samples: f64 = chosen.iter().map(|c| c.samples(seconds)).sum();
                let idle: f64 = (0..self.worth.len())
                    .map(|p| {
                        let there = self.instance.pools[p].nodes * self.instance.pools[p].devices_per_node;
                        let used: u32 = chosen.iter().map(|c| c.used[p]).sum();
                        self.worth[p] * f64::from(there - used)
                    })
                    .sum();
                if samples + idle + 1e-6 >= self.limit.batch {
                    if chosen.len() > 1 && samples + 1e-6 >= self.limit.batch {
                        self.offer(chosen);
                    }
                    self.choose(at, slack - own, chosen);
                }
            }
            chosen.pop();
        }
    }

    fn offer(&mut self, chosen: &[&Candidate]) {
        let owned: Vec<Pipe> = chosen.iter().map(|c| c.pipe.clone()).collect();
        let fixed = exchange_s(self.instance, &owned) + update_s(self.instance, &owned);
        let mut slowest = self.best - fixed;
        divide(chosen, self.instance.global_batch, 0.0, &mut slowest);
        self.best = self.best.min(slowest + fixed);
    }
}

/// The shortest step of all layouts, if any takes less than `below`.
pub(crate) fn optimum(instance: &Instance, below: f64) -> Option<f64> {
    let limit = Limit::new(instance, below);
    let candidates = pipes(instance, &limit);
    let mut sets = Sets::new(instance, &limit, &candidates);
    for candidate in candidates.iter().filter(|c| fits(instance, &[c])) {
        sets.offer(&[candidate]);
    }
    let slack = sets.slack();
    sets.choose(0, slack, &mut Vec::new());
    (sets.best < below).then_some(sets.best)
}

/// Checks a case against the enumeration: whether it has a plan, and whether the search could end.
fn agrees(seed: u64, size: Size) -> (bool, bool) {
    let instance = instance(seed, size);
    let found = find(&instance, None, &Effort::default()).unwrap();
    let Some((layout, priced)) = &found.best else {
        // One pipeline that fits would do the batch alone: sizes of micro-batches divide it.
        assert!(pipes(&instance, &Limit::new(&instance, 1e6)).is_empty(), "seed {seed}: there is a layout");
        return (false, true);
    };
    // The enumeration needs to look no further than a little above what was found.
    let brute = optimum(&instance, priced.iteration_s * (1.0 + 1e-4)).unwrap_or(f64::INFINITY);
    assert_eq!(check(&instance, layout), vec![], "seed {seed}");
    assert_eq!(price(&instance, layout), *priced);
    let second = second_price(&instance, layout);
    assert!((second - priced.iteration_s).abs() <= 1e-6 * second, "seed {seed}: {second} {priced:?}");
    assert!(
        (priced.iteration_s - brute).abs() <= 1e-6 * brute,
        "seed {seed}: found {} s, brute force {brute} s: {layout:?}",
        priced.iteration_s
    );
    assert!(found.bound.seconds <= brute * (1.0 + 1e-9), "seed {seed}: {:?} beaten by {brute}", found.bound);
    // Far above the optimum nothing but the reasoning itself keeps it below.
    let bound = Bound::up_to(&instance, 3.0 * brute);
    assert!(bound.seconds <= brute * (1.0 + 1e-9), "seed {seed}: {bound:?} beaten by {brute}");
    (true, found.gap.unwrap() < 1e-9)
}

fn all_agree(seeds: std::ops::Range<u64>, size: Size) {
    let num = seeds.end - seeds.start;
    let (mut planned, mut ended) = (0, 0);
    for seed in seeds {
        let (has_plan, has_ended) = agrees(seed, size);
        planned += u64::from(has_plan);
        ended += u64::from(has_ended);
    }
    assert!(planned * 2 > num, "only {planned} of {num} cases have a plan: they test too little");
    assert!(ended * 100 >= num * 99, "only {ended} of {num} searches could be ended");
}

/// Cases of the largest size; `HGCT_PLANS` says how many instead.
fn cases() -> u64 {
    std::env::var("HGCT_PLANS").ok().and_then(|text| text.parse().ok()).unwrap_or(40)
}

/// Without a limit nothing is left out but what does not fit.
#[test]
fn what_ends_a_branch_of_the_enumeration_loses_nothing() {
    let size = Size { pools: 2, devices: 3, layers: 4, batch: 6, tensor_parallel: true };
    for seed in 40_000..40_200 {
        let instance = instance(seed, size);
        let all = optimum(&instance, 1e6);
        let again = all.and_then(|all| optimum(&instance, all * (1.0 + 1e-4)));
        let alike = all.zip(again).is_some_and(|(a, b)| (a - b).abs() <= 1e-12 * a);
        assert!(alike || all.is_none(), "seed {seed}: {all:?} {again:?}");
    }
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
fn eight_devices_of_three_kinds_and_eight_layers_have_the_optimum_of_brute_force() {
    let size = Size { pools: 3, devices: 8, layers: 8, batch: 8, tensor_parallel: true };
    all_agree(30_000..30_000 + cases(), size);
}

/// 80,000 pipelines that are nearly alike, of which any two could be a plan: what brute force found in
/// two minutes is found and proven.
#[test]
fn sets_of_many_alike_pipelines_are_searched_to_the_end() {
    let size = Size { pools: 3, devices: 8, layers: 8, batch: 8, tensor_parallel: true };
    let found = find(&instance(31_428, size), None, &Effort::default()).unwrap();
    assert!(found.gap.unwrap() < 1e-9, "{:?}", found.gap);
    let step = found.best.unwrap().1.iteration_s;
    assert!((step / 10.583_613_127_892_937 - 1.0).abs() < 1e-9, "{step}");
}

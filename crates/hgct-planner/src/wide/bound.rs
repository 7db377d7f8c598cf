//! What no layout can beat.
//!
//! *compute* ([`Bound::compute_s`]). Let `c[p][l]` be the fewest device-seconds a sample that a device
//! of pool p needs for layer l, over all degrees and micro-batch sizes. For any prices λ of a device
//! with `Σ n_p λ_p = 1`, a sample costs at least `Y = Σ_l min_p λ_p c[p][l]`, so a step of B samples
//! takes at least `B·Y`. The best λ are the dual solution of: maximise X with `Σ_p x[p][l] = X` for
//! every layer and `Σ_l x[p][l] c[p][l] ≤ n_p`. (The sum of the kinds' own rates is no bound: kinds
//! differ by layer.)
//!
//! *fill and cut* ([`Bound::fill_s`]). A pipeline of k stages with m micro-batches of b samples and
//! stage times c_s takes at least `(m − 1) max c_s + ρ Σ c_s`, where ρ is the part of a stage's work
//! that no allowed schedule hides (1 for 1F1B). A device of stage s then exchanges at least
//! `ε · bytes_s` behind at most σ·c_s of its own last backward; the mean over the stages gives
//! `T ≥ (m − 1) max c_s + (ρ − σ/k) Σ c_s + ε G / k` for gradients of G bytes. As
//! `Σ_s λ D_s c_s ≥ b r Y` for groups of D_s devices, this limits what a pipeline does in T seconds to
//! `b ρ` and the sum over its stages of `max(0, (T − εG/k) λ D_s / (r Y) − b (ρ − σ/k))` (r: see
//! `uses`; `b ρ` is divided evenly among its devices, which are k or what holds the model at least).
//! A device's share of it is at most the largest over k, b and D; summed over all devices it must
//! reach B. Here ε is for at least `n0` pipelines; with fewer, nothing is exchanged in the bound,
//! but all last terms together are at most `n0` of the smallest micro-batches. The bound is the smaller
//! of the two cases, at the best `n0`.
//!
//! *memory*: a layer that fits on no device at some degree and micro-batch is not offered there, and
//! pipelines with less memory than the model's state are not counted.

use serde::{Deserialize, Serialize};

use crate::bound::maximise;
use crate::instance::{Curve, Exchange, Instance, Link, Schedule};

/// Seconds that no step can beat, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bound {
    /// The largest of all below.
    pub seconds: f64,
    /// Compute alone.
    pub compute_s: f64,
    /// Compute, unavoidable fill and exchange.
    pub fill_s: f64,
    /// Price of a device of each pool; `Σ devices · price = 1`. A device more shortens the compute
    /// bound by about this part.
    pub prices: Vec<f64>,
}

/// Device-seconds a sample of each pool and layer class, at the best degree and micro-batch.
pub(crate) struct Costs {
    /// By pool, by class.
    pub(crate) least: Vec<Vec<f64>>,
}

impl Costs {
    pub(crate) fn new(instance: &Instance) -> Self {
        let num = instance.classes.len();
        let least = instance
            .pools
            .iter()
            .map(|pool| {
                let mut least = vec![f64::INFINITY; num];
                for row in pool.costs.iter().filter(|_| pool.nodes > 0) {
                    let Some(degree) = instance.degree_index(row.tensor_parallel) else { continue };
                    if row.micro_batch > instance.global_batch {
                        continue;
                    }
                    let by = f64::from(row.tensor_parallel) / f64::from(row.micro_batch);
                    for (class, least) in least.iter_mut().enumerate() {
                        // A layer that does not fit alone is never there.
                        let memory = &instance.classes[class].memory[degree];
                        let kept = if instance.rules.recompute {
                            memory.activation_bytes.min(memory.recompute_bytes)
                        } else {
                            memory.activation_bytes
                        };
                        let needed = memory.state_bytes
                            + f64::from(row.micro_batch) * kept
                            + pool.overhead_bytes[degree];
                        if needed <= pool.memory_bytes {
                            *least = least.min((row.forward_s[class] + row.backward_s[class]) * by);
                        }
                    }
                }
                least
            })
            .collect();
        Self { least }
    }

    /// `Σ_l min_p λ_p c[p][l]`; infinite if some layer has no place.
    pub(crate) fn priced(&self, instance: &Instance, prices: &[f64]) -> f64 {
        instance
            .runs
            .iter()
            .map(|run| {
                let of = |(of_pool, price): (&Vec<f64>, &f64)| price * of_pool[run.class];
                let least = self.least.iter().zip(prices).map(of).fold(f64::INFINITY, f64::min);
                least * f64::from(run.count)
            })
            .sum()
    }
}

impl Bound {
    /// The bound of an instance; infinite where some layer fits nowhere.
    pub fn new(instance: &Instance) -> Self {
        let costs = Costs::new(instance);
        let prices = prices(instance, &costs);
        let batch = f64::from(instance.global_batch);
        // Leaves room for the rounding of the sums.
        let compute_s = batch * costs.priced(instance, &prices) * (1.0 - 1e-9);
        let fill_s = if compute_s.is_finite() { fill(instance, &prices, compute_s) } else { compute_s };
        Self { seconds: compute_s.max(fill_s), compute_s, fill_s, prices }
    }
}

/// Dual prices of the compute bound, by the simplex method; whatever comes out, weak duality makes the
/// bound valid.
fn prices(instance: &Instance, costs: &Costs) -> Vec<f64> {
    let pools = instance.pools.len();
    let devices: Vec<f64> = instance.pools.iter().map(|p| p.num_devices() as f64).collect();
    // Classes of the same costs are one variable.
    let mut kinds: Vec<(Vec<f64>, f64)> = Vec::new();
    for run in &instance.runs {
        let of: Vec<f64> = costs.least.iter().map(|c| c[run.class]).collect();
        match kinds.iter_mut().find(|(known, _)| *known == of) {
            Some((_, count)) => *count += f64::from(run.count),
            None => kinds.push((of, f64::from(run.count))),
        }
    }
    let scale = kinds.iter().flat_map(|(c, _)| c).copied().filter(|c| c.is_finite()).fold(0.0, f64::max);
    let num = pools + kinds.len();
    let mut rows = Vec::new();
    for (at, (of, _)) in kinds.iter().enumerate() {
        for (pool, cost) in of.iter().enumerate().filter(|(_, c)| c.is_finite()) {
            let mut row = vec![0.0; num];
            // Prices count whole pools, so that numbers stay near one.
            row[pool] = -cost / scale / devices[pool] * devices.iter().sum::<f64>();
            row[pools + at] = 1.0;
            rows.push((row, 0.0));
        }
    }
    let mut sum = vec![0.0; num];
    sum[..pools].fill(1.0);
    rows.push((sum, 1.0));
    let mut objective = vec![0.0; num];
    for (at, (_, count)) in kinds.iter().enumerate() {
        objective[pools + at] = *count;
    }
    let solution = maximise(&objective, rows);
    let whole = |of: Vec<f64>| -> Option<Vec<f64>> {
        let of: Vec<f64> = of.iter().map(|x| x.max(0.0)).collect();
        let sum: f64 = of.iter().sum();
        let each = |(x, n): (&f64, &f64)| if *n > 0.0 { x / sum / n } else { 0.0 };
        (sum > 0.0 && sum.is_finite()).then(|| of.iter().zip(&devices).map(each).collect())
    };
    // Should the solver fail, prices by speed are valid too, only less sharp.
    let plain = costs.least.iter().zip(&devices).map(|(c, n)| {
        let sum: f64 = instance.runs.iter().map(|r| c[r.class] * f64::from(r.count)).sum();
        if sum > 0.0 { n / sum } else { 0.0 }
    });
    [whole(solution[..pools].to_vec()), whole(plain.collect())]
        .into_iter()
        .flatten()
        .max_by(|a, b| costs.priced(instance, a).total_cmp(&costs.priced(instance, b)))
        .unwrap_or_else(|| vec![1.0 / devices.iter().sum::<f64>(); pools])
}

/// A way to use devices of a pool: a group's devices, its micro-batch, and what a device-second of it
/// is worth in samples.
struct Use {
    group: f64,
    micro_batch: f64,
    worth: f64,
}

/// Ways to use each pool. With `y_l` the least priced cost of layer l anywhere, and r the least ratio
/// of a way's own priced cost to it over all layers, a stage s on that way has
/// `λ D c_s ≥ b r Σ_l y_l`: its devices are worth `λ / (r Y)` samples a second. Layers that cost next to
/// nothing are left out of r, and of Y.
fn uses(instance: &Instance, prices: &[f64]) -> Vec<Vec<Use>> {
    let costs = Costs::new(instance);
    let least: Vec<f64> = (0..instance.classes.len())
        .map(|class| {
            costs.least.iter().zip(prices).map(|(c, price)| price * c[class]).fold(f64::INFINITY, f64::min)
        })
        .collect();
    let of_run = |run: &crate::instance::Run| least[run.class] * f64::from(run.count);
    let whole: f64 = instance.runs.iter().map(of_run).sum();
    let counts = |class: usize| {
        let runs = instance.runs.iter().filter(|run| run.class == class);
        runs.map(of_run).sum::<f64>() >= SMALL * whole
    };
    let kept: Vec<usize> = (0..instance.classes.len()).filter(|class| counts(*class)).collect();
    let sum: f64 = instance.runs.iter().filter(|run| kept.contains(&run.class)).map(of_run).sum();
    instance
        .pools
        .iter()
        .zip(prices)
        .map(|(pool, price)| {
            let mut all = Vec::new();
            for row in &pool.costs {
                for replicas in 1..=instance.rules.max_replicas {
                    let (degree, samples) = (f64::from(row.tensor_parallel), f64::from(row.micro_batch));
                    let ratio = kept
                        .iter()
                        .map(|class| {
                            price * (row.forward_s[*class] + row.backward_s[*class]) * degree
                                / samples
                                / least[*class]
                        })
                        .fold(f64::INFINITY, f64::min)
                        .max(1.0);
                    let by = f64::from(replicas);
                    if row.micro_batch * replicas <= instance.global_batch {
                        all.push(Use {
                            group: degree * by,
                            micro_batch: samples * by,
                            worth: price / (ratio * sum),
                        });
                    }
                }
            }
            all
        })
        .collect()
}

/// Part of the whole cost below which a class of layers does not count.
const SMALL: f64 = 0.02;

fn fill(instance: &Instance, prices: &[f64], compute_s: f64) -> f64 {
    let rules = &instance.rules;
    let uses = uses(instance, prices);
    // The largest group, and what of a stage's work is forward and backward.
    let rows = || instance.pools.iter().flat_map(|p| &p.costs);
    let share = |row: &crate::instance::CostRow, class: usize| {
        let again = if rules.recompute { row.forward_s[class] } else { 0.0 };
        let (forward, backward) = (row.forward_s[class], row.backward_s[class] + again);
        if backward > 0.0 { backward / (forward + backward) } else { 0.0 }
    };
    let classes = 0..instance.classes.len();
    let shares: Vec<f64> = rows().flat_map(|row| classes.clone().map(move |c| share(row, c))).collect();
    let most_backward = shares.iter().copied().fold(0.0, f64::max);
    let hides = rules.exchange_overlap * most_backward;
    let shown = rules.schedules.iter().map(|schedule| match schedule {
        Schedule::Interleaved(v) => 1.0 / f64::from((*v).max(1)),
        Schedule::ZeroBubble => 1.0 - most_backward,
        Schedule::OneForwardOneBackward => 1.0,
    });
    let shown = shown.fold(1.0, f64::min);
    let total: f64 = gradients(instance);
    let smallest = uses.iter().flatten().map(|way| way.micro_batch).fold(f64::INFINITY, f64::min);
    let most_group = uses.iter().flatten().map(|way| way.group).fold(1.0, f64::max);
    let least_devices = least_devices(instance);
    // Samples in so many seconds, with `few` pipelines at most or with any number of them.
    let case = |seconds: f64, exchange: f64, few: Option<f64>| -> f64 {
        let of_stage = |way: &Use, stages: f64| {
            if way.group + (stages - 1.0) * most_group < least_devices {
                return 0.0;
            }
            let left = (seconds - exchange * total / stages).max(0.0);
            let lost = way.micro_batch * (shown - hides / stages).max(0.0);
            let first = way.micro_batch * shown * way.group / stages.max(least_devices).max(way.group);
            (left * way.worth * way.group - lost).max(0.0) + first
        };
        let each = |way: &Use| {
            let of_group = match few {
                Some(_) => (seconds * way.worth * way.group - smallest * shown).max(0.0),
                None => (1..=instance.num_layers().min(512))
                    .map(|stages| of_stage(way, f64::from(stages)))
                    .fold(0.0, f64::max),
            };
            of_group / way.group
        };
        let pools = instance.pools.iter().zip(&uses);
        let sum: f64 = pools
            .map(|(pool, ways)| ways.iter().map(each).fold(0.0, f64::max) * pool.num_devices() as f64)
            .sum();
        sum + few.map_or(0.0, |few| few * smallest * shown)
    };
    let least = |exchange: f64, pipelines: Option<f64>| -> f64 {
        let (mut low, mut high) = (compute_s, compute_s * 4.0);
        if case(low, exchange, pipelines) >= f64::from(instance.global_batch) {
            return low;
        }
        for _ in 0..30 {
            let middle = f64::midpoint(low, high);
            if case(middle, exchange, pipelines) >= f64::from(instance.global_batch) {
                high = middle;
            } else {
                low = middle;
            }
        }
        low * (1.0 - 1e-9)
    };
    let mut best = compute_s;
    for pipelines in [2.0, 4.0, 8.0, 16.0, 32.0] {
        let few = least(0.0, Some(pipelines - 1.0));
        if few <= best {
            break;
        }
        best = best.max(few.min(least(exchange(instance, pipelines), None)));
    }
    best
}

/// Devices that hold the model's state at least, optimizer state apart where it may be sharded.
fn least_devices(instance: &Instance) -> f64 {
    let of_class = |class: usize| {
        let degrees = instance.degrees.iter().zip(&instance.classes[class].memory);
        let bytes = degrees.map(|(degree, memory)| {
            let optimizer = if instance.rules.shard_optimizer { 0.0 } else { memory.optimizer_bytes };
            f64::from(*degree) * (memory.state_bytes + optimizer)
        });
        bytes.fold(f64::INFINITY, f64::min)
    };
    let state: f64 = instance.runs.iter().map(|run| of_class(run.class) * f64::from(run.count)).sum();
    let free = instance
        .pools
        .iter()
        .map(|pool| pool.memory_bytes - pool.overhead_bytes.iter().copied().fold(f64::INFINITY, f64::min));
    (state / free.fold(1.0, f64::max)).ceil().max(1.0)
}

/// Gradient bytes of the model.
pub(crate) fn gradients(instance: &Instance) -> f64 {
    instance.runs.iter().map(|r| instance.classes[r.class].gradient_bytes * f64::from(r.count)).sum()
}

/// Seconds a gradient byte that a device of at least `pipelines` must exchange at least.
pub(crate) fn exchange(instance: &Instance, pipelines: f64) -> f64 {
    let largest = f64::from(instance.degrees.last().copied().unwrap_or(1));
    let layers = instance.runs.iter().map(|r| instance.classes[r.class].gradient_bytes);
    let (small, sum) = (layers.filter(|b| *b > 0.0).fold(f64::INFINITY, f64::min), gradients(instance));
    match instance.rules.exchange {
        Exchange::FlatRing { bucket_bytes } => {
            let most = instance.num_devices() as f64;
            let sizes = (small / largest / most, sum.min(bucket_bytes) / pipelines);
            let rate = instance.inter.iter().flatten().map(|l| fastest(l, sizes)).fold(0.0, f64::max);
            2.0 * (pipelines - 1.0) / pipelines / largest / rate
        }
        Exchange::Hierarchical => {
            let second = |c: &crate::instance::LayerClass| {
                if instance.rules.shard_optimizer {
                    c.parameter_bytes.min(c.gradient_bytes)
                } else {
                    c.gradient_bytes
                }
            };
            let used = instance.classes.iter().filter(|c| c.gradient_bytes > 0.0);
            let both = used.map(|c| 1.0 + second(c) / c.gradient_bytes).fold(2.0, f64::min);
            let per_node = instance.pools.iter().map(|p| p.devices_per_node).max().unwrap_or(1);
            let nodes = (pipelines / f64::from(per_node)).ceil().max(1.0);
            let sizes = (small / instance.num_devices() as f64, sum * 2.0);
            let within =
                (0..instance.pools.len()).map(|p| fastest(&instance.inter[p][p], sizes)).fold(0.0, f64::max);
            let across = (0..instance.pools.len())
                .flat_map(|p| (0..instance.pools.len()).filter(move |q| *q != p).map(move |q| (p, q)))
                .map(|(p, q)| fastest(&instance.inter[p][q], sizes))
                .fold(0.0, f64::max);
            // K pools of nodes/K nodes each.
            let by_pools = (1..=instance.pools.len()).map(|k| {
                let k = (k as f64).min(nodes);
                let inside = (1.0 - k / nodes).max(0.0) / within;
                inside + if k > 1.0 { (k - 1.0) / k / (nodes / k) / across } else { 0.0 }
            });
            both * by_pools.fold(f64::INFINITY, f64::min)
        }
    }
}

/// The best rate of a link for any message in a range of sizes.
fn fastest(link: &Link, (smallest, largest): (f64, f64)) -> f64 {
    let of = |curve: &Curve| {
        let ends = curve.bytes_per_s(smallest).max(curve.bytes_per_s(largest));
        match curve {
            Curve::AlphaBeta { bytes_per_s, .. } => *bytes_per_s,
            Curve::Polynomial { a, b, smallest_bytes, .. } => {
                let vertex = (-b / (2.0 * a)).exp2() * 1e6;
                let inner =
                    if vertex > smallest && vertex < largest { curve.bytes_per_s(vertex) } else { 0.0 };
                ends.max(inner).max(curve.bytes_per_s(*smallest_bytes))
            }
        }
    };
    link.rows.iter().map(|row| of(&row.curve)).fold(0.0, f64::max)
}

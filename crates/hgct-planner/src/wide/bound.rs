//! What no layout can beat.
//!
//! *compute* ([`Bound::compute_s`]). Let `c[p][l]` be the fewest device-seconds a sample that a device
//! of pool p needs for layer l, over all degrees and micro-batch sizes. For any prices λ of a device
//! with `Σ n_p λ_p = 1`, a sample costs at least `Y = Σ_l min_p λ_p c[p][l]`, so a step of B samples
//! takes at least `B·Y`. The best λ are the dual solution of: maximise X with `Σ_p x[p][l] = X` for
//! every layer and `Σ_l x[p][l] c[p][l] ≤ n_p`. (The sum of the kinds' own rates is no bound: kinds
//! differ by layer.)
//!
//! *memory and fill* ([`Bound::fill_s`]). No set of pipelines does the batch in less time than the
//! cheapest of all pipelines allows at any prices of devices ([`super::dual`], [`super::chain`]):
//! stages must fit into memory with the micro-batches that are in flight, every stage but the slowest
//! is filled and drained, a micro-batch is handed on over the fastest link at best, a stage has whole
//! layers and a group whole devices.
//!
//! *exchange, and the cut between kinds* ([`Bound::exchange_s`]). The same with the exchange: the
//! devices that hold a layer are D, on `D / g` nodes of g devices or more, so each moves at least
//! `(1 − g/D)` of its bytes between nodes (or more between kinds, whose links are slower), less what
//! its last backward hides. The mean over all devices is a resource that pipelines use up
//! ([`within`]). In a flat ring each holder moves `2 (1 − 1/n)` of its largest stage, divided by the
//! least degree of whoever holds the same layers ([`ring`], [`Exchanges::rings`]).

use serde::{Deserialize, Serialize};

use crate::bound::maximise;
use crate::instance::{Curve, Exchange, Held, Instance, Link, Schedule};

use super::chain::{Holding, Ring};
use super::dual::{Case, Dual};
use super::table::Table;
use super::{Effort, Meter};

/// Seconds that no step can beat, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bound {
    /// The largest of all below.
    pub seconds: f64,
    /// Compute alone.
    pub compute_s: f64,
    /// Compute, memory and unavoidable fill.
    pub fill_s: f64,
    /// The same with the exchange.
    pub exchange_s: f64,
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
                    if row.samples() > instance.global_batch {
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
                        let (tensor_parallel, group) = row.shape();
                        let held = Held::new(instance, class, degree, group / tensor_parallel.max(1));
                        let needed = held.state_bytes
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
        Self { seconds: compute_s, compute_s, fill_s: compute_s, exchange_s: compute_s, prices }
    }

    /// The bound with all that is known of memory, fill and exchange, up to `enough` seconds: nothing
    /// above that is proven.
    pub fn up_to(instance: &Instance, enough: f64) -> Self {
        let mut bound = Self::new(instance);
        bound.sharpen(instance, enough, &mut Meter::new(&Effort::default()));
        bound
    }

    /// Adds what memory, fill and exchange cost, up to `enough` seconds: those of a layout that is
    /// known. As much as `meter` allows.
    pub(crate) fn sharpen(&mut self, instance: &Instance, enough: f64, meter: &mut Meter<'_>) {
        if !self.compute_s.is_finite() || enough <= self.compute_s {
            return;
        }
        let table = Table::new(instance, |pool, _| instance.pools[pool].nodes > 0);
        // At best every device holds each layer.
        if instance.rules.shard_optimizer {
            table.shards.set(instance.num_devices() as f64);
        }
        let exchanges = Exchanges::new(instance);
        let schedules = fastest_to_fill(schedules(instance));
        let mut dual = Dual::new(&table, &schedules, exchanges.holding, enough, meter);
        let devices = instance.pools.iter().map(|pool| pool.num_devices() as f64);
        let mut shares: Vec<f64> = devices.zip(&self.prices).map(|(n, price)| n * price).collect();
        shares.extend([0.0; 3]);
        let any = Case { exchange: None, pipelines: None, ring: Ring::free(instance.pools.len()) };
        let fill_s = dual.seconds(&any, enough, 8, &mut shares);
        self.fill_s = self.fill_s.max(fill_s * (1.0 - 1e-9));
        self.exchange_s = self.exchange_s.max(self.fill_s);
        let exchange_s = exchanges.seconds(&mut dual, self.fill_s, enough, &shares);
        self.exchange_s = self.exchange_s.max(exchange_s * (1.0 - 1e-9));
        self.seconds = self.seconds.max(self.fill_s).max(self.exchange_s);
    }
}

/// Schedules that a layout may use.
pub(crate) fn schedules(instance: &Instance) -> Vec<Schedule> {
    let mut schedules = vec![Schedule::OneForwardOneBackward];
    for schedule in &instance.rules.schedules {
        if !schedules.contains(schedule) {
            schedules.push(*schedule);
        }
    }
    schedules
}

/// Those that fill in the least time: not 1F1B beside zero bubbles, which need no more memory. (What it
/// hides more of an exchange, the bound allows to both.)
pub(crate) fn fastest_to_fill(mut schedules: Vec<Schedule>) -> Vec<Schedule> {
    if schedules.contains(&Schedule::ZeroBubble) {
        schedules.retain(|schedule| *schedule != Schedule::OneForwardOneBackward);
    }
    schedules
}

/// What a layout must exchange at least.
struct Exchanges<'a> {
    instance: &'a Instance,
    holding: Holding,
}

impl<'a> Exchanges<'a> {
    fn new(instance: &'a Instance) -> Self {
        let holding = match instance.rules.exchange {
            Exchange::FlatRing { .. } => Holding { seconds_a_byte: 0.0, hides: 0.0 },
            Exchange::Hierarchical => Holding {
                seconds_a_byte: both(instance) / within(instance).0,
                hides: instance.rules.exchange_overlap,
            },
        };
        Self { instance, holding }
    }

    /// Seconds of a step, over all that its exchange may take. `least_s`: of its pipelines, whatever
    /// they exchange.
    fn seconds(&self, dual: &mut Dual<'_, '_, '_>, least_s: f64, enough: f64, shares: &[f64]) -> f64 {
        let span = enough - least_s;
        match self.instance.rules.exchange {
            Exchange::Hierarchical => {
                let (rate, alone) = within(self.instance);
                let devices = self.instance.num_devices() as f64;
                let free = alone * gradients(self.instance) * both(self.instance) / rate;
                let cases = |_: usize, most: f64| {
                    let exchange = Some(most * devices + free);
                    vec![Case { exchange, pipelines: None, ring: Ring::free(self.instance.pools.len()) }]
                };
                over_exchanges(dual, (1, &cases), least_s, enough, shares)
            }
            Exchange::FlatRing { .. } if self.instance.rules.exchange_overlap > 0.0 || span <= 0.0 => least_s,
            Exchange::FlatRing { bucket_bytes } => {
                // Any layout has its number of pipelines between two neighbours of these.
                let most = self.instance.num_devices() as f64;
                let num = PIPELINES.iter().filter(|low| **low <= most).count();
                let cases = |at: usize, seconds: f64| {
                    let pipelines = PIPELINES[..num].get(at + 1).map(|next| next - 1.0);
                    let rings = self.rings(PIPELINES[at], seconds, bucket_bytes);
                    rings.into_iter().map(|ring| Case { exchange: None, pipelines, ring }).collect()
                };
                over_exchanges(dual, (num, &cases), least_s, enough, shares)
            }
        }
    }

    /// What the rings of so many pipelines or more allow in `seconds`, by what all layers take together
    /// ([`super::chain`]): no layout is outside of all of these.
    fn rings(&self, pipelines: f64, seconds: f64, bucket_bytes: f64) -> Vec<Ring> {
        let instance = self.instance;
        if pipelines < 2.0 {
            return vec![Ring::free(instance.pools.len())];
        }
        let seconds_a_byte = self.seconds_a_byte(pipelines, seconds, bucket_bytes);
        let all = gradients(instance);
        let slowest = seconds_a_byte.iter().copied().fold(0.0, f64::max) * all;
        let fastest = seconds_a_byte.iter().copied().fold(f64::INFINITY, f64::min) * all;
        let widest = instance.pools.iter().map(|pool| pool.devices_per_node).max().unwrap_or(1);
        let fastest = fastest / f64::from(widest);
        let mut rings = Vec::new();
        for (at, fewest) in STAGES.iter().enumerate() {
            let least_s = (*fewest as f64 - 1.0) * seconds;
            let layers_s = STAGES.get(at + 1).map_or(f64::INFINITY, |next| (*next as f64 - 1.0) * seconds);
            if least_s <= slowest && layers_s * (1.0 + 1e-9) >= fastest {
                let layers_s = if layers_s < slowest { layers_s } else { f64::INFINITY };
                let seconds_a_byte = seconds_a_byte.clone();
                rings.push(Ring { seconds_a_byte, stage_s: seconds, layers_s, stages: *fewest });
            }
        }
        rings
    }

    /// Seconds of a gradient byte of a stage of each pool, divided by its degree, in a ring of so many
    /// pipelines or more that takes no more than `seconds`. What a group of layers sends is not more than
    /// what a stage with its least degree holds, so a bound on that bounds its messages, whose sizes bound
    /// the rates of links; and the holders on a pool have a link of it on one side at least.
    fn seconds_a_byte(&self, pipelines: f64, seconds: f64, bucket_bytes: f64) -> Vec<f64> {
        let instance = self.instance;
        let mut group = gradients(instance);
        let mut of_pools = Vec::new();
        for _ in 0..3 {
            let messages = group.min(bucket_bytes) / pipelines;
            let pools = 0..instance.pools.len();
            of_pools = pools.map(|pool| ring(instance, pool, pipelines, messages)).collect();
            group = group.min(of_pools.iter().map(|rate| seconds / rate).fold(0.0, f64::max));
        }
        of_pools
    }
}

/// Numbers of pipelines between which layouts are bounded apart.
const PIPELINES: [f64; 15] =
    [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0, 256.0, 1024.0];

/// Fewest stages of any pipeline by which layouts are bounded apart.
const STAGES: [usize; 7] = [1, 2, 3, 4, 5, 7, 9];

/// The cases of a kind by the seconds of their exchange at most.
type Cases<'c> = &'c dyn Fn(usize, f64) -> Vec<Case>;

/// The least of `X + seconds of the pipelines` over all X and so many kinds of cases. What is least is
/// divided, until it is narrow.
fn over_exchanges(
    dual: &mut Dual<'_, '_, '_>,
    (kinds, cases): (usize, Cases<'_>),
    least_s: f64,
    enough: f64,
    shares: &[f64],
) -> f64 {
    let all = (0.0, enough - least_s);
    let part =
        |kind| Part { kind, seconds: least_s, span: all, asked: f64::INFINITY, shares: shares.to_vec() };
    let mut open: Vec<Part> = (0..kinds).map(part).collect();
    for _ in 0..kinds * PARTS {
        let order = |a: &usize, b: &usize| open[*a].seconds.total_cmp(&open[*b].seconds);
        let Some(at) = (0..open.len()).min_by(order) else { break };
        let (low, high) = open[at].span;
        let is_narrow = high - low < NARROW * enough;
        // Of a wider part: it was asked with fewer rows known.
        let is_old = open[at].asked > 3.0 * (high - low);
        if open[at].seconds >= enough || is_narrow && !is_old {
            break;
        }
        let mut part = open.swap_remove(at);
        if part.asked.is_finite() && !is_narrow {
            let middle = f64::midpoint(low, high);
            let pipelines = part.seconds - low;
            open.push(Part { span: (low, middle), asked: f64::INFINITY, ..part.clone() });
            open.push(Part { seconds: pipelines + middle, span: (middle, high), ..part });
            continue;
        }
        let mut found = enough - low;
        for case in cases(part.kind, high) {
            found = dual.seconds(&case, found, if dual.rings { 4 } else { 6 }, &mut part.shares);
            if low + found <= part.seconds {
                break;
            }
        }
        part.seconds = part.seconds.max(low + found);
        part.asked = high - low;
        open.push(part);
    }
    open.iter().map(|part| part.seconds).fold(enough, f64::min)
}

/// A part of what an exchange may take.
#[derive(Debug, Clone)]
struct Part {
    kind: usize,
    /// Seconds of a step at least.
    seconds: f64,
    /// Seconds of the exchange, from and to.
    span: (f64, f64),
    /// How wide the part with this upper end was for which `seconds` were found; infinite where they are of
    /// another upper end.
    asked: f64,
    /// Prices to begin with.
    shares: Vec<f64>,
}

/// Width of a part that is not divided any more, as a part of a step.
const NARROW: f64 = 0.003;
/// Parts of the exchange's time that are looked at, for each kind of cases.
const PARTS: usize = 24;

/// Bytes that a gradient byte moves, with the parameters that come back.
fn both(instance: &Instance) -> f64 {
    let second = |c: &crate::instance::LayerClass| {
        if instance.rules.shard_optimizer {
            c.parameter_bytes.min(c.gradient_bytes)
        } else {
            c.gradient_bytes
        }
    };
    let used = instance.classes.iter().filter(|c| c.gradient_bytes > 0.0);
    used.map(|c| 1.0 + second(c) / c.gradient_bytes).fold(2.0, f64::min)
}

/// Bytes a second between nodes, and devices that hold a layer without it: D devices exchange at
/// least `(D − devices) · bytes / rate` device-seconds.
fn within(instance: &Instance) -> (f64, f64) {
    let layers = instance.classes.iter().map(|c| c.gradient_bytes).filter(|b| *b > 0.0);
    let sizes =
        (layers.fold(f64::INFINITY, f64::min) / instance.num_devices() as f64, gradients(instance) * 2.0);
    let num = instance.pools.len();
    let within = (0..num).map(|p| fastest(&instance.inter[p][p], sizes)).fold(0.0, f64::max);
    let across = (0..num)
        .flat_map(|p| (0..num).filter(move |q| *q != p).map(move |q| (p, q)))
        .map(|(p, q)| fastest(&instance.inter[p][q], sizes))
        .fold(0.0, f64::max);
    let per_node = instance.pools.iter().map(|p| p.devices_per_node).max().unwrap_or(1);
    // K pools of n nodes together: (1 − K/n) / within + (K − 1)/n / across, the least over K.
    let saved = if across > within { num as f64 - (num as f64 - 1.0) * within / across } else { 1.0 };
    (within, saved * f64::from(per_node))
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

/// Gradient bytes of the model.
pub(crate) fn gradients(instance: &Instance) -> f64 {
    instance.runs.iter().map(|r| instance.classes[r.class].gradient_bytes * f64::from(r.count)).sum()
}

/// Seconds that a stage of a pool exchanges at least, a gradient byte divided by its degree, with at
/// least so many pipelines and messages of at most so many bytes.
fn ring(instance: &Instance, pool: usize, pipelines: f64, messages: f64) -> f64 {
    let largest = f64::from(instance.degrees.last().copied().unwrap_or(1));
    let layers = instance.runs.iter().map(|r| instance.classes[r.class].gradient_bytes);
    let small = layers.filter(|b| *b > 0.0).fold(f64::INFINITY, f64::min);
    let most = instance.num_devices() as f64;
    let sizes = (small / largest / most, messages);
    let pools = 0..instance.pools.len();
    let beside = pools.map(|other| {
        let both = [&instance.inter[pool][other], &instance.inter[other][pool]];
        both.map(|link| link.curve(1, 1).map_or(0.0, |curve| fastest_curve(curve, sizes)))
            .into_iter()
            .fold(0.0, f64::max)
    });
    2.0 * (pipelines - 1.0) / pipelines / beside.fold(0.0, f64::max)
}

/// Seconds of a message from device to device at least, whatever its size, and of each of its bytes.
pub(crate) fn quickest(instance: &Instance, link: &Link) -> (f64, f64) {
    match link.curve(1, 1) {
        Some(Curve::AlphaBeta { latency_s, bytes_per_s }) => (*latency_s, 1.0 / bytes_per_s),
        Some(curve) => (0.0, 1.0 / fastest_curve(curve, (1.0, gradients(instance)))),
        None => (f64::INFINITY, f64::INFINITY),
    }
}

/// The best rate of a link for any message in a range of sizes, whatever devices use it.
fn fastest(link: &Link, sizes: (f64, f64)) -> f64 {
    link.rows.iter().map(|row| fastest_curve(&row.curve, sizes)).fold(0.0, f64::max)
}

fn fastest_curve(curve: &Curve, (smallest, largest): (f64, f64)) -> f64 {
    let ends = curve.bytes_per_s(smallest).max(curve.bytes_per_s(largest));
    match curve {
        Curve::AlphaBeta { bytes_per_s, .. } => *bytes_per_s,
        Curve::Polynomial { a, b, smallest_bytes, .. } => {
            let vertex = (-b / (2.0 * a)).exp2() * 1e6;
            let inner = if vertex > smallest && vertex < largest { curve.bytes_per_s(vertex) } else { 0.0 };
            ends.max(inner).max(curve.bytes_per_s(*smallest_bytes))
        }
    }
}

//! The search over thousands of devices.
//!
//! What an exchange costs depends on the largest stage and the smallest degree, and nothing else of a
//! form; so for each such pair (a *context*) the search makes pipelines by their value under device
//! prices ([`super::generate`]), lets a linear programme choose how many of each and gives its prices
//! back (column generation), estimates the step, and makes whole numbers of the most promising ones.

use crate::instance::{Schedule, check, price};

use super::Meter;
use super::form::Form;
use super::generate::{Generator, Wish};
use super::program::{Column, Relaxed, relaxed, whole};
use super::settle::{Crew, Settled, least_seconds, polish, settle};
use super::table::Table;

/// Which part of the space one run looks at, and what is known before.
#[derive(Debug, Clone)]
pub(crate) struct Start<'s> {
    /// Devices of each pool that may be used.
    pub(crate) limits: Vec<u64>,
    /// First prices of a device of each pool.
    pub(crate) prices: Vec<f64>,
    /// Seconds that no step can beat.
    pub(crate) bound: f64,
    /// A step that is known.
    pub(crate) best: Option<f64>,
    /// Ratio between the largest stages of neighbouring contexts.
    pub(crate) step: f64,
    /// How many contexts are made whole.
    pub(crate) depth: usize,
    pub(crate) schedules: &'s [Schedule],
}

/// One context with what the linear programme says of it.
struct Context {
    least_degree: u32,
    most_degree: u32,
    largest: f64,
    seconds: f64,
    exchange: f64,
    prices: Vec<f64>,
    /// (size, schedule, micro-batches) that its solution uses.
    used: Vec<(usize, Schedule, f64)>,
}

pub(crate) struct Search<'a, 't, 'm> {
    table: &'t Table<'a>,
    start: &'t Start<'t>,
    meter: &'t mut Meter<'m>,
    generator: Generator,
    forms: Vec<Form>,
    pub(crate) best: Option<Settled>,
    /// Prices of devices in the best context.
    pub(crate) prices: Vec<f64>,
}

impl<'a, 't, 'm> Search<'a, 't, 'm> {
    pub(crate) fn new(table: &'t Table<'a>, start: &'t Start<'t>, meter: &'t mut Meter<'m>) -> Self {
        let prices = start.prices.clone();
        Self { table, start, meter, generator: Generator::default(), forms: Vec::new(), best: None, prices }
    }

    /// Runs until done (`Some`) or out of nodes.
    pub(crate) fn run(&mut self) -> Option<()> {
        let mut contexts = Vec::new();
        let many = self.many();
        let mut pairs = self.contexts();
        if many {
            self.most_promising(&mut pairs);
        }
        for (least_degree, largest) in pairs {
            let mut context = Context {
                least_degree,
                most_degree: if many { least_degree * 2 } else { u32::MAX },
                largest,
                seconds: self.start.best.unwrap_or(self.start.bound * 1.3),
                exchange: 0.0,
                prices: self.start.prices.clone(),
                used: Vec::new(),
            };
            self.coarse(&mut context)?;
            if context.seconds.is_finite() {
                contexts.push(context);
            }
        }
        contexts.sort_by(|a, b| (a.seconds + a.exchange).total_cmp(&(b.seconds + b.exchange)));
        let depth = if self.many() { self.start.depth.div_ceil(2) } else { self.start.depth };
        for at in 0..contexts.len().min(depth) {
            let known = self.known();
            // A coarse sum says little where much is left out.
            let slack = if self.many() { 1.5 } else { 1.06 };
            let context = &mut contexts[at];
            if at > 0 && (context.seconds + context.exchange) > known * slack {
                continue;
            }
            for _ in 0..if self.many() { 2 } else { 3 } {
                self.refine(context)?;
                if self.many() && (context.seconds + context.exchange) > known * 1.2 {
                    break;
                }
            }
            if at > 0 && (context.seconds + context.exchange) > known * 1.06 {
                continue;
            }
            self.make_whole(context)?;
        }
        if let Some(best) = self.best.take() {
            self.best = Some(polish(self.table, best.clone(), 6, self.meter).unwrap_or(best));
        }
        Some(())
    }

    fn known(&self) -> f64 {
        let own = self.best.as_ref().map_or(f64::INFINITY, Settled::seconds);
        own.min(self.start.best.unwrap_or(f64::INFINITY))
    }

    /// Pairs of smallest degree and largest stage, from the cheapest exchange to the dearest.
    fn contexts(&self) -> Vec<(u32, f64)> {
        let table = self.table;
        let total = table.gradient[table.num_layers];
        let layer =
            (0..table.num_layers).map(|l| table.gradient[l + 1] - table.gradient[l]).fold(0.0, f64::max);
        let mut sizes = Vec::new();
        let mut size = total * 1.001;
        while size > layer * 1.02 {
            sizes.push(size);
            size /= if sizes.len() == 1 { 1.4 } else { self.start.step };
        }
        sizes.push(layer);
        let mut degrees: Vec<u32> = table.choices.iter().map(|c| c.degree).collect();
        degrees.sort_unstable();
        degrees.dedup();
        let flat = !matches!(table.instance.rules.exchange, crate::instance::Exchange::Hierarchical);
        if !flat && !self.many() {
            degrees.truncate(1);
        }
        degrees.iter().rev().flat_map(|d| sizes.iter().map(move |size| (*d, *size))).collect()
    }

    /// Whether there is too much to look at everything.
    fn many(&self) -> bool {
        self.table.ends.len() > MANY_ENDS || self.table.num_layers > MANY_LAYERS
    }

    fn most_stages(&self) -> usize {
        self.table.num_layers.min(MOST_STAGES)
    }

    /// Keeps the contexts whose step is the shortest by a rough sum: compute at these degrees, what
    /// as many stages as the largest allows lose to fill, and their exchange.
    fn most_promising(&self, pairs: &mut Vec<(u32, f64)>) {
        let table = self.table;
        let instance = table.instance;
        let batch = f64::from(instance.global_batch);
        let total = table.gradient[table.num_layers];
        let devices: u64 = self.start.limits.iter().sum();
        let rate = super::bound::exchange(instance, 16.0);
        let step = |(degree, largest): &(u32, f64)| -> f64 {
            let stages = (total / largest).max(1.0);
            // Seconds of a sample on all devices at this degree, each kind at its own rate.
            let mut speed = 0.0;
            for (pool, limit) in self.start.limits.iter().enumerate().filter(|(_, n)| **n > 0) {
                let of_size = |size: usize| {
                    let choice = table
                        .choices
                        .iter()
                        .position(|c| c.pool == pool && c.degree == *degree && !c.recompute);
                    choice.map_or(f64::INFINITY, |c| {
                        let (forward, backward) = table.compute(c, size, 0, table.num_layers);
                        (forward + backward) / f64::from(table.micro_batches[size])
                    })
                };
                let best = (0..table.micro_batches.len()).map(of_size).fold(f64::INFINITY, f64::min);
                speed += *limit as f64 / f64::from(*degree) / best;
            }
            let lost = devices as f64 / f64::from(*degree) * (1.0 - 1.0 / stages);
            (batch + lost) / speed + rate * largest
        };
        pairs.sort_by(|a, b| step(a).total_cmp(&step(b)));
        pairs.truncate(self.start.depth * 2);
    }

    /// Makes pipelines on a coarse grid of paces and solves the linear programme.
    fn coarse(&mut self, context: &mut Context) -> Option<()> {
        let table = self.table;
        let batch = f64::from(table.instance.global_batch);
        let devices: u64 = self.start.limits.iter().sum();
        for size in 0..table.micro_batches.len() {
            let samples = f64::from(table.micro_batches[size]);
            let most = batch / samples;
            let mut nums = Vec::new();
            if self.many() {
                // So many stages of that degree make so many pipelines, and these so many micro-batches.
                let stages = (table.gradient[table.num_layers] / context.largest).max(1.0);
                for longer in [1.0, 1.35] {
                    let stages = stages * longer;
                    let pipelines = (devices as f64 / (stages * f64::from(context.least_degree))).max(1.0);
                    nums.push((most / pipelines).max(1.0) + stages - 1.0);
                    nums.push(((most / pipelines).max(1.0) + stages - 1.0) * 0.8);
                }
            } else {
                let mut num = 1.6;
                while num < most * 1.5 + 4.0 {
                    nums.push(num);
                    num *= 1.7;
                }
            }
            for num in nums {
                for schedule in self.start.schedules {
                    self.generate(context, size, *schedule, num, 3)?;
                    if self.many() {
                        self.generate_alone(context, size, *schedule, num)?;
                    }
                }
            }
        }
        self.solve(context)
    }

    /// Makes more pipelines about those that the solution uses, at its prices.
    fn refine(&mut self, context: &mut Context) -> Option<()> {
        for (size, schedule, num) in context.used.clone() {
            let near = [size.saturating_sub(1), size, size + 1];
            for size in near.iter().filter(|s| **s < self.table.micro_batches.len()) {
                let ratio =
                    f64::from(self.table.micro_batches[*size]) / f64::from(self.table.micro_batches[near[1]]);
                let grid: &[f64] = if self.many() {
                    &[0.85, 1.0, 1.12]
                } else {
                    &[0.6, 0.75, 0.85, 0.93, 1.0, 1.06, 1.13, 1.25, 1.45]
                };
                for by in grid {
                    self.generate(context, *size, schedule, num * by / ratio, 4)?;
                }
            }
        }
        self.solve(context)
    }

    /// The same of each pool alone, so that the linear programme can use all devices.
    fn generate_alone(
        &mut self,
        context: &mut Context,
        size: usize,
        schedule: Schedule,
        num: f64,
    ) -> Option<()> {
        let prices = context.prices.clone();
        let pools: Vec<usize> = (0..prices.len()).filter(|p| prices[*p].is_finite()).collect();
        if pools.len() < 2 {
            return Some(());
        }
        for pool in pools {
            let alone = |(at, price): (usize, &f64)| if at == pool { *price } else { f64::INFINITY };
            context.prices = prices.iter().enumerate().map(alone).collect();
            let done = self.generate(context, size, schedule, num, 1);
            context.prices.clone_from(&prices);
            done?;
        }
        Some(())
    }

    /// Pipelines whose pace is that of `num` micro-batches and fill in the context's time.
    fn generate(
        &mut self,
        context: &Context,
        size: usize,
        schedule: Schedule,
        num: f64,
        keep: usize,
    ) -> Option<()> {
        if num < 0.9 || !context.seconds.is_finite() {
            return Some(());
        }
        let wish = Wish {
            size,
            schedule,
            pace: context.seconds / num,
            prices: &context.prices,
            least_degree: context.least_degree,
            most_degree: context.most_degree,
            value: f64::from(self.table.micro_batches[size]) * num,
            beam: if self.many() { BEAM } else { usize::MAX },
            largest: context.largest,
            most_stages: self.most_stages(),
            keep,
        };
        let first = self.forms.len();
        self.generator.make(self.table, &wish, self.meter, &mut self.forms)?;
        // Each form once.
        let mut at = first;
        while at < self.forms.len() {
            let (known, new) = self.forms.split_at(at);
            let alike = |f: &Form| {
                f.size == new[0].size
                    && f.stages.len() == new[0].stages.len()
                    && f.schedule == new[0].schedule
                    && f.stages == new[0].stages
            };
            if known.iter().any(alike) {
                self.forms.swap_remove(at);
            } else {
                at += 1;
            }
        }
        Some(())
    }

    /// Forms that a context allows.
    fn allowed(&self, context: &Context) -> Vec<usize> {
        (0..self.forms.len())
            .filter(|at| {
                let form = &self.forms[*at];
                (form.least_degree >= context.least_degree || context.most_degree < u32::MAX)
                    && form.largest <= context.largest * (1.0 + 1e-9)
                    && form.used.iter().zip(&self.start.limits).all(|(u, n)| u64::from(*u) <= *n)
            })
            .collect()
    }

    fn columns(&self, allowed: &[usize], seconds: f64) -> Vec<Column> {
        allowed
            .iter()
            .map(|at| {
                let form = &self.forms[*at];
                Column { used: form.used.clone(), samples: form.samples(self.table, seconds) }
            })
            .collect()
    }

    /// The least time at which the linear programme does the batch.
    fn solve(&mut self, context: &mut Context) -> Option<()> {
        let allowed = self.allowed(context);
        let batch = f64::from(self.table.instance.global_batch);
        let (mut low, mut high) = (self.start.bound * 0.5, self.start.bound * 1.3);
        let mut solution: Option<(f64, Relaxed)> = None;
        for _ in 0..40 {
            let at = if solution.is_some() { f64::midpoint(low, high) } else { high };
            let columns = self.columns(&allowed, at);
            self.meter.spend(columns.len() as u64 * 20)?;
            let found = relaxed(&columns, &self.start.limits);
            if found.value >= batch {
                solution = Some((at, found));
                high = at;
            } else if solution.is_some() {
                low = at;
            } else {
                low = high;
                high *= 1.5;
            }
            if solution.is_some() && high - low < 1e-3 * high {
                break;
            }
        }
        let Some((seconds, found)) = solution else {
            context.seconds = f64::INFINITY;
            return Some(());
        };
        context.seconds = seconds;
        // A pool whose devices are worth nothing still needs a small price, or forms waste them.
        let most = found.prices.iter().copied().fold(0.0, f64::max);
        context.prices = found
            .prices
            .iter()
            .zip(&self.start.prices)
            .map(|(now, first)| if first.is_finite() { now.max(most * 0.02) } else { f64::INFINITY })
            .collect();
        context.used.clear();
        let mut crew: Crew = Vec::new();
        for (at, count) in allowed.iter().zip(&found.counts) {
            if *count > 1e-6 {
                let form = &self.forms[*at];
                context.used.push((form.size, form.schedule, seconds / form.pace));
                crew.push((form.clone(), count.round().max(1.0) as u32));
            }
        }
        // What it exchanges: roughly, as counts are rounded.
        let templates = crew.iter().map(|(form, count)| form.template(self.table, *count, 1)).collect();
        let shard_optimizer = self.table.instance.rules.shard_optimizer;
        let rough = price(self.table.instance, &crate::instance::Layout { templates, shard_optimizer });
        context.exchange = rough.exchange_s + rough.update_s;
        Some(())
    }

    /// Whole numbers of pipelines: the least time that they allow, by bisection.
    fn make_whole(&mut self, context: &Context) -> Option<()> {
        let allowed = self.allowed(context);
        let batch = u64::from(self.table.instance.global_batch);
        let mut low = context.seconds;
        let mut high = (self.known() - context.exchange * 0.9).min(context.seconds * 1.6);
        let mut at = context.seconds * 1.01;
        for _ in 0..9 {
            if at >= high || high - low < 2e-3 * low {
                at = f64::midpoint(low, high);
                if high - low < 2e-3 * low {
                    break;
                }
            }
            let columns = self.columns(&allowed, at);
            self.meter.spend(columns.len() as u64 * 20)?;
            let relaxed = relaxed(&columns, &self.start.limits);
            let counts = whole(&columns, &self.start.limits, &relaxed, self.meter)?;
            let crew: Crew = allowed
                .iter()
                .zip(&counts)
                .filter(|(_, n)| **n > 0)
                .map(|(at, n)| (self.forms[*at].clone(), *n))
                .collect();
            let done: u64 = crew.iter().map(|(f, n)| u64::from(*n) * f.samples(self.table, at)).sum();
            if done >= batch {
                high = at.min(least_seconds(self.table, &crew));
                self.offer(&crew, &context.prices);
            } else {
                low = at;
            }
            at = f64::midpoint(low, high);
        }
        Some(())
    }

    /// Settles pipelines and keeps them if they are the best.
    fn offer(&mut self, crew: &Crew, prices: &[f64]) {
        let Some(found) = settle(self.table, crew) else { return };
        let better = self.best.as_ref().is_none_or(|best| found.seconds() < best.seconds());
        if better && check(self.table.instance, &found.layout).is_empty() {
            self.best = Some(found);
            self.prices = prices.to_vec();
        }
    }
}

/// Ways to place a stage beyond which the search looks at fewer of them at a time.
const MANY_ENDS: usize = 8;
/// Layers beyond which it does.
const MANY_LAYERS: usize = 40;
/// Suffixes of a length that are then gone on with.
const BEAM: usize = 48;
/// Stages of a pipeline at most; more has never been of use.
const MOST_STAGES: usize = 48;

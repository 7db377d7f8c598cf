//! The search over thousands of devices.
//!
//! What an exchange costs depends on the largest stage and the smallest degree, and nothing else of a
//! form; so for each such pair (a *context*) the search makes pipelines by their value under device
//! prices ([`super::generate`]), lets a linear programme choose how many of each and gives its prices
//! back (column generation), estimates the step, and makes whole numbers of the most promising ones.

use std::collections::BTreeSet;

use crate::instance::{Schedule, check, price};

mod apart;

use super::even::Even;
use super::form::Form;
use super::generate::{Generator, Wish};
use super::program::{Column, Relaxed, relaxed, whole};
use super::settle::{Crew, Settled, least_seconds, polish, settle};
use super::table::Table;
use super::{Meter, NEAR};

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
    /// The best of each number of pipelines that is near the best of all.
    pub(crate) near: Vec<Settled>,
    /// Whether any layout fitted, however slow.
    pub(crate) fits: bool,
}

impl<'a, 't, 'm> Search<'a, 't, 'm> {
    pub(crate) fn new(table: &'t Table<'a>, start: &'t Start<'t>, meter: &'t mut Meter<'m>) -> Self {
        Self {
            table,
            start,
            meter,
            generator: Generator::default(),
            forms: Vec::new(),
            best: None,
            near: Vec::new(),
            fits: false,
        }
    }

    /// Runs until done (`Some`) or out of nodes.
    pub(crate) fn run(&mut self) -> Option<()> {
        let done = self.everything();
        if let Some(best) = self.best.take() {
            let best = polish(self.table, best.clone(), 6, self.meter).unwrap_or(best);
            let whole = self.with_whole_backwards(&best.crew);
            self.best = Some(best);
            if let Some(crew) = whole {
                self.offer(&crew);
            }
        }
        done
    }

    /// The same pipelines under 1F1B, which hides more of an exchange than zero bubbles that fill faster.
    fn with_whole_backwards(&self, crew: &Crew) -> Option<Crew> {
        let plain = Schedule::OneForwardOneBackward;
        let whole = |(form, count): &(Form, u32)| {
            Some((Form::new(self.table, form.size, plain, form.stages.clone())?, *count))
        };
        let divided = |(form, _): &(Form, u32)| form.schedule == Schedule::ZeroBubble;
        crew.iter().any(divided).then(|| crew.iter().map(whole).collect()).flatten()
    }

    fn everything(&mut self) -> Option<()> {
        self.evenly()?;
        let of = self.table.instance;
        if !self.has_many_ways() || of.pools.len() > FEW_POOLS || of.num_devices() > FEW_ALTOGETHER {
            self.apart()?;
        }
        if self.has_many_ways() {
            return self.combine();
        }
        let mut contexts = Vec::new();
        let all = self.contexts();
        let (mut at, mut stride) = (0, 1);
        while let Some((least_degree, largest)) = all.get(at) {
            let mut context = self.context(*least_degree, *largest);
            self.coarse(&mut context)?;
            if context.seconds.is_finite() {
                contexts.push(context);
            }
            if at == 0 {
                // As many as half of the work allows, evenly spaced.
                let whole = self.generator.work.saturating_mul(all.len() as u64);
                stride = whole.div_ceil(self.most_work() / 2).max(1) as usize;
            }
            at += stride;
        }
        contexts.sort_by(|a, b| (a.seconds + a.exchange).total_cmp(&(b.seconds + b.exchange)));
        for (at, context) in contexts.iter_mut().take(self.start.depth).enumerate() {
            let known = self.known() * 1.06;
            if at > 0 && (context.seconds + context.exchange) > known {
                continue;
            }
            for _ in 0..3 {
                self.refine(context)?;
            }
            if at > 0 && (context.seconds + context.exchange) > known {
                continue;
            }
            self.make_whole(context)?;
        }
        Some(())
    }

    /// Whether there are too many for more than alike pipelines.
    fn has_many_ways(&self) -> bool {
        self.table.ends.len() > MANY_ENDS || self.table.num_layers > MANY_LAYERS
    }

    /// Stages that generators may try. In a flat ring the largest stage decides how long every exchange
    /// takes; what goes between nodes once and hides is worth less of a search.
    fn most_work(&self) -> u64 {
        match self.table.instance.rules.exchange {
            crate::instance::Exchange::FlatRing { .. } => u64::MAX,
            crate::instance::Exchange::Hierarchical => {
                // Each pool is searched alone, too.
                HIDDEN_WORK * 4 / (self.table.instance.pools.len() as u64).max(4)
            }
        }
    }

    fn context(&self, least_degree: u32, largest: f64) -> Context {
        Context {
            least_degree,
            largest,
            seconds: self.start.best.unwrap_or(self.start.bound * 1.3),
            exchange: 0.0,
            prices: self.start.prices.clone(),
            used: Vec::new(),
        }
    }

    /// Unlike ones of the pipelines that were found beside each other.
    fn combine(&mut self) -> Option<()> {
        if self.forms.is_empty() {
            return Some(());
        }
        let mut context = self.context(0, f64::INFINITY);
        self.solve(&mut context)?;
        if context.seconds.is_finite() { self.make_whole(&context) } else { Some(()) }
    }

    /// Alike pipelines, as many as may be worth it.
    fn evenly(&mut self) -> Option<()> {
        let batch = f64::from(self.table.instance.global_batch);
        let shards = self.table.shards.get();
        for size in 0..self.table.micro_batches.len() {
            let samples = f64::from(self.table.micro_batches[size]);
            for schedule in self.start.schedules {
                for num in counts(&self.start.limits, batch / samples) {
                    let share = |limit: &u64| (limit / num) as u32;
                    let devices: Vec<u32> = self.start.limits.iter().map(share).collect();
                    let micro_batches = batch / samples / num as f64;
                    self.of_these(&devices, size, *schedule, micro_batches, num)?;
                }
            }
        }
        self.table.shards.set(shards);
        Some(())
    }

    /// `num` pipelines on that many devices each.
    fn of_these(
        &mut self,
        devices: &[u32],
        size: usize,
        schedule: Schedule,
        micro_batches: f64,
        num: u64,
    ) -> Option<()> {
        if self.table.instance.rules.shard_optimizer {
            self.table.shards.set(num as f64);
        }
        let even = Even { devices, size, schedule, pipelines: num, micro_batches, enough: self.known() };
        for form in super::even::make(self.table, &even, self.meter)? {
            self.offer(&vec![(form.clone(), num as u32)]);
            self.leftover(&form, num)?;
            self.forms.push(form);
        }
        Some(())
    }

    /// The same pipelines with one of them on all devices that the others leave.
    fn leftover(&mut self, form: &Form, num: u64) -> Option<()> {
        let others = num.saturating_sub(1);
        let rest = self.start.limits.iter().zip(&form.used);
        let devices: Vec<u32> =
            rest.map(|(limit, used)| (limit - (others * u64::from(*used)).min(*limit)) as u32).collect();
        if others == 0 || devices == form.used {
            return Some(());
        }
        let samples = f64::from(self.table.micro_batches[form.size]);
        let even = Even {
            devices: &devices,
            size: form.size,
            schedule: form.schedule,
            micro_batches: f64::from(self.table.instance.global_batch) / samples / num as f64,
            enough: self.known() * 1.05,
            pipelines: num,
        };
        for last in super::even::make(self.table, &even, self.meter)? {
            self.offer(&vec![(form.clone(), others as u32), (last, 1)]);
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
        if !flat {
            degrees.truncate(1);
        }
        degrees.iter().rev().flat_map(|d| sizes.iter().map(move |size| (*d, *size))).collect()
    }

    /// Makes pipelines on a coarse grid of paces and solves the linear programme.
    fn coarse(&mut self, context: &mut Context) -> Option<()> {
        let table = self.table;
        let batch = f64::from(table.instance.global_batch);
        for size in 0..table.micro_batches.len() {
            let samples = f64::from(table.micro_batches[size]);
            let most = batch / samples;
            let mut nums = Vec::new();
            let mut num = 1.6;
            while num < most * 1.5 + 4.0 {
                nums.push(num);
                num *= 1.7;
            }
            for num in nums {
                for schedule in self.start.schedules {
                    self.generate(context, size, *schedule, num, 3)?;
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
                for by in [0.6, 0.75, 0.85, 0.93, 1.0, 1.06, 1.13, 1.25, 1.45] {
                    self.generate(context, *size, schedule, num * by / ratio, 4)?;
                }
            }
        }
        self.solve(context)
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
        if num < 0.9 || !context.seconds.is_finite() || self.generator.work > self.most_work() {
            return Some(());
        }
        let wish = Wish {
            size,
            schedule,
            pace: context.seconds / num,
            prices: &context.prices,
            least_degree: context.least_degree,
            largest: context.largest,
            most_stages: self.table.num_layers.min(MOST_STAGES),
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
                form.least_degree >= context.least_degree
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
                self.offer(&crew);
            } else {
                low = at;
            }
            at = f64::midpoint(low, high);
        }
        Some(())
    }

    /// Settles pipelines and keeps them if they are the best, or near it.
    fn offer(&mut self, crew: &Crew) {
        let Some(found) = settle(self.table, crew) else { return };
        let seconds = found.seconds();
        let num = found.layout.num_pipelines();
        let alike = self.near.iter().position(|known| known.layout.num_pipelines() == num);
        let is_near =
            seconds < self.known() * NEAR && alike.is_none_or(|at| seconds < self.near[at].seconds());
        // What is not kept only tells whether anything fits.
        if self.fits && !is_near || !check(self.table.instance, &found.layout).is_empty() {
            return;
        }
        self.fits = true;
        if !is_near {
            return;
        }
        if let Some(at) = alike {
            self.near.swap_remove(at);
        }
        self.near.push(found.clone());
        if self.best.as_ref().is_none_or(|best| seconds < best.seconds()) {
            self.best = Some(found);
        }
    }
}

/// Numbers of alike pipelines that are tried: up to a micro-batch each, ever farther apart, and those of
/// one, two, three or so devices of a pool.
fn counts(limits: &[u64], micro_batches: f64) -> BTreeSet<u64> {
    let most = limits.iter().copied().max().unwrap_or(0);
    let mut counts: BTreeSet<u64> = std::iter::successors(Some(1u64), |num| Some(num + 1 + num / 12))
        .take_while(|num| *num <= most)
        .collect();
    counts.extend(limits.iter().flat_map(|limit| FEW_DEVICES.map(|devices| limit / devices)));
    counts.retain(|num| *num > 0 && *num as f64 <= micro_batches);
    counts
}

/// Pools and devices up to which pipelines through all of them are as good as those that keep to one pool,
/// where there are many ways to place a stage.
const FEW_POOLS: usize = 4;
const FEW_ALTOGETHER: u64 = 1024;
/// Devices of a pool in each of as many pipelines as there can be with them.
const FEW_DEVICES: [u64; 6] = [1, 2, 3, 4, 6, 8];
/// Stages that are tried at most where exchanges are hierarchical: some tenths of a second.
const HIDDEN_WORK: u64 = 2_000_000;
/// Ways to place a stage beyond which only alike pipelines are made.
const MANY_ENDS: usize = 8;
/// Layers beyond which it is so.
const MANY_LAYERS: usize = 40;
/// Stages of a pipeline at most; more has never been of use.
const MOST_STAGES: usize = 48;

#[cfg(test)]
mod tests {
    use super::counts;

    #[test]
    fn pipelines_are_counted_by_what_each_has_of_a_pool() {
        let all = counts(&[128, 20], 256.0);
        assert!([1, 2, 11, 16, 20, 32, 42, 64, 128].iter().all(|num| all.contains(num)), "{all:?}");
        assert!(counts(&[128, 20], 30.0).iter().all(|num| (1..=30).contains(num)));
        assert!(counts(&[], 256.0).is_empty());
    }
}

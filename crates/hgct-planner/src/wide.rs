//! Plans thousands of devices: pipelines unlike each other, uneven layers, unlike kinds, tensor
//! parallelism a stage, uneven micro-batches, recompute, any subset of the devices.
//!
//! ```text
//! Instance ─► bound ─► device prices ─┬► generate: pipelines by dynamic programming ─┐
//!                                     └─◄ program: how many of each, new prices ◄────┘
//!                                                 └► settle: micro-batches, exact price, polish ─► Found
//! ```
//!
//! Few devices are searched to the end (`exact`), if the effort suffices: what comes out is the
//! optimum. Many are not; what the best layout is short of the bound is the gap that stands beside it.
//! The same instance, parent and nodes give the same answer, bit for bit.

use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use crate::instance::{Fault, Instance, Layout, Priced, Schedule, check, check_instance, price};

mod bound;
mod chain;
mod dual;
mod even;
mod exact;
mod form;
mod generate;
mod meter;
mod moves;
mod program;
mod replan;
mod replay;
mod search;
mod settle;
mod table;

pub use bound::Bound;
use bound::{fastest_to_fill, schedules};
pub use meter::Effort;
pub(crate) use meter::Meter;
pub(crate) use program::gcd;
pub use replan::{Replan, Way, replan};
pub use replay::{Replayed, replay};

use exact::Exact;
use search::{Search, Start};
use settle::Settled;
use table::Table;

/// What a search found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// The best layout with its price, if any was found.
    pub best: Option<(Layout, Priced)>,
    /// What no layout can beat, by reasoning alone.
    pub bound: Bound,
    /// What no layout can beat: the bound, or the best itself where everything was searched.
    pub proven_s: f64,
    /// Part of the best step by which it may be too long at most: `1 − proven_s / iteration_s`.
    pub gap: Option<f64>,
    /// What makes the step longer than the compute bound, most of all: `compute` (nothing does),
    /// `bubble`, `transfer`, `exchange`, `update`, or `rounding` (samples, layers and devices are
    /// whole numbers).
    pub limited_by: String,
    /// The best of other ways, with the seconds of their steps.
    pub alternatives: Vec<Alternative>,
    /// Layouts with other numbers of pipelines that are priced nearly as well, the best first.
    pub near: Vec<(Layout, Priced)>,
    /// Nodes spent.
    pub nodes: u64,
    /// Whether the search came to its end within its effort.
    pub finished: bool,
}

/// Another way to plan, and how long its step is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Alternative {
    /// Pools that it uses; the only difference.
    pub pools: Vec<usize>,
    /// Its layout with its price; `None` where none fits.
    pub best: Option<(Layout, Priced)>,
}

/// Devices up to which everything is searched, as far as its part of the effort reaches.
const EXACT_DEVICES: u64 = 12;
/// This may take one n-th of the effort: by default about a second. Of 40 problems of nine to twelve
/// cards seven times as much answered one better, by 0.25 %, and took up to 58 seconds.
const EXACT_PART: u64 = 50;
/// Devices up to which it comes to its end nearly always, and the nodes that it may take for that.
const FEW_DEVICES: u64 = 8;
const FEW_NODES: u64 = 60_000_000;

/// Seconds of a layout that is near the best one, as a part of its seconds.
const NEAR: f64 = 1.01;

/// Nodes that the proof of a gap may take.
const PROOF_NODES: u64 = 300_000_000;

/// Searches for the fastest layout. `parent` is a layout to be no worse than, if it is sound here.
pub fn find(
    instance: &Instance,
    parent: Option<&Layout>,
    effort: &Effort<'_>,
) -> std::result::Result<Found, Vec<Fault>> {
    find_and_prove(instance, parent, effort, None)
}

/// [`find`], with a flag of its own by which the caller ends the proof of the gap, too.
pub fn find_and_prove(
    instance: &Instance,
    parent: Option<&Layout>,
    effort: &Effort<'_>,
    stop_proof: Option<&AtomicBool>,
) -> std::result::Result<Found, Vec<Fault>> {
    let faults = check_instance(instance);
    if !faults.is_empty() {
        return Err(faults);
    }
    let mut bound = Bound::new(instance);
    let first = bound.clone();
    let mut finder =
        Finder { instance, bound: &first, meter: Meter::new(effort), best: None, near: Vec::new() };
    if let Some(parent) = parent.filter(|parent| check(instance, parent).is_empty()) {
        finder.best = Some((parent.clone(), price(instance, parent)));
    }
    let mut alternatives = Vec::new();
    let mut finished = true;
    let mut proven = false;
    if bound.seconds.is_finite() {
        finished = finder.everything(&mut alternatives, &mut proven).is_some();
    }
    let best = finder.best.take();
    let near = finder.near(best.as_ref());
    let mut nodes = finder.meter.spent();
    if let (false, Some((_, priced))) = (proven, &best) {
        // Not of the search's effort: what was found is worth little without its gap.
        let mut meter = Meter::new(&Effort { nodes: PROOF_NODES, stop: stop_proof });
        bound.sharpen(instance, priced.iteration_s, &mut meter);
        nodes += meter.spent();
    }
    let step = best.as_ref().map(|(_, priced)| priced.iteration_s);
    let proven_s = step
        .filter(|_| proven)
        .unwrap_or(bound.seconds)
        .max(bound.seconds.min(step.unwrap_or(f64::INFINITY)));
    Ok(Found {
        gap: step.map(|step| (1.0 - proven_s / step).max(0.0)),
        limited_by: best.as_ref().map_or("memory", |(_, priced)| limited_by(priced, &bound)).into(),
        proven_s,
        best,
        bound,
        alternatives,
        near,
        nodes,
        finished,
    })
}

struct Finder<'a, 'm> {
    instance: &'a Instance,
    bound: &'a Bound,
    meter: Meter<'m>,
    best: Option<(Layout, Priced)>,
    near: Vec<(Layout, Priced)>,
}

impl Finder<'_, '_> {
    /// Layouts with other numbers of pipelines than the best, priced nearly as well.
    fn near(&mut self, best: Option<&(Layout, Priced)>) -> Vec<(Layout, Priced)> {
        let Some((best, priced)) = best else { return Vec::new() };
        let mut near = std::mem::take(&mut self.near);
        near.sort_by(|a, b| a.1.iteration_s.total_cmp(&b.1.iteration_s));
        let mut seen = vec![best.num_pipelines()];
        near.retain(|(layout, of)| {
            let num = layout.num_pipelines();
            let is_new = of.iteration_s < priced.iteration_s * NEAR && !seen.contains(&num);
            seen.extend(is_new.then_some(num));
            is_new
        });
        near
    }

    fn everything(&mut self, alternatives: &mut Vec<Alternative>, proven: &mut bool) -> Option<()> {
        let all: Vec<usize> = (0..self.instance.pools.len()).collect();
        if all.len() > 1 {
            for pool in all.iter().filter(|pool| self.instance.pools[**pool].nodes > 0) {
                let (found, done) = self.run(&[*pool], false);
                self.offer(found.as_ref());
                done?;
                alternatives.push(Alternative { pools: vec![*pool], best: found });
            }
        }
        let (found, done) = self.run(&all, true);
        self.offer(found.as_ref());
        done?;
        if self.instance.num_devices() <= EXACT_DEVICES {
            let others = self.instance.rules.schedules.iter().any(|s| matches!(s, Schedule::Interleaved(_)));
            self.exact()?;
            // What was not searched is not excluded.
            *proven = !others && self.instance.rules.max_replicas == 1;
        }
        Some(())
    }

    fn offer(&mut self, found: Option<&(Layout, Priced)>) {
        if let Some((layout, priced)) = found
            && self.best.as_ref().is_none_or(|(_, best)| priced.iteration_s < best.iteration_s)
        {
            self.best = Some((layout.clone(), priced.clone()));
        }
    }

    /// The best layout on some pools, and `None` when out of nodes.
    fn run(&mut self, pools: &[usize], thorough: bool) -> (Option<(Layout, Priced)>, Option<()>) {
        let instance = self.instance;
        let schedules = fastest_to_fill(schedules(instance));
        let limits: Vec<u64> = instance
            .pools
            .iter()
            .enumerate()
            .map(|(at, pool)| if pools.contains(&at) { pool.num_devices() } else { 0 })
            .collect();
        // A pool that the bound gives no worth is not for wasting either.
        let least = self.bound.prices.iter().copied().fold(0.0, f64::max) * 0.02;
        let price = |at: usize| {
            let price = self.bound.prices[at].max(least) * f64::from(instance.global_batch);
            if pools.contains(&at) { price } else { f64::INFINITY }
        };
        let prices: Vec<f64> = (0..limits.len()).map(price).collect();
        // Its own bound is longer where pools are left out.
        let worth: f64 = pools.iter().map(|p| self.bound.prices[*p] * limits[*p] as f64).sum();
        let bound = self.bound.compute_s / worth.clamp(1e-6, 1.0);
        let mut best: Option<Settled> = None;
        let is_whole =
            |pool: usize, degree: u32| instance.pools[pool].devices_per_node.is_multiple_of(degree);
        let of_pools = |pool: usize| pools.contains(&pool) && instance.pools[pool].nodes > 0;
        // Degrees that leave nothing of a node; then all, where that makes a difference, whose groups may
        // not go into nodes however few devices they take.
        let mut tables = vec![Table::new(instance, |pool, degree| of_pools(pool) && is_whole(pool, degree))];
        let any = Table::new(instance, |pool, _| of_pools(pool));
        if any.choices.len() > tables[0].choices.len() {
            tables.push(any);
        }
        for table in &tables {
            let mut shards: &[f64] = if instance.rules.shard_optimizer { &[16.0, 4.0, 1.0] } else { &[1.0] };
            while let Some((now, rest)) = shards.split_first() {
                shards = rest;
                table.shards.set(*now);
                let known = best.as_ref().map(Settled::seconds);
                let start = Start {
                    limits: limits.clone(),
                    prices: prices.clone(),
                    bound,
                    best: known,
                    step: if thorough { 1.15 } else { 1.5 },
                    depth: if thorough { 12 } else { 3 },
                    schedules: &schedules,
                };
                let mut search = Search::new(table, &start, &mut self.meter);
                let done = search.run();
                let fits = search.fits;
                self.near.extend(search.near.into_iter().map(|of| (of.layout, of.priced)));
                if let Some(found) = search.best
                    && known.is_none_or(|known| found.seconds() < known)
                {
                    best = Some(found);
                }
                // Fewer replicas share optimizer state only where many do not fit.
                if fits && self.instance.num_devices() > EXACT_DEVICES {
                    shards = &[];
                }
                if done.is_none() {
                    return (best.map(|settled| (settled.layout, settled.priced)), None);
                }
            }
        }
        (best.map(|settled| (settled.layout, settled.priced)), Some(()))
    }

    /// Searches everything; `Some` when nothing is faster than the best.
    fn exact(&mut self) -> Option<()> {
        let instance = self.instance;
        let table = Table::new(instance, |_, _| true);
        // At best every device holds each layer: checked exactly for each layout.
        if instance.rules.shard_optimizer {
            table.shards.set(instance.num_devices() as f64);
        }
        let limits: Vec<u64> = instance.pools.iter().map(crate::instance::Pool::num_devices).collect();
        let schedules = schedules(instance);
        let least = if instance.num_devices() <= FEW_DEVICES { FEW_NODES } else { 0 };
        let left = self.meter.left();
        let effort = Effort { nodes: least.max(left / EXACT_PART).min(left), stop: self.meter.stop() };
        let mut meter = Meter::new(&effort);
        let known = self.best.as_ref().map(|(layout, priced)| Settled {
            layout: layout.clone(),
            priced: priced.clone(),
            crew: Vec::new(),
        });
        let mut exact = Exact::new(&table, &limits, &self.bound.prices, &schedules, &mut meter, known);
        let done = exact.run();
        let found = exact.best.map(|settled| (settled.layout, settled.priced));
        self.offer(found.as_ref());
        self.meter.spend(meter.spent())?;
        done
    }
}

/// The largest of what stands between a step and the compute bound.
fn limited_by(priced: &Priced, bound: &Bound) -> &'static str {
    let Some(slowest) = priced.templates.iter().max_by(|a, b| a.total_s.total_cmp(&b.total_s)) else {
        return "memory";
    };
    let lost = priced.iteration_s - bound.compute_s;
    if lost < 0.03 * priced.iteration_s {
        return "compute";
    }
    let (bubble, transfer) = (slowest.bubble_s, slowest.transfer_s);
    // What any layout pays for it, whether by exchanging or by being one that exchanges less.
    let exchange = priced.exchange_s.max(bound.exchange_s - bound.fill_s);
    let rest = lost - bubble - transfer - exchange - priced.update_s;
    let parts = [
        ("bubble", bubble),
        ("transfer", transfer),
        ("exchange", exchange),
        ("update", priced.update_s),
        ("rounding", rest),
    ];
    parts.iter().fold(("compute", 0.0), |most, part| if part.1 > most.1 { *part } else { most }).0
}

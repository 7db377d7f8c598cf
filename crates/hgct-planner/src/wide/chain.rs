//! The cheapest pipeline at given prices, from below: what the bound needs of every pipeline there is.
//!
//! A pipeline of micro-batches of b samples at pace τ that fills for F seconds does at most
//! `b (T − F + M) / τ` samples in T seconds, M being the fill of its slowest stage, which costs nothing
//! more than its pace. At prices λ a device, ν a second of exchange and ω a pipeline it is paid for if
//! that is no more than `λ D + ν h + ω`; hence `T ≥ τ/b · (λ D + ν h + ω + b/τ · F) − M`. What is in
//! brackets is a sum over stages, and the least of it over all ways to cut the layers is found by
//! dynamic programming over the layer at which a stage begins, from the head to the embedding.
//!
//! Paces are what some stage computes ([`Paces`]), where no handing on is longer. In an interval of them
//! the least is at its lower end, at which M is at most that end: a pipeline
//! that pays for less than M's part of a micro-batch does one all the same, in F seconds or more, and
//! `λ D + ν h + ω < b M/τ` makes that `F > τ/b · (…) − M`.
//!
//! Everything that is left out makes the sum smaller, so that it stays a bound: transfers are those
//! over the fastest link, micro-batches in flight are as few as the fewest stages behind allow, and
//! optimizer state is divided among all devices. Paces are taken in intervals, with the smaller end
//! where a small pace helps and the larger one where a large one does.
//!
//! In a flat ring a layer takes at least its bytes, divided by the least degree of any of its holders, at
//! the rate of the slowest of their pools; a stage pays for all of its layers, X at most. Layouts are
//! divided by what all layers together take, into those of more than `(k − 1) X` and up to `k X`
//! ([`Ring`]): no pipeline of theirs has fewer than k stages, and at its own degrees and pools, which make
//! no layer slower than it is, no pipeline takes more than `k X`. The latter is priced (μ a second, with
//! which the least stays a bound for any μ ≥ 0).

use std::ops::Range;

use crate::instance::{Schedule, Transfer};

use super::table::{StageTime, Table};

mod alike;
mod paces;
mod suffix;

use alike::{Lengths, long_runs, longest};
use paces::Paces;
use suffix::{Suffix, Suffixes};

/// Prices and limits of one question.
#[derive(Debug, Clone)]
pub(crate) struct Market {
    /// Samples a device of each pool.
    pub(crate) devices: Vec<f64>,
    /// Samples a device-second of exchange.
    pub(crate) exchange: f64,
    /// Samples a pipeline.
    pub(crate) pipeline: f64,
    /// Samples a second by which a pipeline's layers take longer than [`Ring::layers_s`].
    pub(crate) layers: f64,
    pub(crate) ring: Ring,
}

/// What the rings over the holders of each layer allow.
#[derive(Debug, Clone)]
pub(crate) struct Ring {
    /// Seconds of a gradient byte on a stage of each pool, divided by its degree, at least.
    pub(crate) seconds_a_byte: Vec<f64>,
    /// Seconds that a stage pays at most.
    pub(crate) stage_s: f64,
    /// Seconds that all layers together take at most.
    pub(crate) layers_s: f64,
    /// Stages of each pipeline at least.
    pub(crate) stages: usize,
}

impl Ring {
    /// No ring, or none that matters.
    pub(crate) fn free(num_pools: usize) -> Self {
        let seconds_a_byte = vec![0.0; num_pools];
        Self { seconds_a_byte, stage_s: f64::INFINITY, layers_s: f64::INFINITY, stages: 1 }
    }

    /// Seconds of bytes by pool, each divided by the degree.
    pub(crate) fn seconds(&self, bytes: &[f64]) -> f64 {
        self.seconds_a_byte.iter().zip(bytes).map(|(rate, bytes)| rate * bytes).sum()
    }
}

/// Device-seconds that a layer's exchange takes, for each device that holds it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Holding {
    /// Seconds a gradient byte.
    pub(crate) seconds_a_byte: f64,
    /// Part of the last backward that hides it.
    pub(crate) hides: f64,
}

/// The least seconds of any pipeline, with what it takes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Cheapest {
    pub(crate) seconds: f64,
    /// Of its pace, by micro-batch: what a sample's worth of prices is multiplied by.
    pub(crate) weight: f64,
    pub(crate) devices: Vec<f64>,
    pub(crate) exchange: f64,
    /// Gradient bytes on each pool, divided by degrees: of all its stages, and of the largest.
    pub(crate) bytes: Vec<f64>,
    pub(crate) largest: Vec<f64>,
    pub(crate) stages: usize,
    /// `F − M`.
    pub(crate) fixed: f64,
    /// Of one stage: its pace, of which a step has a whole number, and samples of a micro-batch.
    pub(crate) whole: Option<(f64, f64)>,
}

/// A pipeline of one stage, whose micro-batches are counted exactly.
struct Single {
    choice: usize,
    pace: f64,
    exchange: f64,
    /// Gradient bytes, divided by its degree.
    bytes: f64,
}

/// A choice with sums over the layers before each layer.
struct Way {
    choice: usize,
    /// The way without recompute that this one stands beside.
    plain: Option<usize>,
    compute: Vec<f64>,
    fill: Vec<f64>,
    exchange: Vec<f64>,
    handing: f64,
    /// First layer that memory allows, by micro-batches in flight and end; made when asked for.
    fitting: std::cell::RefCell<Vec<Vec<u16>>>,
}

/// All ways to place a stage with one micro-batch size and schedule.
pub(crate) struct Chains<'t, 'a> {
    table: &'t Table<'a>,
    size: usize,
    schedule: Schedule,
    ways: Vec<Way>,
    singles: Vec<Single>,
    /// Long runs of alike layers.
    runs: Vec<Range<usize>>,
    /// Largest part of a stage's compute that counts as fill, and its handing on.
    fill_part: f64,
    handing: f64,
    pub(crate) paces: Paces,
}

impl<'t, 'a> Chains<'t, 'a> {
    pub(crate) fn new(table: &'t Table<'a>, size: usize, schedule: Schedule, holding: Holding) -> Self {
        let layers = table.num_layers;
        let usable: Vec<usize> = (0..table.choices.len()).filter(|c| table.runs(*c, size)).collect();
        let mut ways: Vec<Way> = Vec::new();
        let mut fill_part = 0.0f64;
        for choice in usable {
            let of = &table.choices[choice];
            let plain = ways.iter().position(|way| {
                let other = &table.choices[way.choice];
                of.recompute && other.is_alike(of)
            });
            let (mut compute, mut fill, mut exchange) = (vec![0.0], vec![0.0], vec![0.0]);
            let (mut sums, devices) = ([0.0f64; 3], f64::from(of.devices));
            // So that recompute never is a way to hide more.
            let again = table.instance.rules.recompute && !of.recompute;
            for layer in 0..layers {
                let (forward_s, backward_s) = table.compute(choice, size, layer, layer + 1);
                let of_fill = table.layer_fill_s(schedule, choice, size, layer);
                if forward_s + backward_s > 0.0 {
                    fill_part = fill_part.max(of_fill / (forward_s + backward_s));
                }
                let bytes = table.gradient[layer + 1] - table.gradient[layer];
                sums[0] += forward_s + backward_s;
                sums[1] += of_fill;
                // A whole backward, whatever the schedule: it stands for all that fill no faster.
                let hides = backward_s + if again { forward_s } else { 0.0 };
                sums[2] += devices * (bytes * holding.seconds_a_byte - holding.hides * hides);
                compute.push(sums[0]);
                fill.push(sums[1]);
                exchange.push(sums[2]);
            }
            let handing = table.least_transfer(size, of.end);
            ways.push(Way { choice, plain, compute, fill, exchange, handing, fitting: Vec::new().into() });
        }
        let handing = ways.iter().map(|way| 2.0 * way.handing).fold(0.0, f64::max);
        let in_flight = schedule.in_flight(1, 0);
        let fits = |way: &&Way| table.fits(way.choice, size, 0, layers, in_flight);
        let single = |way: &Way| Single {
            choice: way.choice,
            pace: way.compute[layers],
            exchange: way.exchange[layers],
            bytes: table.gradient[layers] / f64::from(table.choices[way.choice].degree),
        };
        let singles = ways.iter().filter(fits).map(single).collect();
        let runs = long_runs(table);
        let paces = Paces::new(table, size, schedule, ways.iter().map(|way| &way.compute[..]));
        Self { table, size, schedule, ways, singles, runs, fill_part, handing, paces }
    }

    /// Pipelines of one stage, with the seconds that they take to do what they are paid for. They have no
    /// fill, so that nothing is lost by counting whole micro-batches.
    pub(crate) fn singles(&self, market: &Market) -> impl Iterator<Item = Cheapest> {
        let samples = f64::from(self.table.micro_batches[self.size]);
        let ring = &market.ring;
        let allowed = move |of: &&Single| {
            let pool = self.table.choices[of.choice].pool;
            let most = ring.stage_s.min(ring.layers_s) * (1.0 + 1e-9);
            ring.stages <= 1 && of.bytes * ring.seconds_a_byte[pool] <= most
        };
        self.singles.iter().filter(allowed).map(move |of| {
            let choice = &self.table.choices[of.choice];
            let on = |what: f64| {
                let mut by_pool = vec![0.0; self.table.instance.pools.len()];
                by_pool[choice.pool] = what;
                by_pool
            };
            let devices = f64::from(choice.devices);
            let price =
                market.devices[choice.pool] * devices + market.exchange * of.exchange + market.pipeline;
            Cheapest {
                seconds: (price / samples * (1.0 - 1e-9)).ceil().max(0.0) * of.pace,
                weight: of.pace / samples,
                devices: on(devices),
                exchange: of.exchange,
                bytes: on(of.bytes),
                largest: on(of.bytes),
                stages: 1,
                fixed: 0.0,
                whole: Some((of.pace, samples)),
            }
        })
    }

    /// First layer of a stage that ends at each layer, as memory allows with `behind` stages behind it;
    /// the end itself where none fits.
    fn fitting(&self, at: usize, behind: usize, end: usize) -> usize {
        let way = &self.ways[at];
        let mut all = way.fitting.borrow_mut();
        if all.len() <= behind {
            all.resize(behind + 1, Vec::new());
        }
        let of = &mut all[behind];
        if of.is_empty() {
            of.resize(self.table.num_layers + 1, UNKNOWN);
        }
        if of[end] == UNKNOWN {
            let in_flight = self.schedule.in_flight(behind + 1, 0);
            let (mut low, mut high) = (0, end);
            while low < high {
                let middle = usize::midpoint(low, high);
                let fits = self.table.fits(way.choice, self.size, middle, end, in_flight);
                if fits { high = middle } else { low = middle + 1 }
            }
            of[end] = high as u16;
        }
        usize::from(of[end])
    }

    /// Whether any stage runs at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.ways.is_empty()
    }

    /// The least pace that any pipeline can have: that of its largest layer.
    pub(crate) fn least_pace(&self) -> f64 {
        (0..self.table.num_layers)
            .map(|layer| {
                let of = |way: &Way| way.compute[layer + 1] - way.compute[layer];
                self.ways.iter().map(of).fold(f64::INFINITY, f64::min)
            })
            .fold(0.0, f64::max)
    }

    /// Seconds that are surely not more than those of [`Self::cheapest`], at once: each layer on the way
    /// that is cheapest for it alone, with its part of a stage that is as slow as allowed.
    pub(crate) fn at_least(&self, market: &Market, (low, high): (f64, f64)) -> f64 {
        let weight = f64::from(self.table.micro_batches[self.size]) / low;
        let mut price = market.pipeline - layers_price(market);
        let mut layer = 0;
        for run in &self.table.instance.runs {
            let of = |way: &Way| {
                let between = |sums: &[f64]| sums[layer + 1] - sums[layer];
                let compute = between(&way.compute);
                if compute > high * (1.0 + 1e-9) {
                    return f64::INFINITY;
                }
                let of = &self.table.choices[way.choice];
                let bytes = between(&self.table.gradient) / f64::from(of.degree);
                // A stage of its own has its devices, and two ends.
                let stage = market.devices[of.pool] * f64::from(of.devices) + 2.0 * weight * way.handing;
                stage * compute / (high * (1.0 + 1e-9))
                    + weight * between(&way.fill)
                    + market.exchange * between(&way.exchange)
                    + market.layers * market.ring.seconds_a_byte[of.pool] * bytes
            };
            price += f64::from(run.count) * self.ways.iter().map(of).fold(f64::INFINITY, f64::min);
            layer += run.count as usize;
        }
        // The first stage and the last have one end.
        price / weight - self.handing - self.free(low)
    }

    /// Fill of the slowest stage at most, which its pace pays for.
    fn free(&self, pace: f64) -> f64 {
        let free = self.fill_part * pace + self.handing;
        if self.table.instance.rules.transfer == Transfer::Overlapped { free } else { free.min(pace) }
    }

    /// Numbers of stages that are told apart, the last of them "as many or more": for the rules of
    /// transfers and for the fewest that the ring allows.
    fn levels(&self, ring: &Ring) -> usize {
        let of_rules = if self.published() { DOUBLED } else { 1 };
        of_rules.max(ring.stages.min(MOST_LEVELS) - 1)
    }

    fn published(&self) -> bool {
        self.table.instance.rules.transfer == Transfer::Published
    }

    /// Steps that a question takes, about. Levels are not counted: rules that need several do not shorten
    /// a proof.
    pub(crate) fn work(&self) -> u64 {
        4 * (self.table.num_layers * self.ways.len()) as u64
    }

    /// The cheapest pipeline of several stages with a pace of `low` to `high`; `None` if there is none.
    /// Work: about `layers · levels` steps, times the layers of a stage, and times the ways where layers
    /// differ.
    pub(crate) fn cheapest(&self, market: &Market, (low, high): (f64, f64)) -> Option<Cheapest> {
        let table = self.table;
        let layers = table.num_layers;
        let weight = f64::from(table.micro_batches[self.size]) / low;
        let serial = table.instance.rules.transfer != Transfer::Overlapped;
        let published = self.published();
        let ring = &market.ring;
        let levels = self.levels(ring);
        let mut suffixes = Suffixes::new(layers, levels);
        let mut whole: Option<Suffix> = None;
        let ways: Vec<Priced> = self.ways.iter().map(|way| self.priced(way, market, weight)).collect();
        let allowed = |at: usize, layers: Range<usize>, ends: f64| {
            let (way, Range { start, end }) = (&self.ways[at], layers);
            let handing = if serial { ends * way.handing } else { 0.0 };
            way.compute[end] - way.compute[start] + handing <= high * (1.0 + 1e-9)
                && table.gradient[end] - table.gradient[start] <= ways[at].bytes
        };
        let lengths = |run: &Range<usize>| Lengths::new(run.clone(), ways.len(), allowed);
        let mut runs: Vec<Lengths> = self.runs.iter().map(lengths).collect();
        // Layers at most of a first stage with one behind it.
        let longest = |at: usize| longest(layers - 1, |num| allowed(at, 0..num, 1.0));
        let longest: Vec<usize> = (0..ways.len()).map(longest).collect();
        let mut starts = vec![layers - 1; ways.len()];
        let mut short = vec![false; ways.len() * (levels + 1)];
        for end in (1..=layers).rev() {
            let last = end == layers;
            let inside = runs.iter_mut().find_map(|run| Some((run.first(end).filter(|_| !last)?, run)));
            // Of stages that are not inside a run.
            let past = inside.as_ref().map_or(end, |(first, _)| *first);
            // Ends of a stage that begins after the first layer, and of one that begins with it.
            let before = if last && published { 2.0 } else { 1.0 };
            let after = if last { 0.0 } else { 1.0 };
            let crosses = inside.as_ref().is_none_or(|(_, run)| run.crosses(end));
            for (at, way) in self.ways.iter().enumerate().filter(|_| crosses) {
                if past <= 1 && !last && end > longest[at] {
                    continue;
                }
                let priced = &ways[at];
                let mut start = starts[at].min(past).max(1);
                while start < past && !allowed(at, start..end, before + after) {
                    start += 1;
                }
                while start > 1 && allowed(at, start - 1..end, before + after) {
                    start -= 1;
                }
                starts[at] = start;
                if start >= past && !allowed(at, 0..end, after) {
                    // Its stages are all inside the run.
                    continue;
                }
                for level in 0..=levels {
                    let behind = suffixes.at(level, end);
                    if behind.price.is_infinite()
                        || way.plain.is_some_and(|plain| !short[plain * (levels + 1) + level])
                    {
                        // Recompute is of use only where memory is short.
                        continue;
                    }
                    let doubled = if published && level >= DOUBLED { 2.0 * after } else { after };
                    // Those of one stage are counted exactly, elsewhere.
                    let is_first = !last
                        && behind.stages + 1 >= ring.stages.min(MOST_LEVELS)
                        && allowed(at, 0..end, doubled);
                    let with = behind.price + priced.stage + priced.sums[end];
                    let of_whole = with - priced.sums[0] + doubled * priced.end;
                    let is_better = is_first && whole.is_none_or(|best| of_whole < best.price);
                    short[at * (levels + 1) + level] = false;
                    if start >= past && !is_better {
                        // With recompute it would not be cheaper.
                        continue;
                    }
                    let fitting = self.fitting(at, behind.stages, end);
                    short[at * (levels + 1) + level] = fitting > if is_first { 0 } else { start };
                    let next = (level + 1).min(levels);
                    let suffix = |price| Suffix { price, end, way: at, level, stages: behind.stages + 1 };
                    for first in start.max(fitting)..past {
                        let price = with - priced.sums[first] + (before + after) * priced.end;
                        suffixes.offer(next, first, suffix(price));
                    }
                    if is_better && fitting == 0 {
                        whole = Some(suffix(of_whole));
                    }
                }
            }
            let Some((first, run)) = inside else { continue };
            for level in 0..=levels {
                let behind = suffixes.at(level, end);
                if behind.price.is_infinite() {
                    continue;
                }
                let lengths = run.behind(self, &ways, behind.stages);
                for (length, first) in lengths.iter().zip((first.max(1)..end).rev()) {
                    let price = behind.price + length.price;
                    let stages = behind.stages + 1;
                    suffixes.offer(
                        (level + 1).min(levels),
                        first,
                        Suffix { price, end, way: length.way, level, stages },
                    );
                }
            }
        }
        whole.map(|first| self.follow(first, &suffixes, market, (low, weight)))
    }

    fn priced(&self, way: &Way, market: &Market, weight: f64) -> Priced {
        let of = &self.table.choices[way.choice];
        let degree = f64::from(of.degree);
        let seconds_a_byte = market.ring.seconds_a_byte[of.pool] / degree;
        let bytes = if market.ring.stage_s.is_finite() {
            market.ring.stage_s / seconds_a_byte * (1.0 + 1e-9)
        } else {
            f64::INFINITY
        };
        let sums = way.fill.iter().zip(&way.exchange).zip(&self.table.gradient);
        let sum = |((fill, exchange), bytes): ((&f64, &f64), &f64)| {
            weight * fill + market.exchange * exchange + market.layers * seconds_a_byte * bytes
        };
        Priced {
            stage: market.devices[of.pool] * f64::from(of.devices),
            end: weight * way.handing,
            sums: sums.map(sum).collect(),
            bytes,
        }
    }

    /// The pipeline that begins with that stage.
    fn follow(
        &self,
        first: Suffix,
        suffixes: &Suffixes,
        market: &Market,
        (low, weight): (f64, f64),
    ) -> Cheapest {
        let table = self.table;
        let none = vec![0.0; table.instance.pools.len()];
        let mut found = Cheapest {
            seconds: (first.price + market.pipeline - layers_price(market)) / weight - self.free(low),
            weight: 0.0,
            devices: none.clone(),
            exchange: 0.0,
            bytes: none.clone(),
            largest: none,
            stages: 0,
            fixed: 0.0,
            whole: None,
        };
        let (mut layer, mut next, mut pace) = (0, first, 0.0f64);
        loop {
            let way = &self.ways[next.way];
            let of = &table.choices[way.choice];
            found.devices[of.pool] += f64::from(of.devices);
            found.exchange += way.exchange[next.end] - way.exchange[layer];
            let bytes = (table.gradient[next.end] - table.gradient[layer]) / f64::from(of.degree);
            found.bytes[of.pool] += bytes;
            found.largest[of.pool] = found.largest[of.pool].max(bytes);
            found.stages += 1;
            let mut ends = f64::from(u32::from(next.end < table.num_layers) + u32::from(layer > 0));
            let is_doubled = next.end == table.num_layers || layer == 0 && next.level >= DOUBLED;
            if self.published() && is_doubled {
                ends *= 2.0;
            }
            let (compute, handing) = (way.compute[next.end] - way.compute[layer], ends * way.handing);
            pace = pace.max(table.pace(StageTime { forward: 0.0, backward: compute, transfer: handing }));
            found.fixed += way.fill[next.end] - way.fill[layer] + handing;
            layer = next.end;
            if layer == table.num_layers {
                // Its own pace: the ends of a wide interval would make it look better than it is.
                found.weight = pace / f64::from(table.micro_batches[self.size]);
                found.fixed -= self.free(pace);
                return found;
            }
            next = suffixes.at(next.level, layer);
        }
    }
}

/// What the layers of each pipeline may take, priced.
fn layers_price(market: &Market) -> f64 {
    if market.layers > 0.0 { market.layers * market.ring.layers_s } else { 0.0 }
}

/// Of a stage whose first layer nobody asked for.
const UNKNOWN: u16 = u16::MAX;
/// Stages behind the first one from which on published transfers count its activation twice.
const DOUBLED: usize = 3;
/// Numbers of stages that are told apart at most.
const MOST_LEVELS: usize = 8;

/// A way at given prices.
struct Priced {
    /// Of a stage.
    stage: f64,
    /// Of an end of a stage.
    end: f64,
    /// Of the layers before each layer.
    sums: Vec<f64>,
    /// Gradient bytes of a stage at most.
    bytes: f64,
}

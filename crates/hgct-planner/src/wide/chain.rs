//! The cheapest pipeline at given prices, from below: what the bound needs of every pipeline there is.
//!
//! A pipeline of micro-batches of b samples at pace τ that fills for F seconds does at most
//! `b (T − F + M) / τ` samples in T seconds, M being the fill of its slowest stage, which costs nothing
//! more than its pace. At prices λ a device, ν a second of exchange and ω a pipeline it is paid for if
//! that is no more than `λ D + ν h + ω`; hence `T ≥ τ/b · (λ D + ν h + ω + b/τ · F) − M`. What is in
//! brackets is a sum over stages, and the least of it over all ways to cut the layers is found by
//! dynamic programming over the layer at which a stage begins, from the head to the embedding.
//!
//! In an interval of paces the least is at its lower end, at which M is at most that end: a pipeline
//! that pays for less than M's part of a micro-batch does one all the same, in F seconds or more, and
//! `λ D + ν h + ω < b M/τ` makes that `F > τ/b · (…) − M`.
//!
//! Everything that is left out makes the sum smaller, so that it stays a bound: transfers are those
//! over the fastest link, micro-batches in flight are as few as the fewest stages behind allow, and
//! optimizer state is divided among all devices. Paces are taken in intervals, with the smaller end
//! where a small pace helps and the larger one where a large one does.

use crate::instance::{Schedule, Transfer, Work};

use super::table::Table;

/// Prices and limits of one question.
#[derive(Debug, Clone)]
pub(crate) struct Market {
    /// Samples a device of each pool.
    pub(crate) devices: Vec<f64>,
    /// Samples a device-second of exchange.
    pub(crate) exchange: f64,
    /// Samples a pipeline.
    pub(crate) pipeline: f64,
    /// Gradient bytes of a stage of each pool, divided by its degree, at most.
    pub(crate) largest: Vec<f64>,
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
#[derive(Debug, Clone)]
pub(crate) struct Cheapest {
    pub(crate) seconds: f64,
    /// Of its pace, by micro-batch: what a sample's worth of prices is multiplied by.
    pub(crate) weight: f64,
    pub(crate) devices: Vec<f64>,
    pub(crate) exchange: f64,
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
    /// Largest part of a stage's compute that counts as fill, and its handing on.
    fill_part: f64,
    handing: f64,
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
                let of_fill = schedule.fill_s(Work { forward_s, backward_s, transfer_s: 0.0 });
                if forward_s + backward_s > 0.0 {
                    fill_part = fill_part.max(of_fill / (forward_s + backward_s));
                }
                let bytes = table.gradient[layer + 1] - table.gradient[layer];
                sums[0] += forward_s + backward_s;
                sums[1] += of_fill;
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
        Self { table, size, schedule, ways, singles, fill_part, handing }
    }

    /// Pipelines of one stage, with the seconds that they take to do what they are paid for. They have no
    /// fill, so that nothing is lost by counting whole micro-batches.
    pub(crate) fn singles(&self, market: &Market) -> impl Iterator<Item = Cheapest> {
        let samples = f64::from(self.table.micro_batches[self.size]);
        let allowed = |of: &&Single| {
            let pool = self.table.choices[of.choice].pool;
            of.bytes <= market.largest[pool] * (1.0 + 1e-9)
        };
        self.singles.iter().filter(allowed).map(move |of| {
            let choice = &self.table.choices[of.choice];
            let mut devices = vec![0.0; self.table.instance.pools.len()];
            devices[choice.pool] = f64::from(choice.devices);
            let price = market.devices[choice.pool] * devices[choice.pool]
                + market.exchange * of.exchange
                + market.pipeline;
            Cheapest {
                seconds: (price / samples * (1.0 - 1e-9)).ceil().max(0.0) * of.pace,
                weight: of.pace / samples,
                devices,
                exchange: of.exchange,
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
            let in_flight = self.schedule.in_flight(behind + 1, 0);
            let mut first = 0;
            for end in 0..=self.table.num_layers {
                while first < end && !self.table.fits(way.choice, self.size, first, end, in_flight) {
                    first += 1;
                }
                of.push(first as u16);
            }
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
        let mut price = market.pipeline;
        let mut layer = 0;
        for run in &self.table.instance.runs {
            let of = |way: &Way| {
                let between = |sums: &[f64]| sums[layer + 1] - sums[layer];
                let compute = between(&way.compute);
                if compute > high * (1.0 + 1e-9) {
                    return f64::INFINITY;
                }
                let of = &self.table.choices[way.choice];
                // A stage of its own has its devices, and two ends.
                let stage = market.devices[of.pool] * f64::from(of.devices) + 2.0 * weight * way.handing;
                stage * compute / (high * (1.0 + 1e-9))
                    + weight * between(&way.fill)
                    + market.exchange * between(&way.exchange)
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

    /// Steps that a question takes, about.
    pub(crate) fn work(&self) -> u64 {
        4 * (self.table.num_layers * self.ways.len()) as u64
    }

    /// The cheapest pipeline of several stages with a pace of `low` to `high`; `None` if there is none. Work: about
    /// `layers · ways` steps, times the layers of a stage.
    pub(crate) fn cheapest(&self, market: &Market, (low, high): (f64, f64)) -> Option<Cheapest> {
        let table = self.table;
        let layers = table.num_layers;
        let samples = f64::from(table.micro_batches[self.size]);
        let weight = samples / low;
        let serial = table.instance.rules.transfer != Transfer::Overlapped;
        let mut least = vec![f64::INFINITY; layers + 1];
        // (end, way) of the first stage of the best suffix, and the fewest stages of any.
        let mut best = vec![(0usize, 0usize); layers + 1];
        let mut fewest = vec![usize::MAX; layers + 1];
        (least[layers], fewest[layers]) = (0.0, 0);
        let fixed: Vec<f64> = self
            .ways
            .iter()
            .map(|way| {
                let of = &table.choices[way.choice];
                market.devices[of.pool] * f64::from(of.devices)
            })
            .collect();
        // Price of the layers before each layer.
        let sums: Vec<Vec<f64>> = self
            .ways
            .iter()
            .map(|way| {
                let both = way.fill.iter().zip(&way.exchange);
                both.map(|(fill, exchange)| weight * fill + market.exchange * exchange).collect()
            })
            .collect();
        let mut starts = vec![layers - 1; self.ways.len()];
        let mut short = vec![false; self.ways.len()];
        for end in (1..=layers).rev() {
            if least[end].is_infinite() {
                continue;
            }
            for (at, way) in self.ways.iter().enumerate() {
                if way.plain.is_some_and(|plain| !short[plain]) {
                    // Recompute is of use only where memory is short.
                    continue;
                }
                let degree = f64::from(table.choices[way.choice].degree);
                let handing = if serial && end < layers { way.handing } else { 0.0 };
                let pace = high * (1.0 + 1e-9) - handing;
                let largest = market.largest[table.choices[way.choice].pool];
                let bytes = largest * degree * (1.0 + 1e-9);
                let in_pace = |first: usize| {
                    way.compute[end] - way.compute[first] <= pace
                        && table.gradient[end] - table.gradient[first] <= bytes
                };
                let mut start = starts[at].min(end);
                while start < end && !in_pace(start) {
                    start += 1;
                }
                while start > 0 && in_pace(start - 1) {
                    start -= 1;
                }
                starts[at] = start;
                let fitting = self.fitting(at, fewest[end], end);
                short[at] = fitting > start;
                let start = start.max(fitting);
                let after = if end < layers { weight * way.handing } else { 0.0 };
                let with = least[end] + fixed[at] + after + sums[at][end];
                // Those of one stage are counted exactly, elsewhere.
                let least_first = usize::from(end == layers);
                for first in start.max(least_first)..end {
                    let before = if first > 0 { weight * way.handing } else { 0.0 };
                    let price = with - sums[at][first] + before;
                    if price < least[first] {
                        least[first] = price;
                        best[first] = (end, at);
                    }
                    fewest[first] = fewest[first].min(fewest[end] + 1);
                }
            }
        }
        if least[0].is_infinite() {
            return None;
        }
        let free = self.free(low);
        let mut found = Cheapest {
            seconds: (least[0] + market.pipeline) / weight - free,
            weight: 1.0 / weight,
            devices: vec![0.0; table.instance.pools.len()],
            exchange: 0.0,
            fixed: -free,
            whole: None,
        };
        let mut first = 0;
        while first < layers {
            let (end, at) = best[first];
            let way = &self.ways[at];
            let of = &table.choices[way.choice];
            found.devices[of.pool] += f64::from(of.devices);
            found.exchange += way.exchange[end] - way.exchange[first];
            let ends = u32::from(end < layers) + u32::from(first > 0);
            found.fixed += way.fill[end] - way.fill[first] + f64::from(ends) * way.handing;
            first = end;
        }
        Some(found)
    }
}

//! What no set of pipelines can beat, by prices.
//!
//! Let a step take T seconds of which every device has X for its exchange. For prices λ of a device of
//! each pool, ν of a device-second of exchange and ω of a pipeline, with
//! `Σ λ n + ν E + ω R = batch`, pipelines that each do fewer samples than their prices do not reach
//! the batch; so `T − X` is at least that of the cheapest pipeline ([`super::chain`]). The best prices
//! are found by cutting planes (Kelley 1960): each cheapest pipeline is a row of a small linear
//! programme. Whatever prices come out, the bound is valid.
//!
//! X is not known, so it is divided into intervals: at least the lower end for the time that is lost,
//! at most the upper end for what may be exchanged. What a layout must exchange (`E`, or the rings of
//! its layers) is in [`Exchanges`].

use crate::bound::maximise;
use crate::instance::{Exchange, Instance, Schedule};

use super::Meter;
use super::chain::{Chains, Cheapest, Holding, Market, Ring};
use super::table::Table;

/// What is known of a layout in one case.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// Device-seconds of exchange of all pipelines at most.
    pub(crate) exchange: Option<f64>,
    /// Pipelines at most.
    pub(crate) pipelines: Option<f64>,
    pub(crate) ring: Ring,
}

/// Rows of the linear programme, kept from case to case: they hold in all that allow their stages.
pub(crate) struct Dual<'t, 'a, 'm> {
    instance: &'a Instance,
    chains: Vec<Chains<'t, 'a>>,
    rows: Vec<Cheapest>,
    /// Longest pace that is of interest.
    longest: f64,
    /// Whether layers are exchanged in rings: many cases, whose narrow intervals lose about as much as a
    /// bound may be short of what its rows allow.
    pub(crate) rings: bool,
    meter: &'t mut Meter<'m>,
}

/// Seconds at least, chains, interval of paces, and the pipeline once it was asked for.
type Open = (f64, usize, (f64, f64), Option<Cheapest>);

/// Prices, as parts of the batch: all devices of each pool, all exchange, all pipelines; and a ring's
/// longest stage, which is no part of it.
type Shares = Vec<f64>;

impl<'t, 'a, 'm> Dual<'t, 'a, 'm> {
    pub(crate) fn new(
        table: &'t Table<'a>,
        schedules: &[Schedule],
        holding: Holding,
        longest: f64,
        meter: &'t mut Meter<'m>,
    ) -> Self {
        let sizes = 0..table.micro_batches.len();
        let chains = sizes
            .flat_map(|size| {
                schedules.iter().map(move |schedule| Chains::new(table, size, *schedule, holding))
            })
            .filter(|chains| !chains.is_empty())
            .collect();
        let rings = matches!(table.instance.rules.exchange, Exchange::FlatRing { .. });
        Self { instance: table.instance, chains, rows: Vec::new(), longest, rings, meter }
    }

    /// Seconds that pipelines of the case take at least; no more than `enough`, which is reason to
    /// stop. `shares` are the first prices, and the last ones afterwards.
    pub(crate) fn seconds(&mut self, case: &Case, enough: f64, rounds: u32, shares: &mut Shares) -> f64 {
        let mut best = 0.0f64;
        // Prices of the rows alone swing: those that are tried lie between them and the best so far.
        let mut tried = shares.clone();
        let mut between = true;
        let mut spans = Vec::new();
        for _ in 0..rounds {
            let Some((found, is_new)) = self.cheapest(case, &tried, enough, &mut spans) else { break };
            if found > best {
                best = found;
                shares.clone_from(&tried);
            }
            if best >= enough || !between && !is_new {
                break;
            }
            let most = self.solve(case, &mut tried, None);
            if most - best < if self.rings { 0.01 } else { 0.001 } * most {
                break;
            }
            between = is_new;
            if between {
                for (tried, best) in tried.iter_mut().zip(shares.iter()) {
                    *tried = OUT * *tried + (1.0 - OUT) * best;
                }
            }
        }
        self.with_whole(case, enough, best, shares).min(enough)
    }

    /// The same with prices for whole micro-batches of pipelines of one stage. Their seconds are steps
    /// over prices, so a time is guessed, and the prices are sought at which none is faster. Only for rings
    /// over single devices, which small models have: elsewhere steps have far more micro-batches.
    fn with_whole(&mut self, case: &Case, enough: f64, least: f64, shares: &mut Shares) -> f64 {
        let mut best = least;
        if !self.rings || best >= enough || self.singles(case, shares).is_empty() {
            return best;
        }
        let mut high = enough;
        for _ in 0..WHOLE_GUESSES {
            if high - best < 0.004 * high {
                break;
            }
            let guess = f64::midpoint(best, high);
            let mut reached = false;
            for _ in 0..WHOLE_ROUNDS {
                let mut tried = shares.clone();
                if self.solve(case, &mut tried, Some(guess)) < guess {
                    break;
                }
                let Some((found, _)) = self.cheapest(case, &tried, guess, &mut Vec::new()) else { break };
                if found > best {
                    best = found;
                    shares.clone_from(&tried);
                }
                reached = found >= guess * (1.0 - 1e-9);
                if reached {
                    break;
                }
            }
            if !reached {
                high = guess;
            }
        }
        best
    }

    /// Units of a share: what is there of each resource, a sample of the batch.
    fn units(&self, case: &Case) -> Vec<f64> {
        let batch = f64::from(self.instance.global_batch);
        let pools = self.instance.pools.iter().map(|pool| pool.num_devices() as f64);
        let exchange = case.exchange.unwrap_or(f64::INFINITY);
        pools
            .chain([exchange, case.pipelines.unwrap_or(f64::INFINITY), case.ring.stage_s])
            .map(|there| batch / there.max(1e-12))
            .collect()
    }

    fn market(&self, case: &Case, shares: &Shares) -> Market {
        let units = self.units(case);
        let pools = self.instance.pools.len();
        let priced: Vec<f64> = shares.iter().zip(&units).map(|(share, unit)| share * unit).collect();
        Market {
            devices: priced[..pools].to_vec(),
            exchange: priced[pools],
            pipeline: priced[pools + 1],
            // Without a limit there is nothing to pay for.
            layers: if case.ring.layers_s.is_finite() { priced[pools + 2] } else { 0.0 },
            ring: case.ring.clone(),
        }
    }

    /// All pipelines of one stage at these prices.
    fn singles(&self, case: &Case, shares: &Shares) -> Vec<Cheapest> {
        let market = self.market(case, shares);
        self.chains.iter().flat_map(|chains| chains.singles(&market)).collect()
    }

    /// The least seconds of any pipeline at these prices, which becomes a row, and whether it was none
    /// before; infinite if there is no pipeline, `None` when out of nodes.
    /// Intervals of paces are halved, the most promising first, until they are narrow.
    fn cheapest(
        &mut self,
        case: &Case,
        shares: &Shares,
        enough: f64,
        spans: &mut Vec<(usize, (f64, f64))>,
    ) -> Option<(f64, bool)> {
        let market = self.market(case, shares);
        let mut open: Vec<Open> = Vec::new();
        for single in self.singles(case, shares) {
            open.push((single.seconds, 0, (1.0, 1.0), Some(single)));
        }
        if spans.is_empty() {
            *spans = self.spans();
        }
        for (at, span) in spans.drain(..) {
            open.push((self.chains[at].at_least(&market, span), at, span, None));
        }
        while let Some(at) = (0..open.len()).min_by(|a, b| open[*a].0.total_cmp(&open[*b].0)) {
            let (seconds, of, (low, high), found) = open.swap_remove(at);
            let chains = &self.chains[of];
            let Some(found) = found else {
                if seconds.is_finite() {
                    self.meter.spend(chains.work())?;
                    if let Some(found) = chains.cheapest(&market, (low, high)) {
                        open.push((found.seconds.max(seconds), of, (low, high), Some(found)));
                    }
                }
                continue;
            };
            if high < low * NARROW || seconds >= enough {
                spans.extend(open.iter().map(|(_, at, span, _)| (*at, *span)));
                spans.push((of, (low, high)));
                spans.retain(|(_, span)| span.0 < span.1);
                let is_new = self.keep(found);
                return Some((seconds, is_new));
            }
            let middle = (low * high).sqrt();
            for span in
                [(low, middle), (middle, high)].into_iter().filter_map(|span| chains.paces.within(span))
            {
                open.push((chains.at_least(&market, span).max(seconds), of, span, None));
            }
        }
        Some((f64::INFINITY, false))
    }

    /// Intervals of all paces.
    fn spans(&self) -> Vec<(usize, (f64, f64))> {
        let mut spans = Vec::new();
        for (at, chains) in self.chains.iter().enumerate() {
            let mut low = chains.least_pace().max(self.longest * 1e-6);
            while low < self.longest {
                let high = (low * FIRST).min(self.longest * (1.0 + 1e-9));
                spans.extend(chains.paces.within((low, high)).map(|span| (at, span)));
                low = high;
            }
        }
        spans
    }

    /// Makes a pipeline a row; the oldest makes room.
    fn keep(&mut self, mut found: Cheapest) -> bool {
        // Of the prices at which it was found.
        found.seconds = 0.0;
        if self.rows.contains(&found) {
            return false;
        }
        if self.rows.len() == ROWS {
            self.rows.remove(0);
        }
        self.rows.push(found);
        true
    }

    /// The best prices for the rows that are known, with their seconds. `guess`: those of one stage do
    /// the whole micro-batches of about that time.
    fn solve(&self, case: &Case, shares: &mut Shares, guess: Option<f64>) -> f64 {
        let units = self.units(case);
        let pools = self.instance.pools.len();
        let ring = &case.ring;
        let inside = |row: &&Cheapest| {
            let stages = row.largest.iter().zip(&ring.seconds_a_byte);
            let most = ring.stage_s * (1.0 + 1e-9);
            row.stages >= ring.stages && stages.into_iter().all(|(bytes, rate)| bytes * rate <= most)
        };
        let mut rows: Vec<Cheapest> = self.rows.iter().filter(inside).cloned().collect();
        if let Some(guess) = guess {
            rows.retain(|row| row.whole.is_none());
            for mut row in self.singles(case, shares) {
                let Some((pace, samples)) = row.whole else { continue };
                let num = (guess / pace * (1.0 - 1e-9)).floor();
                if num >= 1.0 {
                    row.weight = guess / (num * samples) * (1.0 - 1e-7);
                    rows.push(row);
                }
            }
        }
        // Variables: seconds above the least constant, then shares.
        let least = rows.iter().map(|row| row.fixed).fold(0.0, f64::min);
        let mut lines = Vec::with_capacity(rows.len() + 1);
        for row in &rows {
            let mut line = vec![1.0];
            line.extend(row.devices.iter().zip(&units).map(|(n, unit)| -row.weight * n * unit));
            line.push(if case.exchange.is_some() { -row.weight * row.exchange * units[pools] } else { 0.0 });
            line.push(if case.pipelines.is_some() { -row.weight * units[pools + 1] } else { 0.0 });
            // What is counted in whole micro-batches is not priced by its layers.
            let priced = ring.layers_s.is_finite() && row.whole.is_none();
            let over = ring.seconds(&row.bytes) - ring.layers_s;
            line.push(if priced { -row.weight * over * units[pools + 2] } else { 0.0 });
            lines.push((line, row.fixed - least));
        }
        let mut sum = vec![1.0; pools + 4];
        (sum[0], sum[pools + 3]) = (0.0, 0.0);
        lines.push((sum, 1.0));
        // Where no pipeline that is known keeps within its layers' time, nothing else would limit this.
        let mut layers = vec![0.0; pools + 4];
        layers[pools + 3] = 1.0;
        lines.push((layers, 1.0));
        let mut goal = vec![0.0; pools + 4];
        goal[0] = 1.0;
        let solution = maximise(&goal, lines);
        shares.clear();
        shares.extend(solution[1..].iter().map(|share| share.max(0.0)));
        if case.exchange.is_none() {
            shares[pools] = 0.0;
        }
        if case.pipelines.is_none() {
            shares[pools + 1] = 0.0;
        }
        if ring.layers_s.is_infinite() {
            shares[pools + 2] = 0.0;
        }
        let sum: f64 = shares[..pools + 2].iter().sum();
        if sum > 0.0 {
            for share in &mut shares[..pools + 2] {
                *share /= sum;
            }
        }
        solution[0] + least
    }
}

/// Part of the way from the best prices to those of the rows that is tried next.
const OUT: f64 = 0.6;
/// Rows that are kept.
const ROWS: usize = 250;
/// Times that are guessed for whole micro-batches, and prices that are sought for each.
const WHOLE_GUESSES: u32 = 7;
const WHOLE_ROUNDS: u32 = 5;
/// Ratio of the ends of a first interval of paces.
const FIRST: f64 = 2.0;
/// Ratio below which an interval is not halved.
const NARROW: f64 = 1.003;

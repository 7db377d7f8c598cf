//! Every way to use a few devices.
//!
//! First all pipelines that could be part of a plan as fast as the best so far, then all sets of
//! them, each divided and priced exactly. What ends a branch:
//!
//! * At device prices λ that sum to 1, and Y priced seconds a sample, devices worth Λ do at most
//!   `Λ T / Y` samples in T seconds, so what is chosen and what is left must together reach the global
//!   batch. Of a pipeline that is being made, a sample also costs what its remaining layers cost.
//! * A layout takes its update and, with n pipelines, a ring of its largest stage (`Beside`) beside
//!   its pipelines, which have so much less time.
//! * Once all pipelines are known, the linear programme of how many of each prices devices anew. What a
//!   pipeline costs more than its samples are worth is *slack*; all that is chosen may have as much of
//!   it as the programme's value is above the batch. Pipelines that use the same devices and do the
//!   same samples are chosen as one, and told apart in sets that do the batch.

use std::collections::BTreeMap;

use crate::instance::{Exchange, Link, Schedule, Update, check};

use super::Meter;
use super::bound::{Costs, quickest};
use super::form::{Form, Placed};
use super::program::{Column, relaxed};
use super::settle::{Crew, Settled, settle};
use super::table::{StageTime, Table};

/// See the module. Devices and batch small enough for it are the caller's to say.
pub(crate) struct Exact<'a, 't, 'm> {
    table: &'t Table<'a>,
    limits: &'t [u64],
    /// Price of a device of each pool; `Σ limits · prices = 1`.
    prices: &'t [f64],
    schedules: &'t [Schedule],
    meter: &'t mut Meter<'m>,
    pub(crate) best: Option<Settled>,
    /// Priced seconds of a sample in the layers before each layer.
    priced: Vec<f64>,
    /// From each pool to each.
    links: Vec<Vec<Ring>>,
    /// The quickest from or to each pool.
    rings: Vec<Ring>,
    found: Vec<Candidate>,
}

/// What a message takes at least, from device to device.
#[derive(Debug, Clone, Copy)]
struct Ring {
    latency_s: f64,
    seconds_a_byte: f64,
    bucket_bytes: f64,
}

impl Ring {
    /// Nothing.
    const FREE: Self = Self { latency_s: 0.0, seconds_a_byte: 0.0, bucket_bytes: f64::INFINITY };

    /// The quicker of the two at each.
    fn or(self, other: Self) -> Self {
        Self {
            latency_s: self.latency_s.min(other.latency_s),
            seconds_a_byte: self.seconds_a_byte.min(other.seconds_a_byte),
            bucket_bytes: self.bucket_bytes,
        }
    }

    /// A ring of two: `2 (latency + bytes / 2 / rate)`, latency once a bucket.
    fn seconds(self, bytes: f64) -> f64 {
        2.0 * (bytes / self.bucket_bytes).ceil() * self.latency_s + bytes * self.seconds_a_byte
    }
}

/// What a layout takes at least beside its pipelines, because one of them is there.
#[derive(Debug, Clone, Copy, Default)]
struct Beside {
    update_s: f64,
    /// Of a ring with one other pipeline.
    ring_s: f64,
}

impl Beside {
    fn and(self, other: Self) -> Self {
        Self { update_s: self.update_s.max(other.update_s), ring_s: self.ring_s.max(other.ring_s) }
    }

    /// With n pipelines a ring sends `2 (n − 1) / n` of its bytes, and more messages.
    fn seconds(self, pipelines: usize) -> f64 {
        let n = pipelines as f64;
        (self.update_s + 2.0 * (n - 1.0) / n * self.ring_s) * (1.0 - 1e-9)
    }
}

/// A pipeline that may be part of a plan.
struct Candidate {
    form: Form,
    beside: Beside,
}

/// Stages of a pipeline that is being made, from the last on.
#[derive(Clone)]
struct Suffix {
    stages: Vec<Placed>,
    used: Vec<u64>,
    worth: f64,
    /// Of the stages behind the first, whose neighbours are all known.
    behind: Sums,
    beside: Beside,
}

/// How long a pipeline takes.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    pace: f64,
    fill: f64,
    largest_fill: f64,
}

/// What one run of [`Exact::extend`] is about.
struct Kind {
    size: usize,
    schedule: Schedule,
    samples: f64,
    /// The least fill of the layers before each layer.
    fill: Vec<f64>,
}

impl<'a, 't, 'm> Exact<'a, 't, 'm> {
    pub(crate) fn new(
        table: &'t Table<'a>,
        limits: &'t [u64],
        prices: &'t [f64],
        schedules: &'t [Schedule],
        meter: &'t mut Meter<'m>,
        best: Option<Settled>,
    ) -> Self {
        let instance = table.instance;
        let costs = Costs::new(instance);
        let mut priced = vec![0.0];
        for class in instance.layer_classes() {
            let of = |(least, price): (&Vec<f64>, &f64)| price * least[class];
            let least = costs.least.iter().zip(prices).map(of).fold(f64::INFINITY, f64::min);
            priced.push(priced[priced.len() - 1] + least);
        }
        let link = |link: &Link| match instance.rules.exchange {
            Exchange::FlatRing { bucket_bytes } if instance.rules.exchange_overlap <= 0.0 => {
                let (latency_s, seconds_a_byte) = quickest(instance, link);
                Ring { latency_s, seconds_a_byte, bucket_bytes }
            }
            // What hides, and what stays inside a node, is left to the price of each layout.
            _ => Ring::FREE,
        };
        let links: Vec<Vec<Ring>> = instance.inter.iter().map(|of| of.iter().map(link).collect()).collect();
        let pools = 0..instance.pools.len();
        let both = |pool: usize| pools.clone().map(move |other| (pool, other));
        let rings = pools
            .clone()
            .map(|pool| {
                let quicker = |all: Ring, (a, b): (usize, usize)| all.or(links[a][b]).or(links[b][a]);
                both(pool).fold(links[pool][pool], quicker)
            })
            .collect();
        Self { table, limits, prices, schedules, meter, best, priced, links, rings, found: Vec::new() }
    }

    /// `Some` if nothing faster than `best` exists.
    pub(crate) fn run(&mut self) -> Option<()> {
        for size in 0..self.table.micro_batches.len() {
            for schedule in self.schedules {
                let kind = self.kind(size, *schedule);
                let suffix = Suffix {
                    stages: Vec::new(),
                    used: vec![0; self.limits.len()],
                    worth: 0.0,
                    behind: Sums::default(),
                    beside: Beside::default(),
                };
                self.extend(&kind, self.table.num_layers, &suffix)?;
            }
        }
        self.alone()?;
        self.several()
    }

    /// The time to beat; a step that is as fast is of no use.
    fn known(&self) -> f64 {
        self.best.as_ref().map_or(1e30, Settled::seconds)
    }

    fn batch(&self) -> f64 {
        f64::from(self.table.instance.global_batch)
    }

    fn kind(&self, size: usize, schedule: Schedule) -> Kind {
        let table = self.table;
        let mut fill = vec![0.0];
        for layer in 0..table.num_layers {
            let of = |choice: usize| table.layer_fill_s(schedule, choice, size, layer);
            let runs = (0..table.choices.len()).filter(|choice| table.runs(*choice, size));
            fill.push(fill[layer] + runs.map(of).fold(f64::INFINITY, f64::min));
        }
        Kind { size, schedule, samples: f64::from(table.micro_batches[size]), fill }
    }

    /// Whether a pipeline with these stages, whose first is `first`, may be part of a plan that is
    /// faster than the best; `rest`: with what the layers before `first` take at least.
    fn is_useful(&self, kind: &Kind, sums: &Sums, worth: f64, beside: Beside, rest: Option<usize>) -> bool {
        let known = self.known();
        let fill = sums.fill - sums.largest_fill;
        // Either the slowest stage is among those that are not there yet, or their fill is added.
        let fill = rest.map_or(fill, |first| (fill + kind.fill[first]).min(sums.fill));
        let samples = |seconds: f64| {
            kind.samples * ((seconds - fill) / sums.pace * (1.0 + 1e-9) + 1e-9).floor().min(1e9)
        };
        if samples(known - beside.update_s) >= self.batch() {
            return true;
        }
        let seconds = known - beside.seconds(2);
        let most = samples(seconds);
        if most < kind.samples {
            return false;
        }
        // A sample of this pipeline takes its other layers' part from the devices that are left.
        let all = self.priced[self.table.num_layers];
        let part = rest.map_or(1.0, |first| 1.0 - self.priced[first] / all);
        most * part + (1.0 - worth).max(0.0) * seconds / all * (1.0 + 1e-9) + 1e-6 >= self.batch()
    }

    fn extend(&mut self, kind: &Kind, end: usize, suffix: &Suffix) -> Option<()> {
        let table = self.table;
        let after = suffix.stages.last().map(|stage| table.choices[usize::from(stage.choice)].end);
        for choice in 0..table.choices.len() {
            let of = table.choices[choice];
            let room = suffix.used[of.pool] + u64::from(of.devices) <= self.limits[of.pool];
            if !room || !table.runs(choice, kind.size) {
                continue;
            }
            let behind = self.behind(kind, suffix, of.end);
            let worth = suffix.worth + f64::from(of.devices) * self.prices[of.pool];
            let in_flight = kind.schedule.in_flight(suffix.stages.len() + 1, 0);
            for first in (0..end).rev() {
                self.meter.spend(1)?;
                if !table.fits(choice, kind.size, first, end, in_flight) {
                    break;
                }
                let (forward, backward) = table.compute(choice, kind.size, first, end);
                // What stands before it is not known yet, and may cost nothing.
                let transfer =
                    table.stage_transfer(kind.size, (first, end), of.end, after, None, 1, kind.schedule);
                let sums = behind.with(table, kind, choice, StageTime { forward, backward, transfer });
                let bytes = (table.gradient[end] - table.gradient[first]) / f64::from(of.degree);
                let ring_s = self.rings[of.pool].seconds(bytes);
                let own = Beside { update_s: 0.0, ring_s };
                if !self.is_useful(kind, &sums, worth, suffix.beside.and(own), None) {
                    // Longer stages are slower still.
                    break;
                }
                let own = Beside { update_s: self.update_s(kind, choice, (first, end)), ring_s };
                let beside = suffix.beside.and(own);
                if !self.is_useful(kind, &sums, worth, beside, Some(first)) {
                    continue;
                }
                let mut next = suffix.clone();
                next.stages.push(Placed { first: first as u16, choice: choice as u16 });
                next.used[of.pool] += u64::from(of.devices);
                (next.worth, next.behind, next.beside) = (worth, behind, beside);
                if first == 0 {
                    self.keep(kind, next);
                } else {
                    self.extend(kind, first, &next)?;
                }
            }
        }
        Some(())
    }

    /// The stages of a suffix, once the end that stands before them is known.
    fn behind(&self, kind: &Kind, suffix: &Suffix, before: usize) -> Sums {
        let table = self.table;
        let num = suffix.stages.len();
        let Some(head) = suffix.stages.last() else { return suffix.behind };
        let next = num.checked_sub(2).map(|at| &suffix.stages[at]);
        let (first, end) = (usize::from(head.first), next.map_or(table.num_layers, |s| usize::from(s.first)));
        let end_of = |stage: &Placed| table.choices[usize::from(stage.choice)].end;
        let choice = usize::from(head.choice);
        let (forward, backward) = table.compute(choice, kind.size, first, end);
        let transfer = table.stage_transfer(
            kind.size,
            (first, end),
            end_of(head),
            next.map(end_of),
            Some(before),
            num + 1,
            kind.schedule,
        );
        suffix.behind.with(table, kind, choice, StageTime { forward, backward, transfer })
    }

    /// Seconds of a stage's update at least.
    fn update_s(&self, kind: &Kind, choice: usize, (first, end): (usize, usize)) -> f64 {
        let table = self.table;
        let instance = table.instance;
        let of = &table.choices[choice];
        let micro_batch = table.micro_batches[kind.size] / of.replicas;
        let Some(row) = instance.pools[of.pool].cost(of.degree, micro_batch) else { return 0.0 };
        let class = |layer: usize| {
            let mut before = 0;
            let run = instance.runs.iter().find(|run| {
                before += run.count as usize;
                layer < before
            });
            run.map_or(0.0, |run| row.update_s[run.class])
        };
        match instance.rules.update {
            Update::FirstLayer => class(first),
            Update::AllLayers => (first..end).map(class).sum::<f64>() / table.shards.get(),
        }
    }

    /// Keeps a whole pipeline that may be part of a plan.
    fn keep(&mut self, kind: &Kind, mut suffix: Suffix) {
        suffix.stages.reverse();
        let Some(form) = Form::new(self.table, kind.size, kind.schedule, suffix.stages) else { return };
        let sums = Sums { pace: form.pace, fill: form.fixed + form.pace, largest_fill: form.pace };
        if self.is_useful(kind, &sums, suffix.worth, suffix.beside, None) {
            self.found.push(Candidate { form, beside: suffix.beside });
        }
    }

    /// All that one pipeline can do.
    fn alone(&mut self) -> Option<()> {
        for at in 0..self.found.len() {
            self.meter.spend(1)?;
            let of = &self.found[at];
            let seconds = self.known() - of.beside.update_s;
            if of.form.samples(self.table, seconds) as f64 >= self.batch() {
                self.offer(&[at])?;
            }
        }
        Some(())
    }

    /// All that several can do.
    fn several(&mut self) -> Option<()> {
        let known = self.known();
        let samples = |of: &Candidate| of.form.samples(self.table, known - of.beside.seconds(2));
        let columns: Vec<Column> =
            self.found.iter().map(|of| Column { used: of.form.used.clone(), samples: samples(of) }).collect();
        self.meter.spend(columns.len() as u64 * 20)?;
        let mut prices = relaxed(&columns, self.limits).prices;
        // Whatever the prices are, they are raised until no pipeline does more than it pays for.
        let least = prices.iter().copied().fold(1e-9, f64::max) * 1e-9;
        let cost = |prices: &[f64], used: &[u32]| -> f64 {
            used.iter().zip(prices).map(|(n, price)| f64::from(*n) * price).sum()
        };
        for price in &mut prices {
            *price = price.max(least);
        }
        let short = columns.iter().map(|c| c.samples as f64 / cost(&prices, &c.used)).fold(0.0, f64::max);
        for price in &mut prices {
            *price *= short * (1.0 + 1e-9);
        }
        let all: f64 = self.limits.iter().zip(&prices).map(|(n, price)| *n as f64 * price).sum();
        let slack = all - self.batch() + 1e-6;
        let mut alike: BTreeMap<(&[u32], u64), Vec<usize>> = BTreeMap::new();
        for (at, column) in columns.iter().enumerate().filter(|(_, column)| column.samples > 0) {
            alike.entry((&column.used, column.samples)).or_default().push(at);
        }
        let of = |((used, samples), members): ((&[u32], u64), Vec<usize>)| Alike {
            slack: cost(&prices, used) - samples as f64,
            used: used.to_vec(),
            samples: samples as f64,
            members,
        };
        let mut order: Vec<Alike> = alike.into_iter().map(of).filter(|of| of.slack <= slack).collect();
        order.sort_by(|a, b| a.slack.total_cmp(&b.slack));
        let sets = Sets { order, prices };
        let limits = self.limits.to_vec();
        self.choose(&sets, 0, &limits, slack, &mut Vec::new())
    }

    /// Adds pipelines from `from` on to what is chosen.
    fn choose(
        &mut self,
        sets: &Sets,
        from: usize,
        left: &[u64],
        slack: f64,
        chosen: &mut Vec<usize>,
    ) -> Option<()> {
        for (at, alike) in sets.order.iter().enumerate().skip(from) {
            self.meter.spend(1)?;
            if alike.slack > slack {
                break;
            }
            if alike.used.iter().zip(left).any(|(used, left)| u64::from(*used) > *left) {
                continue;
            }
            let rest: Vec<u64> = left.iter().zip(&alike.used).map(|(n, used)| n - u64::from(*used)).collect();
            chosen.push(at);
            let samples = sets.samples(chosen);
            let of_rest: f64 = rest.iter().zip(&sets.prices).map(|(n, price)| *n as f64 * price).sum();
            if samples + of_rest + 1e-6 >= self.batch() {
                if chosen.len() > 1 && samples >= self.batch() {
                    self.pick(sets, chosen, 0, &mut Vec::new())?;
                }
                self.choose(sets, at, &rest, slack - alike.slack, chosen)?;
            }
            chosen.pop();
        }
        Some(())
    }

    /// One pipeline of each that are chosen; of those that are alike, `from` that on.
    fn pick(&mut self, sets: &Sets, chosen: &[usize], from: usize, picked: &mut Vec<usize>) -> Option<()> {
        let num = picked.len();
        let Some(of) = chosen.get(num) else {
            let most = self.samples(picked, self.exchange_s(picked));
            return if most >= self.batch() { self.offer(picked) } else { Some(()) };
        };
        let rest = sets.samples(&chosen[num + 1..]);
        for (at, member) in sets.order[*of].members.iter().enumerate().skip(from) {
            self.meter.spend(1)?;
            picked.push(*member);
            if self.samples(picked, self.ring_s(picked, chosen.len())) + rest >= self.batch() {
                let again = chosen.get(num + 1) == Some(of);
                self.pick(sets, chosen, if again { at } else { 0 }, picked)?;
            }
            picked.pop();
        }
        Some(())
    }

    /// Samples that these do at most in a step as fast as the best, with so long an exchange.
    fn samples(&self, picked: &[usize], exchange_s: f64) -> f64 {
        let update_s = picked.iter().map(|at| self.found[*at].beside.update_s).fold(0.0, f64::max);
        let seconds = self.known() - (exchange_s + update_s) * (1.0 - 1e-9);
        picked.iter().map(|at| self.found[*at].form.samples(self.table, seconds) as f64).sum()
    }

    /// What these exchange at least as a part of so many pipelines.
    fn ring_s(&self, picked: &[usize], pipelines: usize) -> f64 {
        let beside = picked.iter().fold(Beside::default(), |all, at| all.and(self.found[*at].beside));
        Beside { update_s: 0.0, ..beside }.seconds(pipelines)
    }

    /// What these exchange at least: each layer over the slowest link between its holders, as the largest
    /// of them does, and each stage all of its layers.
    fn exchange_s(&self, picked: &[usize]) -> f64 {
        let table = self.table;
        let n = picked.len() as f64;
        let forms = || picked.iter().map(|at| &self.found[*at].form);
        let mut sums = vec![0.0];
        for layer in 0..table.num_layers {
            let holder = |form: &Form| {
                let stage = form.stages.iter().rev().find(|stage| usize::from(stage.first) <= layer);
                stage.map_or((0, 1), |stage| {
                    let choice = &table.choices[usize::from(stage.choice)];
                    (choice.pool, choice.degree)
                })
            };
            let mut holders: Vec<(usize, u32)> = forms().map(holder).collect();
            holders.sort_unstable();
            let least = holders.iter().map(|holder| holder.1).min().unwrap_or(1);
            // The next one in a ring; from a pool on itself only where two of it are neighbours.
            let next = (1..holders.len()).chain([0]);
            let links = holders.iter().zip(next).map(|(holder, next)| (holder.0, holders[next].0));
            let slowest = links.map(|(a, b)| self.links[a][b].seconds_a_byte).fold(0.0, f64::max);
            let bytes = (table.gradient[layer + 1] - table.gradient[layer]) / f64::from(least);
            sums.push(sums[layer] + 2.0 * (n - 1.0) / n * bytes * slowest);
        }
        let stages = |form: &Form| {
            let ends =
                form.stages.iter().skip(1).map(|stage| usize::from(stage.first)).chain([table.num_layers]);
            let seconds = |(stage, end): (&Placed, usize)| sums[end] - sums[usize::from(stage.first)];
            form.stages.iter().zip(ends).map(seconds).fold(0.0, f64::max)
        };
        forms().map(stages).fold(0.0, f64::max)
    }

    fn offer(&mut self, chosen: &[usize]) -> Option<()> {
        self.meter.spend(20)?;
        let mut crew: Crew = Vec::new();
        for at in chosen {
            let form = &self.found[*at].form;
            match crew.last_mut() {
                Some((last, count)) if last == form => *count += 1,
                _ => crew.push((form.clone(), 1)),
            }
        }
        if let Some(found) = settle(self.table, &crew)
            && found.seconds() < self.known()
            && check(self.table.instance, &found.layout).is_empty()
        {
            self.best = Some(found);
        }
        Some(())
    }
}

/// Pipelines on as many devices of each pool that do as many samples.
struct Alike {
    used: Vec<u32>,
    samples: f64,
    /// What the devices cost more than the samples are worth.
    slack: f64,
    /// Indices of the candidates.
    members: Vec<usize>,
}

/// What sets are made of.
struct Sets {
    /// By slack, ascending.
    order: Vec<Alike>,
    /// Samples that a device of each pool is worth: no pipeline does more than its devices are.
    prices: Vec<f64>,
}

impl Sets {
    /// Samples of some of these at most.
    fn samples(&self, chosen: &[usize]) -> f64 {
        chosen.iter().map(|at| self.order[*at].samples).sum()
    }
}

impl Sums {
    fn with(self, table: &Table<'_>, kind: &Kind, choice: usize, time: StageTime) -> Self {
        let fill = table.fill_s(kind.schedule, choice, time);
        Self {
            pace: self.pace.max(table.pace(time)),
            fill: self.fill + fill,
            largest_fill: self.largest_fill.max(fill),
        }
    }
}

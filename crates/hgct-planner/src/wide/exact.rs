//! Every way to use a few devices.
//!
//! First all pipelines that could be part of a plan as fast as the best so far, then all sets of
//! them. What ends a branch: at device prices λ that sum to 1, and Y priced seconds a sample, devices
//! worth Λ do at most `Λ T / Y` samples in T seconds, so what is chosen and what is left must together
//! reach the global batch. Each set is divided and priced exactly.

use crate::instance::{Schedule, Work, check};

use super::Meter;
use super::form::{Form, Placed};
use super::settle::{Crew, Settled, settle};
use super::table::Table;

/// See the module. Devices and batch small enough for it are the caller's to say.
pub(crate) struct Exact<'a, 't, 'm> {
    pub(crate) table: &'t Table<'a>,
    pub(crate) limits: &'t [u64],
    /// Price of a device of each pool; `Σ limits · prices = 1`.
    pub(crate) prices: &'t [f64],
    /// Priced seconds of the global batch.
    pub(crate) bound: f64,
    pub(crate) schedules: &'t [Schedule],
    pub(crate) meter: &'t mut Meter<'m>,
    pub(crate) best: Option<Settled>,
    forms: Vec<Form>,
}

/// Stages of a pipeline that is being made, from the last on.
struct Suffix {
    stages: Vec<Placed>,
    used: Vec<u64>,
    worth: f64,
    pace: f64,
    fill: f64,
    largest_fill: f64,
}

impl<'a, 't, 'm> Exact<'a, 't, 'm> {
    pub(crate) fn new(
        table: &'t Table<'a>,
        limits: &'t [u64],
        prices: &'t [f64],
        bound: f64,
        schedules: &'t [Schedule],
        meter: &'t mut Meter<'m>,
        best: Option<Settled>,
    ) -> Self {
        Self { table, limits, prices, bound, schedules, meter, best, forms: Vec::new() }
    }

    /// `Some` if nothing faster than `best` exists.
    pub(crate) fn run(&mut self) -> Option<()> {
        for size in 0..self.table.micro_batches.len() {
            for schedule in self.schedules {
                let mut suffix = Suffix {
                    stages: Vec::new(),
                    used: vec![0; self.limits.len()],
                    worth: 0.0,
                    pace: 0.0,
                    fill: 0.0,
                    largest_fill: 0.0,
                };
                self.extend(size, *schedule, self.table.num_layers, &mut suffix)?;
            }
        }
        // The most productive devices first, so that good plans come early.
        let known = self.known();
        let value = |form: &Form| form.samples(self.table, known) as f64 / self.worth(&form.used).max(1e-12);
        let mut order: Vec<(f64, usize)> =
            self.forms.iter().enumerate().map(|(at, form)| (value(form), at)).collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        self.forms = order.into_iter().map(|(_, at)| self.forms[at].clone()).collect();
        let mut chosen = Vec::new();
        let left = self.limits.to_vec();
        self.choose(0, &left, 0, 0.0, &mut chosen)
    }

    /// The time to beat; a step that is as fast is of no use.
    fn known(&self) -> f64 {
        self.best.as_ref().map_or(1e30, Settled::seconds)
    }

    fn worth(&self, used: &[u32]) -> f64 {
        used.iter().zip(self.prices).map(|(n, p)| f64::from(*n) * p).sum()
    }

    /// Whether so many samples and devices of the rest reach the batch.
    fn reaches(&self, samples: f64, worth: f64, seconds: f64) -> bool {
        let batch = f64::from(self.table.instance.global_batch);
        let rest = (1.0 - worth).max(0.0) * seconds / self.bound * batch;
        samples + rest * (1.0 + 1e-9) + 1e-6 >= batch
    }

    fn extend(&mut self, size: usize, schedule: Schedule, end: usize, suffix: &mut Suffix) -> Option<()> {
        let micro_batch = f64::from(self.table.micro_batches[size]);
        let seconds = self.known();
        for choice in 0..self.table.choices.len() {
            let of = self.table.choices[choice];
            let room = suffix.used[of.pool] + u64::from(of.devices) <= self.limits[of.pool];
            if !room || !self.table.runs(choice, size) {
                continue;
            }
            for first in (0..end).rev() {
                self.meter.spend(1)?;
                let in_flight = schedule.in_flight(suffix.stages.len() + 1, 0);
                if !self.table.fits(choice, size, first, end, in_flight) {
                    break;
                }
                let (forward_s, backward_s) = self.table.compute(choice, size, first, end);
                let of_fill = schedule.fill_s(Work { forward_s, backward_s, transfer_s: 0.0 });
                let pace = suffix.pace.max(forward_s + backward_s);
                let fill = suffix.fill + of_fill;
                let largest_fill = suffix.largest_fill.max(of_fill);
                let worth = suffix.worth + f64::from(of.devices) * self.prices[of.pool];
                let num = ((seconds - (fill - largest_fill)) / pace * (1.0 + 1e-9) + 1e-9).floor();
                if num < 1.0 || !self.reaches(num * micro_batch, worth, seconds) {
                    // Longer stages are slower still.
                    break;
                }
                suffix.stages.push(Placed { first: first as u16, choice: choice as u16 });
                if first == 0 {
                    let mut stages = suffix.stages.clone();
                    stages.reverse();
                    if let Some(form) = Form::new(self.table, size, schedule, stages) {
                        let samples = form.samples(self.table, seconds) as f64;
                        if samples > 0.0 && self.reaches(samples, worth, seconds) {
                            self.forms.push(form);
                        }
                    }
                } else {
                    let before = (suffix.worth, suffix.pace, suffix.fill, suffix.largest_fill);
                    (suffix.worth, suffix.pace, suffix.fill, suffix.largest_fill) =
                        (worth, pace, fill, largest_fill);
                    suffix.used[of.pool] += u64::from(of.devices);
                    self.extend(size, schedule, first, suffix)?;
                    suffix.used[of.pool] -= u64::from(of.devices);
                    (suffix.worth, suffix.pace, suffix.fill, suffix.largest_fill) = before;
                }
                suffix.stages.pop();
            }
        }
        Some(())
    }

    fn choose(
        &mut self,
        from: usize,
        left: &[u64],
        samples: u64,
        worth: f64,
        chosen: &mut Vec<usize>,
    ) -> Option<()> {
        for at in from..self.forms.len() {
            self.meter.spend(1)?;
            let seconds = self.known();
            let form = &self.forms[at];
            if form.used.iter().zip(left).any(|(used, left)| u64::from(*used) > *left) {
                continue;
            }
            let samples = samples + form.samples(self.table, seconds);
            let worth = worth + self.worth(&form.used);
            if !self.reaches(samples as f64, worth, seconds) {
                continue;
            }
            let rest: Vec<u64> = left.iter().zip(&form.used).map(|(n, used)| n - u64::from(*used)).collect();
            chosen.push(at);
            if samples >= u64::from(self.table.instance.global_batch) {
                self.offer(chosen);
            }
            self.choose(at, &rest, samples, worth, chosen)?;
            chosen.pop();
        }
        Some(())
    }

    fn offer(&mut self, chosen: &[usize]) {
        let mut crew: Crew = Vec::new();
        for at in chosen {
            match crew.last_mut() {
                Some((form, count)) if *form == self.forms[*at] => *count += 1,
                _ => crew.push((self.forms[*at].clone(), 1)),
            }
        }
        let Some(found) = settle(self.table, &crew) else { return };
        if found.seconds() < self.known() && check(self.table.instance, &found.layout).is_empty() {
            self.best = Some(found);
        }
    }
}

//! Makes pipelines: a dynamic programme from the last stage to the first.
//!
//! For a micro-batch size b, a pace τ and a price λ a device, a pipeline of F seconds fill does about
//! `b · ((T − F)/τ + 1)` samples in T seconds, so the best one for these prices has the least
//! `λ · devices + b/τ · F`. Stages are filled from the head backwards, so that their place from the
//! end, hence micro-batches in flight, memory and the need of recompute, are known; each is as long
//! as pace, memory and exchange allow, and the pipelines found are then tightened to the least pace
//! that their devices allow.

use crate::instance::Schedule;

use super::Meter;
use super::form::{Form, PaceSearch, Placed};
use super::table::{StageTime, Table};

/// What to make pipelines for.
#[derive(Debug, Clone)]
pub(crate) struct Wish<'w> {
    /// Index of the micro-batch size.
    pub(crate) size: usize,
    pub(crate) schedule: Schedule,
    /// Pace at most.
    pub(crate) pace: f64,
    /// Price of a device of each pool; infinite: not to be used.
    pub(crate) prices: &'w [f64],
    /// Smallest degree that may be used.
    pub(crate) least_degree: u32,
    /// Gradient bytes of a stage at most.
    pub(crate) largest: f64,
    /// Stages at most.
    pub(crate) most_stages: usize,
    /// Pipelines wanted at most.
    pub(crate) keep: usize,
}

const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Label {
    cost: f64,
    first: u16,
    choice: u16,
    /// The suffix that it stands before.
    after: u32,
    /// End of the stage that must stand before it.
    before: u16,
}

/// Working memory of the programme, kept between calls.
#[derive(Default)]
pub(crate) struct Generator {
    labels: Vec<Label>,
    slots: Vec<u32>,
    /// Cost, first choice and the suffix after it, of whole pipelines.
    finals: Vec<(f64, u16, u32)>,
    /// Stages that were tried so far: what it has taken.
    pub(crate) work: u64,
}

impl Generator {
    /// The cheapest pipelines of that kind, each tightened; `None` when out of nodes.
    pub(crate) fn make(
        &mut self,
        table: &Table<'_>,
        wish: &Wish<'_>,
        meter: &mut Meter<'_>,
        forms: &mut Vec<Form>,
    ) -> Option<()> {
        self.labels.clear();
        self.finals.clear();
        let ends = table.ends.len();
        let slots = (table.num_layers + 1) * ends * ends;
        self.slots.resize(slots, NONE);
        let usable: Vec<usize> = (0..table.choices.len())
            .filter(|c| {
                let of = &table.choices[*c];
                of.degree >= wish.least_degree
                    && wish.prices[of.pool].is_finite()
                    && table.runs(*c, wish.size)
            })
            .collect();
        let mut by_end: Vec<Vec<usize>> = vec![Vec::new(); ends];
        for choice in &usable {
            by_end[table.choices[*choice].end].push(*choice);
        }
        let befores = neighbours(table, &by_end);
        let mut level: Vec<usize> = Vec::new();
        for depth in 1..=wish.most_stages {
            let start = self.labels.len();
            if depth == 1 {
                for choice in &usable {
                    self.extend(table, wish, NONE, *choice, 1, &befores);
                }
                meter.spend(usable.len() as u64)?;
            } else {
                for at in &level {
                    let at = *at;
                    let before = usize::from(self.labels[at].before);
                    meter.spend(by_end[before].len() as u64)?;
                    for choice in &by_end[before] {
                        self.extend(table, wish, at as u32, *choice, depth, &befores);
                    }
                }
            }
            level = (start..self.labels.len()).collect();
            for at in &level {
                let slot = self.slot(table, *at);
                self.slots[slot] = NONE;
            }
            if level.is_empty() {
                break;
            }
        }
        self.collect(table, wish, forms);
        Some(())
    }

    fn slot(&self, table: &Table<'_>, at: usize) -> usize {
        let label = &self.labels[at];
        let ends = table.ends.len();
        let own = table.choices[usize::from(label.choice)].end;
        (usize::from(label.first) * ends + own) * ends + usize::from(label.before)
    }

    /// Puts a stage on `choice` before the suffix `after`, as long as it may be.
    fn extend(
        &mut self,
        table: &Table<'_>,
        wish: &Wish<'_>,
        after: u32,
        choice: usize,
        depth: usize,
        befores: &[Vec<usize>],
    ) {
        let (end, cost, next) = if after == NONE {
            (table.num_layers, 0.0, None)
        } else {
            let label = &self.labels[after as usize];
            let next = table.choices[usize::from(label.choice)].end;
            (usize::from(label.first), label.cost, Some(next))
        };
        let of = &table.choices[choice];
        let in_flight = wish.schedule.in_flight(depth, 0);
        let limit = wish.pace * (1.0 + 1e-9);
        let time = |first: usize, before: Option<usize>| {
            let (forward, backward) = table.compute(choice, wish.size, first, end);
            let transfer =
                table.stage_transfer(wish.size, (first, end), of.end, next, before, depth, wish.schedule);
            StageTime { forward, backward, transfer }
        };
        let fine = |first: usize, before: Option<usize>| {
            table.gradient[end] - table.gradient[first] <= wish.largest * (1.0 + 1e-9)
                && table.pace(time(first, before)) <= limit
                && table.fits(choice, wish.size, first, end, in_flight)
        };
        let weight = f64::from(table.micro_batches[wish.size]) / wish.pace;
        let price = |first: usize, before: Option<usize>| {
            let time = time(first, before);
            let fill = table.fill_s(wish.schedule, choice, time);
            cost + wish.prices[of.pool] * f64::from(of.devices) + weight * fill
        };
        if fine(0, None) {
            // More stages only help at a smaller pace, which is another call.
            let cost = price(0, None);
            return self.finals.push((cost, choice as u16, after));
        }
        if depth == wish.most_stages {
            return;
        }
        self.work += befores[of.end].len() as u64;
        for before in &befores[of.end] {
            let before = *before;
            if end < 2 || !fine(end - 1, Some(before)) {
                continue;
            }
            let (mut low, mut high) = (1, end - 1);
            while low < high {
                let middle = usize::midpoint(low, high);
                if fine(middle, Some(before)) { high = middle } else { low = middle + 1 }
            }
            let cost = price(high, Some(before));
            let label =
                Label { cost, first: high as u16, choice: choice as u16, after, before: before as u16 };
            let ends = table.ends.len();
            let slot = (high * ends + of.end) * ends + before;
            let known = self.slots[slot];
            if known == NONE {
                self.slots[slot] = self.labels.len() as u32;
                self.labels.push(label);
            } else if cost < self.labels[known as usize].cost {
                self.labels[known as usize] = label;
            }
        }
    }

    /// The best finals of each use of devices, as forms.
    fn collect(&mut self, table: &Table<'_>, wish: &Wish<'_>, forms: &mut Vec<Form>) {
        self.finals.sort_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let mut seen: Vec<Vec<u32>> = Vec::new();
        for (_, choice, after) in &self.finals {
            if seen.len() >= wish.keep {
                break;
            }
            let mut stages = vec![Placed { first: 0, choice: *choice }];
            let mut used = vec![0; table.instance.pools.len()];
            let first = &table.choices[usize::from(*choice)];
            used[first.pool] += first.devices;
            let mut next = *after;
            while next != NONE {
                let label = &self.labels[next as usize];
                stages.push(Placed { first: label.first, choice: label.choice });
                let of = &table.choices[usize::from(label.choice)];
                used[of.pool] += of.devices;
                next = label.after;
            }
            if seen.contains(&used) {
                continue;
            }
            seen.push(used);
            if let Some(form) = tighten(table, wish, &stages) {
                forms.push(form);
            }
        }
    }
}

/// Which ends may stand before each: any where there are few, else the same, the same degree, and the
/// largest group of every pool.
fn neighbours(table: &Table<'_>, by_end: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let usable: Vec<usize> = (0..by_end.len()).filter(|end| !by_end[*end].is_empty()).collect();
    let largest = |pool: usize| {
        usable.iter().map(|e| table.ends[*e]).filter(|e| e.pool == pool).map(|e| e.devices).max()
    };
    let near = |own: usize| {
        let mut near: Vec<usize> = usable
            .iter()
            .copied()
            .filter(|other| {
                let (of, own) = (table.ends[*other], table.ends[own]);
                usable.len() <= 8
                    || of == own
                    || (of.pool == own.pool
                        && (of.devices == own.devices * 2 || of.devices * 2 == own.devices))
                    || (of.pool != own.pool && largest(of.pool) == Some(of.devices))
            })
            .collect();
        near.sort_unstable();
        near
    };
    (0..by_end.len()).map(near).collect()
}

/// The same stages with the least pace that places all layers, by bisection.
fn tighten(table: &Table<'_>, wish: &Wish<'_>, stages: &[Placed]) -> Option<Form> {
    let choices: Vec<u16> = stages.iter().map(|stage| stage.choice).collect();
    let given = Form::new(table, wish.size, wish.schedule, stages.to_vec());
    if choices.len() == 1 {
        return given;
    }
    let high = given.as_ref().map_or(wish.pace, |form| form.pace);
    let low = high * 0.5;
    let search = PaceSearch { low, first: f64::midpoint(low, high), high, tries: 14, tolerance: 1e-5 };
    let found = search
        .tightest(|pace| Form::new(table, wish.size, wish.schedule, fill(table, wish, &choices, pace)?));
    // The given one where nothing is faster.
    given.into_iter().chain(found).min_by(|a, b| a.pace.total_cmp(&b.pace))
}

/// Fills stages on given choices from the last to the first; `None` if layers remain.
pub(crate) fn fill(table: &Table<'_>, wish: &Wish<'_>, choices: &[u16], pace: f64) -> Option<Vec<Placed>> {
    let num = choices.len();
    let mut stages = Vec::with_capacity(num);
    let mut end = table.num_layers;
    let end_of = |choice: u16| table.choices[usize::from(choice)].end;
    for at in (0..num).rev() {
        let choice = usize::from(choices[at]);
        let before = at.checked_sub(1).map(|before| end_of(choices[before]));
        let after = choices.get(at + 1).map(|after| end_of(*after));
        let in_flight = wish.schedule.in_flight(num, at);
        let fine = |first: usize| {
            let (forward, backward) = table.compute(choice, wish.size, first, end);
            let own = table.choices[choice].end;
            let transfer =
                table.stage_transfer(wish.size, (first, end), own, after, before, num, wish.schedule);
            table.gradient[end] - table.gradient[first] <= wish.largest * (1.0 + 1e-9)
                && table.pace(StageTime { forward, backward, transfer }) <= pace
                && table.fits(choice, wish.size, first, end, in_flight)
        };
        // Every stage before needs a layer.
        if end <= at || !fine(end - 1) {
            return None;
        }
        let (mut low, mut high) = (at, end - 1);
        if at == 0 && !fine(0) {
            return None;
        }
        while low < high {
            let middle = usize::midpoint(low, high);
            if fine(middle) { high = middle } else { low = middle + 1 }
        }
        stages.push(Placed { first: high as u16, choice: choices[at] });
        end = high;
    }
    stages.reverse();
    (end == 0).then_some(stages)
}

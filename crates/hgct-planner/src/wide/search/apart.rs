//! Pools that keep to themselves: alike pipelines on each, unlike from pool to pool.
//!
//! What pipelines exchange depends on the largest stage of all of them, so what is best for a pool
//! depends on what the others do. For each size of a largest stage every pool begins with what is
//! fastest under it, and then changes in turn as long as the whole step gets shorter.

use super::super::even::{Even, make};
use super::super::form::Form;
use super::super::settle::{Crew, settle};
use super::{Search, counts};

/// What each pool does; `None`: it is left out.
type Chosen = Vec<Option<usize>>;

/// Alike pipelines of one pool.
struct Own {
    form: Form,
    count: u32,
    /// Samples of all of them in the time to beat.
    samples: f64,
    /// Gradient bytes of the largest stage, divided by its degree.
    largest: f64,
}

impl Search<'_, '_, '_> {
    pub(super) fn apart(&mut self) -> Option<()> {
        let pools: Vec<usize> = (0..self.start.limits.len()).filter(|p| self.start.limits[*p] > 0).collect();
        if pools.len() < 2 {
            return Some(());
        }
        let mut own: Vec<Vec<Own>> = Vec::new();
        for pool in pools {
            own.push(self.of_pool(pool)?);
        }
        own.retain(|of| !of.is_empty());
        if own.len() < 2 {
            return Some(());
        }
        let mut sizes: Vec<f64> = own.iter().flatten().map(|of| of.largest).collect();
        sizes.sort_by(|a, b| b.total_cmp(a));
        sizes.dedup_by(|a, b| *a > *b * 0.99);
        let mut starts: Vec<(f64, Chosen)> = Vec::new();
        for size in sizes {
            let fastest = |of: &Vec<Own>| {
                let allowed = (0..of.len()).filter(|at| of[*at].largest <= size * 1.001);
                allowed.max_by(|a, b| of[*a].samples.total_cmp(&of[*b].samples).then(b.cmp(a)))
            };
            let chosen: Chosen = own.iter().map(fastest).collect();
            if chosen.iter().any(Option::is_some) && starts.iter().all(|(_, known)| *known != chosen) {
                self.meter.spend(60 * own.len() as u64)?;
                let seconds = settle(self.table, &crew(&own, &chosen)).map(|found| found.seconds());
                starts.push((seconds.unwrap_or(f64::INFINITY), chosen));
            }
        }
        starts.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (seconds, chosen) in starts.into_iter().take((STARTS / own.len()).max(2)) {
            self.in_turn(&own, seconds, chosen)?;
        }
        Some(())
    }

    /// Changes what one pool does, or leaves it out, as long as that makes the step shorter.
    fn in_turn(&mut self, own: &[Vec<Own>], seconds: f64, mut chosen: Chosen) -> Option<()> {
        let mut best = seconds;
        self.offer(&crew(own, &chosen));
        for _ in 0..ROUNDS {
            let before = best;
            for pool in 0..own.len() {
                for at in (0..own[pool].len()).map(Some).chain([None]) {
                    self.meter.spend(30 * own.len() as u64)?;
                    let old = std::mem::replace(&mut chosen[pool], at);
                    let crew = crew(own, &chosen);
                    match settle(self.table, &crew) {
                        Some(found) if found.seconds() < best => {
                            best = found.seconds();
                            if best < self.known() {
                                self.offer(&crew);
                            }
                        }
                        _ => chosen[pool] = old,
                    }
                }
            }
            if best >= before {
                break;
            }
        }
        Some(())
    }

    /// What a pool may do: of each size of a largest stage the few fastest.
    fn of_pool(&mut self, pool: usize) -> Option<Vec<Own>> {
        let table = self.table;
        let batch = f64::from(table.instance.global_batch);
        let limit = self.start.limits[pool];
        let worth = |p: usize| {
            let price = self.start.prices[p];
            if price.is_finite() { price * self.start.limits[p] as f64 } else { 0.0 }
        };
        let share = worth(pool) / (0..self.start.limits.len()).map(worth).sum::<f64>();
        let known = self.known();
        let mut all: Vec<Own> = Vec::new();
        for size in 0..table.micro_batches.len() {
            let samples = f64::from(table.micro_batches[size]);
            for schedule in self.start.schedules {
                for num in counts(&[limit], batch / samples) {
                    let mut devices = vec![0; self.start.limits.len()];
                    devices[pool] = (limit / num) as u32;
                    let even = Even {
                        devices: &devices,
                        size,
                        schedule: *schedule,
                        pipelines: num,
                        micro_batches: batch * share / samples / num as f64,
                        enough: known * 1.2,
                    };
                    for form in make(table, &even, self.meter)? {
                        let degree = f64::from(form.least_degree);
                        all.push(Own {
                            samples: form.samples(table, known) as f64 * num as f64,
                            largest: form.largest / degree,
                            count: num as u32,
                            form,
                        });
                    }
                }
            }
        }
        all.sort_by(|a, b| a.largest.total_cmp(&b.largest).then(b.samples.total_cmp(&a.samples)));
        // Smaller stages exchange less; who has larger ones must be as fast.
        let mut kept: Vec<Own> = Vec::new();
        let mut fastest = 0.0f64;
        for of in all {
            let alike = kept.iter().filter(|other| of.largest < other.largest * 1.01).count();
            if of.samples > 0.0 && of.samples >= fastest * 0.97 && alike < ALIKE {
                fastest = fastest.max(of.samples);
                kept.push(of);
            }
        }
        Some(kept)
    }
}

/// Pipelines of each pool that takes part.
fn crew(own: &[Vec<Own>], chosen: &Chosen) -> Crew {
    let of = |(at, of): (&Option<usize>, &Vec<Own>)| at.map(|at| (of[at].form.clone(), of[at].count));
    chosen.iter().zip(own).filter_map(of).collect()
}

/// Changes begin with so many layouts, divided by the pools that take turns.
const STARTS: usize = 64;
/// Of one size of a largest stage.
const ALIKE: usize = 6;
/// Times that all pools may change.
const ROUNDS: usize = 3;

//! The best few layouts once more, in the simulator.
//!
//! The price lets every group of devices have its node's ports for itself. Where many small groups of a
//! node send at once, that is too short, and the more so the more stages a pipeline has. So layouts that
//! are priced nearly alike are simulated, and the one that takes least is the answer. Its price stands,
//! and its gap is its own.

use crate::instance::{Instance, Layout, Priced, Transfer};
use crate::scale::{WhatIf, simulate_layout};
use crate::words::{count, seconds};

use super::{Found, limited_by};

/// What simulations decided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Replayed {
    /// Layouts that were simulated.
    pub num: usize,
    /// Seconds of a step of the best of them.
    pub step_s: f64,
    /// Of the one with the best price.
    pub best_priced_s: f64,
}

impl Replayed {
    /// Why the best price is not the answer, where it is not.
    pub fn reason(&self) -> Option<String> {
        let Self { num, step_s, best_priced_s } = *self;
        let reason = || {
            format!(
                "{} of nearly the same price were simulated: this one takes {}, the one with the best price {}",
                count(num as u64, "plan"),
                seconds(step_s),
                seconds(best_priced_s)
            )
        };
        (step_s < best_priced_s).then(reason)
    }
}

/// Layouts that are simulated beside the one with the best price.
const OTHERS: usize = 3;
/// Computations of a layout that is simulated: some tenths of a second.
const MOST: u64 = 400_000;

/// Chooses among the layouts that are priced nearly as well as the best; `None` where the best is proven,
/// where there is no other, or where nothing runs beside compute, as in formulas of tables.
pub fn replay(instance: &Instance, found: &mut Found) -> Option<Replayed> {
    let best = found.best.take()?;
    let is_proven = found.proven_s >= best.1.iteration_s;
    if is_proven || instance.rules.transfer != Transfer::Overlapped {
        found.best = Some(best);
        return None;
    }
    let mut all: Vec<(Layout, Priced)> = vec![best];
    all.extend(found.near.drain(..).take(OTHERS));
    let steps: Vec<f64> = all.iter().map(|(layout, _)| simulated_s(instance, layout)).collect();
    let least = (0..all.len()).min_by(|a, b| steps[*a].total_cmp(&steps[*b])).unwrap_or(0);
    let (layout, priced) = all.swap_remove(least);
    found.gap = Some((1.0 - found.proven_s / priced.iteration_s).max(0.0));
    found.limited_by = limited_by(&priced, &found.bound).into();
    found.best = Some((layout, priced));
    found.near = all;
    let replayed = Replayed { num: steps.len(), step_s: steps[least], best_priced_s: steps[0] };
    (replayed.num > 1 && replayed.best_priced_s.is_finite()).then_some(replayed)
}

/// Infinite where it is too much to simulate.
fn simulated_s(instance: &Instance, layout: &Layout) -> f64 {
    if layout.computations() > MOST {
        return f64::INFINITY;
    }
    let simulated = simulate_layout(instance, layout, &WhatIf::default());
    simulated.map_or(f64::INFINITY, |simulated| simulated.step_ns as f64 / 1e9)
}

//! The best few layouts once more, in the simulator.
//!
//! The price lets every group of devices have its node's ports for itself. Where many small groups of a
//! node send at once, that is too short, and the more so the more stages a pipeline has. So layouts that
//! are priced nearly alike are simulated, and the one that takes least is the answer. Its price stands,
//! and its gap is its own.

use crate::instance::{Instance, Layout, Transfer};
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
    /// That price.
    pub best_price_s: f64,
}

impl Replayed {
    /// Why the best price is not the answer, where it is not.
    pub fn reason(&self) -> Option<String> {
        let Self { num, step_s, best_priced_s, .. } = *self;
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

/// Chooses among the layouts that are priced nearly as well as the best; `None` where the best is proven or
/// too much to simulate, where there is no other, or where nothing runs beside compute, as in formulas of
/// tables.
pub fn replay(instance: &Instance, found: &mut Found) -> Option<Replayed> {
    let best = found.best.as_ref()?;
    let best_price_s = best.1.iteration_s;
    let is_proven = found.proven_s >= best_price_s;
    if is_proven || found.near.is_empty() || instance.rules.transfer != Transfer::Overlapped {
        return None;
    }
    let best_priced_s = simulated_s(instance, &best.0)?;
    let others = found.near.iter().take(OTHERS).enumerate();
    let steps: Vec<(usize, f64)> =
        others.filter_map(|(at, (layout, _))| Some((at, simulated_s(instance, layout)?))).collect();
    let least = steps.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1));
    let mut step_s = best_priced_s;
    if let Some((at, of_least)) = least.filter(|(_, of_least)| *of_least < best_priced_s) {
        step_s = of_least;
        let (layout, priced) = found.near.remove(at);
        found.gap = Some((1.0 - found.proven_s / priced.iteration_s).max(0.0));
        found.limited_by = limited_by(&priced, &found.bound).into();
        let best = found.best.replace((layout, priced));
        found.near.splice(0..0, best);
    }
    Some(Replayed { num: 1 + steps.len(), step_s, best_priced_s, best_price_s })
}

/// Seconds of a step; `None` where it is too much to simulate.
fn simulated_s(instance: &Instance, layout: &Layout) -> Option<f64> {
    if layout.computations() > MOST {
        return None;
    }
    let simulated = simulate_layout(instance, layout, &WhatIf::default()).ok()?;
    Some(simulated.step_ns as f64 / 1e9)
}
